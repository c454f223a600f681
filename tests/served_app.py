"""The app of scenarios/test_servers.py, for a server in a process of its own."""

from __future__ import annotations

import contextlib

from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from starcast import Broadcast, BroadcastEndpoint, Tuning

hub = Broadcast(tuning=Tuning(close_timeout=0.3))
impatient = Broadcast(tuning=Tuning(close_timeout=0.3, send_timeout=1.0))
ended: dict[str, list[int]] = {}  # of each channel, the close codes that `on_disconnect` was told


class Chat(BroadcastEndpoint):
    broadcast = hub
    encoding = None

    async def on_receive(self, websocket: WebSocket, data: str | bytes) -> None:
        channel = self.get_channel(websocket)
        command = data.partition(" ")[0] if isinstance(data, str) else ""
        if command == "others":
            await hub.publish(channel, data, exclude=websocket)
        elif command == "me":
            await hub.send(data, to=websocket)
        elif command == "burst":
            for number in range(int(data.split()[1])):
                hub.publish_nowait(channel, str(number))
        elif command == "own":
            await hub.publish(channel, "before it")
            await websocket.send_text(data)
        elif command == "code":
            await hub.close(websocket, int(data.split()[1]))
        elif command == "close":
            await hub.publish(channel, "bye")
            await hub.close(websocket, 4000, "enough")
        else:
            await super().on_receive(websocket, data)

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        await super().on_disconnect(websocket, close_code)
        ended.setdefault(self.get_channel(websocket), []).append(close_code)


class ImpatientChat(Chat):
    """Gives up clients that take nothing for a second."""

    broadcast = impatient


async def state(websocket: WebSocket) -> None:
    """Say how a channel and the hub are, as often as asked."""
    await websocket.accept()
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            channel = await websocket.receive_text()
            channels = hub.channels | impatient.channels
            await websocket.send_json(
                {
                    "here": channels.get(channel, 0),
                    "ended": ended.get(channel, []),
                    "channels": channels,
                    "behind": impatient.stats().buffered > 0,
                }
            )


async def dies(websocket: WebSocket) -> None:
    """Register a client and end, without a word to the hub, when it sends something."""
    await hub.connect(websocket, websocket.path_params["channel"])
    await websocket.receive()


class Wrapped:
    """Middleware that wraps `send`, as tracing does."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def wrapped_send(message: Message) -> None:
            await send(message)

        await self.app(scope, receive, wrapped_send)


async def never_joins(websocket: WebSocket) -> None:
    """Have the hub close a client that it does not know."""
    await websocket.accept()
    await hub.close(websocket, int(websocket.path_params["code"]))


class Members(BroadcastEndpoint):
    broadcast = hub
    refuse = "close"

    async def on_connect(self, websocket: WebSocket) -> None:
        raise WebSocketException(1008, "log in")


app = Starlette(
    routes=[
        WebSocketRoute("/ws/{channel}", Chat),
        WebSocketRoute("/impatient/{channel}", ImpatientChat),
        WebSocketRoute("/dies/{channel}", dies),
        WebSocketRoute("/never/{code}", never_joins, middleware=[Middleware(Wrapped)]),
        WebSocketRoute("/members", Members),
        WebSocketRoute("/state", state),
    ],
    lifespan=hub.lifespan,
)
