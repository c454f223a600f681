"""Tests of what the history in Redis does in ways of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import redis
from redis.asyncio.sentinel import Sentinel

from backends.redis_server import RedisServer
from starcast import BackendUnavailable, Broadcast, Gap, History, Publisher, Tuning
from starcast.backends.redis import RedisBackend
from support import DEADLINE, until, until_sync

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def shared() -> Iterator[RedisServer]:
    """A server that nobody stops."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    shared.command("FLUSHALL")
    return shared


async def test_what_is_in_redis(server):
    async with Broadcast(server.url, history=History(size=3, ttl=60)) as hub:
        for number in range(5):
            id = await hub.publish("room", str(number), idempotency_key=f"key {number}")
    names = {name.decode() for name in server.command("KEYS", "*")}
    stream = "starcast:history:{default:room}"
    assert names == {stream, f"{stream}:position"} | {f"{stream}:key:key {n}" for n in range(5)}
    entries = server.command("XRANGE", stream, "-", "+")
    assert [fields for _, fields in entries] == [{b"m": b"2"}, {b"m": b"3"}, {b"m": b"4"}]
    assert [entry.partition(b"-")[0] for entry, _ in entries] == [b"3", b"4", b"5"]
    assert id.endswith("-5")
    assert 59_000 < server.command("PTTL", stream) <= 60_000
    assert 86_459_000 < server.command("PTTL", f"{stream}:position") <= 86_460_000
    assert 59_000 < server.command("PTTL", f"{stream}:key:key 1") <= 60_000


async def test_a_channel_that_is_only_read_is_not_forgotten(server):
    async with Broadcast(server.url, history=History(ttl=60)) as hub:
        await hub.publish("room", "text")
        position = "starcast:history:{default:room}:position"
        for left, then in ((10_000, 86_460_000), (86_000_000, 86_000_000)):
            server.command("PEXPIRE", position, left)
            await hub.history("room")
            assert then - 1000 < server.command("PTTL", position) <= then


async def test_messages_expire(server):
    async with Broadcast(server.url, history=History(ttl=0.2)) as hub:
        old = await hub.publish("room", "old")
        await until(lambda: not server.command("EXISTS", "starcast:history:{default:room}"))
        past = await hub.history("room")
        assert (past.events, past.id) == ([], old)
        async with hub.subscribe("room", since=old) as subscriber:
            assert subscriber.resumed.recovered
        await hub.publish("room", "0")
        for number in range(200):  # the stream does not expire, but messages do
            await hub.publish("room", str(number))
            if len((await hub.history("room", limit=1000)).events) < number:
                break
            await asyncio.sleep(0.005)
        else:
            pytest.fail("no message has expired")
        async with hub.subscribe("room", since=old) as subscriber:
            assert not subscriber.resumed.recovered


async def test_a_quiet_channel_keeps_its_position_while_it_has_members(server, monkeypatch):
    monkeypatch.setattr("starcast.backends.redis_history.POSITION_TTL", 0.4)
    tuning = Tuning(position_interval=0.1)
    async with (
        Broadcast(server.url, history=History(ttl=0.2), tuning=tuning) as hub,
        hub.subscribe("room", gaps=True) as subscriber,
    ):
        await hub.publish("room", "0")
        await asyncio.sleep(1.5)
        await hub.publish("room", "1")
        assert [(await subscriber.get()).id[-2:] for _ in range(2)] == ["-1", "-2"]
    assert hub.stats().backend.gaps == 0


async def test_a_channel_that_was_only_asked_for_is_soon_forgotten(server):
    """Clients may ask for any number of channels."""
    async with Broadcast(server.url, history=History(ttl=60)) as hub:
        await hub.history("room")
        position = "starcast:history:{default:room}:position"
        assert 0 < server.command("PTTL", position) <= 660_000
        await hub.publish("room", "text")
        await hub.history("room")
        assert server.command("PTTL", position) > 86_000_000


@pytest.mark.parametrize("name", ["}", "{x}", "%7D", "a}b", "{}", "🎈 '\"", "x" * 200])
async def test_both_keys_of_a_channel_are_in_one_slot(server, name):
    async with Broadcast(server.url, history=History()) as hub:
        await hub.publish(name, "text", idempotency_key="key")
        assert len((await hub.history(name)).events) == 1
    keys = server.command("KEYS", "*")
    assert len(keys) == 3
    # What the specification of a cluster says about keys with braces.
    tags = {key[key.index(b"{") + 1 : key.index(b"}", key.index(b"{"))] for key in keys}
    assert len(tags) == 1
    assert tags != {b""}


async def test_channels_with_similar_names_are_apart(server):
    async with Broadcast(server.url, history=History()) as hub:
        for name in ("a}", "a%7D", "a", "a}:position", "a:position"):
            assert (await hub.publish(name, "text")).endswith("-1")


async def test_a_script_that_the_server_does_not_know_any_more(server):
    async with Broadcast(server.url, history=History()) as hub:
        await hub.publish("room", "0")
        server.command("SCRIPT", "FLUSH")
        ids = await asyncio.gather(*(hub.publish("room", str(n)) for n in range(1, 4)))
        assert [id.partition("-")[2] for id in ids] == ["2", "3", "4"]
        server.command("SCRIPT", "FLUSH")
        assert [event.message for event in (await hub.history("room")).events] == [*"0123"]


async def test_keys_of_another_type(server):
    """Somebody else's program has written there."""
    async with Broadcast(server.url, history=History()) as hub:
        server.command("SET", "starcast:history:{default:room}:position", "text")
        with pytest.raises(BackendUnavailable, match=r"Redis refuses: .*WRONGTYPE"):
            await hub.publish("room", "text")
        with pytest.raises(BackendUnavailable, match=r"Redis refuses: .*WRONGTYPE"):
            await hub.history("room")
        server.command("DEL", "starcast:history:{default:room}:position")
        server.command("HSET", "starcast:history:{default:b}:position", "epoch", "not - one")
        server.command("HSET", "starcast:history:{default:b}:position", "server", "x")
        assert await hub.publish("b", "text")  # of another server, so it is not used


async def test_an_epoch_that_is_none(server):
    async with Broadcast(server.url, history=History()) as hub:
        await hub.publish("room", "text")
        server.command("HSET", "starcast:history:{default:room}:position", "epoch", "not - one")
        with pytest.raises(BackendUnavailable, match="something else where the history should be"):
            await hub.publish("room", "text")


def test_the_address_of_a_server_that_sentinel_names():
    backend = RedisBackend(client=Sentinel([("127.0.0.1", 1)]).master_for("shop"))
    assert backend.address == "the Redis that Sentinel calls 'shop', prefix 'starcast:'"


async def test_one_message_of_a_batch_is_refused(server):
    async with Broadcast(server.url, history=History()) as hub:
        for name in "ab":
            await hub.publish(name, "0")
        server.command("SET", "starcast:history:{default:b}", "text")
        results = await asyncio.gather(
            *(hub.publish(name, "text") for name in "abc"), return_exceptions=True
        )
    assert results[0].endswith("-2")
    assert "Redis refuses" in str(results[1])
    assert isinstance(results[1], BackendUnavailable)
    assert results[2].endswith("-1")


async def test_messages_with_a_header_that_is_not_ours(server):
    async with (
        Broadcast(server.url, history=History()) as hub,
        hub.subscribe("room") as subscriber,
    ):
        for payload in (b"\xff\x02", b"\xff\x02no id:text", b"\xff\x02\xff-1:text", b"\xff\x02e-1"):
            server.command("PUBLISH", "starcast:default:room", payload)
        await hub.publish("room", "text")
        assert (await subscriber.get()).message == "text"
        assert hub.stats().backend.malformed >= 3


async def test_a_server_that_was_started_anew_gives_no_old_offsets_to_other_messages(tmp_path):
    """It has written a snapshot, and what came after that is lost."""
    history = History(size=100, ttl=60)
    with RedisServer("--save", "") as server:
        async with Broadcast(server.url, history=history) as hub:
            old = [await hub.publish("room", str(number)) for number in range(3)]
            server.command("SAVE")
            old += [await hub.publish("room", str(number)) for number in range(3, 6)]
        server.kill()
        server.start()
        async with Broadcast(server.url, history=history) as hub:
            assert server.command("EXISTS", "starcast:history:{default:room}") == 1
            for number in range(6):
                await hub.publish("room", f"other {number}")
            async with hub.subscribe("room", since=old[4]) as subscriber:
                assert subscriber.resumed.recovered is False


async def test_a_hub_that_knows_more_than_the_server(server):
    """As after a failover to a replica that was behind."""
    history = History(size=100, ttl=60)
    async with (
        Broadcast(server.url, history=history) as hub,
        hub.subscribe("room", gaps=True) as subscriber,
    ):
        for number in range(3):
            old = await hub.publish("room", str(number))
            assert (await subscriber.get()).message == str(number)
        position = "starcast:history:{default:room}:position"
        server.command("HINCRBY", position, "offset", -2)
        server.command("DEL", "starcast:history:{default:room}")
        new = await hub.publish("room", "new")
        assert new.partition("-")[0] != old.partition("-")[0]
        assert (await subscriber.get()).message == "new"
        server.command("HINCRBY", position, "offset", 1)
        server.command("DEL", "starcast:history:{default:room}")
        await hub.publish("room", "newer")  # it is the third, and the second is nowhere
        assert isinstance(await subscriber.get(), Gap)
        assert (await subscriber.get()).message == "newer"


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_a_server_that_comes_back_without_what_it_had_not_written_yet(lost):
    """Even if it has an append-only file, unless that is written before each answer."""
    history = {"room": History(size=100, ttl=60)}
    stream = "starcast:history:{both:room}"
    with RedisServer("--appendonly", "yes", "--appendfsync", "always") as server:
        async with Broadcast(server.url, name="both", history=history) as other:
            for number in range(3):
                old = await other.publish("room", str(number))
            async with (
                Broadcast(server.url, name="both", history=history) as hub,
                hub.subscribe("room", gaps=True) as subscriber,
            ):
                for number in range(lost):
                    old = await other.publish("room", f"lost {number}")
                    assert (await subscriber.get()).id == old
                server.command("HINCRBY", f"{stream}:position", "offset", -lost)
                for id, _ in server.command("XRANGE", stream, "4", "+"):
                    server.command("XDEL", stream, id)
                server.kill()
                await until(lambda: hub.stats().backend.state == "reconnecting")
                server.start()
                await until(lambda: other.stats().backend.state == "connected")
                for number in range(lost + 1):
                    await other.publish("room", f"new {number}")
                got = [await subscriber.get() for _ in range(lost + 1 + bool(lost))]
                assert isinstance(got[0], Gap) is bool(lost)
                assert [event.message for event in got[bool(lost) :]] == [
                    f"new {number}" for number in range(lost + 1)
                ]
            async with other.subscribe("room", since=old) as subscriber:
                assert subscriber.resumed.recovered is not bool(lost)
            first = (await other.history("room")).events[0]
            async with other.subscribe("room", since=first.id) as subscriber:
                assert subscriber.resumed.recovered
                got = [(await subscriber.get()).message for _ in range(3 + lost)]
                assert got == ["1", "2", *(f"new {number}" for number in range(lost + 1))]


async def test_a_server_that_begins_to_keep_what_is_written_to_it():
    """What hubs have asked it before still holds: they do not take turns in emptying histories."""
    with RedisServer() as server:
        async with Broadcast(server.url, name="both", history=History()) as before:
            ids = [await before.publish("room", "0")]
            server.command("CONFIG", "SET", "appendonly", "yes")
            async with Broadcast(server.url, name="both", history=History()) as after:
                for hub in (after, before, after):
                    ids.append(await hub.publish("room", "text"))
                assert [event.id for event in (await after.history("room")).events] == ids


def user(server: RedisServer, name: str, *rules: str) -> str:
    server.command("ACL", "SETUSER", name, "on", ">secret", *rules)
    return server.url.replace("redis://", f"redis://{name}:secret@")


RULES = ("resetkeys", "resetchannels", "&starcast:*", "-@all", "+publish", "+subscribe", "+ping")


async def test_a_user_with_the_rights_that_the_docs_name(server):
    commands = RedisBackend.__doc__.partition("A history needs ")[2].partition("`")[2]
    rights = commands.partition("`")[0].split()
    url = user(server, "named", *RULES, "+unsubscribe", "~starcast:history:*", *rights)
    async with Broadcast(url, history=History(size=2)) as hub, hub.subscribe("room") as subscriber:
        for number in range(4):
            id = await hub.publish("room", str(number), idempotency_key=str(number))
            assert (await subscriber.get()).id == id
        assert len((await hub.history("room")).events) == 2


async def test_a_user_without_rights(server, caplog):
    url = user(server, "none", *RULES, "+unsubscribe")
    async with Broadcast(url, history=History()) as hub:
        with pytest.raises(BackendUnavailable, match=r"Redis refuses: .*evalsha"):
            await hub.publish("room", "text")
        with pytest.raises(BackendUnavailable, match="evalsha"):
            async with hub.subscribe("room"):
                pass
    assert "secret" not in caplog.text


async def test_a_user_who_may_not_ask_for_the_server(server):
    url = user(server, "some", "allkeys", "allchannels", "+@all", "-info")
    async with Broadcast(url, history=History()) as hub:
        assert (await hub.publish("room", "text")).endswith("-1")


def test_the_server_is_redis(server):
    """Or compatible with it."""
    assert redis.Redis(unix_socket_path=server.path).info("server")["run_id"]


async def test_what_redis_cli_publishes_is_delivered_and_not_kept(server):
    async with (
        Broadcast(server.url, history=History()) as hub,
        hub.subscribe("room") as subscriber,
    ):
        await hub.publish("room", "kept")
        server.command("PUBLISH", "starcast:default:room", "not kept")
        id = await hub.publish("room", "kept too")
        got = [await subscriber.get() for _ in range(3)]
        assert [event.message for event in got] == ["kept", "not kept", "kept too"]
        assert (got[1].id, got[2].id) == (None, id)
        assert len((await hub.history("room")).events) == 2


async def test_a_publisher_keeps_too(server):
    history = History(size=5)
    publisher = Publisher(server.url, history=history)
    try:
        first = await asyncio.to_thread(publisher.publish, "room", "one", idempotency_key="a")
        again = await asyncio.to_thread(publisher.publish, "room", "one", idempotency_key="a")
    finally:
        publisher.close()
    assert first == again
    async with Broadcast(server.url, history=history) as hub:
        assert [event.id for event in (await hub.history("room")).events] == [first]


# A cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[RedisServer, RedisServer]]:
    """Two nodes, of which each has half of the slots."""
    with (
        RedisServer("--cluster-enabled", "yes") as one,
        RedisServer("--cluster-enabled", "yes") as two,
    ):
        one.command("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
        two.command("CLUSTER", "ADDSLOTSRANGE", 8192, 16383)
        one.command("CLUSTER", "MEET", "127.0.0.1", two.port)
        for node in (one, two):
            until_sync(lambda it=node: b"cluster_state:ok" in it.command("CLUSTER", "INFO"))
            until_sync(lambda it=node: str(it.command("CLUSTER", "NODES")).count(" connected") == 2)
        yield one, two


async def test_the_histories_of_a_cluster(cluster):
    """Each is where its keys are, whatever node a hub has the URL of."""
    one, two = cluster
    history = History(size=10, ttl=60)
    names = [f"room{number}" for number in range(8)]
    async with (
        Broadcast(one.url, name="both", history=history) as first,
        Broadcast(two.url, name="both", history=history) as second,
    ):
        ids = {name: [await first.publish(name, "0")] for name in names}
        for hub in (second, first):
            got = await asyncio.gather(*(hub.publish(name, "1") for name in names))
            for name, id in zip(names, got, strict=True):
                ids[name].append(id)
        for its in ids.values():
            epoch = its[0].partition("-")[0]
            assert its == [f"{epoch}-{number}" for number in (1, 2, 3)]
        for name in names:
            async with second.subscribe(name, since=ids[name][0]) as subscriber:
                assert subscriber.resumed.recovered
                live = await first.publish(name, "live", idempotency_key="a")
                assert await second.publish(name, "live", idempotency_key="a") == live
                got = [(await subscriber.get()).id for _ in range(3)]
                assert got == [*ids[name][1:], live]
    assert one.command("DBSIZE") > 0
    assert two.command("DBSIZE") > 0


async def test_a_node_of_a_cluster_that_is_away(cluster):
    one, two = cluster
    async with Broadcast(one.url, name="away", history=History()) as hub:
        await asyncio.gather(*(hub.publish(f"room{n}", "0") for n in range(4)))
        two.kill()
        results: list[object] = []

        async def all_answer() -> bool:
            results[:] = await asyncio.gather(
                *(hub.publish(f"room{n}", "1", idempotency_key="1") for n in range(4)),
                return_exceptions=True,
            )
            return not any(isinstance(it, BackendUnavailable) for it in results)

        assert not await all_answer()
        two.start()
        end = asyncio.get_running_loop().time() + DEADLINE
        while not await all_answer():
            assert asyncio.get_running_loop().time() < end, results
            await asyncio.sleep(0.05)
