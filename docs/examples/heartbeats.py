from fastapi import FastAPI, WebSocket
from starlette.routing import WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)

# --8<-- [start:mount]
app.mount("/live", hub.app(heartbeats={"ping": "pong"}))
# --8<-- [end:mount]


# --8<-- [start:serve]
@app.websocket("/rooms/{room}")
async def rooms(websocket: WebSocket, room: str):
    await hub.serve(websocket, room, heartbeats={"ping": "pong", "keepalive": None})


# --8<-- [end:serve]


# --8<-- [start:endpoint]
HEARTBEATS = {'{"type":"ping"}': '{"type":"pong"}'}


class Chat(BroadcastEndpoint):
    broadcast = hub
    encoding = "json"
    heartbeats = HEARTBEATS


# --8<-- [end:endpoint]

app.router.routes.append(WebSocketRoute("/chat/{channel}", Chat))
