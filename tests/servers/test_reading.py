"""What a client has sent before its connection ended is received, as from uvicorn by itself."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
from typing import Any

import pytest
import websockets
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from starcast import Broadcast, frames
from starcast.servers.reading import MAX_QUEUED
from support import starcast_tasks, until
from test_frames import CLOSE, CONTINUATION, PING
from test_uvicorn import PROTOCOL, Client, certificate, masked

pytestmark = pytest.mark.anyio
__all__ = ["certificate"]  # a fixture


def text(payload: bytes) -> bytes:
    return masked(payload, frames.TEXT)


COUNT = 5 * MAX_QUEUED
SENT = b"".join(
    [
        *(text(b"%d" % number) + masked(b"?", PING) for number in range(COUNT)),
        masked(b"a whole ", frames.TEXT, 0) + masked(b"message", CONTINUATION),
    ]
)
RECEIVED = [*map(str, range(COUNT)), "a whole message"]
OWN_CODE = masked(struct.pack("!H", 4001) + b"enough", CLOSE)
AN_EMPTY_PING = bytes([0x80 | PING, 0])
HALF_A_FRAME = text(b"half")[:-2]


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param}


class App(Starlette):
    """Receives nothing from its client until it is told to."""

    def __init__(self, in_hub: bool = True) -> None:
        super().__init__(routes=[WebSocketRoute("/ws/x", self.serve)])
        self.hub = Broadcast()
        self.in_hub = in_hub
        self.begin = asyncio.Event()
        self.connected = False
        self.received: list[Any] = []
        self.end: Any = None

    async def serve(self, websocket: WebSocket) -> None:
        await self.hub.connect(websocket, "x")
        if not self.in_hub:
            await self.hub.disconnect(websocket)
        self.connected = True
        await self.begin.wait()
        while self.end is None:
            message = await self.receive(websocket)
            if message["type"] == "websocket.disconnect":
                self.end = message["code"], message.get("reason", "")
            else:
                self.received.append(message["text"])

    async def receive(self, websocket: WebSocket) -> Any:
        return await websocket.receive()


async def start(serve: Any, app: App, last: bytes = b"", **config: Any) -> tuple[Any, Client, Any]:
    """Let a client send all that. Returns the server, the client and its protocol, in which it
    waits.
    """
    server = await serve(app, **config)
    client = await Client.connect(server)
    await until(lambda: app.connected)
    await asyncio.get_running_loop().sock_sendall(client.sock, SENT + last)
    (protocol,) = server.server.server_state.connections
    await until(lambda: protocol.read_paused)  # the app has much to receive
    return server, client, protocol


@pytest.fixture(params=["auto", PROTOCOL], ids=["adopted", "protocol"])
def ws(request) -> str:
    return request.param


@pytest.mark.parametrize("in_hub", [True, False], ids=["in the hub", "after the hub"])
@pytest.mark.parametrize(
    ("last", "end"),
    [
        (b"", (1005, "")),
        (HALF_A_FRAME, (1005, "")),
        (OWN_CODE, (4001, "enough")),
        (OWN_CODE + b"and more", (4001, "enough")),
        (masked(b"a fault", 3) + text(b"not received"), (1005, "")),
        (text(b"\xff") + text(b"not received"), (1005, "")),
    ],
    ids=["nothing", "half a frame", "a close", "a close and more", "a fault", "not UTF-8"],
)
async def test_a_connection_that_is_reset(serve, ws, in_hub, last, end):
    app = App(in_hub)
    server, client, protocol = await start(serve, app, last, ws=ws)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()  # with a reset, which the next write finds
    protocol.transport.write(AN_EMPTY_PING)
    await until(lambda: not server.server.server_state.connections)
    app.begin.set()
    await until(lambda: app.end)
    assert app.received == RECEIVED
    # A client that was in a hub is one that has gone away.
    assert app.end == end
    await until(lambda: not starcast_tasks())


@pytest.mark.parametrize("ends", ["closes", "closes and says why", "half-closes"])
async def test_a_connection_that_ends_over_tls(serve, ws, certificate, ends):
    cert, key = map(str, certificate)
    app = App()
    server = await serve(app, ws=ws, ssl_certfile=cert, ssl_keyfile=key)
    context = ssl.create_default_context(cafile=cert)
    url = f"wss://127.0.0.1:{server.port}/ws/x"
    client = await websockets.connect(url, ssl=context, compression=None, proxy=None)
    await until(lambda: app.connected)
    transport = client.transport
    transport.write(SENT + (OWN_CODE if ends == "closes and says why" else b""))
    (protocol,) = server.server.server_state.connections
    protocol.close_timeout = 0.3  # asyncio waits longer for the other half
    await until(lambda: protocol.read_paused)  # the app has much to receive
    if ends == "half-closes":
        raw = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        raw.shutdown(socket.SHUT_WR)
        raw.close()
    else:
        transport.close()
    app.begin.set()
    await until(lambda: app.end)
    assert app.received == RECEIVED
    assert app.end == ((4001, "enough") if ends == "closes and says why" else (1005, ""))
    await client.close()
    await until(lambda: not starcast_tasks())


class Cancels(App):
    """Cancels each receive as soon as it has begun."""

    async def receive(self, websocket: WebSocket) -> Any:
        while True:
            receiving = asyncio.ensure_future(websocket.receive())
            await asyncio.sleep(0)
            receiving.cancel()
            (outcome,) = await asyncio.gather(receiving, return_exceptions=True)
            if isinstance(outcome, dict):
                return outcome


@pytest.mark.parametrize("app_class", [App, Cancels])
async def test_a_shutdown_comes_after_what_was_read(serve, ws, app_class):
    app = app_class(in_hub=app_class is App)
    _, client, protocol = await start(serve, app, ws=ws)
    protocol.shutdown()
    app.begin.set()
    await until(lambda: app.end)
    assert app.received == RECEIVED
    assert app.end == (1012, "")
    client.close()


async def test_a_client_is_not_taken_for_dead_while_its_messages_wait(serve, ws):
    """Its answer to the server's ping stands behind them."""
    app = App()
    pings = {"ws_ping_interval": 1000, "ws_ping_timeout": 1000}
    _, client, protocol = await start(serve, app, ws=ws, **pings)
    protocol.send_keepalive_ping()
    for _ in range(3):
        protocol.pong_timer.cancel()
        protocol.keepalive_timeout()
        assert not protocol.transport.is_closing()
    app.begin.set()
    await until(lambda: app.received == RECEIVED)
    client.close()


async def test_a_message_that_is_too_long_is_refused_where_it_becomes_so(serve, ws):
    app = App()
    app.begin.set()
    server = await serve(app, ws=ws, ws_max_size=1000)
    client = await Client.connect(server)
    await until(lambda: app.connected)
    await client.send(bytes(600), bits=0)
    # Only the head of what is too much: the rest need not come.
    await asyncio.get_running_loop().sock_sendall(client.sock, masked(bytes(401), CONTINUATION)[:8])
    assert [frame.payload[:2] for frame in await client.rest()] == [struct.pack("!H", 1009)]
    await until(lambda: app.end)
    assert app.received == []
    client.close()
