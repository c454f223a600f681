"""The app of servers/test_watch.py: handlers that only push, for uvicorn in its own process."""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from starcast import Broadcast, ConnectionManager

hub = Broadcast()
manager = ConnectionManager(hub)


async def by_hub(websocket: WebSocket) -> None:
    await hub.connect(websocket)
    try:
        while True:
            await hub.send("tick", to=websocket)
            await asyncio.sleep(0.01)
    except WebSocketDisconnect:
        await hub.disconnect(websocket)


async def by_manager(websocket: WebSocket) -> None:
    await manager.connect(websocket)
    try:
        while True:
            await manager.send_personal_message("tick", websocket)
            await asyncio.sleep(0.01)
    except WebSocketDisconnect:
        manager.disconnect(websocket)


app = Starlette(
    routes=[
        WebSocketRoute("/hub", by_hub),
        WebSocketRoute("/manager", by_manager),
    ],
    lifespan=hub.lifespan,
)
