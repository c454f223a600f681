from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from starcast import Broadcast, ConnectionManager

app = FastAPI()

hub = Broadcast("memory://", max_buffer=256 * 1024)
manager = ConnectionManager(hub)


@app.websocket("/ws")
async def old_clients(websocket: WebSocket):
    await manager.connect(websocket)
    try:
        while True:
            await manager.broadcast(await websocket.receive_text())
    except WebSocketDisconnect:
        pass
    finally:
        manager.disconnect(websocket)


@app.websocket("/rooms/{room}")
async def new_clients(websocket: WebSocket, room: str):
    await hub.serve(websocket, channel=f"room:{room}")


@app.get("/clients")
async def clients():
    return {"all": len(manager.active_connections), "channels": dict(hub.channels)}
