"""Pressure: what a client says waits until its room can take it.

`publish` waits for nobody. Of a client that is relayed, nothing more is read meanwhile, so the
sender is slowed before a reader of the same event loop is lost who keeps up with anything his line
can carry. What one reader may cost the others has a bound: see `space.Draining`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from .event import Event
from .group import Member
from .hub import Hub
from .shard import Shard
from .sync.space import Draining

# What may be on its way to the buffers, as a part of one, without being looked at. As much again is
# perhaps being delivered in this moment. What clients say fills half of a buffer; so this, and a
# message as long as the default allows, still find space in the other half.
UNSEEN = 8

# How often a message waits for others that are on their way, if ever more of them come.
MAX_TRIES = 8

# Whoever hands much over to a loop, one after another. See `wait`.
_turns: WeakKeyDictionary[Shard, asyncio.Lock] = WeakKeyDictionary()


def unseen(hub: Hub) -> int:
    """Return how many bytes may be on their way to a loop before a message has to `wait`."""
    return hub.settings.max_buffer // UNSEEN


def is_on(members: Iterable[Member]) -> bool:
    """Whether something waits for one of them. If not, and little is on its way, don't `wait`."""
    for member in members:  # noqa: SIM110  # a generator costs more than the few members of a room
        if member.outbox.size:
            return True
    return False


def is_on_the_way(hub: Hub, event: Event) -> bool:
    """Whether the broker has so much of this hub that is not back yet. If so, `wait`."""
    cost = hub.link.outstanding
    return cost > 0 and cost + event.cost > unseen(hub)


async def wait(hub: Hub, shard: Shard, event: Event) -> None:
    """Wait until the event may be handed over: at once, before the loop does anything else."""
    while True:
        if _is_much(hub, shard, event):
            with hub.lock:
                turn = _turns.setdefault(shard, asyncio.Lock())
            async with turn:  # or several would find the same space, and all of them use it
                await _settle(hub, shard, event)
                draining = _find(hub, shard, event)
        else:
            draining = _find(hub, shard, event)
        if draining is None:
            return
        await draining.wait()


async def _settle(hub: Hub, shard: Shard, event: Event) -> None:
    """Bring what is on its way to the buffers, as far as others do not always add to it."""
    if is_on_the_way(hub, event):
        await hub.link.round_trip()
    await hub.dispatcher.settled()
    tries = MAX_TRIES
    while shard.awake and (tries := tries - 1):
        await hub.dispatcher.settled()


def _is_much(hub: Hub, shard: Shard, event: Event) -> bool:
    """Whether so much is on its way to the buffers that these do not yet say what they can take."""
    return shard.queue.size + event.cost > unseen(hub) or is_on_the_way(hub, event)


def _find(hub: Hub, shard: Shard, event: Event) -> Draining | None:
    """Return what the event has to wait for, at one of those who will get it."""
    members = shard.not_ready(event.channel)
    timeout = hub.settings.tuning.space_timeout
    for member in filter(_may_be_waited_for, members):
        outbox = member.outbox
        draining = outbox.draining
        if (draining is None or not draining.full) and not outbox.has_space(event.cost):
            if draining is None:
                _begin(members, timeout)
                draining = outbox.draining
            assert draining is not None
            draining.full = True
        if draining is not None and draining.full and not draining.over:
            return draining
    return None


def _begin(members: Iterable[Member], timeout: float) -> None:
    """Begin to look at everybody who is behind, or they would be waited for one after another."""
    for member in filter(_may_be_waited_for, members):
        member.outbox.draining = member.outbox.draining or Draining(member, timeout)


def _may_be_waited_for(member: Member) -> bool:
    """Whether it is behind. A policy that drops messages says that nobody has to wait."""
    return member.outbox.size > 0 and member.outbox.overflow == "disconnect"
