from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint

broadcast = Broadcast("memory://")


class Chatroom(BroadcastEndpoint):
    broadcast = broadcast

    def get_channel(self, websocket):
        return "chatroom"


app = Starlette(
    routes=[WebSocketRoute("/", Chatroom, name="chatroom_ws")],
    lifespan=broadcast.lifespan,
)
