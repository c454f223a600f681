"""What a client says waits until what was said before is back, or until it is known not to come."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from starcast import Broadcast, PublishQueueFull
from support import Bus, Peer, starcast_tasks, until

pytestmark = pytest.mark.anyio

MUCH = "x" * 9000  # more than an eighth of the buffer


@pytest.fixture
async def room(broker):
    """A hub, and a client of it that has said much already."""
    hub = Broadcast(backend=Bus(broker), max_buffer=64 * 1024)
    async with hub:
        peer = Peer()
        serving = asyncio.create_task(hub.serve(peer.websocket, "room"))
        await until(lambda: hub.channels == {"room": 1})
        peer.say(MUCH)
        await until(lambda: len(peer.got) == 1)
        yield hub, peer
        broker.open.set()
        peer.leave()
        await serving
    await until(lambda: not starcast_tasks())


async def test_what_never_comes_back_is_not_waited_for_long(broker, room):
    hub, peer = room
    ((bus, channels),) = broker.buses.items()
    channels.discard(hub._hub.link.probe.channel)
    peer.say(MUCH)
    peer.say("and more")
    await until(lambda: peer.got == [MUCH, MUCH, "and more"])
    bus.deliver(hub._hub.link.probe.channel, b"too late")


async def test_a_connection_that_breaks_brings_nothing_back(broker, room, monkeypatch):
    hub, peer = room
    monkeypatch.setattr("starcast.broker.sender.TIMEOUT", 1000.0)
    channels = next(iter(broker.buses.values()))
    channels.discard(hub._hub.link.probe.channel)
    calls = len(broker.calls)
    peer.say(MUCH)
    await until(lambda: len(broker.calls) > calls)
    broker.kill()
    broker.up = True
    await until(lambda: len(peer.got) == 2)
    assert hub.stats().backend.gaps == 1


async def test_nothing_is_asked_of_a_broker_for_which_too_much_waits(
    broker, room, monkeypatch, caplog
):
    hub, peer = room
    monkeypatch.setattr("starcast.dispatcher.PUBLISH_TIMEOUT", 0.1)
    broker.open.clear()
    hub.publish_nowait("elsewhere", "x")
    await until(lambda: broker.stalled)
    for size in (1_000_000, 10_000, 100, 1):  # to the brim
        with contextlib.suppress(PublishQueueFull):
            while True:
                hub.publish_nowait("elsewhere", "x" * size)
    peer.say(MUCH)
    await until(lambda: peer.closed == 1013)
    assert "messages of clients are being lost" in caplog.text
    caplog.clear()
