"""One message, from a real client through a real server to real clients."""

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import BroadcastEndpoint

pytestmark = pytest.mark.anyio


async def test_a_message_reaches_everybody(serve):
    server = await serve(Starlette(routes=[WebSocketRoute("/ws", BroadcastEndpoint)]))
    async with server.connect("/ws") as one, server.connect("/ws") as two:
        await one.send("hello")
        assert await one.recv() == "hello"
        assert await two.recv() == "hello"
