"""Group: messages of one turn of the event loop for the same members, one write for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from .connection import Connection
from .event import Event
from .frames import Setting
from .outbox import Item
from .servers.wire import MAX_JOIN
from .subscriber import Subscription

Member = Connection | Subscription[Any]
Write = Callable[[bytes], None]
Done = Callable[[], None]
Entry = tuple[Item | None, tuple[Member, ...], Done | None]

# Members of several channels that are compared in one step, to find out whether messages that do
# not follow each other may share a write. With more of them, only those that do share one.
MAX_COMPARED = 1024


class Snapshot(tuple[Member, ...]):
    """Who is on a channel, and how frames are written to those who take them, looked up once.

    Attributes:
        writers: By wire setting: the calls that write, and whose each is.
        others: Everybody else.
        version: Of the shard, when these were right; it changes whenever a client's state does.
    """

    version = -1
    writers: dict[Setting, tuple[list[Write], list[Member]]]
    others: list[Member]

    def look(self, version: int) -> None:
        """Begin to look them up: `add` follows for each member."""
        self.version = version
        self.writers = {}
        self.others = []

    def add(self, members: Iterable[Member]) -> None:
        for member in members:
            frames = member.frames
            if frames is None or frames.direct is None:
                self.others.append(member)
            else:
                writes, whose = self.writers.setdefault(frames.setting, ([], []))
                writes.append(frames.direct)
                whose.append(member)


class Group:
    """Items that the same members get one after another; more than one only if they are events.

    Together these cost at most `MAX_JOIN` bytes, like anything that waits.
    """

    __slots__ = ("_joined", "_size", "done", "exclude", "items", "members")

    def __init__(self, item: Item | None, members: tuple[Member, ...]) -> None:
        self.items = [] if item is None else [item]
        self.members = members
        self.done: list[Done] = []
        self.exclude: frozenset[int] | None = None  # None: it takes no further event
        self._size = 0
        self._joined: dict[Setting, bytes] = {}
        if isinstance(item, Event):
            self.exclude = item.exclude
            self._size = item.cost

    def add(self, item: Item | None) -> bool:
        """Take one more item, if it fits."""
        if isinstance(item, Event) and item.exclude == self.exclude:
            size = self._size + item.cost
            if size <= MAX_JOIN:
                self.items.append(item)
                self._size = size
                return True
        return False

    def joined(self, setting: Setting) -> bytes:
        """Return the frames of all events for a wire setting, made once."""
        joined = self._joined.get(setting)
        if joined is None:
            frames = [item.frame(setting) for item in self.items if isinstance(item, Event)]
            joined = self._joined[setting] = frames[0] if len(frames) == 1 else b"".join(frames)
        return joined


def grouped(batch: Collection[Entry]) -> list[Group]:
    """Group what was added to a shard; each member gets its items in the order of the batch."""
    groups: list[Group] = []
    disjoint = _disjoint(batch)
    last: dict[int, Group] = {}  # the group of each tuple of members that may take more
    for item, members, done in batch:
        group = groups[-1] if item is None and groups else last.get(id(members))
        if group is None or (item is not None and not group.add(item)):
            if not disjoint:
                last.clear()  # somebody is in two of them, and must not get the later item first
            group = last[id(members)] = Group(item, members)
            groups.append(group)
        if done is not None:
            group.done.append(done)
    return groups


def _disjoint(batch: Collection[Entry]) -> bool:
    """Whether nobody is in two different tuples of members; False if there are too many."""
    distinct = {id(members): members for _, members, _ in batch}
    size = sum(map(len, distinct.values()))
    if len(distinct) > 1 and size > MAX_COMPARED:
        return False
    return len(distinct) <= 1 or len(set[Member]().union(*distinct.values())) == size
