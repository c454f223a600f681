import logging

from fastapi import FastAPI

from starcast import Broadcast

logging.basicConfig(
    level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s [%(process)d] %(message)s"
)

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)
app.mount("/live", hub)
