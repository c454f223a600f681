from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from starcast import ConnectionManager

app = FastAPI()
manager = ConnectionManager()


@app.websocket("/ws")
async def websocket_endpoint(websocket: WebSocket):
    await manager.connect(websocket)
    try:
        while True:
            data = await websocket.receive_text()
            await manager.hub.send(data, exclude=websocket)  # to everybody else
    except WebSocketDisconnect:
        pass
    finally:
        manager.disconnect(websocket)
