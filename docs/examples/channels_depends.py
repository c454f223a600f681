from typing import Annotated

from fastapi import Depends, FastAPI, Query, WebSocket, WebSocketException

from starcast import Broadcast, Client, Subscription

hub = Broadcast()
app = FastAPI(lifespan=hub.lifespan)


def current_user(ticket: Annotated[str, Query()] = "") -> str:
    if not ticket.startswith("ticket-of-"):
        raise WebSocketException(1008, "no ticket")
    return ticket.removeprefix("ticket-of-")


@app.websocket("/connection/websocket")
async def live(websocket: WebSocket, user: Annotated[str, Depends(current_user)]):
    async def on_connect(websocket, token, data):
        return Client(user=user)

    async def on_subscribe(websocket, channel, token, data):
        if channel not in ("news", f"user:{user}"):
            raise PermissionError
        return Subscription()

    await hub.serve_channels(websocket, on_connect=on_connect, on_subscribe=on_subscribe)
