"""The broker at the start: one that comes late, one that never comes, one that delivers nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from backends.front import front
from backends.nats_server import NatsServer
from backends.postgres_server import PostgresServer
from backends.redis_server import RedisServer
from starcast import BackendUnavailable, Broadcast
from support import BUSY, Peer, free_port, listening, starcast_tasks, until

pytestmark = pytest.mark.anyio

SCHEMES = ["redis", "nats", "postgresql"]


@pytest.fixture
async def all_back(anyio_backend):
    """After the test, no task of starcast is left."""
    yield
    await until(lambda: not starcast_tasks())


def attempts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "trying again" in text]


async def test_a_broker_that_comes_late(server, all_back, caplog):
    server.kill()
    hub = Broadcast(server.url)
    opening = asyncio.create_task(hub.connect())
    await until(lambda: len(attempts(caplog)) >= 2)
    await asyncio.to_thread(server.start)
    await opening
    assert all("127.0.0.1" in text for text in attempts(caplog))
    peer = Peer()
    await hub.connect(peer.websocket, "room")
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])
    assert hub.stats().backend.gaps == 0
    await hub.disconnect()


async def in_lifespan(hub: Broadcast) -> None:
    async with hub.lifespan():
        pass


async def subscribe(hub: Broadcast) -> None:
    async with hub.subscribe("room"):
        pass


WAYS_TO_OPEN = {
    "connect": Broadcast.connect,
    "lifespan": in_lifespan,
    "a client": lambda hub: hub.connect(Peer().websocket, "room"),
    "publish": lambda hub: hub.publish("room", "hello"),
    "subscribe": subscribe,
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("way", WAYS_TO_OPEN)
async def test_a_broker_that_never_comes(all_back, caplog, scheme, way):
    hub = Broadcast(f"{scheme}://user:secret@127.0.0.1:{free_port()}", open_timeout=1.0)
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1"):
        await WAYS_TO_OPEN[way](hub)
    assert time.monotonic() - began < 1.0 + BUSY
    assert len(attempts(caplog)) >= 2
    assert "secret" not in caplog.text


# A login that is refused


@pytest.fixture(params=["redis", "nats", "postgres"])
def wrong_login(request):
    """The URL of a server, with a password that is not the right one."""
    server: Any
    if request.param == "redis":
        server = RedisServer("--requirepass", "right")
    elif request.param == "nats":
        server = NatsServer("authorization: {user: me, password: right}")
    else:
        server = PostgresServer()
    server.start()
    if request.param == "postgres":
        yield server.url_of("postgres", "wrong")
    else:
        scheme, _, rest = server.url.partition("://")
        yield f"{scheme}://me:wrong@{rest}"
    server.close()


async def test_a_wrong_password_is_said_at_once(wrong_login, all_back, caplog):
    hub = Broadcast(wrong_login, open_timeout=60)
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1") as caught:
        await hub.connect()
    assert time.monotonic() - began < 15
    assert not attempts(caplog)
    assert "wrong:" not in str(caught.value)


# What accepts everything and delivers nothing


@contextlib.asynccontextmanager
async def deaf_redis(replies: Callable[[list[bytes]], bytes]) -> AsyncIterator[str]:
    """A server that answers every command of Redis, and hands on no message."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ValueError, OSError):
            while True:
                parts = int((await reader.readline())[1:])
                command = []
                for _ in range(parts):
                    size = int((await reader.readline())[1:])
                    command.append((await reader.readexactly(size + 2))[:-2])
                writer.write(replies(command))

    async with listening(accept) as port:
        yield f"redis://127.0.0.1:{port}"


def polite(command: list[bytes]) -> bytes:
    name = command[0].upper()
    if name == b"SUBSCRIBE":
        return b"*3\r\n$9\r\nsubscribe\r\n$%d\r\n%b\r\n:1\r\n" % (len(command[1]), command[1])
    if name == b"PUBLISH":
        return b":1\r\n"
    if name in (b"HELLO", b"CONFIG"):
        return b"-ERR unknown command\r\n"
    return b"+PONG\r\n"


async def test_a_redis_that_swallows_what_is_published(all_back):
    async with deaf_redis(polite) as url:
        hub = Broadcast(url, open_timeout=1.5)
        began = time.monotonic()
        with pytest.raises(BackendUnavailable, match=r"delivers nothing of it; .* proxy") as caught:
            await hub.connect()
        assert time.monotonic() - began < 1.5 + BUSY
        assert url.removeprefix("redis://") in str(caught.value)


async def test_a_replica_of_redis(all_back):
    """Its own subscribers get what is published there: a message to oneself comes back."""
    with RedisServer() as primary, RedisServer("--replicaof", "127.0.0.1", str(primary.port)) as it:
        hub = Broadcast(it.url, open_timeout=0)
        with pytest.raises(BackendUnavailable, match=rf"{it.port}: this is a replica.* primary"):
            await hub.connect()
        it.command("REPLICAOF", "NO", "ONE")
        await hub.connect()
        await hub.disconnect()


@contextlib.asynccontextmanager
async def pooler(port: int) -> AsyncIterator[int]:
    """Carries PostgreSQL's protocol, and loses every notification, as a transaction pooler does."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)

    async def back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(1))  # "N": no TLS
        while True:
            head = await reader.readexactly(5)
            body = await reader.readexactly(int.from_bytes(head[1:]) - 4)
            if head[:1] != b"A":
                writer.write(head + body)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, away = await asyncio.open_connection("127.0.0.1", port)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, OSError):
                await asyncio.gather(forward(reader, away), back(there, writer))
        finally:
            away.transport.abort()
            writer.transport.abort()

    async with listening(accept) as port_of_pooler:
        yield port_of_pooler


async def test_a_postgres_behind_a_pooler_that_loses_what_is_listened_to(urls, all_back):
    url = urls("postgres")
    port = urlsplit(url).port
    async with pooler(port) as there:
        hub = Broadcast(url.replace(f":{port}/", f":{there}/"), open_timeout=1.5)
        began = time.monotonic()
        with pytest.raises(BackendUnavailable, match=r"delivers nothing of it; .*session pooling"):
            await hub.connect()
        assert time.monotonic() - began < 1.5 + BUSY


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_broker_that_accepts_and_says_nothing(all_back, scheme):
    async with deaf_redis(lambda command: b"") as url:
        port = urlsplit(url).port
        hub = Broadcast(f"{scheme}://user:secret@127.0.0.1:{port}", open_timeout=1.5)
        began = time.monotonic()
        with pytest.raises(BackendUnavailable, match=rf"did not answer .*127\.0\.0\.1:{port}"):
            await hub.connect()
        assert time.monotonic() - began < 1.5 + BUSY


async def test_a_nats_that_does_not_let_us_subscribe(all_back):
    server = NatsServer(
        """authorization: {users: [{user: u, password: p,
        permissions: {publish: ">", subscribe: "starcast:%->"}}]}"""
    )
    server.start()
    try:
        url = server.url.replace("://", "://u:p@")
        hub = Broadcast(url, open_timeout=0)
        with pytest.raises(BackendUnavailable, match=r"(?i)permissions violation"):
            await hub.connect()
    finally:
        server.close()


async def test_a_connection_that_is_made_anew_has_to_deliver_too(all_back):
    with RedisServer() as server:
        hub = Broadcast(server.url)
        peer = Peer()
        await hub.connect(peer.websocket, "room")
        server.command("REPLICAOF", "127.0.0.1", "1")
        server.command("CLIENT", "KILL", "TYPE", "pubsub")
        await until(lambda: "this is a replica" in (hub.stats().backend.error or ""))
        assert hub.stats().backend.state == "reconnecting"
        server.command("REPLICAOF", "NO", "ONE")
        await until(lambda: hub.stats().backend.state == "connected")
        await hub.publish("room", "hello")
        await until(lambda: peer.got == ["hello"])
        await hub.disconnect()


async def test_a_hub_opens_at_a_slow_broker(url, all_back):
    port = urlsplit(url).port
    async with (
        front(port, delay=0.1) as slow,
        Broadcast(url.replace(f":{port}", f":{slow}")) as hub,
    ):
        assert await hub.healthy()


# What is refused


async def test_a_redis_user_that_may_not_use_the_hubs_own_channel(all_back, caplog):
    with RedisServer() as server:
        rights = ["+ping", "+publish", "+subscribe", "+unsubscribe", "&starcast:room"]
        server.command("ACL", "SETUSER", "few", "on", ">pass", "resetchannels", *rights)
        url = server.url.replace("://", "://few:pass@")
        hub = Broadcast(url, open_timeout=0)
        with pytest.raises(BackendUnavailable, match=r"own channel 'starcast-probe-.*(?i:no perm)"):
            await hub.connect()
        # It had the right, and loses that to publish there.
        server.command("ACL", "SETUSER", "few", "allchannels")
        hub = Broadcast(url, probe_interval=0.1)
        async with hub, hub.subscribe("room"):
            server.command("ACL", "SETUSER", "few", "-publish")
            await until(lambda: hub.stats().backend.state == "reconnecting")
            error = hub.stats().backend.error
            assert "own channel" in error
            assert "permission" in error.lower()
            assert "did not answer" not in caplog.text


async def test_a_message_that_is_refused_and_that_nobody_awaits(all_back, caplog):
    with RedisServer() as server:
        server.command("ACL", "SETUSER", "few", "on", ">pass", "+@all", "allchannels")
        async with Broadcast(server.url.replace("://", "://few:pass@")) as hub:
            server.command(
                "ACL", "SETUSER", "few", "resetchannels", "&starcast:default:starcast-probe*"
            )
            for _ in range(20):
                lost = hub.stats().backend.lost
                hub.publish_nowait("secret", "x")
                await until(lambda: hub.stats().backend.lost > lost)  # noqa: B023  # awaited here
            assert "permission" in hub.stats().backend.error.lower()
    lines = [text for text in caplog.messages if "did not reach the broker" in text]
    assert len(lines) == 1
    assert "permission" in lines[0].lower()
