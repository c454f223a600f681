from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import BroadcastEndpoint


class Chat(BroadcastEndpoint):
    def get_channel(self, websocket):
        return websocket.path_params["room"]


app = Starlette(routes=[WebSocketRoute("/ws/{room}", Chat)])
