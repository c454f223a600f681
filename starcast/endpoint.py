"""BroadcastEndpoint: a Starlette WebSocketEndpoint that broadcasts what its clients send."""

from __future__ import annotations

import threading
from typing import Any, Literal
from weakref import WeakKeyDictionary

from starlette.endpoints import WebSocketEndpoint
from starlette.exceptions import WebSocketException
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from . import codec, serving
from .broadcast import DEFAULT_CHANNEL, Broadcast
from .connection import ABNORMAL, INTERNAL_ERROR, is_gone
from .exceptions import ClientGone, InvalidMessage


class _OwnHub:
    """Stands where a class sets no hub, and gives each such class one of its own."""

    def __init__(self) -> None:
        self._hubs: WeakKeyDictionary[type, Broadcast] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def __get__(self, instance: object, owner: type) -> Broadcast:
        hub = self._hubs.get(owner)
        if hub is None:
            with self._lock:  # clients on two event loops may be the first ones
                hub = self._hubs.setdefault(owner, Broadcast())
        return hub


class BroadcastEndpoint(WebSocketEndpoint):
    """Registers a client on connect, broadcasts on receive, cleans up on disconnect.

        class Chat(BroadcastEndpoint):
            broadcast = Broadcast("memory://")

            def get_channel(self, websocket):
                return websocket.path_params["room"]

        routes = [WebSocketRoute("/ws/{room}", Chat)]

    Override any hook and call `super()`. One instance lives as long as its client.

    A hook that raises a `WebSocketException` closes that client with its code, or refuses it if it
    was not accepted yet. Any other exception closes it with 1011 and goes on to the server's log.
    A client that sends what the encoding does not allow is closed with 1003 (wrong type of frame)
    or 1007 (content not valid), and one log line says so.

    Attributes:
        broadcast: The hub. Left out: one in memory, of this very class.
        encoding: `"text"`, the default, `"bytes"` or `"json"`, both ways; `None` takes text and
            binary frames as they come.
    """

    broadcast: Broadcast = _OwnHub()  # type: ignore[assignment]  # a descriptor that returns one
    encoding: Literal["text", "bytes", "json"] | None = "text"

    def get_channel(self, websocket: WebSocket) -> str:
        """Return the client's channel: the path parameter `channel`, or else `"default"`."""
        return str(websocket.path_params.get("channel", DEFAULT_CHANNEL))

    async def on_connect(self, websocket: WebSocket) -> None:
        """Accept and register the client."""
        await self.broadcast.connect(websocket, self.get_channel(websocket))

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        """Broadcast what the client sent, to its channel and so to itself too.

        It does not wait until everybody has it, so a burst is sent in few steps; a client with 256
        messages on their way is not read from until they have been sent.
        """
        channel = self.get_channel(websocket)
        await serving.relay(self.broadcast._hub, websocket, channel, data, self.encoding)

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        """Unregister the client. Called exactly once for every client that was registered.

        `close_code` is what the client or the server closed with; 1006 if nobody said goodbye.
        """
        await self.broadcast.disconnect(websocket)

    async def decode(self, websocket: WebSocket, message: Message) -> Any:
        """Return what `on_receive` gets for an ASGI message of type `websocket.receive`."""
        return codec.decode(message, self.encoding)

    async def dispatch(self) -> None:
        """Live the client's life. Starlette calls this."""
        websocket = WebSocket(self.scope, receive=self.receive, send=self.send)
        hub = self.broadcast._hub
        code = ABNORMAL  # what on_disconnect is told if this task is cancelled
        try:
            await self.on_connect(websocket)
            code = await self._converse(websocket)
        except InvalidMessage as exc:
            code = exc.code
            await serving.reject(hub, websocket, exc)
        except WebSocketException as exc:
            code = exc.code
            if serving.has_handler(websocket, exc):
                raise
            await hub.close_client(websocket, exc.code, exc.reason)
        except Exception as exc:
            connection = hub.find(websocket)
            if isinstance(exc, WebSocketDisconnect) and (
                isinstance(exc, ClientGone)
                or is_gone(websocket)
                or (connection is not None and connection.code is not None)
            ):
                code = exc.code  # a hook found its client gone
                return
            code = INTERNAL_ERROR
            accepted = websocket.application_state is WebSocketState.CONNECTED
            if accepted and not serving.has_handler(websocket, exc):
                await hub.close_client(websocket, code, "")
            raise
        finally:
            try:
                if hub.find(websocket) is not None:
                    await self.on_disconnect(websocket, code)
            finally:
                hub.leave(websocket)

    async def _converse(self, websocket: WebSocket) -> int:
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return serving.disconnect_code(message)
            await self.on_receive(websocket, await self.decode(websocket, message))
