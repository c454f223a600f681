"""The app of scenarios/test_bad_clients.py, for a server in a process of its own.

uvicorn --ws bad_clients_app:Protocol bad_clients_app:app
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from starcast import Broadcast
from starcast.servers import served
from starcast.uvicorn import BroadcastProtocol

CLOSE_TIMEOUT = 0.3

hub = Broadcast()


class Protocol(BroadcastProtocol):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.close_timeout = CLOSE_TIMEOUT


async def leave_unread(websocket: WebSocket, *, full: bool = False) -> None:
    """Send more than a socket takes: some KiB more, or more than the buffer of the server takes."""
    protocol = served.find_protocol(websocket)
    while not protocol.transport.get_write_buffer_size() or (full and protocol.writable.is_set()):
        await websocket.send_text("x" * 16 * 1024)


async def chat(websocket: WebSocket) -> None:
    await hub.connect(websocket)
    with contextlib.suppress(WebSocketDisconnect):
        if websocket.path_params["unread"] != "nothing":
            await leave_unread(websocket, full=websocket.path_params["unread"] == "much")
        while True:
            await websocket.receive_text()
    await hub.disconnect(websocket)


async def ends(websocket: WebSocket) -> None:
    await websocket.accept()
    await leave_unread(websocket, full=True)


async def closes(websocket: WebSocket) -> None:
    await websocket.accept()
    await leave_unread(websocket)
    await websocket.close(4000)


async def waits(websocket: WebSocket) -> None:
    await asyncio.sleep(0.5)
    with contextlib.suppress(WebSocketDisconnect):
        await websocket.accept()
        await websocket.send_text("never arrives")


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    print("the lifespan has ended", flush=True)


app = Starlette(
    routes=[
        WebSocketRoute("/ws/{unread}", chat),
        WebSocketRoute("/ends", ends),
        WebSocketRoute("/closes", closes),
        WebSocketRoute("/waits", waits),
    ],
    lifespan=lifespan,
)
