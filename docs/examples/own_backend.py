from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint


class CountingBackend:
    def __init__(self):
        self.carried = 0
        self.deliver = None

    async def start(self, deliver):
        self.deliver = deliver

    async def stop(self):
        self.deliver = None

    def publish(self, event):
        self.carried += 1
        if self.deliver is not None:
            self.deliver(event)


backend = CountingBackend()


class Chat(BroadcastEndpoint):
    broadcast = Broadcast(backend=backend)


app = Starlette(routes=[WebSocketRoute("/ws", Chat)])
