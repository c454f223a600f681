"""The app of scenarios/test_shutdown.py: a subscriber feeds streams of every shape people write."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

from fastapi import FastAPI, WebSocket
from fastapi.sse import EventSourceResponse
from starlette.responses import StreamingResponse

from starcast import Broadcast

VERSION = "1"

hub = Broadcast()
app = FastAPI(lifespan=hub.lifespan)


@app.get("/version")
async def version() -> str:
    return VERSION


@app.get("/pid")
async def pid() -> int:
    return os.getpid()


@app.get("/sse", response_class=EventSourceResponse)
async def sse() -> AsyncIterator[str]:
    async with hub.subscribe("news") as subscriber:
        yield "subscribed"
        async for event in subscriber:
            yield str(event.message)


@app.get("/stream")
async def stream() -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        async with hub.subscribe("news") as subscriber:
            yield "subscribed\n"
            async for event in subscriber:
                yield f"{event.message}\n"

    return StreamingResponse(lines(), media_type="text/plain")


@app.websocket("/forward")
async def forward(websocket: WebSocket) -> None:
    await websocket.accept()
    async with hub.subscribe("news") as subscriber:
        await websocket.send_text("subscribed")
        async for event in subscriber:
            await websocket.send_text(str(event.message))


app.mount("/live", hub)


@app.websocket("/chat")
async def chat(websocket: WebSocket) -> None:
    await hub.serve(websocket, "news")
