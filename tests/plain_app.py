"""An app as people write it, for servers that are started without any option of starcast's."""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from starcast import Broadcast

hub = Broadcast("memory://")
app = FastAPI()


@app.websocket("/ws")
async def chat(websocket: WebSocket) -> None:
    await hub.connect(websocket, "chat")
    try:
        while True:
            text = await websocket.receive_text()
            if text == "stats":
                stats = hub.stats()
                await websocket.send_json([stats.fast_path, dict(stats.asgi)])
            else:
                await hub.publish("chat", text)
    except WebSocketDisconnect:
        await hub.disconnect(websocket)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]))
