"""Missed: what an event loop that is blocked has no space for, of what a broker sends.

Whoever publishes in memory waits for such a loop, or is told. A broker does neither, and the other
loops must not wait. So the loop misses messages, and its members are told of a gap.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from .event import Gap
from .group import Member
from .history import Histories
from .shard import Shard


class Missed:
    """From the first message that an event loop misses until it goes on. With the hub's lock held.

    It waits for space in the loop's queue, like anybody. Until then the loop gets nothing from the
    broker, even if it would fit: so what is missing is missing in one place, and there the gap is.

    Args:
        shard: That of the loop.
        since: The time before which nothing is missing, in seconds since 1970.
        on_end: Called with this, on the loop, when its queue is empty again.
    """

    def __init__(self, shard: Shard, since: float, on_end: Callable[[Missed], None]) -> None:
        self.shard = shard
        self._on_end = on_end
        self._since = since
        self._count = 0
        self._channels: set[str] = set()  # those that have members on the loop
        shard.queue.waiters.add(self)

    def add(self, channel: str) -> None:
        """Note that a message of this channel is missed."""
        self._count += 1
        self._channels.add(channel)

    def set(self) -> None:
        """Note that everything was taken from the queue. The queue calls this."""
        self._on_end(self)

    def gap(self) -> Gap:
        seconds = time.time() - self._since
        error = f"an event loop was blocked or too slow and missed {self._count} messages"
        return Gap(self._since, seconds, error)

    def members(self, histories: Histories) -> tuple[dict[Member, Shard], dict[Member, Shard]]:
        """Return those that may have missed something of channels with a history, and others."""
        kept: dict[Member, Shard] = {}
        others: dict[Member, Shard] = {}
        for channel in self._channels:
            found = others if histories.find(channel) is None else kept
            found |= dict.fromkeys(self.shard.channels.get(channel, {}), self.shard)
        return kept, {member: shard for member, shard in others.items() if member not in kept}
