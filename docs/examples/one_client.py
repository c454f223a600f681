from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from starcast import Broadcast

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)


@app.websocket("/ws/{room}")
async def chat(websocket: WebSocket, room: str):
    await hub.connect(websocket, room)
    await hub.send({"welcome": room}, to=websocket)
    try:
        while True:
            text = await websocket.receive_text()
            if text == "/count":
                await hub.send({"here": hub.channels[room]}, to=websocket)
            else:
                await hub.publish(room, {"text": text}, exclude=websocket)
    except WebSocketDisconnect:
        pass
    finally:
        await hub.disconnect(websocket)
