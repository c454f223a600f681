"""The starcast demo: `uvicorn demo_app:app`, then three tabs of http://127.0.0.1:8000/?room=tea.

With STARCAST_URL=redis://localhost, any number of workers share their rooms, and a room loses no
line when they are started again.
"""

import asyncio
import contextlib
import hashlib
import math
import os
import secrets
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, WebSocket
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

from starcast import (
    Broadcast,
    ChannelsEndpoint,
    Client,
    CommandError,
    History,
    Presence,
    StarcastError,
    Subscription,
)

MAX_NAME = 24  # characters; the page has the same limits
MAX_TEXT = 500
MAX_KEPT = 50  # messages of a room, for an hour
FOLDER = Path(__file__).parent

# A name for this process. Processes on different machines may have the same number.
WORKER = f"{os.getpid()}-{secrets.token_hex(2)}"
TICKER = f"ticker:{WORKER}"  # every client of this process is on this channel

hub = Broadcast(
    os.environ.get("STARCAST_URL", "memory://"),
    history={"room:*": History(size=MAX_KEPT, ttl=3600)},
    presence=Presence(grace=2),
)


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with hub, asyncio.TaskGroup() as group:
        tasks = [group.create_task(tick(), name="ticker"), group.create_task(watch_broker())]
        yield
        for task in tasks:
            task.cancel()


app = FastAPI(lifespan=lifespan, openapi_url=None)

# The chat


@app.websocket("/live")
class Live(ChannelsEndpoint):
    """A tab has one connection, with these channels:

    `room:tea` for what is said, which is kept, and for who is there; `typing:tea` for what is not
    worth keeping; and the ticker.
    """

    broadcast = hub

    async def on_connect(self, websocket: WebSocket, token: str, data: Any) -> Client:
        match data:
            case {"name": str(name)} if 0 < len(name) <= MAX_NAME:
                pass
            case _:
                raise CommandError(107, f"a name has 1 to {MAX_NAME} characters")
        # The token is a secret of the tab's. Nobody else can make the same user out of a name.
        user = hashlib.sha256(f"{token or secrets.token_hex()} {name}".encode()).hexdigest()[:16]
        welcome = {"user": user, "worker": WORKER, "away": broker_is_away(), "values": values(120)}
        return Client(user=user, info={"name": name}, data=welcome, channels=[TICKER])

    async def on_subscribe(
        self, websocket: WebSocket, channel: str, token: str, data: Any
    ) -> Subscription:
        match channel.split(":"):
            case "room", *_:
                return Subscription(presence=True, join_leave=True, history=True)
            case "typing", *_:
                return Subscription()
        raise PermissionError

    async def on_publish(self, websocket: WebSocket, channel: str, data: Any) -> Any:
        # Everybody gets who says it with it, from the server.
        match channel.split(":"), data:
            case ("room", *_), str(text) if 0 < len(text) <= MAX_TEXT:
                return {"text": text, "time": datetime.now(UTC)}
            case ("typing", *_), _:
                return {}
        raise CommandError(107, "not a message of this chat")

    async def on_rpc(self, websocket: WebSocket, method: str, data: Any) -> Any:
        if method == "time":
            return datetime.now(UTC)
        raise CommandError(104, "method not found")


# Whether the broker is away


def broker_is_away() -> bool:
    backend = hub.stats().backend  # None for memory://
    return backend is not None and backend.state != "connected"


async def watch_broker() -> None:
    """Tell this process's clients when the broker goes away and when it is back."""
    told = False
    while True:
        await asyncio.sleep(0.25)
        away = broker_is_away()
        if away != told:
            told = away
            # To each of them, because what is published goes by way of the broker.
            sends = [hub.send({"away": away}, to=client) for client in hub.clients(TICKER)]
            await asyncio.gather(*sends, return_exceptions=True)  # some may be leaving


# The ticker. Each process has its own channel, and all of them publish the same numbers.


async def tick() -> None:
    """Publish a number four times a second."""
    while True:
        await asyncio.sleep(0.25 - time.time() % 0.25)
        with contextlib.suppress(StarcastError):  # the next one comes soon
            await hub.publish(TICKER, {"values": values(1), "delivered": hub.stats().delivered})


def values(count: int) -> list[float]:
    """Return the newest numbers. They are computed from the clock, so all processes agree."""
    now = round(time.time() * 4)
    return [value_at(moment) for moment in range(now - count + 1, now + 1)]


def value_at(moment: int) -> float:
    waves = [math.sin(moment / period) for period in (3, 8, 21, 55, 144)]
    return round(100 + sum(waves), 2)


# The page


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(FOLDER / "demo_page.html")


@app.get("/tutorial")
async def tutorial() -> FileResponse:
    return FileResponse(FOLDER / "docs" / "tutorial.md", media_type="text/plain")


app.mount("/js", StaticFiles(packages=[("starcast", "static")]))  # starcast.js

if __name__ == "__main__":
    uvicorn.run(app)
