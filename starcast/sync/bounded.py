"""BoundedQueue: what waits to be handed over, how much that is, and who waits for space in it.

It has the hub's lock. `entries` and `size` are only looked at and changed while that is held.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

from ..exceptions import PublishQueueFull
from .deadline import Deadline
from .waiter import Waiter

Entry = TypeVar("Entry")


class Waiting(Protocol):
    """Who waits for space. Told with the lock held."""

    def set(self) -> None:
        """Note that there is some."""


class BoundedQueue(Generic[Entry]):
    """See the module. It may be used from any thread and any event loop.

    A single entry may be larger than the bound: it is taken when none that costs anything waits.

    Args:
        lock: The hub's, which may be taken again by the thread that holds it.
        bound: How many bytes may wait.

    Attributes:
        bound: The same.
        entries: What waits, the oldest first.
        size: What it costs.
        waiters: Those that wait for space.
    """

    __slots__ = ("_lock", "bound", "entries", "size", "waiters")

    def __init__(self, lock: AbstractContextManager[object], bound: int) -> None:
        self._lock = lock
        self.bound = bound
        self.entries: deque[Entry] = deque()
        self.size = 0
        self.waiters: set[Waiting] = set()

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def half_full(self) -> bool:
        """Whether more than half of what may wait does. From any thread."""
        return self.size > self.bound // 2

    # With the lock held

    def has_space(self, cost: int) -> bool:
        """Whether something that costs so much may be added."""
        return not self.size or self.size + cost <= self.bound

    def append(self, entry: Entry, cost: int) -> None:
        """Add an entry at the end. The caller has looked whether there is space."""
        self.entries.append(entry)
        self.size += cost

    def prepend(self, entry: Entry, cost: int) -> None:
        """Add an entry before all others."""
        self.entries.appendleft(entry)
        self.size += cost

    def drop_first(self, cost: int) -> None:
        """Remove the oldest entry. Call `tell` after the last one that is removed."""
        self.entries.popleft()
        self.size -= cost

    def take_all(self) -> deque[Entry]:
        """Remove and return everything."""
        entries, self.entries = self.entries, deque()
        self.size = 0
        if self.waiters:
            self.tell()
        return entries

    def keep(self, entries: Iterable[Entry], size: int) -> None:
        """Remove everything except for these, which cost so much together."""
        self.entries = deque(entries)
        self.size = size
        self.tell()

    def tell(self) -> None:
        """Let those that wait for space see whether there is enough."""
        waiters, self.waiters = self.waiters, set()
        for waiter in waiters:
            waiter.set()

    # Without it

    async def wait_for_space(self, seconds: float) -> None:
        """Wait until some of what waits now has gone, but no longer than so many seconds."""
        waiter = Waiter()
        with self._lock:
            if not self.entries:
                return
            self.waiters.add(waiter)
        try:
            with contextlib.suppress(TimeoutError):
                async with Deadline(seconds):
                    await waiter
        finally:
            with self._lock:
                self.waiters.discard(waiter)


class Full(PublishQueueFull):
    """Knows which queue is full."""

    def __init__(self, text: str, queue: BoundedQueue[Any]) -> None:
        super().__init__(text)
        self.queue = queue

    def __reduce__(self) -> tuple[Any, ...]:
        return PublishQueueFull, self.args  # a queue cannot be sent to another process
