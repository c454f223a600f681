"""For the tests of the connection to a broker: a broker that a test can stop at will."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from starcast import Broadcast, Tuning
from support import Broker, Bus, starcast_tasks, until

# With short waits.
TUNING = Tuning(publish_timeout=0.5, restart_delay=0.05, first_backoff=0.01, max_backoff=0.02)


def quick(**changes: float) -> Tuning:
    """Return these timings with changes."""
    return dataclasses.replace(TUNING, **changes)


def tuned(**changes: float) -> pytest.MarkDecorator:
    """Give the fixture `hub` these timings with changes."""
    return pytest.mark.parametrize("tuning", [quick(**changes)], ids=["tuned"])


def make_hub(backend: Bus, **options: Any) -> Broadcast:
    """Return a hub with short waits."""
    return Broadcast(backend=backend, **{"tuning": TUNING, **options})


@pytest.fixture(autouse=True)
def no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backends of these tests see channels as an app calls them.

    `test_naming.py` and `scenarios/test_two_hubs.py` test that the hub's name goes before them.
    """
    monkeypatch.setattr("starcast.hub.NamedBackend", lambda backend, name: backend)


@pytest.fixture
def broker(anyio_backend: str) -> Broker:
    return Broker()


@pytest.fixture
def bus(broker: Broker) -> Bus:
    return Bus(broker)


@pytest.fixture
def tuning() -> Tuning:
    return TUNING


@pytest.fixture
async def hub(broker: Broker, bus: Bus, tuning: Tuning):
    hub = make_hub(bus, open_timeout=0.5, tuning=tuning)
    yield hub
    broker.open.set()
    await hub.disconnect()
    await until(lambda: not starcast_tasks())
    backend = hub.stats().backend
    assert backend.channels == backend.queued == 0
