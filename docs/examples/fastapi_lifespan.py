import contextlib

from fastapi import FastAPI, Request

from starcast import Broadcast

hub = Broadcast("memory://")


@contextlib.asynccontextmanager
async def database(app: FastAPI):
    app.state.headlines = ["It rains."]  # connect to it here
    yield
    del app.state.headlines  # and disconnect here


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI):
    async with database(app), hub.lifespan(app):
        await hub.publish("news", "the app has started")
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/live", hub.app())


@app.post("/news")
async def add_headline(request: Request, headline: str):
    request.app.state.headlines.append(headline)
    await hub.publish("news", headline)
    return request.app.state.headlines
