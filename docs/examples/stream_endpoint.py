from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.routing import Mount, Route

from starcast import SSE, Broadcast, SSEEndpoint

hub = Broadcast("memory://")
OWNERS = {"7": "s-ann"}


class Orders(SSEEndpoint):
    broadcast = hub
    sse = SSE(heartbeat=10, retry=2000)

    def get_channel(self, request: Request) -> str:
        return f"order:{request.path_params['number']}"

    async def on_connect(self, request: Request) -> None:
        owner = OWNERS.get(request.path_params["number"])
        if owner is None or request.cookies.get("session") != owner:
            raise HTTPException(401, "log in")
        await super().on_connect(request)

    async def on_disconnect(self, request: Request) -> None:
        print("nobody looks at order", request.path_params["number"])


async def may_listen(client: HTTPConnection, channel: str) -> bool:
    return channel in ("news", "weather")


app = Starlette(
    routes=[
        Route("/orders/{number}/events", Orders),
        Mount("/live", hub.app(authorize=may_listen)),
    ],
    lifespan=hub.lifespan,
)
