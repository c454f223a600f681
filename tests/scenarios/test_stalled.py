"""Clients with bytes unsent that read no more, on uvicorn's own protocols and on ours.

A transport that is closed waits until everything is sent. Unless it is aborted, it waits for such a
client for as long as the TCP connection lasts, and a server that shuts down waits for it too.
"""

from __future__ import annotations

import asyncio
import socket
import ssl

import pytest
import trustme
import websockets
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from starcast import Broadcast, BroadcastEndpoint, Tuning
from support import Served, joined, starcast_tasks, until

pytestmark = pytest.mark.anyio

KIB = 1024
PROTOCOL = "starcast.uvicorn:BroadcastProtocol"
MESSAGE = "x" * 64 * KIB
SOON = 2.0
CLOSE = b"\x88\x82" + bytes(4) + b"\x03\xe8"  # a client's close frame, masked with zeros


@pytest.fixture(params=["auto", "wsproto", PROTOCOL])
def ws(request: pytest.FixtureRequest) -> str:
    return request.param


class App:
    """Handlers: one that receives, two that push, and one that forwards."""

    def __init__(self) -> None:
        self.hub = hub = Broadcast(tuning=Tuning(watch_interval=0.05, close_timeout=0.3))
        self.ended: list[str] = []
        self.websockets: dict[str, WebSocket] = {}
        app = self

        class Endpoint(BroadcastEndpoint):
            broadcast = hub

            async def on_connect(self, websocket: WebSocket) -> None:
                await super().on_connect(websocket)
                app.websockets[websocket.path_params["channel"]] = websocket

            async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
                await super().on_disconnect(websocket, close_code)
                app.ended.append("endpoint")

        self.starlette = Starlette(
            routes=[
                WebSocketRoute("/endpoint/{channel}", Endpoint),
                WebSocketRoute("/push/{channel}", self.push),
                WebSocketRoute("/own/{channel}", self.push),
                WebSocketRoute("/forward/{channel}", self.forward),
            ]
        )

    async def push(self, websocket: WebSocket) -> None:
        await self.hub.connect(websocket, websocket.path_params["channel"])
        kind = websocket.url.path.split("/")[1]
        try:
            while True:
                if kind == "push":
                    await self.hub.send(MESSAGE, to=websocket)
                else:
                    await websocket.send_text(MESSAGE)
        except WebSocketDisconnect:
            self.ended.append(kind)

    async def forward(self, websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            async with self.hub.subscribe(websocket.path_params["channel"]) as subscriber:
                async for event in subscriber:
                    await websocket.send_text(event.message)
        except WebSocketDisconnect:
            self.ended.append("forward")


async def start(serve, app: App, ws: str, **config) -> Served:
    return await serve(app.starlette, send_buffer=4 * KIB, ws=ws, **config)


async def stalled(server: Served, path: str):
    """A client that reads nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (server.host, server.port))
    client = await server.connect(path, sock=sock, ping_interval=None, compression=None)
    client.transport.pause_reading()
    client.transport.resume_reading = lambda: None
    return client


def forget(*clients) -> None:
    for client in clients:
        client.transport.abort()


async def test_a_client_that_answers_no_pings_is_gone_although_its_channel_is_silent(serve, ws):
    """Within the ping interval and timeout, with its handler and its connection."""
    app = App()
    server = await start(serve, app, ws, ws_ping_interval=0.2, ws_ping_timeout=0.2)
    connections = server.server.server_state.connections
    async with server.connect("/endpoint/other") as healthy:
        kinds = ["endpoint", "forward", "own", "push"]
        clients = [await stalled(server, f"/{kind}/x") for kind in kinds]
        await until(lambda: len(app.hub) == 4 and app.hub.stats().subscribers == 1)
        for _ in range(4):  # more than the sockets take
            await app.hub.publish("x", MESSAGE)
        await until(lambda: len(app.hub) == 1, SOON)
        await until(lambda: len(connections) == 1, SOON)
        await until(lambda: sorted(app.ended) == kinds, SOON)
        await app.hub.publish("other", "still here")
        assert await healthy.recv() == "still here"
    forget(*clients)
    await until(lambda: not starcast_tasks())


async def test_a_client_that_leaves_with_bytes_unsent_is_gone_within_the_close_timeout(serve, ws):
    """Also one that the hub has closed. It is off the hub at once."""
    app = App()
    server = await start(serve, app, ws)
    connections = server.server.server_state.connections
    clients = [await stalled(server, f"/endpoint/{number}") for number in range(4)]
    await until(lambda: len(app.hub) == 4)
    for channel in "012":
        for _ in range(4):
            await app.hub.publish(channel, MESSAGE)
    await app.hub.publish("3", "x" * 48 * KIB)  # less than the server holds back
    clients[0].transport.write(CLOSE)
    clients[1].transport.write_eof()
    closing = [asyncio.create_task(app.hub.close(app.websockets[name], 4000)) for name in "23"]
    await until(lambda: len(app.hub) == 0, SOON)
    await until(lambda: not connections, SOON)
    await until(lambda: app.ended == ["endpoint"] * 4)
    await asyncio.gather(*closing)
    forget(*clients)
    await until(lambda: not starcast_tasks())


async def test_a_client_that_leaves_over_tls(serve, ws):
    app = App()
    authority = trustme.CA()
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.tempfile() as path:
        server = await serve(app.starlette, ws=ws, ssl_certfile=path)
    url = server.url("/endpoint/x").replace("ws://", "wss://")
    clients = [await websockets.connect(url, ssl=trusting, proxy=None) for _ in range(2)]
    await until(lambda: len(app.hub) == 2)
    await clients[0].close()
    clients[1].transport.abort()
    await until(lambda: len(app.hub) == 0, SOON)
    await until(lambda: len(app.ended) == 2, SOON)
    await until(lambda: not server.server.server_state.connections, SOON)


# Servers of which nothing is known


async def test_a_send_without_progress_is_given_up():
    hub = Broadcast(tuning=Tuning(watch_interval=0.01, send_timeout=0.3))
    dead, slow = await joined(hub, "x"), await joined(hub, "x")
    told = asyncio.create_task(dead.websocket.receive_text())
    for peer in (dead, slow):
        peer.open.clear()
    for number in range(1000):
        hub.publish_nowait("x", str(number))
    while not told.done():
        slow.open.set()  # for one send
        slow.open.clear()
        await asyncio.sleep(0.005)
    with pytest.raises(WebSocketDisconnect) as caught:
        await told
    assert caught.value.code == 1006
    assert hub.clients() == [slow.websocket]
    assert dead.got == []
    slow.open.set()
    await until(lambda: len(slow.got) == 1000)
    await hub.disconnect()


async def test_a_handlers_own_send_too(road):
    hub = Broadcast(tuning=Tuning(watch_interval=0.01, send_timeout=0.1))
    dead = await joined(hub, "x")
    await dead.websocket.send_text("the first")
    dead.open.clear()
    with pytest.raises(WebSocketDisconnect):
        await dead.websocket.send_text("the second")
    assert len(hub) == 0
    assert dead.got == ["the first"]
