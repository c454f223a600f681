from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint

hub = Broadcast("memory://")


class Chat(BroadcastEndpoint):
    broadcast = hub


app = Starlette(routes=[WebSocketRoute("/ws", Chat)])
