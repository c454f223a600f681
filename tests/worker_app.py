"""The app of scenarios/test_many_workers.py, for workers in processes of their own."""

from __future__ import annotations

import contextlib
import os

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint

hub = Broadcast(os.environ["STARCAST_URL"])


class Room(BroadcastEndpoint):
    broadcast = hub

    async def on_connect(self, websocket):
        await super().on_connect(websocket)
        await hub.send(f"worker {os.getpid()}", to=websocket)


async def healthz(request):
    healthy = await hub.healthy()
    return JSONResponse({"healthy": healthy}, 200 if healthy else 503)


@contextlib.asynccontextmanager
async def lifespan(app):
    async with hub:
        yield


app = Starlette(
    routes=[Route("/healthz", healthz), WebSocketRoute("/ws/{channel}", Room)], lifespan=lifespan
)
