from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint

hub = Broadcast("memory://")


class Chat(BroadcastEndpoint):
    broadcast = hub

    def get_channel(self, websocket):
        return "room:" + websocket.path_params["room"]


app = Starlette(routes=[WebSocketRoute("/ws/{room}", Chat)])
