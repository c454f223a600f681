"""What official clients are tested with: `uvicorn official_app:app`, with the broker in URL."""

from __future__ import annotations

import os
import time
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute

from starcast import (
    Broadcast,
    ChannelsEndpoint,
    Client,
    CommandError,
    DisconnectClient,
    History,
    Limits,
    Presence,
    Subscription,
)


class Point(BaseModel):
    x: int
    y: int = 0


class Live(ChannelsEndpoint):
    """Tokens say what is to happen: see `on_connect`."""

    limits = Limits(max_subscriptions=600)
    models: Any = {"move": Point}  # noqa: RUF012  # it does not change

    async def on_connect(self, websocket, token, data):
        user, _, what = token.partition(":")
        if what == "refused":
            raise PermissionError
        if what == "expired":
            raise CommandError(109, "token expired")
        if what == "away":
            raise DisconnectClient(4500, "stay away")
        expires_at = time.time() + 2 if what == "short" else None
        return Client(
            user=user,
            info={"name": user},
            data={"you sent": data},
            channels=["news:all"] if what == "news" else [],
            expires_at=expires_at,
        )

    async def on_refresh(self, websocket, token):
        return time.time() + {"renewed": 1000, "again": 2}[token]

    async def on_subscribe(self, websocket, channel, token, data):
        if channel.startswith("secret"):
            raise PermissionError
        expires_at = None
        if channel.startswith("short"):
            expires_at = time.time() + {"first": 2, "second": 1000}[token]
        gathering = channel.startswith("gathering")
        return Subscription(
            history=True, presence=gathering, join_leave=gathering, expires_at=expires_at
        )

    async def on_publish(self, websocket, channel, data):
        if data == "refused":
            raise PermissionError
        return {"changed": True} if data == "change me" else data

    async def on_rpc(self, websocket, method, data):
        if method == "move":
            return {"sum": data.x + data.y}
        if method == "fail":
            raise CommandError(1000, "failed")
        if method == "echo":
            return data
        raise CommandError(104, "method not found")


def make(url: str = "memory://", **options: Any) -> Starlette:
    """Return an app, whose hub is `app.state.hub`."""
    hub = Broadcast(
        url,
        history={"news:*": History(size=20_000), "room:*": History(size=20_000)},
        presence=Presence(ttl=2, grace=0.2, interval=0.02),
        **options,
    )

    class Endpoint(Live):
        broadcast = hub

    async def health(request):
        return JSONResponse({"clients": len(hub)})

    routes = [WebSocketRoute("/connection/websocket", Endpoint), Route("/", health)]
    app = Starlette(routes=routes, lifespan=hub.lifespan)
    app.state.hub = hub
    return app


if "URL" in os.environ:
    app = make(os.environ["URL"], name="official", open_timeout=30)
