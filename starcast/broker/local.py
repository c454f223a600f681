"""LocalLink: the link of a hub in memory, which has no broker. See `Link` for what the calls do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sized

from .. import logs
from ..event import Event
from ..servers import workers
from .sender import OnLost

NOBODY = (
    "published to a memory:// hub that has had no client and no subscriber, so nobody got it; its "
    "clients must be in this process, on this very Broadcast object. To reach those of another "
    "process, give both the URL of a broker; a job without an event loop uses starcast.Publisher"
)


class LocalLink:
    """Delivers what is published to the clients of this process. Made on any thread.

    Args:
        deliver: Called with each event. It raises if no member gets it.
        shards: The event loops that have had clients.
    """

    is_local = True
    alive = True
    outstanding = 0

    def __init__(self, deliver: Callable[[Event], None], shards: Sized) -> None:
        self._deliver = deliver
        self._shards = shards

    def publish(self, event: Event, wait: bool = False, on_lost: OnLost | None = None) -> None:
        """Deliver an event, so there is nothing to wait for and nothing is lost.

        Raises:
            PublishQueueFull: An event loop has too much to deliver.
        """
        self._deliver(event)
        if not self._shards:
            logs.once(("published to nobody",), NOBODY, level=logging.INFO)

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

    async def healthy(self) -> bool:
        return True

    def stats(self) -> None:
        return None
