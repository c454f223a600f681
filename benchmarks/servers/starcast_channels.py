"""starcast for clients of one channel and of many; the server measures itself: see `channels`."""

from __future__ import annotations

import asyncio
import os
import time
import tracemalloc

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute

from starcast import (
    Broadcast,
    BroadcastEndpoint,
    ChannelsEndpoint,
    Client,
    Limits,
    Member,
    Subscription,
)

hub = Broadcast(os.environ.get("BROKER_URL") or "memory://")


class Plain(BroadcastEndpoint):
    broadcast = hub

    def get_channel(self, websocket):
        return "plain"


class Present(BroadcastEndpoint):
    broadcast = hub
    join_leave = True

    def get_channel(self, websocket):
        return "present"

    def get_member(self, websocket):
        return Member(websocket.query_params["user"])


class Channels(ChannelsEndpoint):
    broadcast = hub
    limits = Limits(max_subscriptions=1000, commands=1e6, burst=1_000_000)

    async def on_connect(self, websocket, token, data):
        return Client(user=token)

    async def on_subscribe(self, websocket, channel, token, data):
        present = channel.startswith("present")
        return Subscription(presence=present, join_leave=present)


async def publish(request: Request) -> JSONResponse:
    """Publish messages, `batch` at a time, and return the CPU that this took, in seconds."""
    count, batch = int(request.query_params["count"]), int(request.query_params["batch"])
    channel = request.query_params["channel"]
    messages = [{"number": number, "text": "x" * 100} for number in range(count)]
    began = time.process_time()
    for start in range(0, count, batch):
        for message in messages[start : start + batch]:
            hub.publish_nowait(channel, message)
        await asyncio.sleep(0.002)
    return JSONResponse({"cpu": time.process_time() - began})


async def look(request: Request) -> JSONResponse:
    """Return the CPU that the server has taken so far, and its memory, if that is traced."""
    if request.query_params.get("trace"):
        tracemalloc.start()
    memory = tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0
    members = hub.channels.get(request.query_params.get("channel", ""), 0)
    return JSONResponse({"cpu": time.process_time(), "memory": memory, "members": members})


app = Starlette(
    routes=[
        Route("/publish", publish),
        Route("/look", look),
        WebSocketRoute("/plain", Plain),
        WebSocketRoute("/present", Present),
        WebSocketRoute("/channels", Channels),
    ],
    lifespan=hub.lifespan,
)

if __name__ == "__main__":
    import sys

    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
