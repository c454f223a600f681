"""Backpressure: a client's message waits until the other members of its channel can take it.

`publish` does not wait for slow clients, but a message that a client sends does: nothing more is
read from the sender until then. So a sender slows down before another client of the same event
loop, which reads as fast as its connection allows, is cut off. How long one client may delay the
others is bounded: see `space.Draining`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

from .event import Event
from .group import Member
from .hub import Hub
from .shard import Shard
from .sync.space import Draining

# Messages that are on their way to the buffers may take this part of one buffer without a check.
# As much again may be being delivered at the moment. Clients' messages fill at most half of a
# buffer, so both, and one more message of the default maximum size, fit into the other half.
UNCHECKED_PART = 8

# How often a message waits for others to be delivered if more of them keep coming.
MAX_TRIES = 8

# Held by the sender that waits for messages to be delivered, one for each loop. See `wait`.
_locks: WeakKeyDictionary[Shard, asyncio.Lock] = WeakKeyDictionary()


def max_unchecked(hub: Hub) -> int:
    """Return how many bytes may be on their way to a loop before a message has to `wait`."""
    return hub.settings.max_buffer // UNCHECKED_PART


def is_behind(members: Iterable[Member]) -> bool:
    """Whether something is buffered for one of them. Then a message has to `wait`."""
    for member in members:  # noqa: SIM110  # a generator costs more than a few members
        if member.outbox.size:
            return True
    return False


def is_broker_busy(hub: Hub, event: Event) -> bool:
    """Whether too many of this hub's messages have not come back from the broker yet."""
    cost = hub.link.outstanding
    return cost > 0 and cost + event.cost > max_unchecked(hub)


async def wait(hub: Hub, shard: Shard, event: Event) -> None:
    """Wait until the event may be published. Publish it at once when this returns."""
    while True:
        if _is_unchecked(hub, shard, event):
            with hub.lock:
                lock = _locks.setdefault(shard, asyncio.Lock())
            async with lock:  # or several senders would find the same space, and all would use it
                await _deliver_pending(hub, shard, event)
                draining = _find_full(hub, shard, event)
        else:
            draining = _find_full(hub, shard, event)
        if draining is None:
            return
        hub.registry.count_waiting(1)
        try:
            await draining.wait()
        finally:
            hub.registry.count_waiting(-1)


def _is_unchecked(hub: Hub, shard: Shard, event: Event) -> bool:
    """Whether so much is on its way to the buffers that their sizes say too little."""
    return shard.queue.size + event.cost > max_unchecked(hub) or is_broker_busy(hub, event)


async def _deliver_pending(hub: Hub, shard: Shard, event: Event) -> None:
    """Wait until pending messages are in the buffers, unless others keep adding more."""
    if is_broker_busy(hub, event):
        await hub.link.round_trip()
    tries = 0
    while not tries or (shard.awake and tries < MAX_TRIES):
        tries += 1
        await hub.dispatcher.settle()


def _find_full(hub: Hub, shard: Shard, event: Event) -> Draining | None:
    """Return what to wait for: one of the members without space for the event."""
    members = shard.may_be_behind(event.channel)
    timeout = hub.settings.tuning.space_timeout
    for member in filter(_may_delay, members):
        outbox = member.outbox
        draining = outbox.draining
        if (draining is None or not draining.full) and not outbox.has_space(event.cost):
            if draining is None:
                _watch(members, timeout)
                draining = outbox.draining
            assert draining is not None
            draining.full = True
        if draining is not None and draining.full and not draining.over:
            return draining
    return None


def _watch(members: Sequence[Member], timeout: float) -> None:
    """Watch all members that are behind, or they would be waited for one after another."""
    for member in filter(_may_delay, members):
        member.outbox.draining = member.outbox.draining or Draining(member, timeout)


def _may_delay(member: Member) -> bool:
    """Whether it is behind. No sender waits for a member whose policy is to drop messages."""
    return member.outbox.size > 0 and member.outbox.overflow == "disconnect"
