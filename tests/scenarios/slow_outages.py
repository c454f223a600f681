"""Faults 11 to 13 of docs/reference/faults.md, unabridged: a minute is a minute.

Too long for every run, so its name keeps it out: `pytest tests/scenarios/slow_outages.py` runs it
and prints how many seconds each took. `.ci/slow` does that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from starcast import BackendUnavailable, Broadcast, Gap, GapSubscriber
from support import Peer, joined, listening, starcast_tasks, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

ROUNDS = 5  # of row 11, because the waits between two attempts are random


@pytest.fixture
async def all_back(anyio_backend):
    """After the test, no task of starcast is left."""
    yield
    await until(lambda: not starcast_tasks())


@pytest.fixture
def tell(server, capsys):
    """Print what was measured, on a line of its own."""

    def tell(what: str) -> None:
        with capsys.disabled():
            print(f"\n{urlsplit(server.url).scheme}: {what}")

    return tell


class Room:
    """A hub, with two subscribers and a client in the room, and one subscriber elsewhere."""

    def __init__(self, url: str) -> None:
        self.hub = Broadcast(url, name="slow-outages")
        self.got: dict[str, list[Any]] = {"one": [], "two": [], "elsewhere": []}
        self.peer = Peer()
        self._tasks: list[asyncio.Task[None]] = []

    async def read(self, name: str, subscriber: GapSubscriber) -> None:
        async for event in subscriber:
            self.got[name].append(event if isinstance(event, Gap) else event.message)

    @property
    def state(self) -> str:
        return self.hub.stats().backend.state

    @property
    def gaps(self) -> list[int]:
        """How many gaps each of the subscribers was told."""
        return [sum(isinstance(event, Gap) for event in got) for got in self.got.values()]

    def has(self, message: str) -> bool:
        """Whether everybody in the room has got it."""
        return all(message in got for got in (self.got["one"], self.got["two"], self.peer.got))


@contextlib.asynccontextmanager
async def room(url: str) -> AsyncIterator[Room]:
    made = Room(url)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(made.hub)
        await made.hub.connect(made.peer.websocket, "room")
        tasks = []
        for name in made.got:
            channel = "elsewhere" if name == "elsewhere" else "room"
            subscriber = made.hub.subscribe(channel, gaps=True)
            await stack.enter_async_context(subscriber)
            tasks.append(asyncio.create_task(made.read(name, subscriber)))
        yield made
    await asyncio.gather(*tasks)  # they end with the hub


async def test_row_11_killed_and_back_after_a_second(server, all_back, tell):
    took = []
    async with room(server.url) as one, room(server.url) as two:
        for number in range(1, ROUNDS + 1):
            server.kill()
            await until(lambda: one.state == two.state == "reconnecting")
            await asyncio.sleep(1)  # what the row says
            await asyncio.to_thread(server.start)
            began = time.monotonic()  # it takes connections
            # Somebody who was not there during the outage speaks, until he is heard.
            async with Broadcast(server.url, name="slow-outages") as fresh:
                while not (one.has(f"word {number}") and two.has(f"word {number}")):
                    assert time.monotonic() - began < 10
                    await fresh.publish("room", f"word {number}")
                    await asyncio.sleep(0.01)
            took.append(time.monotonic() - began)
            assert one.gaps == two.gaps == [number] * 3
            assert await one.hub.healthy()
            # They speak and hear themselves.
            last = f"own {number}"
            await one.hub.publish("room", last)
            await until(lambda: one.has(last) and two.has(last))  # noqa: B023  # awaited here
        tell("row 11, seconds until a message arrives: " + ", ".join(f"{t:.2f}" for t in took))
        assert max(took) < 2


def memory() -> float:
    """MiB that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.asynccontextmanager
async def door(port: int) -> AsyncIterator[list[float]]:
    """Let nobody in, and note who knocks when."""
    knocks: list[float] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        knocks.append(time.monotonic())
        writer.transport.abort()

    async with listening(accept, port):
        yield knocks


async def test_row_12_away_for_a_minute(server, all_back, tell):
    async with room(server.url) as there:
        hub = there.hub
        await hub.publish("room", "before")
        await until(lambda: there.has("before"))
        server.kill()
        away = time.monotonic()
        await until(lambda: there.state == "reconnecting")
        handed, most_waiting = 0, 0

        async def flood() -> None:
            nonlocal handed, most_waiting
            while True:
                for _ in range(100):
                    hub.publish_nowait("room", "x" * 1000 + str(handed))
                    handed += 1
                most_waiting = max(most_waiting, hub.stats().backend.queued)
                await asyncio.sleep(0.01)

        raised = []

        async def try_for(seconds: float) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                began = time.monotonic()
                with pytest.raises(BackendUnavailable):
                    await hub.publish("room", "in vain")
                raised.append(time.monotonic() - began)
                assert there.state == "reconnecting"
                assert not await hub.healthy()

        flooding = asyncio.create_task(flood())
        await try_for(5)  # until everything has grown to its size
        before = memory()
        await try_for(25)
        async with door(urlsplit(server.url).port) as knocks:
            await try_for(30)
        grown = memory() - before
        flooding.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await flooding
        backend = hub.stats().backend
        seconds = time.monotonic() - away
        pauses = [later - earlier for earlier, later in itertools.pairwise(knocks)]
        tell(
            f"row 12, away for {seconds:.0f} s: publish raised {len(raised)} times, after "
            f"{min(raised):.2f} to {max(raised):.2f} s; {len(knocks)} attempts in 30 s, "
            f"{min(pauses):.2f} to {max(pauses):.2f} s apart; of {handed} messages of 1 kB "
            f"{backend.lost} were counted as lost, {most_waiting} waited at most, "
            f"{grown:.1f} MiB more in memory"
        )
        assert seconds > 60
        assert max(raised) < 2.5
        assert len(knocks) > 15
        assert max(pauses) < 2
        assert most_waiting < 100  # it is lost at once, and so not kept
        assert backend.lost == handed
        assert grown < 16  # of some hundred that were handed over
        assert backend.error
        await asyncio.to_thread(server.start)
        began = time.monotonic()
        await until(lambda: all(there.gaps))
        took = time.monotonic() - began
        tell(f"row 12, back {took:.2f} s after the broker")
        assert took < 2
        assert there.gaps == [1, 1, 1]
        await hub.publish("room", "after")
        await hub.publish("elsewhere", "after")
        await until(lambda: there.has("after") and "after" in there.got["elsewhere"])
        another = await joined(hub, "new")
        await hub.publish("new", "hello")
        await until(lambda: another.got == ["hello"])
        assert there.peer.got == ["before", "after"]
        assert await hub.healthy()
        assert hub.stats().backend.lost == handed


async def test_row_13_frozen(server, all_back, tell):
    async with room(server.url) as there:
        assert await there.hub.healthy()
        server.freeze()
        began = time.monotonic()
        await until(lambda: there.state == "reconnecting")
        noticed = time.monotonic() - began
        assert not await there.hub.healthy()
        assert there.gaps == [0, 0, 0]  # it is not over
        server.thaw()
        began = time.monotonic()
        await until(lambda: all(there.gaps))
        told = time.monotonic() - began
        tell(f"row 13, noticed after {noticed:.2f} s, gap told {told:.2f} s after SIGCONT")
        assert noticed < 10
        assert there.gaps == [1, 1, 1]
        await there.hub.publish("room", "after")
        await until(lambda: there.has("after"))
