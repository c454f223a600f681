import asyncio
import contextlib
import itertools
from collections import defaultdict
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.responses import FileResponse
from starlette.routing import Route, WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint

PAGE = Path(__file__).with_name("chat_page.html")

hub = Broadcast("memory://")
names = defaultdict(list)  # channel -> the names of the people on it


def say_who_is_here(channel):
    hub.publish_nowait(channel, {"here": sorted(names[channel])})


class Chat(BroadcastEndpoint):
    broadcast = hub
    encoding = "json"

    def get_channel(self, websocket):
        return "room:" + websocket.path_params["room"]

    async def on_connect(self, websocket):
        self.name = websocket.query_params.get("name", "somebody")[:20]
        await super().on_connect(websocket)
        channel = self.get_channel(websocket)
        names[channel].append(self.name)
        say_who_is_here(channel)
        await hub.connect(websocket, "clock")

    async def on_disconnect(self, websocket, close_code):
        await super().on_disconnect(websocket, close_code)
        channel = self.get_channel(websocket)
        names[channel].remove(self.name)
        say_who_is_here(channel)
        if not names[channel]:
            del names[channel]

    async def on_receive(self, websocket, data):
        if not isinstance(data, str):
            raise WebSocketException(1008, "a JSON string, please")
        await super().on_receive(websocket, {"name": self.name, "text": data[:1000]})


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
