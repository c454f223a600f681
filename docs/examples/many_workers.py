import os

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint


class Chat(BroadcastEndpoint):
    broadcast = Broadcast(os.environ.get("STARCAST_URL", "memory://"))


app = Starlette(routes=[WebSocketRoute("/ws/{channel}", Chat)])
