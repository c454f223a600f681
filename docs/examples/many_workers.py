import os

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint

hub = Broadcast(os.environ.get("STARCAST_URL", "memory://"))


class Chat(BroadcastEndpoint):
    broadcast = hub


app = Starlette(routes=[WebSocketRoute("/ws/{channel}", Chat)], lifespan=hub.lifespan)
