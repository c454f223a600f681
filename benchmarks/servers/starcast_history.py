"""starcast on uvicorn, with a history of each room."""

import os

from starlette.routing import WebSocketRoute

from starcast import Broadcast, History

from . import starcast

starcast.Room.broadcast = Broadcast(os.environ["BROKER_URL"], history=History(size=100))
starcast.app.router.lifespan_context = starcast.Room.broadcast.lifespan


class WithIds(starcast.Room):
    """For those who have to know what they have."""

    ids = True


starcast.app.router.routes.append(WebSocketRoute("/ids/{room}", WithIds))

if __name__ == "__main__":
    starcast.main()
