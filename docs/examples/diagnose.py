import os

from fastapi import FastAPI

from starcast import Broadcast, BroadcastEndpoint

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)


@app.websocket("/ws/{channel}")
class Chat(BroadcastEndpoint):
    broadcast = hub


@app.get("/debug")
async def debug():
    return {
        "process": os.getpid(),
        "hub": f"{hub!r} at {id(hub):#x}",
        "channels": hub.channels,
        "published": hub.stats().published,
    }
