"""For the tests of the connection to a broker: a broker that a test can stop at will."""

from __future__ import annotations

import pytest

from starcast import Broadcast, guard
from starcast.broker import life, link, opening, sender
from support import Broker, Bus, starcast_tasks, until


@pytest.fixture(autouse=True)
def no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backends of these tests see channels as an app calls them.

    That the hub's name goes before them is the matter of `test_naming.py` and
    `scenarios/test_two_hubs.py`.
    """
    monkeypatch.setattr("starcast.hub.NamedBackend", lambda backend, name: backend)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "TIMEOUT", 0.5)
    monkeypatch.setattr(link, "TIMEOUT", 0.5)
    monkeypatch.setattr(guard, "GUARD_EVERY", 0.02)
    monkeypatch.setattr(life, "REST", 0.05)
    monkeypatch.setattr(life, "STOP_LOOK", 0.02)
    monkeypatch.setattr(opening, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(opening, "LONGEST_WAIT", 0.02)


@pytest.fixture
def broker(anyio_backend: str) -> Broker:
    return Broker()


@pytest.fixture
async def hub(broker: Broker):
    hub = Broadcast(backend=Bus(broker), open_timeout=0.5)
    yield hub
    broker.open.set()
    await hub.disconnect()
    await until(lambda: not starcast_tasks())
    assert not hub._hub.link.subscriptions.holds
    assert not len(hub._hub.link._sender.queue)
