"""What a client says: how much of it may be under way, and what cannot be published."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.routing import Mount, WebSocketRoute
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed

from backends.nats_server import NatsServer
from backends.postgres_server import PostgresServer
from backends.redis_server import RedisServer
from starcast import BackendUnavailable, Broadcast, BroadcastEndpoint, Tuning
from support import Broker, Bus, Peer, joined, until

pytestmark = pytest.mark.anyio


async def code_of(client) -> int:
    """Read until the server closes, and return its code."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            await client.recv()
    await client.wait_closed()
    return client.close_code


def lines(caplog) -> list[str]:
    """The lines about single clients, which have no traceback."""
    records = [record for record in caplog.records if "closed the client" in record.getMessage()]
    assert not any(record.exc_info for record in records)
    return [record.getMessage() for record in records]


def app_of(hub: Broadcast, codes: list[int], **options) -> Starlette:
    """An endpoint, a route with `serve(**options)` and a mount; `codes` are what they end with."""

    class Chat(BroadcastEndpoint):
        broadcast = hub

        async def on_disconnect(self, websocket, close_code):
            codes.append(close_code)
            await super().on_disconnect(websocket, close_code)

    async def serve(websocket):
        codes.append(await hub.serve(websocket, **options))

    return Starlette(
        routes=[
            WebSocketRoute("/endpoint", Chat),
            WebSocketRoute("/serve", serve),
            Mount("/mount", hub.app(publish=True)),
        ]
    )


PATHS = ["/endpoint", "/serve", "/mount/default"]


async def test_a_message_too_large_for_the_broker_closes_its_sender_with_1009(serve, caplog):
    with contextlib.closing(NatsServer()) as nats:
        nats.start()
        async with Broadcast(nats.url, max_message=None) as hub:
            codes: list[int] = []
            server = await serve(app_of(hub, codes))
            async with server.connect("/endpoint") as other:
                for number, path in enumerate(PATHS, 1):
                    async with server.connect(path) as client:
                        await client.send("x" * 1_100_000)
                        assert (await code_of(client), path) == (1009, path)
                    await until(lambda n=number: len(lines(caplog)) == n)
                await until(lambda: codes == [1009, 1009])
                assert len(hub) == 1
                await other.send("hello")
                assert await other.recv() == "hello"
    assert all("1009: message too large" in line for line in lines(caplog))
    assert "xxx" not in caplog.text


@pytest.mark.parametrize("broker", [RedisServer, NatsServer, PostgresServer])
async def test_what_could_not_be_published_closes_its_sender_with_1013(serve, caplog, broker):
    with contextlib.closing(broker()) as server_of_broker:
        server_of_broker.start()
        async with Broadcast(server_of_broker.url) as hub:
            codes: list[int] = []
            server = await serve(app_of(hub, codes))
            clients = [await server.connect(path) for path in PATHS]
            listener = await server.connect("/endpoint")
            await until(lambda: len(hub) == 4)
            server_of_broker.kill()
            await until(lambda: hub.stats().backend.state == "reconnecting")
            for client in clients:
                await client.send("hello")
            assert [await code_of(client) for client in clients] == [1013] * 3
            await until(lambda: codes == [1013, 1013])
            await listener.ping()
            assert len(hub) == 1  # who said nothing stays
            await listener.close()
    assert lines(caplog) == []
    caplog.clear()


async def test_what_the_broker_refuses_of_clients_is_one_warning_with_its_words(serve, caplog):
    rights = """authorization: {users: [{user: few, password: pass, permissions: {
        subscribe: ">", publish: {allow: ">", deny: "starcast:default.secret"}}}]}"""
    with contextlib.closing(NatsServer(rights)) as nats:
        nats.start()
        async with Broadcast(nats.url.replace("://", "://few:pass@")) as hub:
            server = await serve(app_of(hub, []))
            other = await server.connect("/endpoint")
            clients = [await server.connect("/mount/secret") for _ in range(3)]
            await until(lambda: len(hub) == 4)
            for client in clients:
                await client.send("hello")
            assert [await code_of(client) for client in clients] == [1013] * 3
            lost = hub.stats().backend.lost
            hub.publish_nowait("secret", "hello")
            await until(lambda: hub.stats().backend.lost == lost + 1)
            assert "permission" in hub.stats().backend.error.lower()
            await other.send("still here")
            assert await other.recv() == "still here"
            assert hub.stats().backend.gaps == 0
            await other.close()
    said = [r for r in caplog.records if "did not reach the broker" in r.getMessage()]
    assert [record.levelname for record in said] == ["WARNING"]
    assert "permission" in said[0].getMessage().lower()
    assert "hello" not in caplog.text


@pytest.mark.parametrize("broker", [RedisServer, NatsServer, PostgresServer])
async def test_what_is_said_during_a_short_outage_arrives_in_order(serve, broker, caplog):
    with contextlib.closing(broker()) as server_of_broker:
        server_of_broker.start()
        tuning = Tuning(publish_timeout=20)  # a busy machine starts brokers slowly
        async with Broadcast(server_of_broker.url, tuning=tuning) as hub:
            codes: list[int] = []
            server = await serve(app_of(hub, codes))
            clients = [await server.connect(path) for path in PATHS]
            await until(lambda: len(hub) == 3)
            server_of_broker.kill()
            await until(lambda: hub.stats().backend.state == "reconnecting")
            for number in range(100):
                for name, client in enumerate(clients):
                    await client.send(f"{name} {number}")
            await until(lambda: hub.stats().backend.queued == 300)
            await asyncio.to_thread(server_of_broker.start)
            for listener in clients:
                async with asyncio.timeout(30):
                    got = [await listener.recv() for _ in range(300)]
                for name in range(len(clients)):
                    said = [text for text in got if text.startswith(f"{name} ")]
                    assert said == [f"{name} {number}" for number in range(100)]
            assert hub.stats().backend.lost == 0
            for client in clients:
                await client.close()
    assert lines(caplog) == []


@pytest.mark.parametrize("way", ["endpoint", "plain", "async"])
async def test_the_hook_gets_what_was_lost_and_the_client_stays(serve, way, caplog):
    lost = []

    def plain(websocket, data, exc):
        lost.append((data, type(exc)))

    async def tell(websocket, data, exc):
        lost.append((data, type(exc)))
        await websocket.send_text(f"not sent: {data}")

    with RedisServer() as redis:
        async with Broadcast(redis.url) as hub:

            class Chat(BroadcastEndpoint):
                broadcast = hub

                async def on_publish_error(self, websocket, data, exc):
                    await tell(websocket, data, exc)

            async def serve_it(websocket):
                await hub.serve(websocket, on_publish_error=plain if way == "plain" else tell)

            route = WebSocketRoute("/", Chat if way == "endpoint" else serve_it)
            server = await serve(Starlette(routes=[route]))
            async with server.connect("/") as client:
                await until(lambda: len(hub) == 1)
                redis.kill()
                await until(lambda: hub.stats().backend.state == "reconnecting")
                for number in range(3):
                    await client.send(str(number))
                await until(lambda: len(lost) == 3)
                assert lost == [(str(number), BackendUnavailable) for number in range(3)]
                if way != "plain":
                    assert [await client.recv() for _ in lost] == [
                        f"not sent: {number}" for number in range(3)
                    ]
                redis.start()
                await until(lambda: hub.stats().backend.state == "connected")
                await client.send("here I am")
                assert await client.recv() == "here I am"
    caplog.clear()


# At a given moment, with a broker that does what the test wants


class Life:
    """A client of a hub with a `Bus`, and what happened to it, in order."""

    def __init__(self, **tuning: float) -> None:
        self.broker = Broker()
        self.hub = hub = Broadcast(backend=Bus(self.broker), tuning=Tuning(**tuning))
        self.peer = Peer()
        self.events: list[object] = []
        self.release = asyncio.Event()
        self.release.set()
        self.error: Exception | None = None
        life = self

        class Chat(BroadcastEndpoint):
            broadcast = hub

            async def on_receive(self, websocket, data):
                life.events.append(("said", data))
                await super().on_receive(websocket, data)

            async def on_publish_error(self, websocket, data, exc):
                life.events.append(("lost", data))
                await life.release.wait()
                if life.error:
                    raise life.error
                life.events.append(("told", data))

            async def on_disconnect(self, websocket, close_code):
                life.events.append(close_code)
                await super().on_disconnect(websocket, close_code)

        endpoint = Chat(self.peer.scope, self.peer.receive, self.peer.send)
        self.task = asyncio.ensure_future(endpoint.dispatch())

    async def say_and_lose(self, *messages: str) -> None:
        """Say it while the broker does not answer, and break the broker once all is handed over."""
        await until(lambda: len(self.hub) == 1)
        self.broker.open.clear()
        for message in messages:
            self.peer.say(message)
        await until(lambda: self.broker.stalled)
        await until(lambda: ("said", messages[-1]) in self.events)
        await asyncio.sleep(0)
        self.broker.kill()
        self.broker.open.set()


@pytest.fixture
async def life(anyio_backend, request):
    life = Life(**getattr(request, "param", {}))
    yield life
    if not life.task.done():
        life.peer.leave()
        await life.task
    await life.hub.disconnect()


async def test_what_is_lost_later_is_told_in_order(life):
    await life.say_and_lose("1", "2", "3")
    await until(lambda: ("told", "3") in life.events)
    told = [event[1] for event in life.events if event[0] == "told"]
    assert told == ["1", "2", "3"]
    assert len(life.hub) == 1


async def test_what_is_lost_later_may_close_its_sender(life):
    life.error = WebSocketException(4000, "enough")
    await life.say_and_lose("1", "2", "3")
    await until(lambda: life.peer.closed)
    assert life.peer.closed == 4000
    life.peer.leave(4000)  # what a server then says
    await life.task
    assert life.events[-2:] == [("lost", "1"), 4000]


async def test_by_default_what_is_lost_later_closes_its_sender_with_1013():
    broker = Broker()
    hub = Broadcast(backend=Bus(broker))
    peer = Peer()
    serving = asyncio.create_task(hub.serve(peer.websocket))
    await until(lambda: len(hub) == 1)
    broker.open.clear()
    peer.say("hello")
    await until(lambda: broker.stalled)
    broker.kill()
    broker.open.set()
    await until(lambda: peer.closed)
    assert peer.closed == 1013
    assert await serving == 1013
    await hub.disconnect()


async def test_a_hook_that_fails_later_closes_its_client_with_1011(life, caplog):
    life.error = LookupError("a mistake")
    await life.say_and_lose("1")
    await until(lambda: life.peer.closed)
    assert life.peer.closed == 1011
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage() == "on_publish_error raised"
    assert record.exc_info[1] is life.error
    caplog.clear()


async def test_nothing_more_is_published_while_the_hook_is_told(life):
    life.release.clear()
    await life.say_and_lose("1")
    await until(lambda: ("lost", "1") in life.events)
    life.broker.up = True
    await until(lambda: life.hub.stats().backend.state == "connected")
    life.peer.say("2")
    await until(lambda: ("said", "2") in life.events)
    published = life.hub.stats().published
    life.peer.say("3")
    for _ in range(10):
        await asyncio.sleep(0)
    assert life.hub.stats().published == published
    assert ("said", "3") not in life.events
    life.release.set()
    await until(lambda: life.peer.got == ["2", "3"])


async def test_the_hook_may_say_it_again():
    broker = Broker()
    hub = Broadcast(backend=Bus(broker))
    lost = []

    class Chat(BroadcastEndpoint):
        broadcast = hub

        async def on_publish_error(self, websocket, data, exc):
            lost.append(data)
            await self.on_receive(websocket, data)

    peer = Peer()
    task = asyncio.ensure_future(Chat(peer.scope, peer.receive, peer.send).dispatch())
    await until(lambda: len(hub) == 1)
    broker.open.clear()
    peer.say("1")
    await until(lambda: broker.stalled)
    broker.kill()
    broker.up = True
    broker.open.set()
    await until(lambda: peer.got == ["1"])
    peer.say("2")
    await until(lambda: peer.got == ["1", "2"])
    assert lost == ["1"]
    peer.leave()
    await task
    await hub.disconnect()


@pytest.mark.parametrize("told", [True, False])
async def test_a_hook_that_finds_its_client_gone_is_no_error(life, told, caplog):
    life.error = WebSocketDisconnect(1006)
    life.release.clear()
    await life.say_and_lose("1")
    await until(lambda: ("lost", "1") in life.events)
    if told:
        life.peer.leave()
        await until(lambda: len(life.hub) == 0)
    life.release.set()
    if not told:  # then it is about somebody else
        await until(lambda: life.peer.closed == 1011)
        life.peer.leave(1011)
    await life.task
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors == ([] if told else ["on_publish_error raised"])
    caplog.clear()


async def test_the_hook_ends_before_on_disconnect(life):
    life.release.clear()
    await life.say_and_lose("1")
    await until(lambda: ("lost", "1") in life.events)
    life.peer.leave()
    for _ in range(10):
        await asyncio.sleep(0)
    assert life.events[-1] == ("lost", "1")
    life.release.set()
    await life.task
    assert life.events[-2:] == [("told", "1"), 1000]


@pytest.mark.parametrize("life", [{"close_timeout": 0.01}], indirect=True)
async def test_a_hook_that_hangs_ends_with_its_client(life):
    life.release.clear()
    await life.say_and_lose("1")
    await until(lambda: ("lost", "1") in life.events)
    life.peer.leave()
    await life.task
    assert life.events[-1] == 1000
    life.release.set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert ("told", "1") not in life.events


async def test_what_is_lost_after_the_client_has_left_is_counted_only(life):
    await until(lambda: len(life.hub) == 1)
    life.broker.open.clear()
    life.peer.say("1")
    life.peer.leave()
    await until(lambda: life.broker.stalled)
    await life.task
    life.broker.kill()
    life.broker.open.set()
    await until(lambda: life.hub.stats().backend.lost == 1)
    for _ in range(10):
        await asyncio.sleep(0)
    assert life.events == [("said", "1"), 1000]


@pytest.mark.parametrize("life", [{"max_queued": 1, "publish_timeout": 0.05}], indirect=True)
async def test_a_hub_without_room_is_told_too(life, caplog):
    await until(lambda: len(life.hub) == 1)

    life.broker.open.clear()
    life.hub.publish_nowait("elsewhere", "x" * 1000)  # all that may be queued, and more
    await until(lambda: life.broker.stalled)
    life.hub.publish_nowait("elsewhere", "x" * 1000)
    life.error = WebSocketException(4000)
    life.peer.say("1")
    await life.task
    assert life.events == [("said", "1"), ("lost", "1"), 4000]
    assert life.peer.closed == 4000
    life.broker.open.set()
    caplog.clear()


# How much may be under way


async def test_what_dumps_cannot_write_closes_who_sent_it():
    def dumps(value):
        if value == 2**70:
            raise OverflowError("a large number")
        return json.dumps(value)

    hub = Broadcast(dumps=dumps)
    peer = Peer()
    peer.say(str(2**70))
    assert await hub.serve(peer.websocket, encoding="json") == 1007


class Watching(Peer):
    """Notes how much waits for its event loop whenever it is read from."""

    def __init__(self, hub: Broadcast) -> None:
        super().__init__()
        self.hub = hub
        self.pending: list[int] = []

    async def receive(self):
        self.pending.append(self.hub.stats().pending)
        return await super().receive()


async def test_a_client_is_not_read_from_while_256_of_its_messages_are_on_their_way():
    hub = Broadcast()
    peer = Watching(hub)
    for number in range(1000):
        peer.say(str(number))
    peer.leave()
    other = await joined(hub)
    await hub.serve(peer.websocket)
    await until(lambda: len(other.got) == 1000)
    assert other.got == [str(number) for number in range(1000)]
    assert max(peer.pending) == 255


async def test_large_messages_of_a_client_are_confirmed_more_often():
    hub = Broadcast()
    peer = Watching(hub)
    for _ in range(100):
        peer.say("x" * 20_000)
    peer.leave()
    await hub.serve(peer.websocket)
    assert hub.stats().published == 100
    assert max(peer.pending) == 3  # one more is 64 KiB


async def test_messages_that_cannot_be_handed_over_are_counted_and_logged_once(caplog):
    broker = Broker()
    hub = Broadcast(backend=Bus(broker), tuning=Tuning(max_queued=1, publish_timeout=0.05))
    peer = Peer()
    stays = lambda *lost: None  # noqa: E731  # by default the first one would close it
    serving = asyncio.create_task(hub.serve(peer.websocket, on_publish_error=stays))
    await until(lambda: len(hub) == 1)
    broker.open.clear()
    for _ in range(2):  # one is under way, and the other fills the queue
        hub.publish_nowait("elsewhere", "x" * 1000)
        await until(lambda: broker.stalled)
    failed = hub.stats().failed
    for number in range(5):
        peer.say(str(number))
    await until(lambda: hub.stats().failed == failed + 5)
    lost = [line for line in caplog.messages if line.startswith("messages of clients are being")]
    assert len(lost) == 1
    broker.open.set()
    peer.say("works")
    await until(lambda: peer.got == ["works"])
    peer.leave()
    await serving
    await hub.disconnect()
    caplog.clear()


async def test_what_a_client_sends_opens_the_hub():
    class Chat(BroadcastEndpoint):
        broadcast = Broadcast()

        async def on_connect(self, websocket):
            await websocket.accept()  # and does not register it

    hub, peer = Chat.broadcast, Peer()
    peer.say("hello")
    peer.leave()
    await Chat(peer.scope, peer.receive, peer.send)
    assert hub.stats().open
    assert hub.stats().published == 1


async def test_a_client_that_is_closed_while_its_message_waits_does_not_say_it():
    hub = Broadcast(max_buffer=1000)
    slow, peer = await joined(hub), Peer()
    serving = asyncio.create_task(hub.serve(peer.websocket))
    await until(lambda: len(hub) == 2)
    slow.open.clear()
    while hub.stats().buffered < 400:  # at 500, half of the buffer, this would wait
        await hub.send("x" * 100, to=slow.websocket)
    peer.say("y" * 200)
    await until(lambda: hub.stats().waiting_senders == 1)
    await hub.close(peer.websocket, 4003)
    slow.open.set()
    assert await serving == 4003
    assert hub.stats().published == 0
    assert "y" * 200 not in slow.got
