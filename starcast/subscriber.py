"""Subscriber: receive the messages of a channel in server code, as an async iterator.

What a hub has of it is a `Subscription`, which a stream of server-sent events is too.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from typing import Any, Generic, Protocol, Self, TypeVar, cast

from .event import Event, Gap
from .exceptions import SubscriberLagged, Unsubscribed
from .history import Resumed, Wish
from .outbox import Close, Item, Outbox, OutboxFull
from .servers import served, stopping, watch
from .stats import Counters
from .tuning import Tuning

T = TypeVar("T")

# Seconds for which entering a block is delayed while the server shuts down. A program may subscribe
# again whenever its subscription ends. It must not keep the event loop busy until it is cancelled.
STOPPING_DELAY = 0.05


class Drainable(Protocol):
    """What a task of a shard sends to."""

    async def drain(self, task: asyncio.Task[None] | None = None) -> None:
        """Send what is in flight, and then what waits. `task` is the current task."""


class Shard(Protocol):
    """What a subscription needs of its `shard.Shard`."""

    loop: asyncio.AbstractEventLoop
    tuning: Tuning
    counters: Counters
    to_drain: deque[Drainable]  # those whose item a task is to send

    def drain_all(self) -> None:
        """Let a task send to each of `to_drain`."""


class Subscription(abc.ABC):
    """A member of channels that is no WebSocket: a `Subscriber`, or a stream.

    Args:
        wishes: Its channels, and what it wants of the past of each.
        outbox: Holds the items that have not been taken yet.

    Attributes:
        gaps: Whether it receives gaps.
        kind: What it counts as among the clients that are not on the fast path; None if it is not a
            client but code on the server.
        transport: That of the client's socket; None if it is not known. What is known before it
            joins, a `Watch` checks.
        shard: That of its event loop; None until it has joined.
    """

    gaps = False
    kind: str | None = None
    transport: Any = None
    shard: Shard | None = None

    # A shard reads these of every member. A subscription takes no frames and is never excluded.
    frames: None = None
    id = 0
    is_stuck = False

    def __init__(self, wishes: Mapping[str, Wish], outbox: Outbox) -> None:
        self.wishes = wishes
        self.outbox = outbox

    @property
    def waiting(self) -> int:
        """Bytes that have not been taken yet."""
        return self.outbox.size

    @property
    def channels(self) -> Set[str]:
        """The names of its channels."""
        return self.wishes.keys()

    @abc.abstractmethod
    def begin(self, channel: str, past: Iterable[Event], resumed: Resumed) -> None:
        """Take what it wants of a channel's past, which does not count in the buffer."""

    @abc.abstractmethod
    def offer(self, items: Sequence[Item]) -> None:
        """Take one item, or several events, on its loop."""

    @abc.abstractmethod
    def lose(self, *, drop: bool = False) -> None:
        """End at once: the client has left."""


Join = Callable[[Subscription], Awaitable[None]]
Leave = Callable[[Subscription], None]


class Iteration(Subscription, Generic[T]):
    """The common base of `Subscriber` and `GapSubscriber`.

    Args:
        channel: The name of the channel.
        outbox: Holds the items that have not been read yet.
        join: Subscribes, and sets `shard`.
        leave: Unsubscribes. Safe to call more than once.
        wish: What it wants of the channel's past.

    Attributes:
        resumed: Where it begins, and whether it has missed nothing since the event that it named;
            None outside of the block and on a channel without a history.
    """

    def __init__(
        self,
        channel: str,
        outbox: Outbox,
        *,
        join: Join,
        leave: Leave,
        wish: Wish = Wish(),  # noqa: B008  # it does not change
    ) -> None:
        super().__init__({channel: wish}, outbox)
        self.channel = channel
        self.resumed: Resumed | None = None
        self._past: deque[Event] = deque()
        self._join = join
        self._leave = leave
        self._counters = Counters()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._ended = False
        self._lagged = False

    def begin(self, channel: str, past: Iterable[Event], resumed: Resumed) -> None:
        """Yield the past before everything else. It does not count in the buffer."""
        self._past.extend(past)
        self.resumed = resumed

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise RuntimeError("a Subscriber can only be entered once; call subscribe() again")
        self._loop = asyncio.get_running_loop()
        if stopping.is_stopping():
            await asyncio.sleep(STOPPING_DELAY)
            self.end()
            return self
        # That of the WebSocket client that the block serves; None if it is not known.
        self.transport = getattr(served.served_protocol(), "transport", None)
        await self._join(self)
        self._counters = self.shard.counters if self.shard else self._counters
        stopping.end_with_server(self)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        stopping.forget(self)
        self._leave(self)
        self._past.clear()
        self.outbox.clear()
        self.end()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if self._loop is None:
            raise RuntimeError(
                "a Subscriber only receives events inside `async with`: write "
                "`async with hub.subscribe(...) as subscriber`"
            )
        if self._past:
            self._counters.delivered += 1
            return cast(T, self._past.popleft())
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
                raise RuntimeError("only one task at a time may iterate over a Subscriber")
            self._waiting = self._loop.create_future()
            await self._waiting
        self._counters.delivered += isinstance(item, Event)
        return cast(T, item)  # `offer` accepts nothing else

    async def get(self) -> T:
        """Wait for the next event and return it, like one step of the iteration.

        Raises:
            Unsubscribed: The subscription has ended; iteration would stop here.
            SubscriberLagged: The subscriber did not keep up, as on iteration.
            RuntimeError: Called outside of the block, or by two tasks at a time.
        """
        try:
            return await self.__anext__()
        except StopAsyncIteration:
            raise Unsubscribed(f"the subscription to {self.channel!r} has ended") from None

    def offer(self, items: Sequence[Item]) -> None:
        """Take items from the shard, on the loop of the block."""
        for item in items:
            if self._ended:
                return
            if isinstance(item, Close):
                self.end()
            elif isinstance(item, (Event, Gap)):
                self._queue(item)
        self._wake()

    def _queue(self, item: Event | Gap) -> None:
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

    def lose(self, *, drop: bool = False) -> None:
        """End the iteration at once: the client that the block serves has left."""
        self._past.clear()
        self.outbox.clear()
        self.end()
        if drop:
            watch.abort(self.transport)  # a send to it may be waiting

    def end(self) -> None:
        """End the iteration after the buffered items."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            with contextlib.suppress(RuntimeError):  # the loop is closed, and no task waits
                self._waiting.set_result(None)


class Subscriber(Iteration[Event]):
    """Returned by `Broadcast.subscribe`: an async context manager and an async iterator of events.

    It is subscribed inside the `async with` block. Iteration stops when the hub is closed or the
    server begins to shut down, in both cases after the buffered events, and when the block has been
    left. If the server is already shutting down, iteration stops at once. In the handler of a
    WebSocket client on uvicorn, it also stops within a second after that client has left, and
    buffered events are dropped.

    It belongs to the event loop that entered the block. Only one task at a time may iterate, on
    that loop.

    Attributes:
        resumed: On a channel that has a history, a `Resumed`: where the subscriber begins, and
            whether it has missed nothing since the event that it named. Otherwise, and outside of
            the block, None.

    Raises:
        SubscriberLagged: On iteration, if the subscriber did not keep up and its policy is
            `"disconnect"`. It is raised after the buffered events, and the subscriber has been
            unsubscribed by then.
        RuntimeError: The block was entered a second time, or iteration takes place outside of the
            block or in two tasks at once.
    """


class GapSubscriber(Iteration[Event | Gap]):
    """A `Subscriber` with `gaps=True`: it also yields a `Gap` where events may be missing."""

    gaps = True
