"""ConnectionManager: the class from FastAPI's WebSocket page, on top of a hub."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from . import codec, personal
from .arguments import check_client
from .broadcast import Broadcast
from .exceptions import NotConnected


class Connections(list[WebSocket]):
    """Clients, in the order in which they came. `remove` means it: programs call that to clean up.

    `remove` is harmless for a client that is not in the list, so that whoever comes second, the
    program or the hub, does no damage.
    """

    def __init__(self, clients: Iterable[WebSocket], leave: Callable[[WebSocket], None]) -> None:
        super().__init__(clients)
        self._leave = leave

    def remove(self, websocket: WebSocket, /) -> None:
        with contextlib.suppress(ValueError):
            super().remove(websocket)
        self._leave(websocket)


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
        """The clients of this process: a fresh list, which does not follow who comes and goes.

        Its `remove(websocket)` unregisters the client, as `disconnect` does.
        """
        return Connections(self.hub._hub.clients(), self.disconnect)

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

    async def send_personal_message(self, message: Any, websocket: WebSocket) -> bool:
        """Send to one client, in order with what it gets from `broadcast`.

        It waits for the client: see `Broadcast.send`. A client that is not registered but
        connected gets the message too.

        Args:
            message: As for `Broadcast.publish`.
            websocket: The client.

        Returns:
            Whether the message was handed over; False means that the client has left.

        Raises:
            ClientGone: The client has left, and the caller serves it, see `Broadcast.send`. A
                `WebSocketDisconnect`: a loop that only sends ends with its client.
            TypeError: `websocket` is None, or no websocket.
            EncodingError, PublishQueueFull: See `Broadcast.publish`.
        """
        if isinstance(message, WebSocket):
            raise TypeError("the message comes first: send_personal_message(message, websocket)")
        check_client(websocket, "send_personal_message(message, ...)")
        # Here and not in `send`: a generator cannot be written twice.
        content, _ = codec.encode(message, None, self.hub._hub.settings.dumps)
        try:
            return await self.hub.send(content, to=websocket)
        except NotConnected:
            pass
        try:
            if isinstance(content, str):
                await websocket.send_text(content)
            else:
                await websocket.send_bytes(content)
        except WebSocketDisconnect:
            personal.tell_gone(websocket, self.hub._hub.find(websocket))
            return False
        return True

    async def broadcast(self, message: Any) -> None:
        """Send to every client; `message` is as for `Broadcast.publish`."""
        await self.hub.send(message)
