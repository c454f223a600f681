"""Outages of a broker, with real servers, killed and frozen: docs/reference/faults.md."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from backends.front import front
from backends.nats_server import Flood, NatsServer
from backends.postgres_server import PostgresServer
from backends.redis_server import RedisServer
from starcast import BackendUnavailable, Broadcast, Gap, PayloadTooLarge, Tuning, backends
from starcast.broker.opening import PROBE_INTERVAL
from support import BUSY, DEADLINE, Changed, Peer, free_port, joined, starcast_tasks, until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def all_back(anyio_backend):
    """After the test, no task of starcast is left."""
    yield
    await until(lambda: not starcast_tasks())


async def test_row_11_killed_and_back_after_a_second(server, all_back):
    gaps: list[Gap] = []
    async with (
        Broadcast(server.url, name="both", on_gap=gaps.append) as hub,
        Broadcast(server.url, name="both") as other,
    ):
        peer, others = await joined(hub, "room"), await joined(other, "room")
        async with hub.subscribe("room", gaps=True) as one, hub.subscribe("b", gaps=True) as two:
            await other.publish("room", "before")
            await until(lambda: peer.got == others.got == ["before"])
            server.kill()
            await until(lambda: hub.stats().backend.state == "reconnecting")
            assert not await hub.healthy()
            await asyncio.sleep(1)  # what the row says
            server.start()
            assert Tuning().max_backoff < 2  # so that it takes less than two seconds
            await until(lambda: gaps)
            await until(lambda: other.stats().backend.state == "connected")
            await other.publish("room", "after")
            await other.publish("b", "after")
            async with asyncio.timeout(DEADLINE):
                got = [await anext(one) for _ in range(3)]
                assert [got[0].message, got[1], got[2].message] == ["before", gaps[0], "after"]
                assert await anext(two) is gaps[0]
                assert (await anext(two)).message == "after"
            await until(lambda: peer.got == others.got == ["before", "after"])
        assert await hub.healthy()
        assert gaps[0].seconds > 1


async def test_row_12_away_for_a_while(server, all_back):
    async with Broadcast(server.url) as hub:
        peer = await joined(hub, "room")
        server.kill()
        await until(lambda: hub.stats().backend.state == "reconnecting")
        since = hub.stats().backend.since
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(BackendUnavailable):
                await hub.publish("room", "in vain")
            assert time.monotonic() - began < Tuning().publish_timeout + BUSY
        for number in range(1000):
            hub.publish_nowait("room", str(number))
        await until(lambda: not hub.stats().backend.queued)
        backend = hub.stats().backend
        assert backend.lost == 1000
        assert backend.since == since
        assert backend.error
        assert not await hub.healthy()
        with pytest.raises(BackendUnavailable):
            await hub.connect(Peer().websocket, "another")
        server.start()
        await until(hub_is_back(hub))
        await hub.publish("room", "after")
        await until(lambda: peer.got == ["after"])


def hub_is_back(hub: Broadcast):
    return lambda: hub.stats().backend.state == "connected"


async def test_row_13_frozen(server, all_back):
    assert PROBE_INTERVAL + Tuning().probe_timeout < 10
    hub = Broadcast(server.url, probe_interval=0.3, tuning=Tuning(probe_timeout=0.7))
    async with hub, hub.subscribe("room", gaps=True) as subscriber:
        peer = await joined(hub, "room")
        server.freeze()
        with pytest.raises(BackendUnavailable):
            await hub.publish("room", "in vain")
        await until(lambda: hub.stats().backend.state == "reconnecting")
        server.thaw()
        await until(lambda: hub.stats().backend.gaps)
        await hub.publish("room", "after")
        await until(lambda: peer.got[-1:] == ["after"])
        async with asyncio.timeout(DEADLINE):
            assert isinstance(await anext(subscriber), Gap)
            # The server may have had the other one already when it froze.
            while (await anext(subscriber)).message != "after":
                pass


async def all_hear_of_the_gap(url: str, outage: Callable[[], Awaitable[object]]) -> None:
    """Every subscriber gets a gap in its place, and everybody what comes later."""
    gaps: list[Gap] = []
    async with (
        Broadcast(url, on_gap=gaps.append) as hub,
        hub.subscribe("room", gaps=True) as one,
        hub.subscribe("b", gaps=True) as two,
    ):
        peer = await joined(hub, "room")
        await joined(hub, "flood")  # nobody minds what becomes of this one
        await hub.publish("room", "before")
        await until(lambda: peer.got)
        await outage()
        await until(lambda: gaps)
        await hub.publish("room", "after")
        await hub.publish("b", "after")
        async with asyncio.timeout(DEADLINE):
            got = [await anext(one) for _ in range(3)]
            assert [got[0].message, got[1], got[2].message] == ["before", gaps[0], "after"]
            assert await anext(two) is gaps[0]
            assert (await anext(two)).message == "after"
        await until(lambda: peer.got == ["before", "after"])
        assert len(gaps) == hub.stats().backend.gaps == 1


async def test_row_14_back_but_empty(server, all_back):
    await all_hear_of_the_gap(server.url, lambda: asyncio.to_thread(server.empty))


@pytest.fixture(params=["redis", "nats", "postgres"])
def strict_server(request):
    """A server that soon cuts off who does not read."""
    if request.param == "redis":
        server: Any = RedisServer("--client-output-buffer-limit", "pubsub 1mb 0 0")
    elif request.param == "nats":
        limits = 'max_payload: 65536\nmax_pending: 65536\nwrite_deadline: "200ms"'
        server = NatsServer(limits)
    else:
        server = PostgresServer()
    server.start()
    yield server
    server.close()


async def cut_off(server: Any) -> None:
    """Have the server end the connection on which the hub listens, as it does by itself."""
    if isinstance(server, RedisServer):
        # MiB, while the loop stands still; a kernel may take many.
        while server.command("PUBLISH", "starcast:default:flood", b"x" * 2**20):
            pass
    elif isinstance(server, NatsServer):
        flood = Flood(server.port, b"starcast:default.flood", b"x" * 60_000, 2_000)
        flood.start()
        flood.join()  # meanwhile the loop reads nothing
    else:
        connection = await asyncpg.connect(server.url)
        assert await connection.fetchval(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE query LIKE '%LISTEN%' AND pid <> pg_backend_pid()"
        )
        await connection.close()


async def test_row_15_cut_off_by_the_broker(strict_server, all_back):
    async def outage() -> None:
        await cut_off(strict_server)

    await all_hear_of_the_gap(strict_server.url, outage)


async def test_a_hub_closes_while_its_broker_is_frozen(server, all_back):
    hub = Broadcast(server.url)
    peer = await joined(hub, "room")
    server.freeze()
    began = time.monotonic()
    await hub.disconnect()
    assert time.monotonic() - began < Tuning().stop_timeout + 5
    assert peer.closed == 1001
    server.thaw()


async def test_row_16_larger_than_the_broker_takes(url, all_back):
    def limit(connection):
        connection.max_payload = 600_000

    async with Broadcast(backend=Changed(backends.from_url(url), limit)) as hub:
        peer = await joined(hub, "room")
        await hub.publish("room", "x" * 500_000)
        with pytest.raises(PayloadTooLarge):
            await hub.publish("room", "x" * 600_001)
        await hub.publish("room", "small")
        await until(lambda: len(peer.got) == 2)
        assert peer.got == ["x" * 500_000, "small"]


async def test_row_17_foreign_bytes(url, all_back):
    lost = []
    foreign = await backends.from_url(url).connect(lambda channel, data: None, lost.append)
    async with Broadcast(url) as hub:
        peer = await joined(hub, "room")
        pickled = b"\x80\x04\x95\x10\x00\x00\x00"
        for data in (b"\xff", b"\xff\x01", b"\xff\x63\x00x", pickled, b"text", b"{}"):
            await foreign.publish([("default:room", data)])
        await until(lambda: len(peer.got) == 2)
        assert peer.got == ["text", "{}"]
        assert hub.stats().backend.malformed == 4
    await foreign.close()
    assert not lost


async def test_row_21_many_come_at_once_and_miss_nothing(url, all_back):
    async with Broadcast(url, name="both") as hub, Broadcast(url, name="both") as publisher:
        for round_ in range(5):
            channel = f"row 21, {round_}"
            peers = await asyncio.gather(*(joined(hub, channel) for _ in range(20)))
            await publisher.publish(channel, "hello")
            await until(lambda: all(peer.got == ["hello"] for peer in peers))  # noqa: B023  # awaited here


async def test_row_21_many_come_at_once_to_a_slow_broker(url, all_back):
    """Who is not the first on a channel must not be let in before the broker has confirmed it."""
    port = urlsplit(url).port
    async with (
        Broadcast(url, name="both") as publisher,
        front(port, delay=0.05) as slow,
        Broadcast(url.replace(f":{port}", f":{slow}"), name="both") as hub,
    ):
        begun: list[str] = []
        expected: list[tuple[Peer, int]] = []

        async def come(name: str) -> None:
            peer = await joined(hub, "room")
            expected.append((peer, len(begun)))
            begun.append(name)
            await publisher.publish("room", name)

        names = [f"client {number}" for number in range(50)]
        await asyncio.gather(*map(come, names))
        await publisher.publish("room", "last")
        await until(lambda: all(peer.got[-1:] == ["last"] for peer, _ in expected))
        for peer, start in expected:
            # Nobody misses what began after `connect` returned, nobody gets anything twice.
            assert set(begun[start:]) <= set(peer.got)
            assert len(peer.got) == len(set(peer.got))


async def test_row_27_nobody_listens_there(url, all_back):
    scheme = url.partition("://")[0]
    port = free_port()
    hub = Broadcast(f"{scheme}://user:secret@127.0.0.1:{port}", open_timeout=0)
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1") as caught:
        await hub.connect()
    assert time.monotonic() - began < 15
    error: BaseException | None = caught.value
    while error is not None:
        assert "secret" not in f"{error!r}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert "secret" not in str(hub.stats())


async def test_row_27_an_unknown_host(url, all_back):
    scheme = url.partition("://")[0]
    hub = Broadcast(f"{scheme}://user:secret@starcast.invalid", open_timeout=0)
    with pytest.raises(BackendUnavailable, match=r"starcast\.invalid") as caught:
        await hub.connect()
    assert "secret" not in str(caught.value)


async def test_row_33_more_comes_than_is_held_until_everything_is_back(server, all_back, caplog):
    reached, go, connections = asyncio.Event(), asyncio.Event(), []

    def slow(connection):
        connections.append(connection)
        subscribe = connection.subscribe

        async def wait(channel: str) -> None:
            if channel.endswith("second") and len(connections) > 1:
                reached.set()
                await go.wait()
            await subscribe(channel)

        connection.subscribe = wait

    backend = Changed(backends.from_url(server.url), slow)
    tuning = Tuning(max_subscribing=1, max_held_back=10_000)
    async with (
        Broadcast(backend=backend, name="both", tuning=tuning) as hub,
        Broadcast(server.url, name="both") as near,
        hub.subscribe("first", gaps=True) as first,
        hub.subscribe("second"),
    ):
        await hub.publish("first", "before")
        await asyncio.to_thread(server.empty)
        await asyncio.wait_for(reached.wait(), 20)
        await until(hub_is_back(near))
        for number in range(300):
            near.publish_nowait("first", str(number))
        await near.publish("first", "300")
        await until(lambda: backend.delivered.count("both:first") == 302)
        go.set()
        async with asyncio.timeout(DEADLINE):
            assert (await anext(first)).message == "before"
            assert isinstance(await anext(first), Gap)
            got = [int((await anext(first)).message)]
            while got[-1] != 300:
                got.append(int((await anext(first)).message))
        lost = hub.stats().backend.lost
        assert got == list(range(lost, 301))
        assert f"{lost} messages were lost" in caplog.text
