from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.sse import EventSourceResponse, ServerSentEvent

from starcast import Broadcast

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)


@app.get("/news", response_class=EventSourceResponse)
async def news() -> AsyncIterator[ServerSentEvent]:
    async with hub.subscribe("news") as subscriber:
        async for event in subscriber:
            yield ServerSentEvent(raw_data=str(event.message))
