from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from starcast import Broadcast

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)


@app.post("/orders/{number}")
async def change(number: int, state: str):
    await hub.publish(f"order:{number}", {"number": number, "state": state})


@app.get("/orders/{number}/events", response_class=EventSourceResponse)
async def events(number: int) -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent(retry=2000)
    async with hub.subscribe(f"order:{number}") as subscriber:
        async for event in subscriber:
            yield ServerSentEvent(event="order", data=event.json())


PAGE = """
<!doctype html>
<p>Order 7: <b id="state">unknown</b></p>
<script>
  const source = new EventSource("/orders/7/events");
  source.addEventListener("order", (event) => {
    document.querySelector("#state").textContent = JSON.parse(event.data).state;
  });
</script>
"""


@app.get("/", response_class=HTMLResponse)
async def page() -> str:
    return PAGE
