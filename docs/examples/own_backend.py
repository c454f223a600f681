from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint

everybody = set()


class InProcess:
    """Joins the hubs of one event loop. A broker would be here otherwise."""

    max_payload = 1024 * 1024

    def __init__(self):
        self.channels = set()

    async def start(self, deliver, lost):
        self.deliver = deliver
        everybody.add(self)

    async def stop(self):
        everybody.discard(self)

    async def subscribe(self, channel):
        self.channels.add(channel)

    async def unsubscribe(self, channel):
        self.channels.discard(channel)

    async def publish(self, messages):
        for channel, payload in messages:
            for backend in everybody:
                if channel in backend.channels:
                    backend.deliver(channel, payload)


class Chat(BroadcastEndpoint):
    broadcast = Broadcast(backend=InProcess())


app = Starlette(routes=[WebSocketRoute("/ws", Chat)])
