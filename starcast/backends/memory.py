"""The backend of one process: what is published is delivered, and nothing lies in between."""

from __future__ import annotations

from ..event import Event
from .base import Deliver


class MemoryBackend:
    """`Broadcast("memory://")`."""

    def __init__(self) -> None:
        self._deliver: Deliver | None = None

    async def start(self, deliver: Deliver) -> None:
        self._deliver = deliver

    async def stop(self) -> None:
        self._deliver = None

    def publish(self, event: Event) -> None:
        if self._deliver is not None:
            self._deliver(event)
