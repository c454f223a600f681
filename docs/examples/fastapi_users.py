from fastapi import FastAPI, WebSocket

from starcast import Broadcast

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)


@app.websocket("/users/{user_id}")
async def listen(websocket: WebSocket, user_id: int):
    await hub.serve(websocket, user_id, publish=False)


@app.post("/users/{user_id}")
async def notify(user_id: int, text: str):
    await hub.publish(user_id, text)
    return {"online": str(user_id) in hub.channels}
