from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.routing import Mount, WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint


class Room(BroadcastEndpoint):
    broadcast = Broadcast("memory://")

    def get_channel(self, websocket):
        return websocket.path_params["room"]


class Members(Room):
    broadcast = Broadcast("memory://")  # not the hub of Room, which is open to everybody

    async def on_connect(self, websocket):
        if websocket.query_params.get("key") != "sesame":
            raise WebSocketException(1008)  # not accepted yet: the client gets HTTP 403
        await super().on_connect(websocket)
        channel = self.get_channel(websocket)
        await self.broadcast.publish(channel, "somebody came in", exclude=websocket)

    async def on_receive(self, websocket, data):
        if data == "bye":
            await self.broadcast.close(websocket, 1000, "see you")
        else:
            await super().on_receive(websocket, data)

    async def on_disconnect(self, websocket, close_code):
        await super().on_disconnect(websocket, close_code)
        channel = self.get_channel(websocket)
        self.broadcast.publish_nowait(channel, f"somebody left ({close_code})")


news = Broadcast("memory://")

app = Starlette(
    routes=[
        WebSocketRoute("/rooms/{room}", Room),
        WebSocketRoute("/members/{room}", Members),
        Mount("/live", news),  # /live/{channel}, listen only
    ],
    lifespan=news.lifespan,
)
