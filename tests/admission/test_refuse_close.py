"""`refuse="close"`: a client is accepted and then closed, so that a page sees the code."""

from __future__ import annotations

import asyncio
import socket

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.routing import Mount, WebSocketRoute
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidStatus

from starcast import Broadcast, BroadcastEndpoint, ClientGone, ConfigurationError, Tuning
from starcast.uvicorn import BroadcastProtocol
from support import Broker, Bus, Peer, starcast_tasks, until
from test_refusals import DOORS, app_of, path_of, warnings_of

pytestmark = pytest.mark.anyio

EVIL = "https://evil.example"
HANDSHAKE = (
    b"GET /endpoint HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    b"Sec-WebSocket-Version: 13\r\nOrigin: https://evil.example\r\n\r\n"
)


async def closing(server, path: str, **options) -> tuple[int, str]:
    """What a client that was accepted is closed with."""
    async with server.connect(path, **options) as client:
        await client.wait_closed()
    return client.close_code, client.close_reason


async def answer(server, path: str, **options) -> int:
    """The HTTP status or the close code."""
    try:
        return (await closing(server, path, **options))[0]
    except InvalidStatus as exc:
        return exc.response.status_code


@pytest.mark.parametrize("ws", ["auto", BroadcastProtocol])
async def test_every_door_tells_what_it_refuses(serve, caplog, ws):
    broker = Broker()
    broker.up = False
    server = await serve(app_of(Broadcast(refuse="close")), ws=ws)
    named = await serve(app_of(Broadcast(refuse="close"), channel="a\0b"), ws=ws)
    away = await serve(
        app_of(Broadcast(backend=Bus(broker), open_timeout=0, refuse="close")), ws=ws
    )
    for door in DOORS:
        assert await closing(server, path_of(door), origin=EVIL) == (1008, "origin not allowed")
        if door != "manager":
            path = path_of(door, "a%00b")
            assert await closing(named, path) == (1008, "invalid channel")
        assert await closing(away, path_of(door)) == (1013, "try again later")
    origin, name, broker_away = warnings_of(caplog)
    assert "origins=" in origin
    assert "must not contain" in name
    assert broker_away.startswith("refused a client before it was accepted (closed with 1013): ")
    assert not any(record.exc_info for record in caplog.records)
    await until(lambda: not starcast_tasks())


async def test_a_mount_and_an_endpoint_may_refuse_otherwise_than_their_hub(serve):
    def door(of_the_hub, of_the_door):
        hub = Broadcast(refuse=of_the_hub)

        class Chat(BroadcastEndpoint):
            broadcast = hub
            refuse = of_the_door

        return [
            WebSocketRoute(f"/{of_the_hub}/{of_the_door}", Chat),
            Mount(f"/{of_the_hub}/{of_the_door}", hub.app(refuse=of_the_door)),
        ]

    pairs = [(hub, its) for hub in ("http", "close") for its in ("http", "close", None)]
    server = await serve(Starlette(routes=[route for pair in pairs for route in door(*pair)]))
    for of_the_hub, of_the_door in pairs:
        expected = 403 if (of_the_door or of_the_hub) == "http" else 1008
        for path in (f"/{of_the_hub}/{of_the_door}", f"/{of_the_hub}/{of_the_door}/a"):
            assert (await answer(server, path, origin=EVIL), path) == (expected, path)


async def test_what_the_app_does_not_let_in_or_refuses_with_a_code_of_its_own(serve, caplog):
    class Chat(BroadcastEndpoint):
        refuse = "close"
        subprotocols = ("bearer",)

        def get_channel(self, websocket):
            if "room" not in websocket.query_params:
                raise WebSocketException(4404, "no such room")
            return "room"

        async def on_connect(self, websocket):
            if "token" not in websocket.query_params:
                raise WebSocketException(4401, "log in")
            await super().on_connect(websocket)

    def authorize(websocket, channel):
        if channel == "raises":
            raise PermissionError
        return {"yes": True, "no": False}.get(channel)

    hub = Broadcast()
    mount = hub.app(authorize=authorize, refuse="close", subprotocols=["bearer"])
    fastapi = FastAPI()
    fastapi.websocket("/fastapi")(Chat)
    routes = [WebSocketRoute("/endpoint", Chat), Mount("/mount", mount), Mount("/", fastapi)]
    server = await serve(Starlette(routes=routes))
    for path in ("/endpoint", "/fastapi"):
        assert await closing(server, path) == (4401, "log in")
        assert await closing(server, f"{path}?token=1") == (4404, "no such room")
    for channel in ("no", "none", "raises"):
        assert await closing(server, f"/mount/{channel}") == (1008, "not authorized")
    # A browser fails a connection to which it has offered subprotocols that nobody takes.
    for path in ("/endpoint", "/mount/no"):
        async with server.connect(path, subprotocols=["s3cr3t", "bearer"]) as client:
            await client.wait_closed()
        assert client.subprotocol == "bearer"
    async with server.connect("/mount/yes") as client:
        await until(lambda: hub.channels == {"yes": 1})
        await client.close()
    assert "(closed with 4401): 4401: log in; " in caplog.text
    assert not any(record.exc_info for record in caplog.records)


async def test_what_a_dependency_of_fastapi_refuses_is_not_the_hubs_to_answer(serve):
    """As `who-may-connect.md` says."""
    app = FastAPI()

    def log_in():
        raise WebSocketException(4401, "log in")

    @app.websocket("/ws", dependencies=[Depends(log_in)])
    class Chat(BroadcastEndpoint):
        refuse = "close"

    server = await serve(app)
    assert await answer(server, "/ws") == 403


@pytest.mark.parametrize("of", [BroadcastProtocol, WebSocketsSansIOProtocol])
async def test_a_client_that_never_answers_the_close_is_dropped(serve, of):
    class Soon(of):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.close_timeout = 0.1

    hub = Broadcast(refuse="close")
    server = await serve(app_of(hub), ws=Soon)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(HANDSHAKE)
    answered = await asyncio.wait_for(reader.read(), 20)  # until the server ends the connection
    assert b" 101 " in answered
    assert answered.endswith(b"\x88\x14\x03\xf0origin not allowed")
    await until(lambda: not server.server.server_state.connections)
    assert len(hub) == 0
    writer.close()
    await until(lambda: not starcast_tasks())


async def ping_without_end(sock):
    loop, ping = asyncio.get_running_loop(), b"\x89\xfd\0\0\0\0" + bytes(125)
    await loop.sock_sendall(sock, HANDSHAKE)
    await loop.sock_recv(sock, 1)
    while True:
        await loop.sock_sendall(sock, ping * 100)


async def test_a_client_that_asks_for_pongs_and_reads_none_is_dropped(serve):
    hub = Broadcast(refuse="close", tuning=Tuning(close_timeout=0.3))
    server = await serve(app_of(hub))
    assert await closing(server, "/endpoint", origin=EVIL) == (1008, "origin not allowed")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.setblocking(False)
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(ping_without_end(sock), 15)
        await until(lambda: not server.server.server_state.connections)


@pytest.mark.parametrize("says", ["nothing", "that it has left"])
async def test_a_client_that_is_gone_before_it_is_accepted(says):
    hub = Broadcast(refuse="close")
    peer = Peer({"origin": EVIL, "host": "chat.example"})
    if says == "nothing":
        peer.fail = OSError()
    else:
        await peer.websocket.receive()
        peer.leave()
        await peer.websocket.receive()
    with pytest.raises(ClientGone):
        await hub.connect(peer.websocket)
    assert peer.sent == []


@pytest.mark.parametrize("refuse", ["403", "", True])
def test_what_is_no_way_to_refuse(refuse):
    for make in (
        lambda: Broadcast(refuse=refuse),
        lambda: Broadcast().app(refuse=refuse),
        lambda: type("Chat", (BroadcastEndpoint,), {"refuse": refuse}),
    ):
        with pytest.raises(ConfigurationError, match="refuse must be http or close"):
            make()


@pytest.mark.parametrize("door", ["endpoint", "serve", "mount"])
async def test_an_accept_that_does_not_get_through_is_no_error(door):
    peer = Peer({"origin": EVIL, "host": "chat.example"})
    peer.scope |= {"path": path_of(door), "root_path": "", "method": "GET"}
    peer.fail = OSError()
    await app_of(Broadcast(refuse="close"))(peer.scope, peer.receive, peer.send)
    assert peer.sent == []
