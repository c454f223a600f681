from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint

hub = Broadcast("memory://")


class Chat(BroadcastEndpoint):
    broadcast = hub


async def healthz(request):
    healthy = await hub.healthy()
    return JSONResponse({"healthy": healthy}, 200 if healthy else 503)


app = Starlette(
    routes=[Route("/healthz", healthz), WebSocketRoute("/ws", Chat)], lifespan=hub.lifespan
)
