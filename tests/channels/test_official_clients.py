"""The clients that people have: Centrifugo's own, in Node and in Python."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from backends.redis_server import RedisServer
from channels import official_app
from channels.official import Failed, Official, clients_of, data, tell, told
from history.brokers import kept_url as kept_url  # a fixture
from server_process import ServerProcess
from starcast import BackendUnavailable, Broadcast, History
from support import Served, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

LIBRARIES = ["node", "python"]
PROTOCOLS = ["json", "protobuf"]

# Numbers that are published while things are killed; .ci/slow asks for more.
NUMBERS = int(os.environ.get("STARCAST_NUMBERS", "500"))


class World:
    """A server in this process, and clients of one library and one form of the protocol."""

    def __init__(self, served: Served, hub: Broadcast, clients: Official, protocol: str) -> None:
        self.served = served
        self.hub = hub
        self.clients = clients
        self._protocol = protocol

    @property
    def url(self) -> str:
        path = "/connection/websocket"
        query = "?cf_protocol=protobuf" if self._protocol == "protobuf" else ""
        return self.served.url(path + query)

    async def open(self, client: str, **options: Any) -> None:
        await self.clients.do("open", client, url=self.url, protocol=self._protocol, **options)

    async def connect(self, client: str, token: str = "", **options: Any) -> None:
        await self.open(client, token=token or client, **options)
        await tell(self.clients, client, "connected")

    async def do(self, action: str, client: str, **arguments: Any) -> Any:
        return await self.clients.do(action, client, **arguments)

    async def subscribe(self, client: str, channel: str, **arguments: Any) -> None:
        await self.do("subscribe", client, channel=channel, **arguments)
        await self.tell(client, "subscribed", channel=channel)

    async def tell(self, client: str, event: str, **having: Any) -> dict[str, Any]:
        return await tell(self.clients, client, event, **having)

    async def fails(self, code: int, action: str, client: str, **arguments: Any) -> None:
        with pytest.raises(Failed) as failed:
            await self.do(action, client, **arguments)
        assert failed.value.args == (code,)

    def data(self, client: str, channel: str, server: bool = False) -> list[Any]:
        return data(self.clients, client, channel, server)

    def cut(self) -> None:
        """Break every connection, as a network does."""
        for connection in list(self.served.server.server_state.connections):
            connection.transport.abort()


@contextlib.asynccontextmanager
async def world(
    library: str, protocol: str = "json", url: str = "memory://"
) -> AsyncIterator[World]:
    app = official_app.make(url, name=None if url == "memory://" else uuid.uuid4().hex)
    served = Served(app)
    await served.start()
    try:
        async with clients_of(library) as clients:
            yield World(served, app.state.hub, clients, protocol)
    finally:
        await served.stop()


async def everyday(it: World) -> None:
    """What clients do all day."""
    await it.connect("ada")
    await it.connect("bob")
    await it.subscribe("ada", "room:tea")
    await it.subscribe("bob", "room:tea")
    for message in [{"text": "hello"}, [1, None], "change me"]:
        await it.do("publish", "ada", channel="room:tea", data=message)
    await it.fails(103, "publish", "ada", channel="room:tea", data="refused")
    await it.hub.publish("room:tea", "from the server")
    expected = [{"text": "hello"}, [1, None], {"changed": True}, "from the server"]
    for client in ("ada", "bob"):
        await until(lambda client=client: len(it.data(client, "room:tea")) == 4)
        assert it.data(client, "room:tea") == expected
    publications = told(it.clients, "bob", "publication")
    assert [event["offset"] for event in publications] == [1, 2, 3, 4]
    assert publications[0]["user"] == "ada"
    past = await it.do("history", "bob", channel="room:tea", limit=2)
    assert past == {"offset": 4, "data": expected[:2]}

    assert await it.do("rpc", "ada", method="echo", data={"a": [1, "\u00e9"]}) == {
        "a": [1, "\u00e9"]
    }
    assert await it.do("rpc", "ada", method="move", data={"x": 1, "y": 2}) == {"sum": 3}
    await it.fails(107, "rpc", "ada", method="move", data={"x": "one"})
    await it.fails(1000, "rpc", "ada", method="fail", data={})
    await it.fails(104, "rpc", "ada", method="unheard of", data={})

    await it.do("subscribe", "ada", channel="secret")
    await it.tell("ada", "unsubscribed", channel="secret", code=103)
    await it.do("unsubscribe", "ada", channel="room:tea")
    await until(lambda: it.hub.channels["room:tea"] == 1)
    await it.hub.unsubscribe_user("bob", "room:tea")
    await it.tell("bob", "unsubscribed", channel="room:tea", code=2000)

    await it.subscribe("ada", "gathering")
    await it.subscribe("bob", "gathering")
    await it.tell("ada", "join", channel="gathering", user="bob")
    assert sorted(await it.do("presence", "bob", channel="gathering")) == [
        ["ada", {"name": "ada"}],
        ["bob", {"name": "bob"}],
    ]
    assert await it.do("counts", "bob", channel="gathering") == [2, 2]
    await it.do("close", "bob")
    await it.tell("ada", "leave", channel="gathering", user="bob")

    await it.hub.disconnect_user("ada", reconnect=True)
    await it.tell("ada", "connecting", code=3011)
    # The Python library does not see the close code while it is just sending something.
    await until(lambda: len(told(it.clients, "ada", "subscribed", channel="gathering")) == 2)
    await it.hub.disconnect_user("ada")
    await it.tell("ada", "disconnected", code=3503)
    await until(lambda: not len(it.hub))


async def tokens(it: World) -> None:
    """Tokens that are wrong, that expire, and that are renewed."""
    await it.open("eve", token="eve:refused")
    await it.tell("eve", "disconnected", code=103)
    await it.open("kay", token="kay:away")
    await it.tell("kay", "disconnected", code=4500)
    await it.open("ada", token="ada:expired", tokens=["ada"])
    await it.tell("ada", "connected")
    await it.open("bob", token="bob:short", tokens=["again", "renewed"])
    await it.tell("bob", "connected")
    await it.subscribe("ada", "short", tokens=["first", "second"])
    # Nobody is cut off, although this is longer than any of these tokens is valid.
    await asyncio.sleep(2.5)
    assert len(told(it.clients, "bob", "connected")) == 1
    assert len(told(it.clients, "ada", "subscribed", channel="short")) == 1
    assert set(it.hub.channels) == {"short"}


async def cut(it: World) -> None:
    """The network breaks: nothing is lost, whoever has subscribed."""
    await it.open("ada", token="ada:news")
    await it.tell("ada", "connected")
    await it.subscribe("ada", "room:tea")
    await it.subscribe("ada", "plain")
    for number in range(3):
        await it.hub.publish("room:tea", number)
        await it.hub.publish("news:all", number)
    await until(lambda: len(it.data("ada", "news:all", server=True)) == 3)
    it.cut()
    for number in range(3, 6):
        await it.hub.publish("room:tea", number)
        await it.hub.publish("news:all", number)
    await until(lambda: len(told(it.clients, "ada", "connected")) == 2)
    await until(lambda: len(told(it.clients, "ada", "subscribed", channel="plain")) == 2)
    for channel in ("room:tea", "news:all", "plain"):
        await it.hub.publish(channel, 6)
    await it.tell("ada", "publication", channel="plain", data=6)
    await it.tell("ada", "publication", channel="news:all", data=6)
    await it.tell("ada", "publication", channel="room:tea", data=6)
    assert it.data("ada", "room:tea") == list(range(7))
    assert it.data("ada", "news:all", server=True) == list(range(7))
    again = told(it.clients, "ada", "subscribed", channel="room:tea")[-1]
    assert (again["wasRecovering"], again["recovered"]) == (True, True)


async def many(it: World) -> None:
    """Hundreds of subscriptions at once, and again after a cut."""
    await it.connect("ada")
    channels = [f"room:{number}" for number in range(300)]
    for channel in channels:
        await it.do("subscribe", "ada", channel=channel)
    await until(lambda: len(told(it.clients, "ada", "subscribed")) == 300)
    it.cut()
    await until(lambda: len(told(it.clients, "ada", "connected")) == 2)
    await until(lambda: len(told(it.clients, "ada", "subscribed")) == 600)
    for channel in channels:
        await it.hub.publish(channel, channel)
    await until(lambda: len(told(it.clients, "ada", "publication")) == 300)
    assert {event["data"] for event in told(it.clients, "ada", "publication")} == set(channels)


SCENARIOS = [everyday, tokens, cut, many]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_official_clients_in_memory(scenario, library, protocol):
    async with world(library, protocol) as it:
        await scenario(it)


async def test_official_clients_over_each_broker(kept_url):
    async with world("node", url=kept_url) as it:
        await everyday(it)
    async with world("python", "protobuf", url=kept_url) as it:
        await cut(it)


# Kills


class Publisher:
    """Publishes numbers one after another, each until it is published, whatever happens."""

    def __init__(self, url: str) -> None:
        self.hub = Broadcast(
            url, name="official", history={"room:*": History(size=20_000)}, open_timeout=30
        )

    async def publish(self, channel: str, numbers: range) -> None:
        for number in numbers:
            while True:
                try:
                    await self.hub.publish(channel, number, idempotency_key=str(number))
                    break
                except BackendUnavailable:
                    await asyncio.sleep(0.05)


@pytest.mark.parametrize("library", LIBRARIES)
async def test_every_number_arrives_once_and_in_order(library, tmp_path):
    """While the clients' server and then the broker are killed, and both at once."""
    with RedisServer("--appendonly", "yes", "--appendfsync", "always") as redis:
        command = ["uvicorn", "channels.official_app:app", "--port", "{port}"]
        server = ServerProcess(command, tmp_path / "log", URL=redis.url)
        try:
            async with clients_of(library) as clients, Publisher(redis.url).hub as hub:
                publisher = Publisher(redis.url)
                publisher.hub = hub
                url = f"ws://127.0.0.1:{server.port}/connection/websocket"
                for number in range(5):
                    await clients.do("open", f"c{number}", url=url, token="x")
                    await clients.do("subscribe", f"c{number}", channel="room:numbers")
                    await tell(clients, f"c{number}", "subscribed")
                publishing = asyncio.create_task(publisher.publish("room:numbers", range(NUMBERS)))

                async def seen(part: float) -> None:
                    least = int(NUMBERS * part)
                    await until(lambda: len(data(clients, "c0", "room:numbers")) >= least)

                await seen(0.2)
                server.kill()
                server.start()
                await seen(0.4)
                redis.kill()
                redis.start()
                await seen(0.6)
                redis.kill()
                server.kill()
                redis.start()
                server.start()
                await publishing
                for number in range(5):
                    name = f"c{number}"
                    await until(
                        lambda name=name: len(data(clients, name, "room:numbers")) >= NUMBERS
                    )
                    assert data(clients, name, "room:numbers") == list(range(NUMBERS))
                    assert told(clients, name, "subscribed", wasRecovering=True)
                    missed = told(clients, name, "subscribed", recovered=False)
                    assert not [event for event in missed if event["wasRecovering"]]
        finally:
            server.kill()


@pytest.mark.parametrize("library", LIBRARIES)
async def test_a_broker_that_has_forgotten_everything_is_told(library):
    with RedisServer() as redis:
        async with world(library, url=redis.url) as it:
            await it.connect("ada")
            await it.subscribe("ada", "room:tea")
            await it.hub.publish("room:tea", 1)
            await it.tell("ada", "publication", data=1)
            redis.kill()
            it.cut()
            redis.start()
            event = await it.tell("ada", "subscribed", wasRecovering=True)
            assert event["recovered"] is False
            await it.hub.publish("room:tea", 2)
            await it.tell("ada", "publication", data=2)
