from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.responses import HTMLResponse
from starlette.routing import Route, WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint

SESSIONS = {"s-ann": "ann"}
page = Path(__file__).with_name("refuse_close.html").read_text()


class Chat(BroadcastEndpoint):
    broadcast = Broadcast(refuse="close")

    async def on_connect(self, websocket):
        if websocket.cookies.get("session") not in SESSIONS:
            raise WebSocketException(4401, "log in")
        await super().on_connect(websocket)


app = Starlette(
    routes=[
        Route("/", lambda request: HTMLResponse(page)),
        WebSocketRoute("/ws", Chat),
    ],
)
