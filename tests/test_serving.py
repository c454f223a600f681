"""`serve`: a client's life from `connect` to its close code."""

from __future__ import annotations

import asyncio
import functools
import json

import pytest
from fastapi import WebSocket
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from websockets.exceptions import ConnectionClosed

from starcast import (
    BackendUnavailable,
    Broadcast,
    BroadcastEndpoint,
    ConfigurationError,
    Tuning,
)
from support import Broker, Bus, Peer, joined, until

pytestmark = pytest.mark.anyio


async def test_serve_lives_a_clients_whole_life(serve):
    hub = Broadcast()
    codes = []

    async def endpoint(websocket: WebSocket) -> None:
        codes.append(await hub.serve(websocket, channel=websocket.path_params["room"]))

    server = await serve(Starlette(routes=[WebSocketRoute("/{room}", endpoint)]))
    async with server.connect("/a") as one, server.connect("/a") as two, server.connect("/b") as b:
        await one.send("hello")
        assert await one.recv() == await two.recv() == "hello"
        assert hub.channels == {"a": 2, "b": 1}
        await b.close(4321)
        await until(lambda: len(hub) == 2)
    await until(lambda: len(codes) == 3)
    assert sorted(codes) == [1000, 1000, 4321]
    assert len(hub) == 0


@pytest.mark.parametrize(
    ("encoding", "sent", "received"),
    [
        ("text", "ok", "ok"),
        ("bytes", b"ok", b"ok"),
        ("json", '"ok"', '"ok"'),
        ("json", b'{"a": 1}', '{"a":1}'),
        (None, "ok", "ok"),
        (None, b"ok", b"ok"),
    ],
)
async def test_serve_speaks_its_encoding_both_ways(serve, encoding, sent, received):
    hub = Broadcast()
    server = await serve(
        Starlette(routes=[WebSocketRoute("/", functools.partial(hub.serve, encoding=encoding))])
    )
    async with server.connect("/") as client:
        await client.send(sent)
        assert await client.recv() == received


@pytest.mark.parametrize(
    ("encoding", "sent", "code"),
    [("text", b"x", 1003), ("bytes", "x", 1003), ("json", "{", 1007)],
)
async def test_serve_closes_who_sends_something_else(serve, encoding, sent, code, caplog):
    hub = Broadcast()
    codes = []

    async def endpoint(websocket: WebSocket) -> None:
        codes.append(await hub.serve(websocket, encoding=encoding))

    server = await serve(Starlette(routes=[WebSocketRoute("/", endpoint)]))
    async with server.connect("/") as client:
        await client.send(sent)
        with pytest.raises(ConnectionClosed) as caught:
            await client.recv()
        assert caught.value.rcvd.code == code
    await until(lambda: codes == [code])
    lines = [record for record in caplog.records if record.name == "starcast"]
    assert len(lines) == 1
    assert str(code) in lines[0].getMessage()


async def test_what_dumps_cannot_write_closes_who_sent_it():
    def dumps(value):
        if value == 2**70:
            raise OverflowError("a large number")
        return json.dumps(value)

    hub = Broadcast(dumps=dumps)
    peer = Peer()
    peer.say(str(2**70))
    assert await hub.serve(peer.websocket, encoding="json") == 1007


async def test_serve_refuses_an_encoding_that_is_none():
    with pytest.raises(ConfigurationError):
        await Broadcast().serve(Peer().websocket, encoding="morse")


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


async def test_serve_unregisters_when_it_is_cancelled():
    hub = Broadcast()
    peer = Peer()
    serving = asyncio.create_task(hub.serve(peer.websocket))
    await until(lambda: len(hub) == 1)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert len(hub) == 0


async def test_serve_of_a_client_that_has_left_comes_back():
    hub = Broadcast()
    peer = Peer()
    await peer.websocket.accept()
    await peer.websocket.close()
    assert await hub.serve(peer.websocket) == 1006


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


# Errors


async def unreachable(connection, messages, proceed):
    if messages and not messages[0][0].startswith("default:starcast-probe"):
        raise ConnectionError("the broker is away")
    await proceed()


async def test_an_error_in_the_hook_closes_after_what_the_client_has_to_get(serve, caplog):
    def mistaken(websocket, data, exc):
        for number in range(100):
            local.publish_nowait("here", str(number).ljust(10_000))
        raise LookupError("a mistake")

    local = Broadcast()
    hub = Broadcast(backend=Bus(on_publish=unreachable))

    async def endpoint(websocket: WebSocket) -> None:
        await local.connect(websocket, "here")
        await hub.serve(websocket, on_publish_error=mistaken)

    server = await serve(Starlette(routes=[WebSocketRoute("/", endpoint)]))
    async with server.connect("/", compression=None) as client:
        await client.send("hello")
        for number in range(100):
            assert (await client.recv()).rstrip() == str(number)
        with pytest.raises(ConnectionClosed) as caught:
            await client.recv()
        assert caught.value.rcvd.code == 1011
    await until(lambda: len(hub) == 0)
    errors = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [repr(error) for error in errors] == ["LookupError('a mistake')"]
    caplog.clear()
    await hub.disconnect()


async def test_the_apps_handler_answers_a_client_that_is_not_accepted_yet():
    async def away(bus, proceed):
        raise BackendUnavailable("the broker is away")

    async def handle(websocket, exc):
        await websocket.close(4503)

    hub = Broadcast(backend=Bus(on_connect=away), open_timeout=0)
    handlers = {BackendUnavailable: handle}
    app = Starlette(routes=[WebSocketRoute("/", hub.serve)], exception_handlers=handlers)
    peer = Peer()
    await app(peer.scope, peer.receive, peer.send)
    assert peer.closed == 4503
