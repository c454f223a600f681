from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from starcast import Broadcast

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)
orders = {7: {"number": 7, "state": "placed"}}


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


@app.websocket("/orders/{number}")
async def order(websocket: WebSocket, number: int):
    channel = f"order:{number}"
    await hub.connect(websocket, channel)  # first, so that no change in between is missed
    await hub.send(orders[number], to=websocket)
    await hub.serve(websocket, channel, publish=False)


@app.put("/orders/{number}/{state}")
async def change(number: int, state: str):
    orders[number]["state"] = state
    await hub.publish(f"order:{number}", orders[number])
