import contextlib

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from starcast import Broadcast

broadcaster = Broadcast("memory://")


@contextlib.asynccontextmanager
async def lifespan(app):
    await broadcaster.connect()
    yield
    await broadcaster.disconnect()


app = FastAPI(lifespan=lifespan)


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
