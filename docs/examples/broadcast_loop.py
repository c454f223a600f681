from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from starcast import Broadcast

app = FastAPI()
broadcaster = Broadcast("memory://")


@app.websocket("/ws")
async def websocket_endpoint(websocket: WebSocket):
    await websocket.accept()
    await broadcaster.connect(websocket)
    try:
        while True:
            data = await websocket.receive_text()
            await broadcaster.send(data)
    except WebSocketDisconnect:
        await broadcaster.disconnect(websocket)
