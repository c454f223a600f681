"""ConnectionManager: the class from FastAPI's WebSocket page, on top of a hub."""

from __future__ import annotations

import contextlib
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from . import codec
from .broadcast import Broadcast
from .exceptions import NotConnected


class ConnectionManager:
    """Takes the place of the class that FastAPI's documentation tells people to copy.

    The names are the same; one client that is gone or does not read harms nobody else, and
    clients may come and go during a broadcast.

    Args:
        broadcast: A hub of yours. Left out: one in memory of its own.

    Attributes:
        hub: The hub.
    """

    def __init__(self, broadcast: Broadcast | None = None) -> None:
        self.hub = Broadcast() if broadcast is None else broadcast

    @property
    def active_connections(self) -> list[WebSocket]:
        """The clients of this process: a fresh list, which does not change any more."""
        return self.hub._hub.clients()

    async def connect(self, websocket: WebSocket) -> None:
        """Accept a client, unless that was done, and register it.

        Raises:
            OriginRefused: The page may not connect; the app answers 403.
            ClientGone: The client has left already. A `WebSocketDisconnect`.
        """
        await self.hub.connect(websocket)

    def disconnect(self, websocket: WebSocket) -> None:
        """Unregister a client; it keeps its socket. Harmless twice and for a stranger."""
        self.hub._hub.leave(websocket)

    async def send_personal_message(self, message: Any, websocket: WebSocket) -> None:
        """Send to one client, in order with what it gets from `broadcast`.

        `message` is as for `Broadcast.publish`. A client that is not registered but connected gets
        it too, and one that has left is no error.
        """
        try:
            await self.hub.send(message, to=websocket)
        except NotConnected:
            content, _ = codec.encode(message, None, self.hub._hub.settings.dumps)
            with contextlib.suppress(WebSocketDisconnect):
                if isinstance(content, str):
                    await websocket.send_text(content)
                else:
                    await websocket.send_bytes(content)

    async def broadcast(self, message: Any) -> None:
        """Send to every client; `message` is as for `Broadcast.publish`."""
        await self.hub.send(message)
