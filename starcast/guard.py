"""Guard: moves a hub's connection to the broker to another event loop when its own has ended.

Otherwise clients that only listen, on the loops that are left, would never hear anything again.
"""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

from .broker.life import REST
from .broker.link import Link
from .lifecycle import Lifecycle
from .registry import Registry
from .shard import Shard

# Seconds between two looks at the connection, on each event loop that has somebody.
GUARD_EVERY = 0.5


class Guard:
    """See the module.

    Args:
        link: The connection.
        registry: Knows the event loops and who is on them.
        lifecycle: Knows whether the hub is open.
    """

    def __init__(self, link: Link, registry: Registry, lifecycle: Lifecycle) -> None:
        self._link = link
        self._registry = registry
        self._lifecycle = lifecycle
        # The shards that look, and the task of each that moves the connection there.
        self._moves: WeakKeyDictionary[Shard, asyncio.Task[None] | None] = WeakKeyDictionary()

    def watch(self) -> None:
        """Look after the connection from this event loop for as long as somebody is on it."""
        with self._registry.lock:
            shard = self._registry.here()
            if shard in self._moves:
                return
            self._moves[shard] = None
        self._look(shard)

    def _look(self, shard: Shard) -> None:
        if not (self._lifecycle.open and shard.channels):
            with self._registry.lock:
                del self._moves[shard]
            return
        move, wait = self._moves[shard], GUARD_EVERY
        if move is not None and move.cancelled():
            # Most likely this loop is ending too, and would not wait for another task.
            self._moves[shard], wait = None, REST
        elif not (self._link.alive or self._link.resting) and (move is None or move.done()):
            self._moves[shard] = shard.loop.create_task(self._move())
        shard.loop.call_later(wait, self._look, shard)

    async def _move(self) -> None:
        async with self._lifecycle.switching:
            if self._lifecycle.open and not self._link.alive:
                await self._link.start(patient=False)
