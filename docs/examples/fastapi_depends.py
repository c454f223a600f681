from typing import Annotated

from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect, WebSocketException

from starcast import Broadcast

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)

TOKENS = {"a-token": "Ann", "b-token": "Ben"}


async def current_user(token: str = "") -> str:
    if token not in TOKENS:
        raise WebSocketException(1008)  # not accepted yet: the client gets HTTP 403
    return TOKENS[token]


User = Annotated[str, Depends(current_user)]


@app.websocket("/rooms/{room}")
async def room_socket(websocket: WebSocket, room: str, user: User):
    await hub.serve(websocket, channel=room)


@app.websocket("/signed/{room}")
async def signed_socket(websocket: WebSocket, room: str, user: User):
    await hub.connect(websocket, channel=room)
    try:
        while True:
            text = await websocket.receive_text()
            await hub.publish(room, {"from": user, "text": text})
    except WebSocketDisconnect:
        pass
    finally:
        await hub.disconnect(websocket)
