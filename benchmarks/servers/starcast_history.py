"""starcast on uvicorn, with a history of each room."""

import os

from starcast import Broadcast, History

from . import starcast

starcast.Room.broadcast = Broadcast(os.environ["BROKER_URL"], history=History(size=100))
starcast.app.router.lifespan_context = starcast.Room.broadcast.lifespan

if __name__ == "__main__":
    starcast.main()
