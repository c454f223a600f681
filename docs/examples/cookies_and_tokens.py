import asyncio
import os
import time
from typing import Annotated, Any

import jwt
from fastapi import Depends, FastAPI, Request, WebSocket, WebSocketException
from starlette.middleware.sessions import SessionMiddleware

from starcast import Broadcast

SESSION_SECRET = os.environ["SESSION_SECRET"]
TOKEN_SECRET = os.environ["TOKEN_SECRET"]  # at least 32 bytes

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)
app.add_middleware(SessionMiddleware, secret_key=SESSION_SECRET)


@app.post("/login")
async def login(request: Request, name: str):
    request.session["user"] = name  # once you have checked a password


def user_of_session(websocket: WebSocket) -> str:
    if "user" not in websocket.session:
        raise WebSocketException(1008, "not logged in")
    return websocket.session["user"]


@app.websocket("/me")
async def me(websocket: WebSocket, user: Annotated[str, Depends(user_of_session)]):
    await hub.serve(websocket, f"user:{user}", publish=False)


def claims_of_token(websocket: WebSocket) -> dict[str, Any]:
    """Return the claims of a token: from the header of a program, or a page's subprotocols."""
    scheme, _, token = websocket.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        scheme, token = (*websocket.scope["subprotocols"], "", "")[:2]
    if scheme.lower() != "bearer":
        raise WebSocketException(1008, "no token")
    try:
        required = {"require": ["exp", "sub"]}
        return jwt.decode(token, TOKEN_SECRET, algorithms=["HS256"], options=required)
    except jwt.InvalidTokenError as exc:
        raise WebSocketException(1008, "the token is not valid") from exc


@app.websocket("/api/me")
async def api_me(websocket: WebSocket, claims: Annotated[dict, Depends(claims_of_token)]):
    channel = f"user:{claims['sub']}"
    try:
        async with asyncio.timeout(claims["exp"] - time.time()):
            await hub.serve(websocket, channel, publish=False, subprotocols=["bearer"])
    except TimeoutError:
        await hub.close(websocket, 3000, "the token has expired")
