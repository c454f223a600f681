from typing import Annotated, Any

from fastapi import Depends, FastAPI, WebSocket, WebSocketException

from starcast import Broadcast, BroadcastEndpoint, Event

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)


@app.websocket("/ws/{room}")
class Chat(BroadcastEndpoint):
    broadcast = hub
    encoding = "json"

    def get_channel(self, websocket: WebSocket) -> str:
        return f"room:{websocket.path_params['room']}"

    async def on_connect(self, websocket: WebSocket) -> None:
        await super().on_connect(websocket)

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await super().on_receive(websocket, {"text": str(data)})

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        await super().on_disconnect(websocket, close_code)


async def current_user(token: str = "") -> str:
    if token != "sesame":
        raise WebSocketException(1008)
    return "Ann"


User = Annotated[str, Depends(current_user)]


def get_hub() -> Broadcast:
    return hub


Hub = Annotated[Broadcast, Depends(get_hub)]


@app.websocket("/me")
async def me(websocket: WebSocket, user: User, hub: Hub) -> None:
    await hub.serve(websocket, f"user:{user}", publish=False)


async def first(channel: str) -> Event | None:
    async with hub.subscribe(channel) as subscriber:
        async for event in subscriber:
            return event
    return None
