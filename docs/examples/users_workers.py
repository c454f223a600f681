import asyncio
import contextlib
import os

from fastapi import FastAPI, WebSocket

from starcast import Broadcast

hub = Broadcast(os.environ.get("STARCAST_URL", "memory://"), name="shop")


async def close_tabs(orders):
    """Close this worker's tabs of each user who signs out, on whichever worker."""
    async for order in orders:
        tabs = hub.clients(f"user:{order.message}")
        await asyncio.gather(*(hub.close(tab, 4001, "signed out") for tab in tabs))


@contextlib.asynccontextmanager
async def lifespan(app):
    async with hub, hub.subscribe("sign-out") as orders:
        task = asyncio.create_task(close_tabs(orders))
        yield
    await task  # which ends with the subscription


app = FastAPI(lifespan=lifespan)


@app.websocket("/ws/{user}")
async def listen(websocket: WebSocket, user: str):
    await hub.serve(websocket, f"user:{user}", publish=False)


@app.post("/sign-out/{user}")
async def sign_out(user: str):
    await hub.publish("sign-out", user)
