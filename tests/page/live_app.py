"""A server of the client protocol for tests, which uvicorn runs in a process of its own."""

from __future__ import annotations

import os
from typing import Any

from starlette.routing import WebSocketRoute

from page.scripted import app as app_with_page
from starcast import (
    Broadcast,
    ChannelsEndpoint,
    Client,
    CommandError,
    History,
    Limits,
    Subscription,
)

hub = Broadcast(
    os.environ.get("STARCAST_URL", "memory://"),
    history={"room:*": History(size=5000, ttl=600)},
)


class Live(ChannelsEndpoint):
    """Everybody may do everything, and is who the token says."""

    broadcast = hub
    limits = Limits(ping_interval=5)

    async def on_connect(self, websocket, token, data):
        return Client(user=token, info={"name": token.title()}, channels=["news"], data=data)

    async def on_subscribe(self, websocket, channel, token, data):
        if channel == "secret":
            raise PermissionError
        return Subscription(presence=True, join_leave=True, history=True, data=data)

    async def on_publish(self, websocket, channel, data):
        return data

    async def on_rpc(self, websocket, method, data: Any):
        if method == "add":
            return sum(data)
        if method == "publish":
            return await hub.publish("room:tea", data)
        raise CommandError(104, "method not found")


app = app_with_page(WebSocketRoute("/page/socket", Live))
app.router.lifespan_context = hub.lifespan
