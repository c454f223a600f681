"""Group: consecutive messages for the same members, so that each member needs one write only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TypeGuard

from .connection import Connection
from .event import Command, Event, join, part
from .frames import WireFormat
from .outbox import Item
from .servers.wire import MAX_JOIN
from .subscriber import Subscription

Member = Connection | Subscription
Write = Callable[[bytes], None]
Done = Callable[[], None]
Entry = tuple[Item | None, tuple[Member, ...], Done | None]

# If a batch has messages for several channels, those that are not consecutive may share a write
# provided that no member is on two of the channels. That is only checked for this many members.
MAX_COMPARED = 1024


class Snapshot(tuple[Member, ...]):
    """The members of a channel, with the bound methods that write frames to those on the fast path.

    Without these, a fan-out would look up each client, its writer and its method, and the processor
    finds little of that in a cache after a system call: it took 9 to 25 percent longer.

    Attributes:
        writers: For each wire format, the methods that write and the members that they belong to.
        others: All other members.
        version: The shard's version for which these are valid. It changes with any client's state.
    """

    version = -1
    writers: dict[WireFormat, tuple[list[Write], list[Member]]]
    others: list[Member]

    def reset(self, version: int) -> None:
        """Begin to collect the writers: `add` follows for all members."""
        self.version = version
        self.writers = {}
        self.others = []

    def add(self, members: Iterable[Member]) -> None:
        for member in members:
            frames = member.frames
            if frames is None or frames.direct is None:
                self.others.append(member)
            else:
                writes, members_of = self.writers.setdefault(frames.wire_format, ([], []))
                writes.append(frames.direct)
                members_of.append(member)


# What most groups have of these. A batch makes so many groups that each object less is felt.
_NOTHING: list[Done] = []
_NOBODY: frozenset[int] = frozenset()


def is_message(item: Item | None) -> TypeGuard[Event]:
    """Whether it is an event that is sent to members."""
    return isinstance(item, Event) and not isinstance(item, Command)


class Group:
    """Items for the same members: events of up to `MAX_JOIN` bytes together, or one other item."""

    __slots__ = ("_joined", "_size", "done", "exclude", "has_events", "items", "members")

    def __init__(self, item: Item | None, members: tuple[Member, ...]) -> None:
        self.items = [] if item is None else [item]
        self.members = members
        self.done = _NOTHING
        self.has_events = is_message(item)
        self.exclude, self._size = _NOBODY, 0  # those of all events
        if is_message(item):
            self.exclude, self._size = item.exclude, item.cost
        self._joined: dict[WireFormat, bytes] | None = None

    def add(self, item: Item | None) -> bool:
        """Take one more item, if it fits."""
        if is_message(item) and self.has_events and item.exclude == self.exclude:
            size = self._size + item.cost
            if size <= MAX_JOIN:
                self.items.append(item)
                self._size = size
                return True
        return False

    def joined(self, wire_format: WireFormat) -> bytes:
        """Return the frames of all events for a wire format, made once."""
        if len(self.items) == 1 and isinstance(first := self.items[0], Event):
            return first.frame(wire_format)
        if self._joined is None:
            self._joined = {}
        joined = self._joined.get(wire_format)
        if joined is None:
            parts = [part(item, wire_format) for item in self.items if isinstance(item, Event)]
            joined = self._joined[wire_format] = join(parts, wire_format)
        return joined


def grouped(batch: Collection[Entry]) -> list[Group]:
    """Group the entries of a shard. Each member gets its items in the order of the batch."""
    groups: list[Group] = []
    disjoint = len(batch) == 1 or _disjoint(batch)
    last: dict[int, Group] = {}  # by tuple of members: its last group, if that may take more
    for item, members, done in batch:
        group = groups[-1] if item is None and groups else last.get(id(members))
        if group is None or (item is not None and not group.add(item)):
            if not disjoint:
                last.clear()  # a member of two groups must not get the later item first
            group = last[id(members)] = Group(item, members)
            groups.append(group)
        if done is not None:
            if group.done:
                group.done.append(done)
            else:
                group.done = [done]
    return groups


def _disjoint(batch: Collection[Entry]) -> bool:
    """Whether no member is in two different tuples; False if there are too many to compare."""
    distinct = {id(members): members for _, members, _ in batch}
    size = sum(map(len, distinct.values()))
    if len(distinct) > 1 and size > MAX_COMPARED:
        return False
    return len(distinct) <= 1 or len(set[Member]().union(*distinct.values())) == size
