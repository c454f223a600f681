"""Messages that ask whether the server is there: answered to their sender, heard by nobody else."""

from __future__ import annotations

import asyncio
import socket
from types import MappingProxyType

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from websockets.exceptions import ConnectionClosed

from starcast import Broadcast, BroadcastEndpoint, ConfigurationError, Tuning
from support import DEADLINE, Peer, until

pytestmark = pytest.mark.anyio

HEARTBEATS = {
    "ping": "pong",
    "quiet": None,
    b"\x09": b"\x0a",
    "bin": b"\x00",
    '{"type":"ping"}': "{}",
}


def endpoint_of(hub, encoding="text", heartbeats=HEARTBEATS):
    its_encoding, its_heartbeats = encoding, heartbeats

    class Endpoint(BroadcastEndpoint):
        broadcast = hub
        encoding = its_encoding
        heartbeats = its_heartbeats
        received: list = []  # noqa: RUF012  # of this class

        async def on_receive(self, websocket, data):
            self.received.append(data)
            await super().on_receive(websocket, data)

    return Endpoint


def app_of(kind, hub, encoding="text", heartbeats=HEARTBEATS):
    """An app whose clients of /ws/{channel} may publish."""
    if kind == "mount":
        app = hub.app(publish=True, encoding=encoding, heartbeats=heartbeats)
        return Starlette(routes=[Mount("/ws", app)])

    async def serving(websocket):
        channel = websocket.path_params["channel"]
        await hub.serve(websocket, channel, encoding=encoding, heartbeats=heartbeats)

    endpoint = serving if kind == "serve" else endpoint_of(hub, encoding, heartbeats)
    return Starlette(routes=[WebSocketRoute("/ws/{channel}", endpoint)])


KINDS = ["endpoint", "serve", "mount"]
ROADS = ["auto", "starcast.uvicorn:BroadcastProtocol"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ws", ROADS)
async def test_a_heartbeat_is_answered_to_that_client_alone_and_in_order(serve, kind, ws):
    hub = Broadcast()
    server = await serve(app_of(kind, hub), ws=ws)
    async with server.connect("/ws/a") as ann, server.connect("/ws/a") as ben:
        await until(lambda: hub.channels == {"a": 2})
        for said in ("one", "ping", "quiet", "two", "ping", "bin", "three"):
            await ann.send(said)
        # What she said herself comes between the answers as she said it.
        got = [await ann.recv() for _ in range(6)]
        assert got == ["one", "pong", "two", "pong", b"\x00", "three"]
        assert [await ben.recv() for _ in range(3)] == ["one", "two", "three"]
    await until(lambda: len(hub) == 0)
    assert hub.stats().published == 3


@pytest.mark.parametrize("kind", KINDS)
async def test_a_text_is_a_text_and_bytes_are_bytes(serve, kind):
    hub = Broadcast()
    server = await serve(app_of(kind, hub, encoding=None))
    async with server.connect("/ws/a") as ann:
        for said in (b"ping", "\x09", b"\x09", "ping ", "Ping", "", b""):
            await ann.send(said)
        got = [await ann.recv() for _ in range(7)]
        assert got == [b"ping", "\x09", b"\x0a", "ping ", "Ping", "", b""]


@pytest.mark.parametrize("kind", KINDS)
async def test_with_json_a_heartbeat_is_compared_as_it_was_sent(serve, kind):
    hub = Broadcast()
    server = await serve(app_of(kind, hub, encoding="json"))
    async with server.connect("/ws/a") as ann:
        # Neither `ping` nor a tab is JSON: they are looked at before JSON is read.
        for said in ('{"type":"ping"}', "ping", b"\x09", '{"type": "ping"}'):
            await ann.send(said)
        got = [await ann.recv() for _ in range(4)]
        assert got == ["{}", "pong", b"\x0a", '{"type":"ping"}']
        await ann.send("pinge")
        with pytest.raises(ConnectionClosed) as caught:
            await ann.recv()
        assert caught.value.rcvd.code == 1007


@pytest.mark.parametrize("encoding", ["text", "bytes", "json", None])
async def test_a_heartbeat_is_no_frame_of_the_wrong_type(serve, encoding):
    hub = Broadcast()
    server = await serve(app_of("serve", hub, encoding=encoding))
    async with server.connect("/ws/a") as ann:
        await ann.send("ping")
        assert await ann.recv() == "pong"
        await ann.send(b"\x09")
        assert await ann.recv() == b"\x0a"


@pytest.mark.parametrize("kind", ["mount", "serve"])
async def test_who_only_listens_may_send_heartbeats(serve, kind, caplog):
    hub = Broadcast()

    async def listening(websocket):
        await hub.serve(websocket, "a", publish=False, heartbeats={"ping": "pong"})

    route = WebSocketRoute("/ws/a", listening)
    if kind == "mount":
        route = Mount("/ws", hub.app(heartbeats={"ping": "pong"}))
    server = await serve(Starlette(routes=[route]))
    async with server.connect("/ws/a") as ann, server.connect("/ws/a") as ben:
        await until(lambda: hub.channels == {"a": 2})
        for _ in range(3):
            await ann.send("ping")
            assert await ann.recv() == "pong"
        await hub.publish("a", "news")
        assert await ann.recv() == await ben.recv() == "news"
        assert [record for record in caplog.records if record.levelname == "WARNING"] == []
        await ann.send("hello")
        with pytest.raises(ConnectionClosed) as caught:
            await ann.recv()
        assert caught.value.rcvd.code == 1008


async def test_on_receive_does_not_get_heartbeats(serve):
    hub = Broadcast()
    endpoint = endpoint_of(hub)
    server = await serve(Starlette(routes=[WebSocketRoute("/ws/{channel}", endpoint)]))
    async with server.connect("/ws/a") as ann:
        for said in ("ping", "quiet", "hello", "ping"):
            await ann.send(said)
        assert [await ann.recv() for _ in range(3)] == ["pong", "hello", "pong"]
    assert endpoint.received == ["hello"]


@pytest.mark.parametrize("heartbeats", [None, {}])
async def test_without_heartbeats_a_ping_is_a_message(serve, heartbeats):
    hub = Broadcast()
    server = await serve(app_of("serve", hub, heartbeats=heartbeats))
    async with server.connect("/ws/a") as ann, server.connect("/ws/a") as ben:
        await until(lambda: hub.channels == {"a": 2})
        await ann.send("ping")
        assert await ann.recv() == await ben.recv() == "ping"


@pytest.mark.parametrize("registered", ["never", "no more"])
async def test_a_client_that_is_not_registered_is_answered_too(serve, registered):
    hub = Broadcast()

    class Endpoint(BroadcastEndpoint):
        broadcast = hub
        heartbeats = {"ping": "pong", "quiet": None}  # noqa: RUF012  # of this class

        async def on_connect(self, websocket):
            if registered == "never":
                await websocket.accept()
            else:
                await super().on_connect(websocket)
                await hub.disconnect(websocket)

    server = await serve(Starlette(routes=[WebSocketRoute("/ws", Endpoint)]))
    async with server.connect("/ws") as ann:
        for _ in range(3):
            await ann.send("quiet")
            await ann.send("ping")
            assert await ann.recv() == "pong"
        assert len(hub) == 0


@pytest.mark.parametrize("error", [None, OSError("reset")])
async def test_an_answer_to_a_client_that_has_gone_is_no_error(error):
    closed = []

    class Endpoint(BroadcastEndpoint):
        heartbeats = {"ping": "pong"}  # noqa: RUF012  # of this class

        async def on_connect(self, websocket):
            await websocket.accept()
            peer.fail = error
            if error is None:
                await websocket.close(4000)
            closed.append(websocket)

    peer = Peer()
    peer.say("ping")
    peer.say("ping")
    peer.leave(4001)
    await Endpoint(peer.scope, peer.receive, peer.send)
    assert closed
    assert peer.got == []


async def test_an_answer_that_fails_does_not_hide_what_the_client_closed_with():
    hub = Broadcast()
    peer = Peer()
    serving = asyncio.create_task(hub.serve(peer.websocket, heartbeats={"ping": "pong"}))
    await until(lambda: len(hub) == 1)
    await hub.disconnect(peer.websocket)
    peer.fail = OSError("reset")
    peer.say("ping")
    peer.leave(4001)
    assert await serving == 4001


async def test_a_heartbeat_for_which_the_loop_has_no_room_is_not_answered():
    hub = Broadcast(tuning=Tuning(max_pending=100))
    peer = Peer()
    serving = asyncio.create_task(hub.serve(peer.websocket, heartbeats={"ping": "pong"}))
    await until(lambda: len(hub) == 1)
    peer.say("ping")  # the handler has it before the loop has brought what follows to the client
    hub.publish_nowait("default", "x" * 200)
    await until(lambda: peer.got)
    peer.say("ping")
    peer.leave()
    assert await serving == 1000
    assert peer.got == ["x" * 200, "pong"]


# A flood


@pytest.mark.parametrize("ws", ROADS)
@pytest.mark.parametrize("overflow", ["disconnect", "drop_oldest", "drop_newest", "latest"])
async def test_a_flood_of_heartbeats_by_a_client_that_does_not_read_is_bounded(serve, overflow, ws):
    hub = Broadcast(max_buffer=8192, overflow=overflow)
    app = app_of("mount", hub, heartbeats={"ping": "p" * 1000})
    server = await serve(app, send_buffer=8192, ws=ws)
    most = 0
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        raw.connect((server.host, server.port))
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        key = "dGhlIHNhbXBsZSBub25jZQ=="
        await loop.sock_sendall(
            raw,
            f"GET /ws/a HTTP/1.1\r\nHost: {server.host}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode(),
        )
        await until(lambda: hub.channels == {"a": 1})
        async with server.connect("/ws/b") as ben:
            pings = b"\x81\x84\0\0\0\0ping" * 4000  # 4 MB of answers
            flood = asyncio.create_task(loop.sock_sendall(raw, pings))
            said = 0
            async with asyncio.timeout(DEADLINE):
                while hub.stats().dropped < 1000 and hub.stats().slow_clients == 0:
                    await ben.send(str(said))
                    assert await ben.recv() == str(said)
                    said += 1
                    most = max(most, hub.stats().buffered)
            assert most <= 8192
            assert hub.stats().published == said  # none of the pings was a message
            if overflow == "disconnect":
                await until(lambda: hub.channels == {"b": 1})
                assert hub.stats().slow_clients == 1
            else:
                assert hub.channels == {"a": 1, "b": 1}
            flood.cancel()
            await asyncio.gather(flood, return_exceptions=True)
    await until(lambda: len(hub) == 0)


@pytest.mark.parametrize("said", ["ping", "quiet"])
async def test_a_flood_of_heartbeats_leaves_time_to_others(said):
    hub = Broadcast()
    peer = Peer()
    for _ in range(1000):
        peer.say(said)
    peer.leave()
    turns = 0

    async def other():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await hub.serve(peer.websocket, heartbeats={"ping": "pong", "quiet": None})
    task.cancel()
    assert turns >= 10


async def test_heartbeats_are_those_of_the_moment_when_the_app_was_made(serve):
    heartbeats = {"ping": "pong"}
    app = Broadcast().app(publish=True, heartbeats=heartbeats)
    heartbeats.clear()
    server = await serve(app)
    async with server.connect("/a") as ann:
        await ann.send("ping")
        assert await ann.recv() == "pong"


# What may be written


@pytest.mark.parametrize(
    "heartbeats",
    [
        "ping",
        b"ping",
        7,
        ["ping"],
        {"ping"},
        [("ping", "pong")],
        {"ping": 1},
        {"ping": {"type": "pong"}},
        {"ping": ["pong"]},
        {"ping": True},
        {1: "pong"},
        {None: "pong"},
        {"ok": "ok", "ping": False},
        {"ping": "\ud800"},
    ],
)
async def test_what_cannot_be_a_heartbeat_is_refused_at_once(heartbeats):
    hub = Broadcast()
    with pytest.raises(ConfigurationError):
        hub.app(heartbeats=heartbeats)
    with pytest.raises(ConfigurationError):
        endpoint_of(hub, heartbeats=heartbeats)
    peer = Peer()
    with pytest.raises(ConfigurationError):
        await hub.serve(peer.websocket, heartbeats=heartbeats)
    assert peer.sent == []


async def test_any_mapping_will_do():
    hub = Broadcast()
    peer = Peer()
    peer.say("ping")
    peer.leave()
    await hub.serve(peer.websocket, heartbeats=MappingProxyType({"ping": "pong"}))
    assert peer.got == ["pong"]
