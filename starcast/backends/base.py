"""The contract of a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..event import Event

Deliver = Callable[[Event], None]


class Backend(Protocol):
    """Carries events from whoever publishes to every hub that shall deliver them.

    Implement these three calls and pass an instance as `Broadcast(backend=...)`.
    """

    async def start(self, deliver: Deliver) -> None:
        """Begin to carry. Call `deliver(event)` for each event that arrives, from any thread.

        `deliver` returns at once; it raises `PublishQueueFull` if nothing was delivered because an
        event loop has too much waiting already.
        """

    async def stop(self) -> None:
        """Stop carrying. Harmless when it is stopped; `start` may follow."""

    def publish(self, event: Event) -> None:
        """Hand an event over, in order. From any thread; before `start` there is nobody to get it.

        Raises:
            PublishQueueFull: The event was not taken.
        """
