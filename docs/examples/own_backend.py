from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint

connections = set()


class InProcess:
    """Joins the hubs of one event loop. A broker would be here otherwise."""

    async def connect(self, deliver, lost):
        return Connection(deliver)


class Connection:
    max_payload = 1024 * 1024

    def __init__(self, deliver):
        self.deliver = deliver
        self.channels = set()
        connections.add(self)

    async def close(self):
        connections.discard(self)

    async def subscribe(self, channel):
        self.channels.add(channel)

    async def unsubscribe(self, channel):
        self.channels.discard(channel)

    async def publish(self, messages):
        for channel, payload in messages:
            for connection in connections:
                if channel in connection.channels:
                    connection.deliver(channel, payload)


class Chat(BroadcastEndpoint):
    broadcast = Broadcast(backend=InProcess())


app = Starlette(routes=[WebSocketRoute("/ws", Chat)])
