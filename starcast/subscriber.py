"""Subscriber: a channel's messages for code on the server, as an async iterator."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Self, TypeVar, cast

from .event import Event
from .exceptions import SubscriberLagged, Unsubscribed
from .gap import Gap
from .outbox import Close, Item, Outbox, OutboxFull
from .servers import served, server, watch
from .stats import Counters

Got = TypeVar("Got")

# Seconds that a block takes which is entered while the server shuts down. A program that subscribes
# again whenever its subscription has ended must not keep the event loop busy until it is cancelled.
STOPPING_DELAY = 0.05


class Subscription(Generic[Got]):
    """What both kinds of subscribers have."""

    gaps = False  # whether it gets any

    # What a shard looks at in any member: nothing is written here, and nobody excludes it.
    state: None = None
    frames: None = None
    id = 0
    is_stuck = False

    def __init__(
        self,
        channel: str,
        outbox: Outbox,
        *,
        join: Callable[[Subscription[Got]], Awaitable[Counters]],
        leave: Callable[[Subscription[Got]], None],
    ) -> None:
        self.channel = channel
        self.outbox = outbox
        self._join = join
        self._leave = leave
        self._counters = Counters()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._ended = False
        self._lagged = False
        # Of the WebSocket client that the block serves, if that is known.
        self.transport: Any = None

    @property
    def waiting(self) -> int:
        """Bytes that were not read yet."""
        return self.outbox.size

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise RuntimeError("a Subscriber can be entered once; call subscribe() again")
        self._loop = asyncio.get_running_loop()
        if server.is_stopping():
            await asyncio.sleep(STOPPING_DELAY)
            self.end()
            return self
        self.transport = getattr(served.served_protocol(), "transport", None)
        self._counters = await self._join(self)
        server.end_with_server(self)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        server.forget(self)
        self._leave(self)
        self.outbox.clear()
        self.end()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Got:
        if self._loop is None:
            raise RuntimeError(
                "a Subscriber only gets events inside `async with`: write "
                "`async with hub.subscribe(...) as subscriber`"
            )
        while (item := self.outbox.take()) is None:
            if self._lagged:
                self._lagged = False
                raise SubscriberLagged(
                    f"the subscriber of {self.channel!r} fell more than "
                    f"{self.outbox.max_buffer} bytes behind"
                )
            if self._ended:
                raise StopAsyncIteration
            if self._waiting is not None and not self._waiting.done():
                raise RuntimeError("a Subscriber is iterated over by one task at a time")
            self._waiting = self._loop.create_future()
            await self._waiting
        self._counters.delivered += isinstance(item, Event)
        return cast(Got, item)  # `put` lets nothing else in

    async def get(self) -> Got:
        """Return the next event; what iteration does, one at a time.

        Raises:
            Unsubscribed: No further event will come; where iteration would end quietly.
            SubscriberLagged: As on iteration.
        """
        try:
            return await self.__anext__()
        except StopAsyncIteration:
            raise Unsubscribed(f"the subscription to {self.channel!r} has ended") from None

    def put(self, item: Item) -> bool:
        """Take an item from the shard, on the loop of the block. Nothing is left to be written."""
        if self._ended:
            return False
        if isinstance(item, Close):
            self.end()
        elif isinstance(item, (Event, Gap)):
            try:
                dropped = self.outbox.offer(item)
            except OutboxFull:
                assert isinstance(item, Event)  # a gap weighs nothing
                dropped = [item]
                self._counters.slow_clients += 1
                self._lagged = True
                self._leave(self)
                self.end()
            if dropped:
                self._counters.dropped += len(dropped)
                self.outbox.tell_dropped(self, dropped)
        self._wake()
        return False

    def lose(self, *, drop: bool = False) -> None:
        """End the iteration: the client that the block serves has left."""
        self.outbox.clear()
        self.end()
        if drop:
            watch.abort(self.transport)  # a send to it may wait

    def end(self) -> None:
        """End the iteration after what is buffered."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._waiting.set_result(None)


class Subscriber(Subscription[Event]):
    """What `Broadcast.subscribe` returns: an async context manager and an async iterator of events.

    Inside the `async with` block it is subscribed. Iteration ends quietly when the hub is closed,
    when the server begins to shut down or when the block has been left: in the first two cases
    after what is buffered. A block that is entered while the server shuts down ends at once. In the
    handler of a WebSocket client, on uvicorn, it also ends within a second when that client has
    left; what is buffered is dropped then.

    It belongs to the event loop that entered the block; iterate in one task there.

    Raises:
        SubscriberLagged: On iteration, when the subscriber did not keep up and its policy is
            `disconnect`: after the events that were buffered. It has been unsubscribed then.
    """


class GapSubscriber(Subscription[Event | Gap]):
    """The same with `gaps=True`: among the events stands a `Gap` where some may be missing."""

    gaps = True
