"""A channel per user over a broker: nothing stays subscribed for users who are gone."""

from __future__ import annotations

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from starcast import Broadcast
from starcast.backends import from_url
from support import Changed, until

pytestmark = pytest.mark.anyio

USERS = 50


@pytest.mark.parametrize("ws", ["auto", "starcast.uvicorn:BroadcastProtocol"])
@pytest.mark.parametrize("end", ["dies", "returns", "gets bytes"])
async def test_handlers_that_end_leave_no_subscription(url, serve, ws, end, caplog):
    left: set[str] = set()

    def note(connection):
        unsubscribe = connection.unsubscribe

        async def noting(channel: str) -> None:
            await unsubscribe(channel)  # until the broker has confirmed it
            left.add(channel.removeprefix("default:"))

        connection.unsubscribe = noting

    async with Broadcast(backend=Changed(from_url(url), note)) as hub:

        async def endpoint(websocket: WebSocket):
            await hub.connect(websocket, websocket.path_params["user"])
            if end == "gets bytes":
                await websocket.receive_text()  # a KeyError: the frame is binary
            await websocket.receive()
            if end == "dies":
                raise ValueError("not what was expected")

        app = Starlette(routes=[WebSocketRoute("/{user}", endpoint)])
        web = await serve(app, ws=ws)
        clients = [await web.connect(f"/user-{number}") for number in range(USERS)]
        users = {f"user-{number}" for number in range(USERS)}
        assert set(hub.channels) == users
        assert hub.stats().backend.channels == USERS
        for client in clients:
            await client.send(b"binary")
        await until(lambda: hub.channels == {}, 2)
        await until(lambda: hub.stats().backend.channels == 0)
        await until(lambda: left == users)
        await asyncio.gather(*(client.close() for client in clients))
    assert all(record.name == "uvicorn.error" for record in caplog.records)
    caplog.clear()
