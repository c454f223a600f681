"""MemoryLog: the history of the channels of a hub in memory.

All of it is used with the hub's lock held.
"""

from __future__ import annotations

import itertools
import math
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..backends.base import Stored, StoredMessage
from ..event import Command, Event
from ..history import Histories, History, Position
from . import envelope

# Idempotency keys of one channel at most. They are forgotten after `History.key_ttl`.
MAX_KEYS = 10_000

T = TypeVar("T")

# Excluded connections are those of the one hub that there is, so it needs no name.
HUB = bytes(8)


class _Channel:
    """The history of a channel to which something was published."""

    __slots__ = ("epoch", "history", "keys", "messages", "top")

    def __init__(self, history: History, epoch: str) -> None:
        self.history = history
        self.epoch = epoch
        self.top = 0  # the offset of the newest message
        # The newest messages, each with the time at which it expires. They have no gap.
        self.messages: deque[tuple[float, bytes]] = deque()
        self.keys: dict[str, tuple[float, int]] | None = None  # when they expire, and their offset

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.top)

    def expire(self, now: float) -> None:
        messages = self.messages
        while messages and messages[0][0] <= now:
            messages.popleft()

    def append(self, event: Event, key: str | None) -> None:
        now = time.monotonic()
        self.expire(now)
        if len(self.messages) >= self.history.size:
            self.messages.popleft()
        self.top += 1
        self.messages.append((now + self.history.ttl, envelope.pack(event, HUB)))
        if key is not None:
            if self.keys is None:
                self.keys = {}
            self.keys[key] = now + self.history.key_ttl, self.top

    def offset_of(self, key: str) -> int | None:
        """Return the offset of what was published with this key; None if it is not known."""
        keys, now = self.keys, time.monotonic()
        if not keys:
            return None
        for old in list(_first_expired(keys, now)):
            del keys[old]
        return keys[key][1] if key in keys else None

    def read(self, since: int | None, limit: int, reverse: bool) -> Stored:
        """See `HistoryConnection.read_kept`."""
        self.expire(time.monotonic())
        first = self.top - len(self.messages) + 1  # the offset of the oldest one
        if reverse:
            end = self.top + 1 if since is None else min(since, self.top + 1)
            start = max(first, end - limit)
        else:
            start = first if since is None else max(first, since + 1)
            end = min(start + limit, self.top + 1)
        kept = itertools.islice(self.messages, start - first, max(end, start) - first)
        found = [StoredMessage(start + number, data) for number, (_, data) in enumerate(kept)]
        if reverse:
            found.reverse()
        return Stored(self.position, found, since is None or since + 1 >= first)


def _first_expired(keys: dict[str, tuple[float, int]], now: float) -> Iterator[str]:
    """Yield the oldest keys that have expired, or are too many."""
    surplus = len(keys) - MAX_KEYS
    for number, (key, (expires, _)) in enumerate(keys.items()):
        if expires > now and number >= surplus:
            return
        yield key


class MemoryLog:
    """See the module. Made on any thread."""

    def __init__(self, histories: Histories) -> None:
        self._histories = histories
        # The channels of each setting, with those at the end that were used last. What is kept of
        # the quiet ones is their position: their messages have expired.
        self._active: dict[History, OrderedDict[str, _Channel]] = {}
        self._quiet: dict[History, OrderedDict[str, _Channel]] = {}
        # That of the channels to which nothing was published yet. Nothing else is kept of these, or
        # whoever joins made-up ones would drive out the others.
        self._epoch = secrets.token_hex(6)

    def position(self, name: str) -> Position | None:
        """Return that of a channel; None if it has no history."""
        history = self._histories.find(name)
        if history is None:
            return None
        found = self._find(name, history)
        return Position(self._epoch, 0) if found is None else found.position

    def read(
        self, name: str, history: History, since: int | None, limit: int, reverse: bool
    ) -> Stored:
        """See `HistoryConnection.read_kept`."""
        found = self._find(name, history) or _Channel(history, self._epoch)
        return found.read(since, limit, reverse)

    def _find(self, name: str, history: History) -> _Channel | None:
        """Return a channel to which something was published, and note that it is in use."""
        active = self._active.setdefault(history, OrderedDict())
        quiet = self._quiet.setdefault(history, OrderedDict())
        if name in quiet:
            active[name] = quiet.pop(name)
        if name not in active:
            return None
        active.move_to_end(name)
        self._calm(active, quiet)
        return active[name]

    def _make(self, name: str, history: History) -> _Channel:
        active, quiet = self._active[history], self._quiet[history]
        active[name] = _Channel(history, self._epoch)
        if len(active) + len(quiet) > history.max_channels:
            (quiet or active).popitem(last=False)
            self._epoch = secrets.token_hex(6)  # or it would be that of the channel again
        return active[name]

    def _calm(self, active: OrderedDict[str, _Channel], quiet: OrderedDict[str, _Channel]) -> None:
        """Forget the messages of the channel that was used the longest ago, if all have expired."""
        name, oldest = next(iter(active.items()))
        expires = oldest.messages[-1][0] if oldest.messages else -math.inf
        if len(active) > 1 and expires <= time.monotonic():
            oldest.messages.clear()
            oldest.keys = None  # they have expired, too
            quiet[name] = active.pop(name)

    def publish(self, event: Event, key: str | None, add: Callable[[Event], list[T]]) -> list[T]:
        """Give an event its position, pass it to `add`, keep it, and return what `add` returned.

        An event whose key is known gets the position of the one that was published before, and is
        neither passed on nor kept.

        Raises:
            Full: `add` has no space for it. It is not kept.
        """
        history = self._histories.find(event.channel)
        if history is None or isinstance(event, Command):
            return add(event)
        channel = self._find(event.channel, history) or self._make(event.channel, history)
        if key is not None and (offset := channel.offset_of(key)) is not None:
            event.position = Position(channel.epoch, offset)
            return []
        event.position = Position(channel.epoch, channel.top + 1)
        added = add(event)
        channel.append(event, key)
        return added
