"""What a client says waits until what was said before is back, or until it is known not to come."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from broker.conftest import make_hub, quick, tuned
from starcast import PublishQueueFull, Tuning
from support import Bus, Peer, starcast_tasks, until

pytestmark = pytest.mark.anyio

MUCH = "x" * 9000  # more than an eighth of the buffer


@pytest.fixture
def tuning() -> Tuning:
    return quick()


@pytest.fixture
async def room(broker, tuning):
    """A hub, and a client of it that has sent much already."""
    hub = make_hub(Bus(broker), max_buffer=64 * 1024, tuning=tuning)
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


async def test_messages_wait_until_earlier_ones_are_back(broker, room):
    hub, peer = room
    for _ in range(20):
        peer.say(MUCH)
    await until(lambda: len(peer.got) == 21)
    assert hub.stats().dropped == hub.stats().slow_clients == 0
    probes = broker.probes
    assert probes > 1


async def test_what_never_comes_back_is_not_waited_for_long(broker, room):
    _, peer = room
    ((connection, channels),) = broker.connections.items()
    channels.discard(broker.probe_channel)
    peer.say(MUCH)
    peer.say("and more")
    await until(lambda: peer.got == [MUCH, MUCH, "and more"])
    connection.deliver(broker.probe_channel, b"too late")


@tuned(publish_timeout=1000.0)
async def test_a_connection_that_breaks_brings_nothing_back(broker, room):
    hub, peer = room
    channels = next(iter(broker.connections.values()))
    channels.discard(broker.probe_channel)
    calls = len(broker.calls)
    peer.say(MUCH)
    await until(lambda: len(broker.calls) > calls)
    broker.restart()
    await until(lambda: len(peer.got) == 2)
    assert hub.stats().backend.gaps == 1


@tuned(publish_timeout=0.1)
async def test_nothing_is_asked_of_a_broker_for_which_too_much_waits(broker, room, caplog):
    hub, peer = room
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
