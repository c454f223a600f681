"""A line that is slow is not dead, and one that is dead is noticed: with real brokers behind it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest

from backends.front import SlowLine
from starcast import BackendUnavailable, Broadcast, Gap, Tuning
from starcast.backends import from_url
from support import Changed, Peer, until

pytestmark = pytest.mark.anyio

PATIENCE = 0.2  # seconds without any sign of life
PATIENT = Tuning(probe_timeout=PATIENCE)
RATE = 200_000  # bytes a second that a slow line carries


@pytest.fixture
async def line(url) -> AsyncIterator[SlowLine]:
    """A line to each broker."""
    async with SlowLine(urlsplit(url).port) as line:
        yield line


def url_of(line: SlowLine, url: str) -> str:
    """The URL of a broker at the end of the line."""
    parts = urlsplit(url)
    netloc = parts.netloc.replace(f":{parts.port}", f":{line.port}")
    return parts._replace(netloc=netloc).geturl()


def by(line: SlowLine, url: str, **options: object) -> Broadcast:
    """A hub at the end of the line."""
    options = {"probe_interval": 0.05, "tuning": PATIENT, **options}
    return Broadcast(url_of(line, url), **options)


@pytest.mark.parametrize("size", [500, 120_000])
async def test_what_arrives_is_a_sign_of_life(line, url, size):
    """The probe waits behind more than its time, be it in many messages or in a single one."""
    tuning = Tuning(probe_timeout=PATIENCE, publish_timeout=PATIENCE)
    async with by(line, url, tuning=tuning) as hub, Broadcast(url) as near:
        peer = Peer()
        await hub.connect(peer.websocket, "room")
        line.rate = RATE
        began, count = time.monotonic(), 120_000 // size
        for number in range(count):
            near.publish_nowait("room", str(number).ljust(size))
        passed = line.passed
        await until(lambda: line.passed > passed + RATE / 20)
        assert await hub.healthy()
        await until(lambda: len(peer.got) == count)
        assert time.monotonic() - began > 2 * PATIENCE
        assert [int(message) for message in peer.got] == list(range(count))
        assert hub.stats().backend.gaps == 0
        assert hub.stats().backend.state == "connected"
        line.rate = math.inf


async def test_a_line_that_falls_silent_in_the_middle_is_noticed(line, url):
    async with (
        by(line, url) as hub,
        Broadcast(url) as near,
        hub.subscribe("room", gaps=True) as subscriber,
    ):
        line.rate = RATE
        near.publish_nowait("room", "first")
        near.publish_nowait("room", "x" * RATE)
        assert (await anext(subscriber)).message == "first"
        passed = line.passed
        await until(lambda: line.passed > passed + RATE / 10)
        line.silent = {0, 1}
        began = time.monotonic()
        await until(lambda: hub.stats().backend.state == "reconnecting")
        assert time.monotonic() - began < PATIENCE + 5
        assert "did not answer" in hub.stats().backend.error
        line.silent, line.rate = set(), math.inf
        assert isinstance(await anext(subscriber), Gap)


@pytest.mark.parametrize("url", ["redis", "postgres"], indirect=True)
@pytest.mark.parametrize("dead", [0, 1])
async def test_one_of_two_connections_is_dead(line, url, dead):
    """Be it the one that brings nothing, or the one on which nothing is published any more."""
    async with by(line, url) as hub, Broadcast(url) as near, hub.subscribe("room"):
        flood = asyncio.create_task(_flood(hub, near))
        await asyncio.sleep(0)
        line.silent = {line.made - 2 + dead}  # opening may have taken more than one attempt
        await until(lambda: hub.stats().backend.state == "reconnecting", 10)
        line.silent = set()
        await until(lambda: hub.stats().backend.gaps)
        flood.cancel()


async def test_answers_are_no_messages(line, url):
    """A broker that confirms whatever it is asked, and delivers nothing any more."""
    channels = []

    def note(connection):
        subscribe = connection.subscribe

        async def noting(channel):
            channels.append(channel)
            await subscribe(channel)

        connection.subscribe = noting

    backend = Changed(from_url(url_of(line, url)), note)
    async with Broadcast(backend=backend, probe_interval=0.05, tuning=PATIENT) as hub:
        await hub.connect(Peer().websocket, "quiet")
        await backend.connection.unsubscribe(channels[0])  # that of its probes
        busy = asyncio.create_task(_come_and_go(hub))
        await until(lambda: hub.stats().backend.gaps)
        busy.cancel()
        await asyncio.wait([busy])


async def _come_and_go(hub: Broadcast) -> None:
    while True:
        peer = Peer()
        with contextlib.suppress(BackendUnavailable):
            await hub.connect(peer.websocket, "busy")
            await hub.publish("elsewhere", "x")
        await hub.disconnect(peer.websocket)


async def _flood(*hubs: Broadcast) -> None:
    while True:
        for hub in hubs:
            hub.publish_nowait("room", "x")
        await asyncio.sleep(0.01)


async def test_a_blocked_loop_is_told_what_it_misses_of_a_broker(url, other, caplog):
    """Row 33. Who is on the loop of the connection gets everything."""
    gaps: list[Gap] = []
    got: list[object] = []
    ready, go = threading.Event(), threading.Event()

    async def listen(hub: Broadcast) -> None:
        async with hub.subscribe("room", gaps=True) as subscriber:
            ready.set()
            go.wait(20)  # that is the point
            async for item in subscriber:
                got.append(item)

    async with (
        Broadcast(url, name="both", on_gap=gaps.append, tuning=Tuning(max_pending=20_000)) as hub,
        Broadcast(url, name="both") as near,
    ):
        peer = Peer()
        await hub.connect(peer.websocket, "room")
        listening = asyncio.run_coroutine_threadsafe(listen(hub), other.loop)
        await asyncio.to_thread(ready.wait, 20)
        for number in range(500):
            near.publish_nowait("room", str(number))
            if number % 100 == 99:  # not too much at once for the loop that is not blocked
                await until(lambda: len(peer.got) == number + 1)  # noqa: B023  # awaited here
        lost = hub.stats().backend.lost
        assert lost
        go.set()
        await until(lambda: gaps)
        await near.publish("room", "500")
        await until(lambda: len(got) == 502 - lost)
    await asyncio.wrap_future(listening)
    numbers = [item if isinstance(item, Gap) else int(item.message) for item in got]
    assert numbers == [*range(500 - lost), gaps[0], 500]
    assert [int(message) for message in peer.got] == list(range(501))
    assert f"missed {lost} messages" in caplog.text
