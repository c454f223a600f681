"""What a broker refuses, with real servers: one channel, one message, one subscription too many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import asyncpg
import pytest
from fastapi import FastAPI
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from backends.nats_server import NatsServer
from backends.redis_server import RedisServer
from starcast import (
    BackendUnavailable,
    Broadcast,
    BroadcastEndpoint,
    Event,
    Gap,
    GapSubscriber,
    Subscriber,
    Tuning,
)
from starcast.backends.nats import NatsBackend
from support import DEADLINE, Peer, starcast_tasks, until

pytestmark = pytest.mark.anyio

OWN = "starcast:default"
CHANNELS = ("news", "News", "chat")


@pytest.fixture
async def all_back(anyio_backend):
    """After the test, no task of starcast is left."""
    yield
    await until(lambda: not starcast_tasks())


class RedisUser:
    """A user of a Redis, and the channels that it may use; it is disconnected when it loses one."""

    words = "permission"

    def __init__(self) -> None:
        self.server = RedisServer()
        self.server.start()
        self.url = self.server.url.replace("//", "//few:pass@")
        self.server.command("ACL", "SETUSER", "few", "on", ">pass", "+@all")

    def allow(self, *channels: str) -> None:
        names = [f"&{OWN}:{name}" for name in (*channels, "starcast-probe*")]
        self.server.command("ACL", "SETUSER", "few", "resetchannels", *names)


class NatsUser:
    """A user of a NATS, and the channels that it may use; it loses one and stays connected."""

    words = "Permissions Violation"

    def __init__(self) -> None:
        self.server = NatsServer(self._config(*CHANNELS))
        self.server.start()
        self.url = self.server.url.replace("//", "//few:pass@")

    def _config(self, *channels: str) -> str:
        denied = [f'"{OWN}.{name}"' for name in CHANNELS if name not in channels]
        rights = f'{{allow: [">"], deny: [{", ".join(denied)}]}}'
        rights = f"{{publish: {rights}, subscribe: {rights}}}"
        return f"authorization: {{users: [{{user: few, password: pass, permissions: {rights}}}]}}"

    def allow(self, *channels: str) -> None:
        self.server.reload(self._config(*channels))


@pytest.fixture(params=[RedisUser, NatsUser])
def user(request: pytest.FixtureRequest) -> Iterator[RedisUser | NatsUser]:
    user = request.param()
    user.allow(*CHANNELS)
    yield user
    user.server.close()


def lines(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [text for text in caplog.messages if words in text]


async def soon(subscriber: GapSubscriber | Subscriber) -> Event | Gap:
    """What it gets next."""
    async with asyncio.timeout(DEADLINE):
        return await anext(subscriber)


# A channel


async def test_a_channel_that_is_taken_away_comes_back(user, all_back, caplog):
    gaps: list[Gap] = []
    hub = Broadcast(user.url, on_gap=gaps.append, after_gap="close")
    async with (
        hub,
        hub.subscribe("news", gaps=True) as news,
        hub.subscribe("News", gaps=True) as others,
    ):
        reader, other = Peer(), Peer()
        await hub.connect(other.websocket, "News")
        await hub.publish("news", "before")
        user.allow("News", "chat")
        denied_at = time.time()
        await until(lambda: hub.stats().backend.refused == 1)
        await until(lambda: hub.stats().backend.state == "connected")
        outages = hub.stats().backend.gaps  # of Redis, which disconnects its user
        assert outages == (user.words == "permission")
        await until(lambda: len(gaps) == outages)
        await until(lambda: other.closed == (1012 if outages else None))
        assert user.words in hub.stats().backend.error
        assert not await hub.healthy()
        # The others go on, and who asks for the channel is told what the broker says.
        await hub.connect(reader.websocket, "chat")
        await hub.publish("chat", "1")
        await until(lambda: reader.got == ["1"])
        with pytest.raises(BackendUnavailable, match=user.words):
            await hub.connect(Peer().websocket, "news")
        assert [line for line in lines(caplog, "'news', which") if user.words in line]
        assert len(lines(caplog, "'news', which")) == 1

        client = Peer()  # who was there already, on another channel
        user.allow(*CHANNELS)
        await until(lambda: not hub.stats().backend.refused)
        assert await hub.healthy()
        assert len(lines(caplog, "subscribed to the channel 'news' again")) == 1
        await hub.connect(client.websocket, "news")
        await hub.publish("news", "after")
        await hub.publish("News", "after")
        assert (await soon(news)).message == "before"
        seen = [await soon(news) for _ in range(outages + 2)]
        assert seen[:-1] == gaps
        assert [gap.channel for gap in gaps] == [None] * outages + ["news"]
        assert user.words in gaps[-1].error
        assert gaps[0].since <= denied_at  # this loop has heard of it later
        assert seen[-1].message == "after"
        seen = [await soon(others) for _ in range(outages + 1)]
        assert seen[:-1] == gaps[:outages]
        assert seen[-1].message == "after"
        await until(lambda: client.got == ["after"])
        assert reader.closed is None
        assert hub.stats().backend.gaps == outages


async def test_only_clients_of_the_channel_are_closed(all_back):
    user = NatsUser()
    try:
        async with Broadcast(user.url, after_gap="close") as hub:
            reader, other = Peer(), Peer()
            await hub.connect(reader.websocket, "news")
            await hub.connect(other.websocket, "chat")
            user.allow("chat")
            await until(lambda: hub.stats().backend.refused)
            assert reader.closed is None
            user.allow(*CHANNELS)
            await until(lambda: reader.closed == 1012)
            await hub.publish("chat", "still here")
            await until(lambda: other.got == ["still here"])
            # Nobody is left on it, so nobody asks for it any more.
            user.allow("chat")
            await hub.publish("chat", "and healthy")
            assert await hub.healthy()
    finally:
        user.server.close()


async def test_a_refused_channel_that_nobody_wants_any_more(all_back):
    user = NatsUser()
    try:
        async with Broadcast(user.url) as hub:
            async with hub.subscribe("news"):
                user.allow("chat")
                await until(lambda: hub.stats().backend.refused)
            await until(lambda: not hub.stats().backend.channels)
            assert not hub.stats().backend.refused
            assert await hub.healthy()
    finally:
        user.server.close()


async def test_the_hubs_own_channels_are_taken_away(own_nats, all_back):
    config = """authorization: {{users: [{{user: u, password: p, permissions: {{
        publish: {{allow: ">", deny: "{}"}}, subscribe: {{allow: ">", deny: "{}"}}}}}}]}}"""
    free = config.format("none", "none")
    server = own_nats(free)
    backend = NatsBackend(server.url.replace("//", "//u:p@"), prefix="app.")
    hub = Broadcast(backend=backend, probe_interval=0.1)
    async with hub, hub.subscribe("room"):
        for denied in [("none", "app.default.*"), ("none", "app.*"), ("app.*", "none")]:
            server.reload(config.format(*denied))
            await until(lambda: hub.stats().backend.state == "reconnecting")
            await until(lambda: "Permissions Violation" in hub.stats().backend.error)
            server.reload(free)
            await until(lambda: hub.stats().backend.state == "connected")
        assert await hub.healthy()


async def test_one_subscription_too_many_is_an_error_for_who_asks(own_nats, all_back, caplog):
    server = own_nats("max_subscriptions: 4")  # two of them are the hub's own
    async with Broadcast(server.url) as hub:
        peers = {name: Peer() for name in ("a", "b", "c", "d")}
        for name in "ab":
            await hub.connect(peers[name].websocket, name)
        for name in "cd":
            with pytest.raises(BackendUnavailable, match="maximum subscriptions exceeded"):
                await hub.connect(peers[name].websocket, name)
        assert await hub.healthy()
        await hub.publish("a", "1")
        await until(lambda: peers["a"].got == ["1"])
        await hub.disconnect(peers["a"].websocket)
        await until(lambda: hub.stats().backend.channels == 1)
        await hub.connect(peers["c"].websocket, "c")
        await hub.publish("c", "2")
        await until(lambda: peers["c"].got == ["2"])
        backend = hub.stats().backend
        assert (backend.state, backend.gaps, backend.refused) == ("connected", 0, 0)
    assert len(lines(caplog, "refused the subscription")) == 2


async def test_too_few_subscriptions_for_the_hub_itself(own_nats, all_back):
    server = own_nats("max_subscriptions: 1")
    with pytest.raises(BackendUnavailable, match="maximum subscriptions exceeded"):
        await Broadcast(server.url, open_timeout=0).connect()


async def test_a_postgresql_role_that_may_not_log_in_for_a_while(urls, all_back):
    """It has no rights for channels: it is all of them or none."""
    url = urls("postgres")
    admin = await asyncpg.connect(url)
    parts = urlsplit(url)
    try:
        await admin.execute("CREATE ROLE few LOGIN PASSWORD 'pass'")
        hub = Broadcast(f"postgresql://few:pass@127.0.0.1:{parts.port}{parts.path}")
        async with hub, hub.subscribe("news", gaps=True) as news:
            await admin.execute("ALTER ROLE few NOLOGIN")
            await admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'few'"
            )
            await until(lambda: "not permitted to log in" in (hub.stats().backend.error or ""))
            assert hub.stats().backend.state == "reconnecting"
            await admin.execute("ALTER ROLE few LOGIN")
            assert (await soon(news)).channel is None
            await hub.publish("news", "after")
            assert (await soon(news)).message == "after"
    finally:
        await admin.execute("DROP ROLE few")
        admin.terminate()


# A message


async def test_only_the_message_that_is_refused_fails(user, all_back):
    async with Broadcast(user.url) as hub, hub.subscribe("news") as news:
        user.allow("news", "chat")
        await hub.publish("news", "0")
        for _ in range(3):
            hub.publish_nowait("News", "lost")
            hub.publish_nowait("news", "1")
        results = await asyncio.gather(
            *(hub.publish(name, "2") for name in ("news", "News", "chat", "News", "news")),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [
            type(None),
            BackendUnavailable,
            type(None),
            BackendUnavailable,
            type(None),
        ]
        assert user.words in str(results[1])
        got = [(await soon(news)).message for _ in range(6)]
        assert got == ["0", *["1"] * 3, *["2"] * 2]
        stats = hub.stats()
        assert (stats.backend.lost, stats.failed) == (3, 2)


async def test_a_message_too_large_for_the_broker_that_came_back(own_nats, all_back):
    server = own_nats("")
    async with Broadcast(server.url) as hub, hub.subscribe("news") as news:
        server.kill()
        await until(lambda: hub.stats().backend.state == "reconnecting")
        hub.publish_nowait("news", "x" * 2000)
        hub.publish_nowait("news", "fits")
        server.configure("max_payload: 1000")
        server.start()
        assert (await soon(news)).message == "fits"
        assert hub.stats().backend.lost == 1
        assert "1000 bytes" in hub.stats().backend.error


# A goodbye


async def test_goodbyes_during_an_outage_are_one_line(all_back, serve, caplog):
    server = RedisServer()
    server.start()
    hub = Broadcast(server.url, tuning=Tuning(publish_timeout=0.3))
    said = 0

    async def say_goodbye() -> None:
        nonlocal said
        said += 1
        await hub.publish("room", "somebody has left")

    class Endpoint(BroadcastEndpoint):
        broadcast = hub

        async def on_disconnect(self, websocket, close_code):
            await super().on_disconnect(websocket, close_code)
            await say_goodbye()

    app = FastAPI(lifespan=hub.lifespan, routes=[WebSocketRoute("/endpoint", Endpoint)])
    app.websocket("/class")(Endpoint)

    @app.websocket("/function")
    async def function(websocket: WebSocket):
        await hub.connect(websocket, "room")
        try:
            async for text in websocket.iter_text():
                await hub.publish("room", text)
        finally:
            await hub.disconnect(websocket)
            await say_goodbye()

    @app.websocket("/raises")
    async def raises(websocket: WebSocket):
        await hub.connect(websocket, "room")
        try:
            while True:
                await hub.publish("room", await websocket.receive_text())
        finally:
            await say_goodbye()

    try:
        web = await serve(app)
        paths = ("/endpoint", "/class", "/function", "/raises")
        clients = await asyncio.gather(*(web.connect(path) for path in paths * 25))
        server.kill()
        await until(lambda: hub.stats().backend.state == "reconnecting")
        await asyncio.gather(*(client.close() for client in clients))
        await until(lambda: said == 100 and not web.server.server_state.tasks)
        assert len(lines(caplog, "after its client had left is lost")) == 1
        ours = [record.message for record in caplog.records if record.name == "starcast"]
        assert len(ours) == 2, ours  # and that the connection is lost
    finally:
        server.close()
