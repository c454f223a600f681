from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

from starcast import Broadcast, ChannelsEndpoint, Client, History, Subscription

hub = Broadcast(history={"room:*": History(size=100, ttl=3600)})
app = FastAPI(lifespan=hub.lifespan)
app.mount("/js", StaticFiles(packages=[("starcast", "static")]))


@app.websocket("/live")
class Live(ChannelsEndpoint):
    broadcast = hub

    async def on_connect(self, websocket, token, data):
        return Client(info={"name": str(data)[:20]})

    async def on_subscribe(self, websocket, channel, token, data):
        if not channel.startswith("room:"):
            raise PermissionError
        return Subscription(presence=True, join_leave=True, history=True)

    async def on_publish(self, websocket, channel, data):
        return str(data)[:500]


@app.get("/")
def page():
    return FileResponse(Path(__file__).parent / "rooms.html")
