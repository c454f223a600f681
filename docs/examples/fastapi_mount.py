from fastapi import FastAPI
from starlette.routing import WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint

app = FastAPI()

news = Broadcast("memory://")

app.mount("/live", news)  # /live/{channel}, listen only


@app.post("/news/{channel}")
async def publish_news(channel: str, headline: str):
    await news.publish(channel, headline)
    return {"listeners": news.channels.get(channel, 0)}


staff = Broadcast("memory://", name="staff")
KEYS = {"kitchen": "k-key", "bar": "b-key"}


def authorize(websocket, channel):
    return channel in KEYS and websocket.query_params.get("key") == KEYS[channel]


app.mount("/staff", staff.app(publish=True, authorize=authorize))


class Chat(BroadcastEndpoint):
    broadcast = Broadcast("memory://")


api = FastAPI()
api.router.routes.append(WebSocketRoute("/ws/{channel}", Chat))

app.mount("/api", api)  # the clients' address is /api/ws/{channel}
