"""ConnectionManager: the class from FastAPI's WebSocket page, on top of a hub."""

from __future__ import annotations

import contextlib
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from . import codec
from .arguments import check_client
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
            TypeError: It is None, or no websocket.
        """
        await self.hub.connect(check_client(websocket, "connect(...)"))

    def disconnect(self, websocket: WebSocket) -> None:
        """Unregister a client; it keeps its socket. Harmless twice and for a stranger.

        Raises:
            TypeError: It is None, or no websocket.
        """
        self.hub._hub.leave(check_client(websocket, "disconnect(...)"))

    async def send_personal_message(self, message: Any, websocket: WebSocket) -> None:
        """Send to one client, in order with what it gets from `broadcast`.

        `message` is as for `Broadcast.publish`. A client that is not registered but connected gets
        it too, and one that has left is no error.

        Raises:
            TypeError: `websocket` is None, or no websocket.
            EncodingError, PublishQueueFull: See `Broadcast.publish`.
        """
        if isinstance(message, WebSocket):
            raise TypeError("the message comes first: send_personal_message(message, websocket)")
        check_client(websocket, "send_personal_message(message, ...)")
        # Here and not in `send`: a generator cannot be written twice.
        content, _ = codec.encode(message, None, self.hub._hub.settings.dumps)
        try:
            await self.hub.send(content, to=websocket)
        except NotConnected:
            with contextlib.suppress(WebSocketDisconnect):
                if isinstance(content, str):
                    await websocket.send_text(content)
                else:
                    await websocket.send_bytes(content)

    async def broadcast(self, message: Any) -> None:
        """Send to every client; `message` is as for `Broadcast.publish`."""
        await self.hub.send(message)
