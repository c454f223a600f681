import logging

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint

logger = logging.getLogger("app")


def note(overflowed):
    """Called on the event loop of the client. It must not block."""
    logger.warning("%s: %d messages lost", overflowed.overflow, len(overflowed.dropped))


hub = Broadcast("memory://", max_buffer=256 * 1024, overflow="disconnect", on_overflow=note)


class Prices(BroadcastEndpoint):
    broadcast = hub

    async def on_connect(self, websocket):
        channel = self.get_channel(websocket)
        await hub.connect(websocket, channel, overflow="latest", max_buffer=16 * 1024)


class Chat(BroadcastEndpoint):
    broadcast = hub


async def stats(request):
    snapshot = hub.stats()
    return JSONResponse(
        {
            "clients": snapshot.clients,
            "channels": dict(snapshot.channels),
            "published": snapshot.published,
            "delivered": snapshot.delivered,
            "dropped": snapshot.dropped,
            "slow_clients": snapshot.slow_clients,
            "buffered": snapshot.buffered,
        }
    )


app = Starlette(
    routes=[
        WebSocketRoute("/chat/{channel}", Chat),
        WebSocketRoute("/prices/{channel}", Prices),
        Route("/stats", stats),
    ]
)
