"""The starcast demo: `uvicorn demo_app:app`, then three tabs of http://127.0.0.1:8000/?room=tea.

With STARCAST_URL=redis://localhost, any number of workers share their rooms.
"""

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

from starcast import BackendUnavailable, Broadcast, BroadcastEndpoint, History, StarcastError

MAX_NAME = 24  # characters; the page has the same limits
MAX_TEXT = 500
MAX_KEPT = 50  # messages of a room, for an hour
FOLDER = Path(__file__).parent

# A name for this process. Processes on different machines may have the same number.
WORKER = f"{os.getpid()}-{secrets.token_hex(2)}"

# What is said in a room is kept for a while. After a broker outage, clients are closed; the page
# reconnects, gets what it has missed, and says so if something could not be recovered.
hub = Broadcast(
    os.environ.get("STARCAST_URL", "memory://"),
    after_gap="close",
    history={"room:*": History(size=MAX_KEPT, ttl=3600)},
)


# The chat


class Chat(BroadcastEndpoint):
    """The chat, as a Starlette endpoint. There is one instance for each client.

    It has two channels: one for what is said, and one for what is not worth keeping.
    """

    broadcast = hub
    encoding = "json"
    history = MAX_KEPT  # for newcomers
    ids = True

    def get_channel(self, websocket: WebSocket) -> str:
        return "room:" + self.room

    async def on_connect(self, websocket: WebSocket) -> None:
        self.id = secrets.token_hex(8)
        self.room = websocket.query_params.get("room") or "lobby"
        await super().on_connect(websocket)
        await hub.connect(websocket, "here:" + self.room)
        welcome = {"type": "welcome", "id": self.id, "worker": WORKER, "away": broker_is_away()}
        await hub.send(welcome, to=websocket)
        await publish_count(self.room)

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        match data:
            case {"type": "message", "author": str(author), "text": str(text)} if (
                0 < len(author) <= MAX_NAME and 0 < len(text) <= MAX_TEXT
            ):
                await self.publish_message(websocket, author, text)
            case {"type": "typing", "author": str(author)} if 0 < len(author) <= MAX_NAME:
                typing = {"type": "typing", "id": self.id, "author": author}
                hub.publish_nowait("here:" + self.room, typing, exclude=websocket)
            case {"type": "ping"}:
                await hub.send({"type": "pong", "time": datetime.now(UTC)}, to=websocket)
            case _:
                raise WebSocketException(1008, "not a message of this chat")

    async def publish_message(self, websocket: WebSocket, author: str, text: str) -> None:
        # Only fields that the server has checked or made itself are passed on.
        message = {
            "type": "message",
            "id": self.id,
            "author": author,
            "text": text,
            "time": datetime.now(UTC),
        }
        try:
            await hub.publish(self.get_channel(websocket), message)
        except BackendUnavailable:
            await hub.send({"type": "unsent", "text": text}, to=websocket)

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        await super().on_disconnect(websocket, close_code)
        await publish_count(self.room)


# How many are here. Each worker publishes the number of its own clients, when it changes and once
# a second, and the page adds up the numbers of all workers.


def rooms() -> list[str]:
    channels = [channel.partition(":") for channel in hub.channels]
    return [room for kind, _, room in channels if kind == "here"]


async def publish_count(room: str) -> None:
    count = hub.channels.get("here:" + room, 0)
    here = {"type": "here", "worker": WORKER, "count": count}
    with contextlib.suppress(StarcastError):  # the next one is due in a second
        await hub.publish("here:" + room, here)


async def publish_counts() -> None:
    while True:
        await asyncio.sleep(1)
        if not broker_is_away():
            for room in rooms():
                await publish_count(room)


# Whether the broker is away


def broker_is_away() -> bool:
    backend = hub.stats().backend  # None for memory://
    return backend is not None and backend.state != "connected"


async def watch_broker() -> None:
    """Tell this worker's clients when the broker goes away and when it is back."""
    told = False
    while True:
        await asyncio.sleep(0.25)
        away = broker_is_away()
        if away != told:
            told = away
            await send_to_all({"type": "broker", "away": away})


async def send_to_all(message: dict[str, Any]) -> None:
    """Send to this worker's clients without the broker, and without waiting for each in turn."""
    clients = [websocket for room in rooms() for websocket in hub.clients("here:" + room)]
    sends = [hub.send(message, to=websocket) for websocket in clients]
    await asyncio.gather(*sends, return_exceptions=True)  # some may be leaving


# The ticker. Each worker has its own channel, and all workers publish the same numbers.

TICKER = f"ticker:{WORKER}"
live = FastAPI()


@live.websocket("/ticker")
async def ticker(websocket: WebSocket, hub: Annotated[Broadcast, Depends(lambda: hub)]) -> None:
    """The ticker, as a FastAPI function. Clients only listen, and a slow one skips ticks."""
    with contextlib.suppress(WebSocketDisconnect):  # the client has left already
        await hub.connect(websocket, TICKER, overflow="latest")
        await hub.send({"values": values(120)}, to=websocket)
        await hub.serve(websocket, TICKER, publish=False)


async def tick() -> None:
    """Publish a number four times a second, through the same hub as the chat."""
    while True:
        await asyncio.sleep(0.25 - time.time() % 0.25)
        with contextlib.suppress(StarcastError):  # the next one comes soon
            await hub.publish(TICKER, {"values": values(1), "delivered": hub.stats().delivered})


def values(count: int) -> list[float]:
    """Return the newest numbers. They are computed from the clock, so all workers agree."""
    now = round(time.time() * 4)
    return [value_at(moment) for moment in range(now - count + 1, now + 1)]


def value_at(moment: int) -> float:
    waves = [math.sin(moment / period) for period in (3, 8, 21, 55, 144)]
    return round(100 + sum(waves), 2)


# The app


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with hub, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(tick(), name="ticker"),
            group.create_task(publish_counts()),
            group.create_task(watch_broker()),
        ]
        yield
        for task in tasks:
            task.cancel()


async def page(request: Request) -> FileResponse:
    return FileResponse(FOLDER / "demo_page.html")


async def tutorial(request: Request) -> FileResponse:
    return FileResponse(FOLDER / "docs" / "tutorial.md", media_type="text/plain")


app = Starlette(
    routes=[
        Route("/", page),
        Route("/tutorial", tutorial),
        WebSocketRoute("/ws", Chat),
        Mount("/live", live),
    ],
    lifespan=lifespan,
)

if __name__ == "__main__":
    uvicorn.run(app)
