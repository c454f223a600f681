"""Tests of histories with real brokers, which are killed, frozen and emptied."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from history.brokers import SERVERS
from starcast import (
    BackendUnavailable,
    Broadcast,
    Event,
    Gap,
    History,
    Subscriber,
    Tuning,
)
from starcast.backends import from_url
from starcast.testing.history import CHECKS
from support import DEADLINE, joined, starcast_tasks, until

pytestmark = pytest.mark.anyio

HISTORY = {"room*": History(size=100, ttl=60), "*": None}


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A server of each kind that the test may kill."""
    server = SERVERS[request.param]()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_it_keeps_the_contract(kept_url, check):
    await check(lambda: from_url(kept_url))


@pytest.fixture(autouse=True)
async def all_back(anyio_backend: str):
    """After the test, no task of starcast is left."""
    yield
    await until(lambda: not starcast_tasks())


async def publish_until_it_is_there(hub: Broadcast, text: str, key: str) -> str:
    """What a program does that must not lose a message: try again, with the same key."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                return await hub.publish("room", text, idempotency_key=key)
            except BackendUnavailable:
                await asyncio.sleep(0.05)


async def take_all(subscriber: Subscriber, last: str) -> list[Any]:
    """What comes until this message."""
    got: list[Any] = []
    async with asyncio.timeout(DEADLINE):
        while not got or got[-1] != last:
            item = await subscriber.get()
            got.append(item.message if isinstance(item, Event) else item)
    return got


async def test_rows_11_and_12_killed_and_back(server):
    """Every message that was published is received once, whatever was in between."""
    async with (
        Broadcast(server.url, name="both", history=HISTORY) as hub,
        Broadcast(server.url, name="both", history=HISTORY) as other,
    ):
        peer = await joined(hub, "room")
        async with hub.subscribe("room", gaps=True) as subscriber:
            ids = [await publish_until_it_is_there(other, "0", "0")]
            server.kill()
            await until(lambda: hub.stats().backend.state == "reconnecting")
            publishing = [
                asyncio.create_task(publish_until_it_is_there(other, str(n), str(n)))
                for n in range(1, 20)
            ]
            server.start()
            ids += await asyncio.gather(*publishing)
            await publish_until_it_is_there(other, "last", "last")
            got = await take_all(subscriber, "last")
            assert sorted(got) == sorted([*map(str, range(20)), "last"])
            await until(lambda: peer.got == got)
        async with other.subscribe("room", since=ids[0]) as subscriber:
            assert subscriber.resumed.recovered
            assert await take_all(subscriber, "last") == got[1:]
        assert hub.stats().backend.gaps == 0


async def test_row_11_what_is_published_before_a_hub_is_back_is_filled_in(server):
    """The other one is back first."""
    slow = Tuning(first_backoff=2.0, max_backoff=2.0)
    async with (
        Broadcast(server.url, name="both", history=HISTORY, tuning=slow) as hub,
        Broadcast(server.url, name="both", history=HISTORY) as other,
        hub.subscribe("room", gaps=True) as subscriber,
    ):
        await other.publish("room", "before")
        assert await take_all(subscriber, "before") == ["before"]
        server.kill()
        server.start()
        for number in range(50):
            await publish_until_it_is_there(other, str(number), str(number))
        await other.publish("room", "last")
        assert await take_all(subscriber, "last") == [*map(str, range(50)), "last"]
        assert hub.stats().backend.gaps == 0


async def test_row_13_frozen(server):
    hub = Broadcast(
        server.url, probe_interval=0.3, history=HISTORY, tuning=Tuning(probe_timeout=0.7)
    )
    async with hub, hub.subscribe("room", gaps=True) as subscriber:
        await hub.publish("room", "before")
        server.freeze()
        with pytest.raises(BackendUnavailable):
            await hub.publish("room", "while it is frozen", idempotency_key="a")
        await until(lambda: hub.stats().backend.state == "reconnecting")
        server.thaw()
        await publish_until_it_is_there(hub, "while it is frozen", "a")
        await publish_until_it_is_there(hub, "after", "b")
        got = await take_all(subscriber, "after")
        assert got == ["before", "while it is frozen", "after"]
        assert hub.stats().backend.gaps == 0


async def test_row_14_back_but_empty(server):
    async with Broadcast(server.url, history=HISTORY) as hub:
        async with hub.subscribe("room", gaps=True) as subscriber:
            old = await hub.publish("room", "before")
            assert await take_all(subscriber, "before") == ["before"]
            await asyncio.to_thread(server.empty)
            new = await publish_until_it_is_there(hub, "after", "key")
            gap, after = await take_all(subscriber, "after")
            assert after == "after"
            assert isinstance(gap, Gap)
            assert gap.channel == "room"
        assert new.partition("-")[0] != old.partition("-")[0]
        async with hub.subscribe("room", since=old, history=5) as subscriber:
            assert subscriber.resumed.recovered is False
            assert (await subscriber.get()).message == "after"


async def test_the_seam_with_several_publishers(server):
    """Members join while two hubs publish: each gets all from where it begins, in one order."""
    done = asyncio.Event()
    ids: list[str] = []
    history = History(size=10_000, ttl=60)  # however many are published while somebody joins
    async with (
        Broadcast(server.url, name="both", history=history) as one,
        Broadcast(server.url, name="both", history=history) as two,
    ):

        async def publisher(hub: Broadcast) -> None:
            while not done.is_set():
                ids.append(await hub.publish("room", f"{len(ids)}"))

        async def member(hub: Broadcast) -> None:
            since = ids[-1]
            async with hub.subscribe("room", since=since) as subscriber:
                assert subscriber.resumed.recovered
                got = [await subscriber.get() for _ in range(20)]
            offsets = [event.position.offset for event in got]
            first = int(since.partition("-")[2])
            assert offsets == sorted(set(offsets))
            past = await hub.history("room", since=since, limit=20)
            if past.complete:
                assert [event.id for event in past.events] == [event.id for event in got]
            if offsets[-1] - first == 20:  # where offsets grow by one
                assert offsets == list(range(first + 1, first + 21))

        publishers = [asyncio.create_task(publisher(hub)) for hub in (one, two)]
        await until(lambda: len(ids) > 10)
        for _ in range(5):
            async with asyncio.timeout(DEADLINE):
                await asyncio.gather(*(member(hub) for hub in (one, two) * 4))
        done.set()
        await asyncio.gather(*publishers)
