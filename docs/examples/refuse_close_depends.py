from typing import Annotated

from fastapi import Depends, FastAPI, WebSocket

from starcast import Broadcast

USERS = {"s-ann": "ann"}
hub = Broadcast(refuse="close")
app = FastAPI(lifespan=hub.lifespan)


class NotLoggedIn(Exception):
    pass


def current_user(websocket: WebSocket) -> str:
    session = websocket.cookies.get("session")
    if session not in USERS:
        raise NotLoggedIn
    return USERS[session]


@app.exception_handler(NotLoggedIn)
async def ask_to_log_in(websocket: WebSocket, exc: NotLoggedIn):
    await websocket.accept()  # only then does the page see the code
    await websocket.close(4401, "log in")


@app.websocket("/ws")
async def ws(websocket: WebSocket, user: Annotated[str, Depends(current_user)]):
    await hub.serve(websocket, f"user:{user}")
