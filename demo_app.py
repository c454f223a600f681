"""The starcast demo: `uvicorn demo_app:app`, then three tabs of http://127.0.0.1:8000/?room=tea."""

import asyncio
import contextlib
import math
import os
import secrets
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect, WebSocketException
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Mount, Route, WebSocketRoute

from starcast import BackendUnavailable, Broadcast, BroadcastEndpoint, StarcastError

MAX_NAME, MAX_TEXT = 24, 500  # characters; the page has the same limits
FOLDER = Path(__file__).parent
WORKER = f"{os.getpid()}-{secrets.token_hex(2)}"  # machines may have processes of the same number
hub = Broadcast(os.environ.get("STARCAST_URL", "memory://"), after_gap="close")


class Chat(BroadcastEndpoint):
    """The chat, as a Starlette endpoint. There is one instance for each client."""

    broadcast = hub
    encoding = "json"

    def get_channel(self, websocket: WebSocket) -> str:
        return "room:" + (websocket.query_params.get("room") or "lobby")

    async def on_connect(self, websocket: WebSocket) -> None:
        self.id = secrets.token_hex(8)
        await super().on_connect(websocket)
        welcome = {"type": "welcome", "id": self.id, "worker": WORKER, "away": broker_is_away()}
        await hub.send(welcome, to=websocket)
        await say_who_is_here(self.get_channel(websocket))

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        channel = self.get_channel(websocket)
        match data:
            case {"type": "message", "author": str(author), "text": str(text)} if (
                0 < len(author) <= MAX_NAME and 0 < len(text) <= MAX_TEXT
            ):
                message = {"type": "message", "id": self.id, "author": author, "text": text}
                try:
                    await hub.publish(channel, message | {"time": datetime.now(UTC)})
                except BackendUnavailable:
                    await hub.send({"type": "unsent", "text": text}, to=websocket)
            case {"type": "typing", "author": str(author)} if 0 < len(author) <= MAX_NAME:
                typing = {"type": "typing", "id": self.id, "author": author}
                hub.publish_nowait(channel, typing, exclude=websocket)
            case {"type": "ping"}:
                await hub.send({"type": "pong", "time": datetime.now(UTC)}, to=websocket)
            case _:
                raise WebSocketException(1008, "not a message of this chat")

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        await super().on_disconnect(websocket, close_code)
        await say_who_is_here(self.get_channel(websocket))


def rooms() -> list[str]:
    return [channel for channel in hub.channels if channel.startswith("room:")]


async def say_who_is_here(channel: str) -> None:
    """Publish how many this worker serves; the page adds up what the workers say."""
    here = {"type": "here", "worker": WORKER, "count": hub.channels.get(channel, 0)}
    with contextlib.suppress(StarcastError):  # it is said again soon
        await hub.publish(channel, here)


def broker_is_away() -> bool:
    backend = hub.stats().backend
    return backend is not None and backend.state != "connected"


async def look_after_rooms() -> None:
    """Tell this worker's clients when the broker is away, and the rooms who is still here."""
    away, said = False, time.monotonic()
    while True:
        await asyncio.sleep(0.25)
        if away != (away := broker_is_away()):
            news = {"type": "broker", "away": away}
            clients = [websocket for room in rooms() for websocket in hub.clients(room)]
            sends = [hub.send(news, to=websocket) for websocket in clients]
            await asyncio.gather(*sends, return_exceptions=True)  # some may be leaving
        if not away and time.monotonic() > said + 1:
            said = time.monotonic()
            for room in rooms():
                await say_who_is_here(room)


live = FastAPI()
TICKER = f"ticker:{WORKER}"  # each worker has its own, with the same numbers


def values(count: int) -> list[float]:
    """The newest of numbers that wander. The clock makes them, so that all workers agree."""
    now, periods = round(time.time() * 4), (3, 8, 21, 55, 144)
    waves = [sum(math.sin((now - n) / period) for period in periods) for n in range(count)]
    return [round(100 + wave, 2) for wave in reversed(waves)]


@live.websocket("/ticker")
async def ticker(websocket: WebSocket, hub: Annotated[Broadcast, Depends(lambda: hub)]) -> None:
    """The ticker, as a FastAPI function. Clients only listen, and one that is slow skips ticks."""
    with contextlib.suppress(WebSocketDisconnect):  # it has left already
        await hub.connect(websocket, TICKER, overflow="latest")
        await hub.send({"values": values(120)}, to=websocket)
        await hub.serve(websocket, TICKER, publish=False)


async def tick() -> None:
    """Publish a number four times a second, through the same hub as the chat."""
    while True:
        await asyncio.sleep(0.25 - time.time() % 0.25)
        with contextlib.suppress(StarcastError):  # the next one comes soon
            await hub.publish(TICKER, {"values": values(1), "delivered": hub.stats().delivered})


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with hub, asyncio.TaskGroup() as tasks:
        own = [tasks.create_task(tick(), name="ticker"), tasks.create_task(look_after_rooms())]
        yield
        for task in own:
            task.cancel()


async def page(request: Request) -> FileResponse:
    return FileResponse(FOLDER / "demo_page.html")


async def tutorial(request: Request) -> FileResponse:
    return FileResponse(FOLDER / "docs" / "tutorial.md", media_type="text/plain")


routes = [Route("/", page), Route("/tutorial", tutorial), WebSocketRoute("/ws", Chat)]
app = Starlette(routes=[*routes, Mount("/live", live)], lifespan=lifespan)

if __name__ == "__main__":  # python demo_app.py: the same, with ready-made frames
    uvicorn.run(app, ws="starcast.uvicorn:BroadcastProtocol")
