"""For the tests of histories."""

from __future__ import annotations

import pytest

from history.brokers import kept_url as kept_url  # a fixture
from history.keeping import TUNING, KeepingBroker, KeepingBus
from starcast import Broadcast, History
from support import starcast_tasks, until

HISTORY = {"room*": History(size=10, ttl=60), "*": None}


@pytest.fixture
def broker(anyio_backend: str) -> KeepingBroker:
    return KeepingBroker()


@pytest.fixture
async def hub(broker: KeepingBroker):
    """A hub whose broker is in this process."""
    async with Broadcast(backend=KeepingBus(broker), history=HISTORY, tuning=TUNING) as hub:
        yield hub
        broker.open.set()
    await until(lambda: not starcast_tasks())
    backend = hub.stats().backend
    assert backend.channels == backend.queued == 0
