"""A channel per user over a broker: nothing stays subscribed for users who are gone."""

from __future__ import annotations

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from backends.redis_server import RedisServer
from starcast import Broadcast
from support import until

pytestmark = pytest.mark.anyio

USERS = 50


@pytest.mark.parametrize("ws", ["auto", "starcast.uvicorn:BroadcastProtocol"])
@pytest.mark.parametrize("end", ["dies", "returns"])
async def test_handlers_that_end_leave_no_subscription(serve, ws, end, caplog):
    server = RedisServer()
    try:
        server.start()
        async with Broadcast(server.url) as hub:

            async def endpoint(websocket: WebSocket):
                await hub.connect(websocket, websocket.path_params["user"])
                await websocket.receive()
                if end == "dies":
                    raise ValueError("not what was expected")

            before = len(server.command("PUBSUB", "CHANNELS"))
            app = Starlette(routes=[WebSocketRoute("/{user}", endpoint)])
            web = await serve(app, ws=ws)
            clients = [await web.connect(f"/user-{number}") for number in range(USERS)]
            assert len(hub.channels) == USERS
            assert len(server.command("PUBSUB", "CHANNELS")) == before + USERS
            for client in clients:
                await client.send(b"binary")
            await until(lambda: hub.channels == {}, 2)
            await until(lambda: len(server.command("PUBSUB", "CHANNELS")) == before)
            await until(lambda: hub.stats().backend.channels == 0)
            await asyncio.gather(*(client.close() for client in clients))
    finally:
        server.close()
    assert all(record.name == "uvicorn.error" for record in caplog.records)
    caplog.clear()
