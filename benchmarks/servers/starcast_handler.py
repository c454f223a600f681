"""starcast in a handler of one's own, on uvicorn as it comes."""

import sys

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from starcast import Broadcast

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)


@app.websocket("/ws/{room}")
async def websocket_endpoint(websocket: WebSocket, room: str):
    await hub.connect(websocket, room)
    try:
        while True:
            await hub.publish(room, await websocket.receive_text())
    except WebSocketDisconnect:
        await hub.disconnect(websocket)


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
