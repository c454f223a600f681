import asyncio

from fastapi import FastAPI, WebSocket

from starcast import Broadcast, BroadcastEndpoint

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)

ROOMS = ("lobby", "tea", "bar")


@app.websocket("/ws")
class Tab(BroadcastEndpoint):
    broadcast = hub
    encoding = "json"

    async def on_connect(self, websocket):
        # Take the user from a session or a token, never from what a client may choose.
        user = websocket.state.user = websocket.query_params.get("user", "guest")
        await hub.connect(websocket, f"user:{user}")
        await hub.connect(websocket, "room:lobby")

    async def on_receive(self, websocket, data):
        match data:
            case {"join": str(room)} if room in ROOMS:
                await hub.connect(websocket, f"room:{room}")
            case {"leave": str(room)}:
                await hub.disconnect(websocket, f"room:{room}")
            case {"say": str(text), "room": str(room)} if room in rooms_of(websocket):
                await hub.publish(f"room:{room}", {"from": websocket.state.user, "text": text})
            case {"move": [str(old), str(new)]} if new in ROOMS:
                await move(websocket, old, new)


# Send to a user, and see who is online


async def send_to_user(user: str, message) -> bool:
    """Send to all tabs of a user; False if this process has none."""
    tabs = hub.clients(f"user:{user}")
    await hub.publish(f"user:{user}", message)
    return bool(tabs)


async def send_to_other_tabs(websocket: WebSocket, message):
    await hub.publish(f"user:{websocket.state.user}", message, exclude=websocket)


def is_online(user: str) -> bool:
    return bool(hub.clients(f"user:{user}"))


def online_users() -> list[str]:
    return [name.removeprefix("user:") for name in hub.channels if name.startswith("user:")]


# Close a user


async def disconnect_user(user: str, keep: WebSocket | None = None):
    """Close all tabs of a user, or all but one."""
    tabs = [tab for tab in hub.clients(f"user:{user}") if tab is not keep]
    await asyncio.gather(*(hub.close(tab, 4001, "signed out") for tab in tabs))


# Rooms


def get_room_members(room: str) -> set[str]:
    return {tab.state.user for tab in hub.clients(f"room:{room}")}


def rooms_of(websocket: WebSocket) -> list[str]:
    return [room for room in ROOMS if websocket in hub.clients(f"room:{room}")]


async def move(websocket: WebSocket, old: str, new: str):
    await hub.connect(websocket, f"room:{new}")
    await hub.disconnect(websocket, f"room:{old}")


async def kick(user: str, room: str):
    for tab in hub.clients(f"user:{user}"):
        await hub.disconnect(tab, f"room:{room}")
