"""Connection: one client of a hub, the writes to it, and what waits while it is behind.

A connection belongs to the event loop of its websocket, and everything here runs on that loop.

At most one send is in flight, and whatever comes meanwhile goes to the outbox; whoever finished a
send goes on with the outbox. That keeps the order, also under backpressure, where a server may let
a later send overtake an earlier one. The handler's own sends (`websocket.send_text`,
`websocket.close`, ...) stand in the same line: see `handler`.

    state    code   what that means
    IDLE     None   nothing is in flight and nothing waits
    SENDING  None   a send is in flight, the hub's or the handler's; what waits is in the outbox
    SENDING  set    a Close is the last thing that waits or is in flight; nothing more is taken
    ENDED    None   the client has left the hub, and its socket is the handler's alone
    ENDED    set    the client was closed, has left or was given up

A client in either of the first two states that is about to leave has a `leaving`, its `Leave`,
which is on its way. If it comes back before that has been reached, `leaving` is None again.

There are three ends. A handler that leaves has its socket back once the client has what it still
had to get. A client that was closed, or did not take what it had to get in time, is over: its
handler's next `receive` says so. A client to which a send failed gets no more, but what the server
still has from it is read.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import Any, Final, Protocol

from starlette.websockets import WebSocket, WebSocketState

from . import fastpath
from .close_codes import ABNORMAL, TRY_AGAIN_LATER
from .event import Event
from .handler import Handler, owner
from .outbox import Close, Item, Leave, Outbox, OutboxFull, Turn
from .servers.watch import Presence
from .servers.wire import FrameWriter, Wire
from .stats import Counters
from .sync.waiter import Waiter
from .tuning import Tuning

# Seconds that a connection waits before it goes on after a cancellation, in case it is the end of
# the event loop, which cancels all tasks and does not wait for new ones.
AFTER_CANCEL = 0.1

DISCONNECTED = WebSocketState.DISCONNECTED


class State(enum.Enum):
    """What a connection does. See the module."""

    IDLE = enum.auto()
    SENDING = enum.auto()
    ENDED = enum.auto()


# A look-up less for each delivery.
IDLE: Final = State.IDLE
SENDING: Final = State.SENDING
ENDED: Final = State.ENDED


class Line(Protocol):
    """What a connection needs of its shard."""

    loop: asyncio.AbstractEventLoop
    counters: Counters
    awake: bool
    tuning: Tuning
    version: int  # changes whenever frames may or may no longer be written to a client at once

    def post(self, item: Turn, connection: Connection) -> None:
        """Bring an item to a connection after everything that is already on its way."""


def is_gone(websocket: WebSocket) -> bool:
    """Whether either side has closed it, as far as the app was told."""
    return DISCONNECTED in (websocket.client_state, websocket.application_state)


class Connection:
    """One registered client. See the module for how it works."""

    # Less memory, and less to fetch for a delivery: a fan-out finds little of it in any cache.
    __slots__ = (
        "_deadline",
        "_handler",
        "_on_end",
        "_presence",
        "_waiters",
        "_writer",
        "asgi_reason",
        "channels",
        "code",
        "frames",
        "id",
        "leaving",
        "line",
        "outbox",
        "state",
        "websocket",
    )

    def __init__(
        self,
        websocket: WebSocket,
        line: Line,
        outbox: Outbox,
        *,
        id: int,
        on_end: Callable[[Connection], object],
        ready_frames: bool = True,
        protocol: Any = None,
    ) -> None:
        self.websocket = websocket
        self.line = line
        self.outbox = outbox
        self.id = id
        # The hub's, under its lock:
        self.channels: set[str] = set()
        self.leaving: Leave | None = None  # the handler has taken it off every channel
        # On the loop:
        self.code: int | None = None  # set as soon as the socket is closed, dead or about to be
        self.state = IDLE
        self.frames: FrameWriter | None = None  # if the server takes ready-made ones
        self._on_end = on_end
        self._writer: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._waiters: list[Waiter] = []
        self._presence = Presence(self, websocket, protocol)
        wire: Wire | str = fastpath.READY_FRAMES
        if ready_frames:
            is_ours = owner(websocket.send) is websocket
            wire = fastpath.open_wire(websocket, protocol) if is_ours else fastpath.OTHER_HUB
        self.asgi_reason = wire if isinstance(wire, str) else None
        if not isinstance(wire, str):
            self.frames = FrameWriter(wire, self)
        self._handler = Handler(self, line.loop)
        if self.frames is not None:
            self.frames.resume()

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight, and the client is neither closed nor left."""
        return self.state is IDLE

    @property
    def ended(self) -> bool:
        """Whether the hub is done with the client."""
        return self.state is ENDED

    @property
    def transport(self) -> Any:
        """That of the client's socket; None if it is not known."""
        return self._presence.transport

    @property
    def waiting(self) -> int:
        """Bytes that the client has not taken: of the outbox and, if that is known, the server."""
        transport = self.transport
        known = transport is not None and not transport.is_closing()
        return self.outbox.size + (transport.get_write_buffer_size() if known else 0)

    @property
    def departed(self) -> bool:
        """Whether the client has left or is about to be closed. From any thread."""
        return self.code is not None or self._presence.is_over

    @property
    def is_closed(self) -> bool:
        """Whether the hub has closed it, or will when it has got what it still had to get."""
        return self.code is not None and (self.state is not ENDED or self._handler.over)

    @property
    def is_here(self) -> bool:
        """Whether it is registered and has not left. From any thread."""
        return self.leaving is None and not self.departed

    def lose(self, code: int = ABNORMAL, *, drop: bool = False) -> None:
        """Forget the client, which has left, with what it still had to get.

        If it has not read everything, its connection is dropped, at once or when it has had time
        for that, and its handler need not wait for the server to say so.
        """
        self._stop_writer()
        self.end(code)
        self._handler.stop_sending()
        if drop:
            self._presence.abort()
            self._handler.interrupt()

    @property
    def is_stuck(self) -> bool:
        """Whether the send that is in flight takes too long. It has to be asked now and then."""
        return self._presence.is_stuck(self.state is SENDING, self.line.tuning.send_timeout)

    # What the shard calls

    def put(self, item: Item) -> bool:
        """Take an item. If this returns True, the caller must await `write(item)` at once."""
        if self.state is ENDED or self.code is not None:
            self._let_go(item)
            return False
        if isinstance(item, Close):
            self.code = item.code
            self._expect(self.kill)
        if self.state is IDLE:
            self.work()
            return True
        if isinstance(item, Leave):
            self._expect(self._expire, item)
        try:
            dropped = self.outbox.offer(item)
        except OutboxFull:
            self._cut_off(item)
        else:
            self._report(dropped)
        return False

    def work(self) -> None:
        """Begin to write: `write` follows at once. Only while it is idle."""
        self.state = SENDING
        if self.frames is not None:
            self.frames.suspend()

    async def write(self, item: Item | None, task: asyncio.Task[None] | None) -> None:
        """Send the item and whatever comes meanwhile, in this task. After `work`, or true `put`."""
        self._writer = task
        try:
            while item is not None:
                self._presence.sends += 1
                if isinstance(item, Event):
                    if self.frames is not None:
                        written = await self.frames.write(item)
                        self.line.counters.delivered += written
                        if not written:
                            self.end(ABNORMAL)
                    elif self._presence.is_over:
                        self.end(ABNORMAL)
                    else:
                        # A fresh dict each time: middleware may change what it is given.
                        await self._handler.send_event(
                            {"type": "websocket.send", item.kind: item.message}
                        )
                        self.line.counters.delivered += 1
                elif isinstance(item, Turn):
                    if not item.abandoned:
                        item.granted = True
                        item.waiter.set()
                        return  # it stays SENDING: the handler's send is the one in flight now
                elif isinstance(item, Close):
                    await self._write_close(item)
                else:
                    assert isinstance(item, Leave)  # a Gap is for subscribers
                    if item is self.leaving:
                        self.end()
                    item.reached()
                item = self.outbox.take() if self.outbox.items else None
            self._rest()
        except asyncio.CancelledError:
            self.failed()
            # If it was the hub, which has forgotten the writer, only this send was meant, and not
            # the other work of the task.
            if task is None or self._writer is task or task.uncancel():
                raise
        except Exception:
            # Servers disagree about what a send to a client that is gone raises, so everything
            # means that. It is no error of whoever published.
            self.failed()
        finally:
            self._writer = None

    def kill(self) -> None:
        """Give the client up: forget it, tell its handler, stop a send that does not come back."""
        self._handler.over = True
        stuck = self._stop_writer() or self._handler.is_sending
        self.end(ABNORMAL)
        if stuck:  # a close would wait for the client to read
            if self.frames is not None:
                self.frames.wire.abort()
            self._presence.abort()
        self._handler.interrupt()
        self._handler.stop_sending()

    def end(self, code: int | None = None) -> None:
        """Let go of the client. Without a code its socket stays open and is the handler's alone."""
        if self.state is ENDED:
            return
        self.state = ENDED
        if self.frames is not None:
            self.frames.suspend()
        if code is None:
            self._handler.uninstall()
        elif self.code is None:
            self.code = code
        if self._deadline is not None:
            self._deadline.cancel()
        self._presence.forget()
        self._discard()
        self._on_end(self)
        if self.code is not None:
            self._handler.limit()
            if self._presence.has_unsent:
                self.call_after_close_timeout(self._presence.abort)
        for waiter in self._waiters:
            waiter.set()

    async def wait_ended(self) -> None:
        """Wait until the hub is done with the client. From any loop."""
        waiter = Waiter()
        self._waiters.append(waiter)
        if self.state is not ENDED:
            await waiter

    # Inside

    def _rest(self) -> None:
        if self.state is SENDING:
            self.state = IDLE
            if self.frames is not None:
                self.frames.resume()

    async def _write_close(self, close: Close) -> None:
        message = {"type": "websocket.close", "code": close.code, "reason": close.reason}
        await self._handler.send(message)
        self._stay_readable()
        self.kill()  # the handler need not wait for the server to say so

    def failed(self) -> None:
        """Let go of the client: a send to it has failed."""
        self._stay_readable()
        self.end(ABNORMAL)

    def _stay_readable(self) -> None:
        # In the state that Starlette sets when a send has failed or was a close, the handler's
        # next `receive_text` would raise RuntimeError, before it could see that the client left.
        self.websocket.application_state = WebSocketState.CONNECTED

    def _expect(self, then: Callable[..., None], *args: object) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.line.loop.call_later(self.line.tuning.close_timeout, then, *args)

    def _expire(self, leave: Leave) -> None:
        """Leave although the client has not got everything."""
        if leave is self.leaving:
            self._stop_writer()
            self.end()
        leave.reached()

    def _stop_writer(self) -> bool:
        writer = self._writer
        if writer is None or writer is asyncio.current_task():
            return False
        self._writer = None
        writer.cancel()
        return True

    def _cut_off(self, item: Item) -> None:
        dropped = [*self._discard(), item]
        self.line.counters.slow_clients += 1
        self.put(Close(TRY_AGAIN_LATER, "too slow"))
        self._on_end(self)
        self._report([event for event in dropped if isinstance(event, Event)])

    def _report(self, dropped: list[Event]) -> None:
        if dropped:
            self.line.counters.dropped += len(dropped)
            self.outbox.tell_dropped(self.websocket, dropped)

    def _discard(self) -> list[Item]:
        items = self.outbox.clear()
        for item in items:
            self._let_go(item)
        return items

    @staticmethod
    def _let_go(item: Item) -> None:
        if isinstance(item, Turn):
            item.waiter.set()
        elif isinstance(item, Leave):
            item.reached()

    # What the handler's own sends need

    async def acquire(self) -> bool:
        """Wait for the handler's turn; True if the send in flight is the handler's now."""
        if self.state is ENDED:
            return False
        if self.state is IDLE and not self.line.awake:
            self._presence.sends += 1
            self.work()
            return True
        turn = Turn()
        self.line.post(turn, self)
        try:
            await turn.waiter
        except asyncio.CancelledError:
            turn.abandoned = True
            if turn.granted:
                self.go_on_later()
            raise
        return turn.granted

    def go_on(self) -> None:
        """Go on with the outbox: the handler's send is over."""
        if self.outbox.items:
            self._writer = self.line.loop.create_task(self._write_outbox())
        else:
            self._rest()

    def go_on_later(self) -> None:
        """The same in a moment: who cancels a handler may be about to end the loop."""
        if not self.outbox.items:
            self._rest()
        elif not self.line.loop.is_closed():
            self.line.loop.call_later(AFTER_CANCEL, self.go_on)

    async def _write_outbox(self) -> None:
        await self.write(self.outbox.take(), asyncio.current_task())

    def call_after_close_timeout(self, then: Callable[[], None]) -> asyncio.TimerHandle:
        return self.line.loop.call_later(self.line.tuning.close_timeout, then)
