from fastapi import FastAPI, WebSocket

from starcast import Broadcast

hub = Broadcast()
app = FastAPI(lifespan=hub.lifespan)


@app.websocket("/ws/{room}")
async def live(websocket: WebSocket, room: str):
    # Take the user from a session or a token, never from what a client may choose.
    user = websocket.query_params.get("user", "guest")
    await hub.connect(websocket, room, user=user, info={"since": 2026})
    try:
        async for text in websocket.iter_text():
            await hub.publish(room, f"{user}: {text}", exclude_user=user)
    finally:
        await hub.disconnect(websocket)


@app.post("/users/{user}/messages")
async def tell(user: str, text: str):
    return {"clients": await hub.send_user(user, text)}


@app.post("/users/{user}/rooms/{room}")
async def invite(user: str, room: str):
    await hub.subscribe_user(user, room)


@app.delete("/users/{user}/rooms/{room}")
async def expel(user: str, room: str):
    await hub.unsubscribe_user(user, room)


@app.delete("/users/{user}")
async def log_out(user: str):
    await hub.disconnect_user(user, 4001, "logged out")


@app.delete("/rooms/{room}")
async def close(room: str):
    await hub.close_channel(room, 4002, "the room is closed")


@app.post("/announcements")
async def announce(text: str):
    await hub.publish(["lobby", "kitchen"], text)  # once for a client that is in both


@app.get("/rooms/{room}")
async def here(room: str):
    return [{"user": it.user, **(it.info or {})} for it in hub.clients_of(room)]
