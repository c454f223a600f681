import asyncio
import contextlib
import itertools
from collections import defaultdict
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.responses import FileResponse
from starlette.routing import Route, WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint, History

PAGE = Path(__file__).with_name("chat_page.html")

kept = History(size=50, ttl=3600, max_channels=1000)
hub = Broadcast("memory://", history={"room:*": kept})
names = defaultdict(list)  # room -> the names of the people in it


def say_who_is_here(room):
    hub.publish_nowait("here:" + room, {"here": sorted(names[room])})


class Chat(BroadcastEndpoint):
    broadcast = hub
    encoding = "json"
    history = 50
    ids = True

    def get_channel(self, websocket):
        return "room:" + websocket.path_params["room"]

    async def on_connect(self, websocket):
        self.name = websocket.query_params.get("name", "somebody")[:20]
        self.room = websocket.path_params["room"]
        await super().on_connect(websocket)
        names[self.room].append(self.name)
        await hub.connect(websocket, "here:" + self.room)
        say_who_is_here(self.room)
        await hub.connect(websocket, "clock")

    async def on_disconnect(self, websocket, close_code):
        await super().on_disconnect(websocket, close_code)
        names[self.room].remove(self.name)
        say_who_is_here(self.room)
        if not names[self.room]:
            del names[self.room]

    async def on_receive(self, websocket, data):
        match data:
            case {"key": str(key), "text": str(text)} if 0 < len(key) <= 100:
                message = {"name": self.name, "text": text[:1000]}
                await hub.publish(self.get_channel(websocket), message, idempotency_key=key)
                await hub.send({"sent": key}, to=websocket)
            case _:
                raise WebSocketException(1008, "a key and a text, please")


async def page(request):
    return FileResponse(PAGE)


async def clock():
    for seconds in itertools.count():
        await hub.publish("clock", {"seconds": seconds})
        await asyncio.sleep(1)


@contextlib.asynccontextmanager
async def lifespan(app):
    async with hub, asyncio.TaskGroup() as tasks:
        task = tasks.create_task(clock())
        yield
        task.cancel()


routes = [Route("/", page), WebSocketRoute("/ws/{room}", Chat)]
app = Starlette(routes=routes, lifespan=lifespan)
