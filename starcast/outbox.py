"""Outbox: the messages that wait for one client, their bound, and the policy when it is reached."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

from starlette.types import Message

from .event import Event, Gap, Ready
from .exceptions import ConfigurationError
from .frames import PLAIN, WITH_ID, WireFormat
from .internal import is_internal
from .sync.space import Draining, SpaceQueue
from .sync.waiter import Waiter

logger = logging.getLogger("starcast")

Overflow = Literal["disconnect", "drop_oldest", "drop_newest", "latest"]

MAX_BUFFER = 1024 * 1024
OVERFLOWS: tuple[str, ...] = get_args(Overflow)


@dataclasses.dataclass(frozen=True, slots=True)
class Overflowed:
    """What `on_overflow` is told: a client or a subscriber did not keep up.

    Attributes:
        client: The `WebSocket`, the `Subscriber` or, of a stream, the `Request` that is behind.
        overflow: The policy that was applied.
        dropped: The messages that it will not get. For `disconnect` and a client: what was waiting
            and the one that was too much; it is being closed with 1013, or its stream ends. For a
            subscriber: the one that was too much; what was waiting is still handed out.
    """

    client: Any
    overflow: Overflow
    dropped: tuple[Event, ...]

    def tell(self, on_overflow: OnOverflow | None) -> None:
        """Call the hook. An error in it is logged, because the publisher cannot do anything."""
        if on_overflow is not None:
            try:
                on_overflow(self)
            except (Exception, asyncio.CancelledError):
                logger.exception("on_overflow raised")


OnOverflow = Callable[[Overflowed], None]


class Close:
    """Closes a client with a close frame, after the messages before it."""

    __slots__ = ("code", "reason")

    def __init__(self, code: int, reason: str = "") -> None:
        self.code = code
        self.reason = reason


class Leave:
    """Ends a client's registration after the messages before it; the socket stays open."""

    __slots__ = ("waiter",)

    def __init__(self, waiter: Waiter | None = None) -> None:
        self.waiter = waiter  # set when everything before it is sent, or given up

    def reached(self) -> None:
        if self.waiter is not None:
            self.waiter.set()


class Replay:
    """Events of a channel's past, which a client gets before those that are published from now on.

    They are kept by whoever keeps the history, so they do not count in the client's buffer, and it
    takes them as fast as it can. What is published meanwhile does count.

    Attributes:
        taken: Done when the client begins to get them, or will not get them.
    """

    __slots__ = ("events", "taken")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.events: asyncio.Future[Sequence[Event]] = loop.create_future()
        self.taken: asyncio.Future[None] = loop.create_future()

    def begin(self, events: Sequence[Event]) -> None:
        """Let them be sent. On the loop of the client."""
        if not self.events.done():
            self.events.set_result(events)

    async def take(self) -> Sequence[Event]:
        """Return them, once they are there."""
        events = await self.events
        self.discard()
        return events

    def discard(self) -> None:
        """Let whoever waits for this go on."""
        if not self.taken.done():
            with contextlib.suppress(RuntimeError):  # the loop is closed, and no task waits
                self.taken.set_result(None)


class Send:
    """An ASGI message that the client's own handler sends, and waits until it has been sent.

    Attributes:
        message: The message.
        sent: True when the message has been sent, False if it will not be. Cancelled if the handler
            is cancelled before.
        error: What the send raised.
    """

    __slots__ = ("error", "message", "sent")

    def __init__(self, message: Message, loop: asyncio.AbstractEventLoop) -> None:
        self.message = message
        self.sent: asyncio.Future[bool] = loop.create_future()
        self.error: Exception | None = None

    def finish(self, sent: bool, error: Exception | None = None) -> None:
        if not self.sent.done():
            self.error = error
            with contextlib.suppress(RuntimeError):  # the loop is closed, and no task waits
                self.sent.set_result(sent)


class Unsubscribed(Ready):
    """Tells a client that it is off a channel that it could not follow: see `Outbox.shed`."""

    __slots__ = ()


# What a client gets, in order. Control items cost nothing and are never dropped. A client has one
# Close and one Leave at most, one Replay and one Send for each task of its handler that joins a
# channel or sends.
Item = Event | Gap | Close | Leave | Send | Replay


class OutboxFull(Exception):
    """The policy is `disconnect` and the buffer has no space."""


def discard(item: Item) -> None:
    """Tell the task that waits for an item, if there is one, that it will not be sent."""
    if isinstance(item, Send):
        item.finish(False)
    elif isinstance(item, Leave):
        item.reached()
    elif isinstance(item, Replay):
        item.discard()


class LatestQueue:
    """A deque that has one event for each channel at most, and finds it by the channel.

    A plain dict would be slow: to find its first item, it steps over all that have been removed.
    """

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items: OrderedDict[object, Item] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items.values())

    def __delitem__(self, index: int) -> None:
        del self._items[next(itertools.islice(self._items, index, None))]

    def append(self, item: Item) -> None:
        """Add an item at the end. An older event of its channel has been removed with `pop`."""
        channel = item.channel if isinstance(item, Event) else ""
        # What has no channel replaces nothing: a control item, or a message to this client alone.
        self._items[channel or object()] = item

    def popleft(self) -> Item:
        return self._items.popitem(last=False)[1]

    def pop(self, channel: str) -> Item | None:
        """Remove and return the event of a channel, if there is one."""
        return self._items.pop(channel, None)


class Outbox:
    """A queue with a bound in bytes and a policy. It belongs to one event loop.

    A single event may be larger than the bound if no other one waits. Whatever the policy drops,
    the rest is sent in the order in which it was offered. So with `latest`, a new event does not
    take the place of the older one, but goes to the end.

    Attributes:
        shed: Called with a channel when the policy is `disconnect` and the buffer is full: it takes
            the client off that channel, and queues an `Unsubscribed`. It returns False if it cannot
            do that. None for a client that is disconnected instead.
        cut: The channels for which that has been done. What the client would still get of these is
            dropped until it gets the `Unsubscribed`: otherwise it would believe that it has
            everything before that.
    """

    __slots__ = (
        "_on_overflow",
        "cut",
        "draining",
        "form",
        "in_flight",
        "items",
        "max_buffer",
        "overflow",
        "promised",
        "replayed",
        "shed",
        "size",
        "space",
    )

    def __init__(
        self,
        max_buffer: int = MAX_BUFFER,
        overflow: Overflow = "disconnect",
        on_overflow: OnOverflow | None = None,
        form: WireFormat = PLAIN,
    ) -> None:
        if not isinstance(max_buffer, int) or isinstance(max_buffer, bool) or max_buffer < 1:
            raise ConfigurationError(f"max_buffer is a number of bytes above 0, not {max_buffer!r}")
        if overflow not in OVERFLOWS:
            raise ConfigurationError(
                f"overflow must be one of {', '.join(OVERFLOWS)}, not {overflow!r}"
            )
        self.max_buffer = max_buffer
        self.overflow: Overflow = overflow
        self._on_overflow = on_overflow
        self.form = form  # what each message is put into for this client
        self.shed: Callable[[str], bool] | None = None
        self.cut: set[str] | None = None
        self.size = 0
        # What is being sent, or is about to be: one item, or the events of one delivery.
        self.in_flight: Sequence[Item] | None = None
        # None until it is needed: an empty deque takes 760 bytes.
        self.items: deque[Item] | LatestQueue | None = None
        self.draining: Draining | None = None  # once senders had to wait for it, until it is empty
        self.replayed: asyncio.Future[None] | None = None  # `taken` of the last Replay
        # Guarded by the hub's lock:
        self.promised = 0  # the cost of messages to this client alone that are not here yet
        self.space: SpaceQueue | None = None  # where their senders wait; None until one has to

    def __len__(self) -> int:
        return len(self.items or ())

    @property
    def ids(self) -> bool:
        """Whether the client gets each message in an object with its id."""
        return self.form == WITH_ID

    async def wait_replayed(self) -> None:
        """Wait until the client begins to get the past of the channel that it has joined last.

        Otherwise the pasts of more and more channels could wait for a client that does not read.
        """
        if self.replayed is not None:
            await asyncio.wait([self.replayed])

    def offer(self, item: Item) -> list[Event]:
        """Add an item at the end and return what was dropped for it, which may be the item itself.

        Raises:
            OutboxFull: There is no space, and the policy is `disconnect`.
        """
        dropped: list[Event] = []
        if isinstance(item, Event):
            if self.cut and item.channel in self.cut and not isinstance(item, Unsubscribed):
                return [item]
            if self.overflow == "latest" and item.channel and isinstance(self.items, LatestQueue):
                self._drop(dropped, self.items.pop(item.channel))
            while self.size and self.size + item.cost > self.max_buffer:
                if self.overflow == "disconnect":
                    if not self._shed(item, dropped):
                        raise OutboxFull
                    if self.cut and item.channel in self.cut:
                        return [*dropped, item]
                    continue
                if self.overflow == "drop_newest":
                    return [item]
                self._drop_first(dropped)
            self.size += item.cost
        if self.items is None:
            self.items = LatestQueue() if self.overflow == "latest" else deque()
        self.items.append(item)
        return dropped

    def _shed(self, item: Event, dropped: list[Event]) -> bool:
        """Take the client off the channel that fills most of the buffer; False if there is none."""
        if self.shed is None:
            return False
        sizes: dict[str, int] = {}
        for each in (*(self.items or ()), item):
            if isinstance(each, Event) and each.channel and not is_internal(each.channel):
                sizes[each.channel] = sizes.get(each.channel, 0) + each.cost
        if not sizes:
            return False
        channel = max(sizes, key=sizes.__getitem__)
        if not self.shed(channel):
            return False
        self.cut = (self.cut or set()) | {channel}
        items, self.items = self.items or (), deque()
        for each in items:
            if isinstance(each, Event) and each.channel == channel:
                self._drop(dropped, each)
            else:
                self.items.append(each)
        return True

    def without_cut(self, items: Sequence[Item]) -> list[Item]:
        """Return what is left of items if some are of channels that were cut off."""
        left: list[Item] = []
        for item in items:
            if isinstance(item, Unsubscribed) and self.cut:
                self.cut = (self.cut - {item.channel}) or None
            elif isinstance(item, Event) and self.cut and item.channel in self.cut:
                continue
            left.append(item)
        return left

    def tell_dropped(self, client: Any, dropped: list[Event]) -> None:
        """Tell the hook, if there is one, which messages the client will not get."""
        Overflowed(client, self.overflow, tuple(dropped)).tell(self._on_overflow)

    def _drop_first(self, dropped: list[Event]) -> None:
        assert self.items is not None  # something has a size
        index, items = 0, iter(self.items)
        while not isinstance(item := next(items), Event):
            index += 1
        del self.items[index]
        self._drop(dropped, item)

    def _drop(self, dropped: list[Event], item: Item | None) -> None:
        if isinstance(item, Event):
            self.size -= item.cost
            dropped.append(item)

    def take(self) -> Item | None:
        """Remove and return the oldest item, or None."""
        if not self.items:
            return None
        item = self.items.popleft()
        if isinstance(item, Event):
            self.size -= item.cost
        if self.space is not None or self.draining is not None:
            self._progress()
        return item

    def has_space(self, cost: int) -> bool:
        """Whether there is space for a message to this client alone. From any thread.

        Such messages fill at most half of the buffer. The other half is for messages to its
        channels, which would otherwise overflow the buffer of a client that is sent a backlog.
        """
        waiting = self.size + self.promised
        return not waiting or waiting + cost <= self.max_buffer // 2

    def next_event(self) -> Event | None:
        """Return the oldest item, which stays, if it is an event."""
        item = next(iter(self.items or ()), None)
        return item if isinstance(item, Event) else None

    def clear(self) -> list[Item]:
        """Discard everything that waits, and return it."""
        items, self.items = list(self.items or ()), None
        self.size = 0
        for item in items:
            discard(item)
        self._progress()
        return items

    @property
    def own_send(self) -> Send | None:
        """The handler's own send, if it is what is in flight."""
        first = self.in_flight[0] if self.in_flight else None
        return first if isinstance(first, Send) else None

    def _progress(self) -> None:
        if self.space is not None:
            self.space.progress()
        if self.draining is not None and not self.size:
            self.draining.end()
            self.draining = None
