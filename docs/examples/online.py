import asyncio
import contextlib
import os
import time
import uuid
from collections import Counter

from fastapi import FastAPI, WebSocket

from starcast import Broadcast, BroadcastEndpoint, StarcastError

EVERY = 5.0  # seconds between two reports if nothing changes
PAUSE = 0.2  # seconds between two reports, at least
FORGOTTEN = 3 * EVERY  # seconds without a report after which a worker is taken off the list

hub = Broadcast(os.environ.get("STARCAST_URL", "memory://"), name="shop")
me = uuid.uuid4().hex  # this worker
mine: Counter[str] = Counter()  # users with a tab here, and how many
changed = asyncio.Event()
reports: dict[str, tuple[float, list[str]]] = {}  # worker -> when it reported, and which users


def online() -> set[str]:
    now = time.monotonic()
    for worker, (when, _) in list(reports.items()):
        if now - when > FORGOTTEN:
            del reports[worker]
    return set(mine).union(*(users for _, users in reports.values()))


async def send_reports() -> None:
    while True:
        changed.clear()
        with contextlib.suppress(StarcastError):  # the broker is away; the next report is due soon
            await hub.publish("online", {"worker": me, "users": list(mine)})
        await asyncio.sleep(PAUSE)  # a thousand arrivals at once are one report
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), EVERY)


async def read_reports() -> None:
    async with hub.subscribe("online", overflow="drop_oldest") as subscriber:
        async for event in subscriber:
            report = event.json()
            reports[report["worker"]] = (time.monotonic(), report["users"])


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI):
    async with hub, asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(read_reports()), tasks.create_task(send_reports())]
        yield
        for task in running:
            task.cancel()


app = FastAPI(lifespan=lifespan)


@app.websocket("/ws/{user}")  # in a real app the session says who it is
class Tab(BroadcastEndpoint):
    broadcast = hub

    def get_channel(self, websocket: WebSocket) -> str:
        return "user:" + websocket.path_params["user"]

    async def on_connect(self, websocket: WebSocket) -> None:
        await super().on_connect(websocket)
        mine[websocket.path_params["user"]] += 1
        changed.set()

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        await super().on_disconnect(websocket, close_code)
        user = websocket.path_params["user"]
        mine[user] -= 1
        if not mine[user]:
            del mine[user]
            changed.set()


@app.get("/online")
async def who_is_online() -> list[str]:
    return sorted(online())
