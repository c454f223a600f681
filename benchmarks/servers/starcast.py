"""starcast on uvicorn as it comes."""

import os
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint


class Room(BroadcastEndpoint):
    broadcast = Broadcast(os.environ["BROKER_URL"])

    def get_channel(self, websocket):
        return websocket.path_params["room"]


class Patient(Room):
    """A client that does not read loses messages here, and is not closed."""

    broadcast = Broadcast(overflow="drop_oldest")


app = Starlette(
    routes=[WebSocketRoute("/ws/{room}", Room), WebSocketRoute("/patient/{room}", Patient)],
    lifespan=Room.broadcast.lifespan,
)


def main(**settings):
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False, **settings)


if __name__ == "__main__":
    main()
