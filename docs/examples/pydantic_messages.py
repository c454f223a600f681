from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from starcast import Broadcast, BroadcastEndpoint

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)


class Say(BaseModel):
    type: Literal["say"]
    text: Annotated[str, Field(min_length=1, max_length=1000)]


class Rename(BaseModel):
    type: Literal["rename"]
    name: Annotated[str, Field(min_length=1, max_length=20)]


Incoming = Annotated[Say | Rename, Field(discriminator="type")]
incoming: TypeAdapter[Say | Rename] = TypeAdapter(Incoming)


class Said(BaseModel):
    type: Literal["said"] = "said"
    name: str
    text: str
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class Renamed(BaseModel):
    type: Literal["renamed"] = "renamed"
    old: str
    new: str


@app.websocket("/ws/{room}")
class Chat(BroadcastEndpoint):
    broadcast = hub
    encoding = "json"
    name = "somebody"

    def get_channel(self, websocket):
        return "room:" + websocket.path_params["room"]

    async def on_receive(self, websocket, data):
        match incoming.validate_python(data):
            case Say(text=text):
                await super().on_receive(websocket, Said(name=self.name, text=text))
            case Rename(name=name):
                await super().on_receive(websocket, Renamed(old=self.name, new=name))
                self.name = name


@app.websocket("/patient/{room}")
async def patient(websocket: WebSocket, room: str):
    channel = f"room:{room}"
    await hub.connect(websocket, channel)
    try:
        while True:
            text = await websocket.receive_text()
            try:
                message = incoming.validate_json(text)
            except ValidationError as exc:
                problems = exc.errors(include_url=False, include_context=False, include_input=False)
                await hub.send({"type": "error", "problems": problems}, to=websocket)
                continue
            if isinstance(message, Say):
                await hub.publish(channel, Said(name="somebody", text=message.text))
    except WebSocketDisconnect:
        pass
    finally:
        await hub.disconnect(websocket)
