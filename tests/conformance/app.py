"""What the conformance cases talk to: an echo by way of a hub, a channel for each client.

`/hub` answers with what is published, so on `starcast.uvicorn` with ready-made frames. `/mixed`
answers with the handler's own send every second time, so that both kinds of frames share one
compression window.
"""

import uuid

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from starcast import Broadcast

hub = Broadcast(max_buffer=64 * 1024 * 1024)  # there are messages of 16 MiB


async def echo(websocket: WebSocket) -> None:
    mixed = websocket.url.path == "/mixed"
    channel = uuid.uuid4().hex
    await hub.connect(websocket, channel)
    own = False
    try:
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            text = message.get("text")
            if not own:
                await hub.publish(channel, message["bytes"] if text is None else text)
            elif text is None:
                await websocket.send_bytes(message["bytes"])
            else:
                await websocket.send_text(text)
            own = mixed and not own
    finally:
        await hub.disconnect(websocket)


app = Starlette(routes=[WebSocketRoute("/hub", echo), WebSocketRoute("/mixed", echo)])
