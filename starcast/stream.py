"""Stream: one client of server-sent events, what waits to be sent to it, and how it ends.

It is a member of its channels and belongs to one event loop. As with a `Connection`, a task of the
shard's sends what it is offered, so a stream has no task of its own for that. Its state is one of
these.

WAITING: The response has not begun. What is offered waits in the outbox.

OPEN: If nothing is being sent, an item is sent at once; otherwise it waits in the outbox. All that
waits goes out in one write, up to `MAX_JOIN` bytes.

ENDING: Nothing more is taken. What waits is still sent, for up to `Tuning.close_timeout`, and the
response ends: the hub was closed, the server shuts down, or the client did not keep up, in which
case nothing waits any more.

FINISHED: `finished` is set, to whether the client is still there for the end of the response.
"""

from __future__ import annotations

import asyncio
import json
from asyncio import TimerHandle
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.types import Send

from . import event_stream
from .event import Event
from .frames import EVENT_STREAM, WITH_ID
from .history import Resumed, Wish
from .outbox import Item, Outbox, OutboxFull
from .servers import served, watch
from .servers.wire import MAX_JOIN
from .subscriber import Join, Leave, Subscription


class Reached(NamedTuple):
    """A place in what a client gets first: all of a channel's past is before it."""

    channel: str
    id: str


# What is sent: an event, a place, or a block that is ready.
Part = Event | Reached | bytes


class Blocks:
    """Makes the blocks of one stream.

    Args:
        wishes: The channels, in the order of their ids in the id of the stream, and what the client
            wants of each.
        objects: Whether each message goes out in an object with its channel and its id.
    """

    def __init__(self, wishes: Mapping[str, Wish], objects: bool) -> None:
        self.past: deque[Part] = deque()  # goes before what is in the outbox
        self._wishes = wishes
        self._objects = objects
        self._ids = dict.fromkeys(wishes, "")  # how far the client is on each channel

    def begin(self, channel: str, past: Iterable[Event], resumed: Resumed) -> None:
        """Let a channel's past be sent, and then the position that it ends at.

        A client whose connection breaks in between comes back with the last id of its past.
        """
        since = self._wishes[channel].since
        if resumed.recovered and since is not None:
            self._ids[channel] = since
        elif resumed.recovered is False:
            content = {"channel": channel, "id": resumed.id, "recovered": False}
            payload = json.dumps(content, ensure_ascii=False).encode()
            self.past.append(event_stream.named(b"reset", payload))
        self.past.extend(past)
        self.past.append(Reached(channel, resumed.id))

    def take_past(self) -> list[Part]:
        """Remove and return the next parts of the past, at most what one write may hold."""
        parts: list[Part] = []
        size = 0
        while self.past and size < MAX_JOIN:
            part = self.past.popleft()
            parts.append(part)
            size += part.cost if isinstance(part, Event) else 0
        return parts

    def make(self, parts: Sequence[Part]) -> bytes:
        """Return the blocks of these parts."""
        if len(parts) == 1:
            return self._block(parts[0])
        return b"".join(map(self._block, parts))

    def _block(self, part: Part) -> bytes:
        if isinstance(part, Event):
            if not self._objects:
                # The channel's own id is that of the stream, which has no other one.
                if part.position is not None:
                    self._ids[part.channel] = str(part.position)
                return part.frame(EVENT_STREAM)
            block = part.frame(EVENT_STREAM | WITH_ID)
            return block if part.id is None else self._move(part.channel, part.id) + block
        if isinstance(part, Reached):
            # An empty line ends the block: a client notes its id, and dispatches nothing.
            known = self._ids[part.channel] == part.id
            return b"" if known else self._move(part.channel, part.id) + b"\n"
        return part

    def _move(self, channel: str, id: str) -> bytes:
        self._ids[channel] = id
        return event_stream.position(",".join(self._ids.values()))


class Stream(Subscription):
    """See the module.

    Args:
        request: What the client has asked for.
        wishes: Its channels, and what it wants of the past of each.
        outbox: Holds what waits for it.
        heartbeat: After how many seconds in which nothing was sent a comment is.
        objects: Whether each message goes out in an object with its channel and its id.
        gaps: Whether it ends where messages may be missing, so that the client reconnects.
        join, leave: Join and leave the channels.
    """

    kind = "event stream"

    def __init__(
        self,
        request: Request,
        wishes: Mapping[str, Wish],
        outbox: Outbox,
        *,
        heartbeat: float,
        objects: bool,
        gaps: bool,
        join: Join,
        leave: Leave,
    ) -> None:
        super().__init__(wishes, outbox)
        self.request = request
        self.gaps = gaps
        self.finished: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._heartbeat = heartbeat
        self._blocks = Blocks(wishes, objects)
        self._join = join
        self._leave = leave
        self._send: Send | None = None
        # What is being sent, or is about to be; None only while it may be sent to at once.
        self._in_flight: Sequence[Any] | None = ()
        self._sent_at = 0.0  # when a send has begun or ended last
        self._task: asyncio.Task[None] | None = None  # sends to this client now
        self._timer: TimerHandle | None = None
        self._ended = False

    @property
    def waiting(self) -> int:
        """Bytes that the client has not taken: of the outbox and, if that is known, the server."""
        transport = self.transport
        known = transport is not None and not transport.is_closing()
        return self.outbox.size + (transport.get_write_buffer_size() if known else 0)

    def begin(self, channel: str, past: Iterable[Event], resumed: Resumed) -> None:
        self._blocks.begin(channel, past, resumed)

    async def join(self) -> None:
        """Join the channels.

        Raises:
            BackendUnavailable: The broker is away.
        """
        await self._join(self)

    def start(self, send: Send, first: bytes) -> None:
        """Send this first, then the past, and then what has been offered and will be.

        Args:
            send: That of the ASGI app. The response has begun.
            first: A block.
        """
        assert self.shard is not None
        self.transport = served.served_transport()
        watch.limit_silence(self.transport, self.shard.tuning.send_timeout)
        self._send = send
        self._in_flight = [first, *self._blocks.take_past()]
        self._sent_at = self.shard.loop.time()
        self._set_timer(self._heartbeat, self._beat)
        self._drain_soon()

    # What is sent

    def offer(self, items: Sequence[Item]) -> None:
        """Take one item, or several events: send them if nothing else is sent, or let them wait."""
        if self._ended:
            return
        if self._in_flight is None and isinstance(items[0], Event):
            self._in_flight = items
            assert self.shard is not None
            self.shard.to_drain.append(self)
            return
        for item in items:
            if isinstance(item, Event):
                self._queue(item)
            else:  # the hub is closed, or messages may be missing
                self.end()

    def _queue(self, event: Event) -> None:
        if self._ended:
            return
        assert self.shard is not None
        try:
            dropped = self.outbox.offer(event)
        except OutboxFull:
            waiting = [*self.outbox.clear(), event]
            dropped = [item for item in waiting if isinstance(item, Event)]
            self.shard.counters.slow_clients += 1
            self.end()
        if dropped:
            self.shard.counters.dropped += len(dropped)
            self.outbox.tell_dropped(self.request, dropped)

    def _drain_soon(self) -> None:
        assert self.shard is not None
        self.shard.to_drain.append(self)
        self.shard.drain_all()

    async def drain(self, task: asyncio.Task[None] | None = None) -> None:
        """Send what is in flight, and then what waits. `task` is the current task."""
        shard, send = self.shard, self._send
        assert shard is not None
        assert send is not None
        self._task = task or asyncio.current_task()
        try:
            while self._in_flight and not self.finished.done():
                body = self._blocks.make(self._in_flight)
                self._sent_at = shard.loop.time()
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                shard.counters.delivered += sum(isinstance(p, Event) for p in self._in_flight)
                self._in_flight = self._next()
        except asyncio.CancelledError:
            self._finish(False)
            raise
        except Exception:
            # Servers disagree about what a send to a client that is gone raises.
            self._finish(False)
        finally:
            self._task = None
        if self._ended:
            self._finish(True)

    def _next(self) -> Sequence[Part] | None:
        """Take what waits, up to what one write may hold."""
        if self._blocks.past:
            return self._blocks.take_past()
        if not self.outbox.items:
            return None
        parts: list[Part] = []
        size = 0
        while size < MAX_JOIN and (event := self.outbox.take()) is not None:
            assert isinstance(event, Event)  # nothing else is offered to it
            parts.append(event)
            size += event.cost
        return parts

    def _beat(self) -> None:
        """Send a comment if nothing was sent for so long, so that a client that is gone shows."""
        assert self.shard is not None
        silent = self.shard.loop.time() - self._sent_at
        if self._in_flight is None and silent >= self._heartbeat:
            self._in_flight = (event_stream.HEARTBEAT,)
            self._drain_soon()
            silent = 0
        elif self._in_flight is not None and silent >= self.shard.tuning.send_timeout:
            self.lose(drop=True)
            return
        self._set_timer(max(self._heartbeat - silent, self._heartbeat / 4), self._beat)

    def _set_timer(self, seconds: float, callback: Any) -> None:
        assert self.shard is not None
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.shard.loop.call_later(seconds, callback)

    # How it ends

    def end(self) -> None:
        """Take nothing more, and end the response after what waits. On its loop."""
        if self._ended:
            return
        self._ended = True
        self._leave(self)
        if self._in_flight is None:
            self._finish(True)
        elif self.shard is not None and self._send is not None:
            self._set_timer(self.shard.tuning.close_timeout, self._give_up)

    def _give_up(self) -> None:
        self.lose(drop=True)

    def lose(self, *, drop: bool = False) -> None:
        """End at once: the client has left, or with `drop`, it is given up."""
        self._ended = True
        if drop:
            watch.abort(self.transport or served.find_transport(self.request.scope))
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()  # a send to it may be waiting
            self._task = None
        self._finish(False)

    def _finish(self, here: bool) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._blocks.past.clear()
        self.outbox.clear()
        self._leave(self)
        if not self.finished.done():
            self.finished.set_result(here)
            watch.limit_silence(self.transport, 0)  # the client may use its connection again
