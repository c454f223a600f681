"""LocalLink: the link of a hub in memory, which has no broker. See `Link` for what the calls do."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from .. import logs
from ..backends.base import Stored
from ..event import Event
from ..history import Histories, Position
from ..servers import workers
from . import envelope
from .memory_log import HUB, MemoryLog
from .sender import OnLost

NOBODY = (
    "published to a memory:// hub that has had no client and no subscriber, so nobody got it; its "
    "clients must be in this process, on this very Broadcast object. To reach those of another "
    "process, give both the URL of a broker; a job without an event loop uses starcast.Publisher"
)


class Registry(Protocol):
    """What the link needs of its `registry.Registry`."""

    @property
    def lock(self) -> AbstractContextManager[object]:
        """The hub's."""

    @property
    def shards(self) -> Mapping[Any, Any]:
        """The event loops that have had clients."""

    def add(self, event: Event) -> list[Any]:
        """Queue an event for the members of its channel, and return what to wake."""

    def wake(self, shards: Iterable[Any]) -> None:
        """Let the loops deliver."""


class LocalLink:
    """Delivers what is published to the clients of this process. Made on any thread.

    Args:
        registry: The hub's.
        histories: Which channels have a history.
    """

    is_local = True
    alive = True
    outstanding = 0

    def __init__(self, registry: Registry, histories: Histories) -> None:
        self._registry = registry
        self._histories = histories
        self._log = MemoryLog(histories) if histories.any else None

    def publish(
        self,
        event: Event,
        wait: bool = False,
        on_lost: OnLost | None = None,
        key: str | None = None,
    ) -> None:
        """Deliver an event, so there is nothing to wait for and nothing is lost.

        Raises:
            PublishQueueFull: An event loop has too much to deliver.
        """
        registry = self._registry
        with registry.lock:
            if self._log is None:
                wake = registry.add(event)
            else:
                wake = self._log.publish(event, key, registry.add)
        if wake:
            registry.wake(wake)
        if not registry.shards and event.position is None:
            logs.once(("published to nobody",), NOBODY, level=logging.INFO)

    def position(self, channel: str) -> Position | None:
        """Return the place that clients have reached. With the lock held."""
        return None if self._log is None else self._log.position(channel)

    def unpack(self, channel: str, payload: bytes) -> Event:
        """Return the event that was kept as this."""
        return envelope.unpack(channel, payload, HUB)

    async def read(self, channel: str, since: int | None, limit: int, reverse: bool) -> Stored:
        """Return what is kept of a channel that has a history."""
        history = self._histories.find(channel)
        assert history is not None
        assert self._log is not None
        with self._registry.lock:
            return self._log.read(channel, history, since, limit, reverse)

    async def acquire(self, channel: str) -> None:
        pass

    def acquire_again(self, channel: str) -> None:
        pass

    def release(self, channel: str) -> None:
        pass

    async def start(self, seconds: float) -> None:
        workers.warn_of_workers()

    def stop_opening(self) -> None:
        pass

    def take_over(self) -> None:
        pass

    async def ready(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def round_trip(self) -> None:
        """Nothing is on its way: what is published is delivered at once."""

    async def catch_up(self, channel: str) -> None:
        """Nothing is behind: what is published is delivered at once."""

    async def healthy(self) -> bool:
        return True

    def stats(self) -> None:
        return None
