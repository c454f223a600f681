from fastapi import FastAPI
from pydantic import BaseModel, Field

from starcast import Broadcast, ChannelsEndpoint, Client, CommandError, History, Subscription

ROOMS = {"room:tea", "room:chess"}
USERS = {"secret-of-ada": "ada", "secret-of-bob": "bob"}  # in place of your sessions

hub = Broadcast("memory://", history={"room:*": History(size=100)})
app = FastAPI(lifespan=hub.lifespan)


class Line(BaseModel):
    text: str = Field(min_length=1, max_length=500)


@app.websocket("/connection/websocket")
class Live(ChannelsEndpoint):
    broadcast = hub

    async def on_connect(self, websocket, token, data):
        if token not in USERS:
            raise PermissionError
        return Client(user=USERS[token], info={"name": USERS[token].title()})

    async def on_subscribe(self, websocket, channel, token, data):
        if channel not in ROOMS:
            raise PermissionError
        return Subscription(presence=True, join_leave=True, history=True)

    async def on_publish(self, websocket, channel, data: Line):
        if channel not in ROOMS:
            raise PermissionError
        return data

    async def on_rpc(self, websocket, method, data):
        if method == "rooms":
            return sorted(ROOMS)
        raise CommandError(104, "method not found")
