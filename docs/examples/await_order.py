from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import Broadcast

hub = Broadcast("memory://")


async def farewell(websocket):
    await hub.connect(websocket)
    await hub.send("first, from the hub")
    await websocket.send_text("second, from the handler")
    await hub.send("third, from the hub again")
    await websocket.close()


app = Starlette(routes=[WebSocketRoute("/ws", farewell)])
