import contextlib
import os

from fastapi import FastAPI, WebSocket

from starcast import Broadcast

url = os.environ.get("STARCAST_URL", "memory://")
stage = os.environ.get("STAGE", "development")
public = Broadcast(url, name=f"shop-{stage}")
staff = Broadcast(url, name=f"shop-staff-{stage}")


def is_staff(websocket: WebSocket, channel: str) -> bool:
    return websocket.cookies.get("session") == "a session of the staff"


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI):
    async with public, staff:
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/live", public)
app.mount("/staff", staff.app(authorize=is_staff))
