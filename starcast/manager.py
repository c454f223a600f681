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
    """Clients, in the order in which they connected. `remove` unregisters one.

    Programs call `remove` to clean up. It ignores a client that is not in the list, because the hub
    may have removed it first.
    """

    def __init__(self, clients: Iterable[WebSocket], leave: Callable[[WebSocket], None]) -> None:
        super().__init__(clients)
        self._leave = leave

    def remove(self, websocket: WebSocket, /) -> None:
        with contextlib.suppress(ValueError):
            super().remove(websocket)
        self._leave(websocket)


class ConnectionManager:
    """Replaces the class that FastAPI's documentation tells people to copy.

    The methods have the same names. A client that has gone or does not read affects no other, and
    clients may connect and leave during a broadcast.

    Args:
        broadcast: The hub to use. By default the manager creates its own hub in memory.

    Attributes:
        hub: The hub.

    Raises:
        TypeError: `broadcast` is something else, such as a URL.
    """

    def __init__(self, broadcast: Broadcast | None = None) -> None:
        if broadcast is not None and not isinstance(broadcast, Broadcast):
            # The value may be a URL with a password.
            raise TypeError(
                f"ConnectionManager(...) needs a Broadcast, not {type(broadcast).__name__}: write "
                "ConnectionManager(Broadcast(url))"
            )
        self.hub = Broadcast() if broadcast is None else broadcast

    @property
    def active_connections(self) -> list[WebSocket]:
        """The clients of this process: a new list each time.

        Its `remove(websocket)` unregisters the client, as `disconnect` does.
        """
        return Connections(self.hub.clients(), self.disconnect)

    async def connect(self, websocket: WebSocket) -> None:
        """Accept a client, unless it has been accepted, and register it.

        Raises:
            OriginRefused: The page may not connect. If nothing catches this, the client gets 403.
            ClientGone: The client has already left. It is a `WebSocketDisconnect`.
            TypeError: `websocket` is None or not a websocket.
        """
        await self.hub.connect(check_client(websocket, "connect(...)"))

    def disconnect(self, websocket: WebSocket) -> None:
        """Unregister a client; it keeps its socket. Ignored if the client is not registered.

        Raises:
            TypeError: `websocket` is None or not a websocket.
        """
        self.hub._hub.leave(check_client(websocket, "disconnect(...)"))

    async def send_personal_message(self, message: Any, websocket: WebSocket) -> bool:
        """Send to one client, in order with the messages of `broadcast`.

        Waits for the client: see `Broadcast.send`. A client that is connected but not registered
        gets the message too.

        Args:
            message: As for `Broadcast.publish`.
            websocket: The client.

        Returns:
            Whether the message was handed over. False means that the client has left.

        Raises:
            ClientGone: The client has left, and the caller serves it; see `Broadcast.send`. It is a
                `WebSocketDisconnect`, so a loop that only sends ends with its client.
            TypeError: `websocket` is None or not a websocket.
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
