"""Connection: one client of a hub, what waits to be sent to it, and how it ends.

A connection belongs to the event loop of its websocket, and everything here runs on that loop.

The state is one of these.

OPEN: The client takes what it is offered. If nothing is being sent to it, an item is sent at once;
otherwise it waits in the outbox. On the fast path, a shard writes the frames of an idle client
without asking the connection: see `servers.wire`.

LEAVING: As OPEN, but the handler has taken the client off every channel, and a `Leave` follows what
the client is still to be sent. A handler that connects it again in time makes it OPEN again.

CLOSING: A `Close` is the last item that waits or is being sent. Nothing more is taken. If it has
not been sent after `Tuning.close_timeout`, the client is given up.

ENDED: The hub is done with the client. Without a `code`, the client has left the hub and its socket
is the handler's alone. With one, it was closed, has gone away or was given up: the handler's next
send raises, and its next receive reports a disconnect, as soon as everything that the server still
has from the client is read.

One item is sent at a time, by a task of the shard's: it sends what waits, item after item, and goes
on to another client or ends. What the handler sends itself (`websocket.send_text`,
`websocket.close`, ...) are items too: see `handler`. That keeps the order, also under backpressure,
where a server may let a later send overtake an earlier one.
"""

from __future__ import annotations

import asyncio
import enum
from asyncio import TimerHandle
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, cast

from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from . import fastpath
from .close_codes import ABNORMAL, NORMAL, TRY_AGAIN_LATER
from .event import Event
from .handler import Handler, Take
from .outbox import Close, Item, Leave, Outbox, OutboxFull, Replay, Send, discard
from .servers.watch import Presence
from .servers.wire import FrameWriter
from .stats import Counters
from .sync.waiter import Waiter
from .tuning import Tuning


class State(enum.Enum):
    """What becomes of a client. See the module."""

    OPEN = enum.auto()
    LEAVING = enum.auto()
    CLOSING = enum.auto()
    ENDED = enum.auto()


class Shard(Protocol):
    """What a connection needs of its `shard.Shard`."""

    loop: asyncio.AbstractEventLoop
    tuning: Tuning
    counters: Counters
    awake: bool
    version: int  # changes whenever frames may or may no longer be written to a client at once
    to_drain: deque[Any]  # clients whose item a task is to send

    def drain_all(self) -> None:
        """Let a task send to each client in `to_drain`."""

    def post(self, item: Send, connection: Connection) -> None:
        """Offer an item to a connection after everything that was published before."""

    def forget(self, connection: Connection) -> object:
        """Take a client that has ended, or is about to, off the hub."""


class Connection:
    """One registered client. See the module."""

    # Slots take less memory, and a fan-out finds little of it in any cache.
    __slots__ = (
        *("_deadline", "_ended", "_handler", "_presence", "_task", "asgi_reason"),
        *("channels", "code", "frames", "id", "leaving", "on_end", "outbox", "shard", "websocket"),
    )

    def __init__(
        self,
        websocket: WebSocket,
        shard: Shard,
        outbox: Outbox,
        *,
        id: int,
        ready_frames: bool = True,
        protocol: Any = None,
    ) -> None:
        self.websocket = websocket
        self.shard = shard
        self.outbox = outbox
        self.id = id
        # Guarded by the hub's lock:
        self.channels: set[str] = set()
        self.leaving: Leave | None = None
        # On the loop:
        self.code: int | None = None  # set as soon as the socket is closed, dead or about to be
        self.frames: FrameWriter | None = None  # if the server takes ready-made ones
        self._ended = False
        self._task: asyncio.Task[None] | None = None  # sends to this client now
        self._deadline: TimerHandle | None = None
        self.on_end: list[Callable[[], None]] = []  # called when the hub is done with the client
        self._presence = Presence(self, websocket, protocol)
        wire = fastpath.open_wire(websocket, protocol) if ready_frames else fastpath.READY_FRAMES
        self.asgi_reason = wire if isinstance(wire, str) else None  # None on the fast path
        reader = None if isinstance(wire, str) else wire
        self._handler = Handler(self, reader)
        if reader is not None:
            self.frames = FrameWriter(reader, self)
            self.frames.resume()

    @property
    def state(self) -> State:
        """See the module. From any thread."""
        if self._ended:
            return State.ENDED
        if self.code is not None:
            return State.CLOSING
        return State.OPEN if self.leaving is None else State.LEAVING

    @property
    def ended(self) -> bool:
        """Whether the hub is done with the client."""
        return self._ended

    @property
    def idle(self) -> bool:
        """Whether nothing is being sent to it, and it takes what it is offered."""
        return self.outbox.in_flight is None and self.code is None and not self._ended

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
        """Whether the client has gone away, was closed or is about to be. From any thread."""
        return self.code is not None or self._presence.is_over

    @property
    def is_closed(self) -> bool:
        """Whether the hub has closed it, or will after what is still to be sent."""
        return self.code is not None and (not self._ended or self._handler.over)

    @property
    def is_here(self) -> bool:
        """Whether it is registered and has not left. From any thread."""
        return self.state is State.OPEN and not self._presence.is_over

    @property
    def is_stuck(self) -> bool:
        """Whether one send has taken too long. A `Watch` asks at regular intervals."""
        sending = self.outbox.in_flight is not None and not self._ended
        return self._presence.is_stuck(sending, self.shard.tuning.send_timeout)

    def receive(self, take: Take) -> Awaitable[Message] | None:
        """Receive the handler's next message that `take` does not handle.

        Args:
            take: See `handler.Take`.

        Returns:
            None if `websocket.receive` has to be called: the client is not on the fast path, or
            somebody has replaced it.
        """
        return self._handler.direct_receive(take) if self._handler.is_direct else None

    # What is sent

    def offer(self, items: Sequence[Item]) -> None:
        """Take one item, or several events: send them if the client is idle, or let them wait."""
        if self.outbox.cut:
            items = self.outbox.without_cut(items)
        if items and self.idle and not isinstance(items[0], Leave):
            self._set_close(items[0])
            self.outbox.in_flight = items
            if self.frames is not None:
                self.frames.suspend()
            self.shard.to_drain.append(self)
        else:
            for item in items:
                self._queue(item)

    def _queue(self, item: Item) -> None:
        if self._ended or self.code is not None:
            discard(item)
            return
        if isinstance(item, Leave):
            if self.outbox.in_flight is None:
                self._leave(item)
                return
            self._set_deadline(self._leave_now, item)
        self._set_close(item)
        try:
            dropped = self.outbox.offer(item)
        except OutboxFull:
            self._cut_off(item)
        else:
            self._report(dropped)

    async def drain(self, task: asyncio.Task[None] | None = None) -> None:
        """Send what is in flight, and then what waits. `task` is the current task."""
        outbox, presence, transport = self.outbox, self._presence, self._presence.transport
        self._task = task or asyncio.current_task()
        try:
            while outbox.in_flight is not None:
                presence.sends += 1
                if transport is not None and transport.is_closing():
                    self.end(ABNORMAL)
                if self._ended:
                    return
                item = outbox.in_flight[0]
                if isinstance(item, Event):
                    await self._send_events(cast("Sequence[Event]", outbox.in_flight))
                elif isinstance(item, Replay):
                    await self._send_events(await item.take())
                elif isinstance(item, Send):
                    await self._send(item)
                elif isinstance(item, Close):
                    await self._close(item)
                else:
                    self._leave(cast(Leave, item))  # a Gap is for subscribers
                following = outbox.take() if outbox.items else None
                outbox.in_flight = None if following is None else (following,)
        except (Exception, asyncio.CancelledError) as exc:
            # Servers disagree about what a send to a client that is gone raises, so every error
            # means that. Whoever published is not to blame for it.
            self.failed()
            if isinstance(exc, asyncio.CancelledError):
                raise
        finally:
            self._task = None
            unsent, outbox.in_flight = outbox.in_flight, None
            if unsent is not None:
                discard(unsent[0])
            elif self.frames is not None and not self._ended:
                self.frames.resume()

    async def _send_events(self, events: Sequence[Event]) -> None:
        """Send events, and on the fast path those that follow them in the outbox as well."""
        if self.frames is not None and events:
            written = await self.frames.write(events)
            self.shard.counters.delivered += written
            if not written:
                self.end(ABNORMAL)
            return
        for event in events:
            if self._ended or self._presence.is_over:
                self.end(ABNORMAL)
                return
            self._presence.sends += 1
            sent = event.in_form(self.outbox.form)
            # A fresh dict each time: middleware may change what it is given.
            await self._handler.send_event({"type": "websocket.send", sent.kind: sent.message})
            self.shard.counters.delivered += 1

    async def send(self, message: Message) -> bool:
        """Send a message of the handler's after everything that was published before.

        Returns:
            False if it was not sent, because the hub is done with the client.

        Raises:
            Exception: What the server's `send` raised.
        """
        if self._ended or self.code is not None:
            return False
        item = Send(message, self.shard.loop)
        if self.shard.awake:
            self.shard.post(item, self)
        else:
            self.offer([item])
            self.shard.drain_all()
        sent = await item.sent
        if item.error is not None:
            raise item.error
        return sent

    async def _send(self, item: Send) -> None:
        if item.sent.done():
            return  # the handler was cancelled while the message waited
        try:
            await self._handler.send(item.message)
        except Exception as exc:
            if isinstance(exc, (WebSocketDisconnect, OSError)):
                self.failed()
            item.finish(True, exc)
            return
        if item.message["type"] == "websocket.close":
            self.end(item.message.get("code", NORMAL))
        item.finish(True)

    async def _close(self, item: Close) -> None:
        await self._handler.send(
            {"type": "websocket.close", "code": item.code, "reason": item.reason}
        )
        self._keep_receivable()
        self.kill()  # the handler need not wait for the server to report the disconnect

    # How it ends

    def kill(self) -> None:
        """Give the client up: forget it, tell its handler, and stop a send that is stuck."""
        self._handler.over = True
        stuck = self._stop_sending()
        self.end(ABNORMAL)
        if stuck:  # a close frame would wait for the client to read
            if self.frames is not None:
                self.frames.wire.abort()
            self._presence.abort()
        self._handler.interrupt()

    def lose(self, code: int = ABNORMAL, *, drop: bool = False) -> None:
        """Forget a client that has gone away, with what was still to be sent to it.

        Args:
            code: The close code.
            drop: Drop the connection if the client has not read everything, now or when it has had
                time for that. Its handler does not wait for the server to report the disconnect.
        """
        self._stop_sending()
        self.end(code)
        if drop:
            self._presence.abort()
            self._handler.interrupt()

    def failed(self) -> None:
        """Forget a client to which a send has failed."""
        self._keep_receivable()
        self.end(ABNORMAL)

    def end(self, code: int | None = None) -> None:
        """Be done with the client. Without a code its socket stays open and is the handler's."""
        if self._ended:
            return
        self._ended = True
        if self.frames is not None:
            self.frames.suspend()
        if code is None:
            self._handler.uninstall()
        elif self.code is None:
            self.code = code
        if self._deadline is not None:
            self._deadline.cancel()
        self._presence.forget()
        self.outbox.clear()
        self.shard.forget(self)
        if self.code is not None:
            self._handler.limit()
            if self._presence.has_unsent:
                self.call_after_close_timeout(self._presence.abort)
        for callback in self.on_end:
            callback()

    async def wait_ended(self) -> None:
        """Wait until the hub is done with the client. From any loop."""
        waiter = Waiter()
        self.on_end.append(waiter.set)
        if not self._ended:
            await waiter

    def call_after_close_timeout(self, callback: Callable[..., None], *args: object) -> TimerHandle:
        """Call it when the client has had time for what was sent to it and for a close frame."""
        return self.shard.loop.call_later(self.shard.tuning.close_timeout, callback, *args)

    def _leave(self, leave: Leave) -> None:
        if leave is self.leaving:  # otherwise the handler has come back
            self.end()
        leave.reached()

    def _leave_now(self, leave: Leave) -> None:
        """Leave although not everything has been sent."""
        if leave is self.leaving:
            own = self.outbox.own_send
            if own is None or own.sent.done():  # the handler does not wait for it
                self._stop_sending()
            self.end()
        leave.reached()

    def _cut_off(self, item: Item) -> None:
        dropped = [*self.outbox.clear(), item]
        self.shard.counters.slow_clients += 1
        self.offer([Close(TRY_AGAIN_LATER, "too slow")])
        self.shard.forget(self)
        self._report([event for event in dropped if isinstance(event, Event)])

    def _set_close(self, item: Item) -> None:
        if isinstance(item, Close):
            self.code = item.code
            self._set_deadline(self.kill)

    def _set_deadline(self, callback: Callable[..., None], *args: object) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.call_after_close_timeout(callback, *args)

    def _stop_sending(self) -> bool:
        """Cancel the send that is in flight, and return whether there was one."""
        task = self._task
        if task is None or task is asyncio.current_task():
            return False
        self._task = None
        task.cancel()
        if self.outbox.own_send is not None:
            self.outbox.own_send.finish(False)
        return True

    def _keep_receivable(self) -> None:
        # In the state that Starlette sets when a send has failed or was a close, the handler's
        # next `receive_text` would raise RuntimeError before it could report the disconnect.
        self.websocket.application_state = WebSocketState.CONNECTED

    def _report(self, dropped: list[Event]) -> None:
        if dropped:
            self.shard.counters.dropped += len(dropped)
            self.outbox.tell_dropped(self.websocket, dropped)
