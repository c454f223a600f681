"""A blocked event loop is not an outage: somebody's handler sleeps, and the answers are there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from starcast import BackendUnavailable, Broadcast, Tuning
from starcast.backends import from_url
from starcast.sync.deadline import Deadline
from support import BUSY, Changed, Peer, until

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


async def blocked(start: Callable[[], object], seconds: float) -> None:
    """Start something, and block the event loop when it has asked the broker."""
    await asyncio.sleep(0)
    task = asyncio.ensure_future(start())
    await asyncio.sleep(0)
    time.sleep(seconds)  # noqa: ASYNC251  # that is the point
    await task


async def test_publish_and_connect_succeed_after_a_handler_that_sleeps(url):
    async with Broadcast(url) as hub:
        peer = Peer()
        await blocked(lambda: hub.connect(peer.websocket, "room"), 2.6)
        await blocked(lambda: hub.publish("room", "hello"), 2.6)
        await blocked(hub.healthy, 2.6)
        await until(lambda: peer.got == ["hello"])
        assert hub.stats().backend.gaps == 0


@pytest.mark.parametrize("seconds", [0.45, 0.5, 0.51, 0.6])
async def test_whenever_the_timer_fires(url, seconds):
    """Before the loop is free, in that moment, and after it."""
    async with Broadcast(url, tuning=Tuning(publish_timeout=0.5)) as hub:
        for number in range(3):
            peer = Peer()
            channel = f"room {number}"
            await blocked(lambda: hub.connect(peer.websocket, channel), seconds)  # noqa: B023  # awaited here
            await blocked(lambda: hub.publish(channel, "hello"), seconds)  # noqa: B023  # awaited here
            await until(lambda: peer.got == ["hello"])  # noqa: B023  # awaited here
            await hub.disconnect(peer.websocket)


async def test_opening_and_probing(url):
    probes = []

    def count(connection):
        publish = connection.publish

        def counting(messages):
            probes.append(messages)
            return publish(messages)

        connection.publish = counting

    backend = Changed(from_url(url), count)
    hub = Broadcast(backend=backend, probe_interval=0.05, tuning=Tuning(probe_timeout=0.2))
    await blocked(hub.connect, 0.3)
    async with hub.subscribe("room"):
        for _ in range(5):
            sent = len(probes)
            await until(lambda: len(probes) > sent)  # noqa: B023  # awaited here
            time.sleep(0.3)  # noqa: ASYNC251  # that is the point
        sent = len(probes)
        await until(lambda: len(probes) > sent)
    assert hub.stats().backend.gaps == 0
    assert hub.stats().backend.error is None
    await hub.disconnect()


async def test_what_does_not_come_is_given_up_all_the_same():
    """On a loop that is free, and on one that is blocked again and again."""

    async def busy(seconds: float) -> None:
        async with Deadline(0.1):
            while True:
                time.sleep(seconds)  # noqa: ASYNC251  # that is the point
                await asyncio.sleep(0)

    for seconds in (0.0, 0.04):
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            await busy(seconds)
        assert 0.1 <= time.monotonic() - began < 0.1 + BUSY


async def test_a_broker_that_is_away_is_said_to_be_in_time(server):
    async with Broadcast(server.url) as hub:
        server.kill()
        began = time.monotonic()
        with pytest.raises(BackendUnavailable):
            await hub.publish("room", "in vain")
        assert time.monotonic() - began < 2 + BUSY
