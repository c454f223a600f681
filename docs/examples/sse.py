from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import FastAPI, Header
from fastapi.sse import EventSourceResponse, ServerSentEvent

from starcast import Broadcast, History

hub = Broadcast("memory://", history=History())
app = FastAPI(lifespan=hub.lifespan)


@app.post("/orders/{number}")
async def change(number: int, state: str):
    await hub.publish(f"order:{number}", {"number": number, "state": state})


@app.get("/orders/{number}/events", response_class=EventSourceResponse)
async def events(
    number: int, last_event_id: Annotated[str | None, Header()] = None
) -> AsyncIterator[ServerSentEvent]:
    async with hub.subscribe(f"order:{number}", since=last_event_id) as subscriber:
        start = subscriber.resumed
        if start is not None and not start.recovered:
            what = "start" if start.recovered is None else "reset"  # messages are missing
            yield ServerSentEvent(event=what, data={"number": number}, id=start.id, retry=2000)
        async for event in subscriber:
            yield ServerSentEvent(event="order", data=event.json(), id=event.id)
