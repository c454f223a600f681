from fastapi import FastAPI, WebSocket
from starlette.routing import WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)

app.mount("/live", hub.app(heartbeats={"ping": "pong"}))


@app.websocket("/rooms/{room}")
async def rooms(websocket: WebSocket, room: str):
    await hub.serve(websocket, room, heartbeats={"ping": "pong", "keepalive": None})


HEARTBEATS = {'{"type":"ping"}': '{"type":"pong"}'}


class Chat(BroadcastEndpoint):
    broadcast = hub
    encoding = "json"
    heartbeats = HEARTBEATS


app.router.routes.append(WebSocketRoute("/chat/{channel}", Chat))
