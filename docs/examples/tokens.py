import time

import jwt
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import Broadcast, ChannelsEndpoint, Client, CommandError, Subscription

SECRET = "from your settings, at least 32 bytes long"

hub = Broadcast()


def read(token: str) -> dict:
    """Return what a token says, or raise what its client is told."""
    try:
        return jwt.decode(token, SECRET, algorithms=["HS256"], options={"require": ["exp", "sub"]})
    except jwt.ExpiredSignatureError:
        raise CommandError(109, "token expired") from None
    except jwt.InvalidTokenError:
        raise PermissionError from None


class Live(ChannelsEndpoint):
    broadcast = hub

    async def on_connect(self, websocket, token, data):
        claims = read(token)
        return Client(user=claims["sub"], expires_at=claims["exp"])

    async def on_refresh(self, websocket, token):
        return read(token)["exp"]

    async def on_subscribe(self, websocket, channel, token, data):
        claims = read(token)
        if claims.get("channel") != channel:
            raise PermissionError
        return Subscription(expires_at=claims["exp"])


app = Starlette(
    routes=[WebSocketRoute("/connection/websocket", Live)],
    lifespan=hub.lifespan,
)


def make_token(user: str, **more: str) -> str:
    """What a route of yours returns to a page whose user is logged in."""
    return jwt.encode({"sub": user, "exp": time.time() + 600, **more}, SECRET, "HS256")
