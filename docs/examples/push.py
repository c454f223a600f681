import asyncio

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocketDisconnect

from starcast import Broadcast

hub = Broadcast("memory://")
history = [f"line {number}" for number in range(100_000)]


async def push(websocket):
    await hub.connect(websocket, "news")
    try:
        for line in history:
            await hub.send(line, to=websocket)  # waits while the client is behind
        while True:
            await hub.send("still here", to=websocket)
            await asyncio.sleep(1)
    except WebSocketDisconnect:
        pass  # the client has left
    finally:
        await hub.disconnect(websocket)


async def notify(websocket, text):
    """Call this from anywhere else. False means that the client has left; it is not an error."""
    return await hub.send(text, to=websocket)


app = Starlette(routes=[WebSocketRoute("/ws", push)])
