from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import HTMLResponse

from starcast import Broadcast, History

hub = Broadcast("memory://", history=History(size=100, ttl=300))
app = FastAPI(lifespan=hub.lifespan)


@app.post("/orders/{number}")
async def change(number: int, state: str):
    await hub.publish(f"order:{number}", {"number": number, "state": state})


@app.get("/orders/{number}/events")
async def events(request: Request, number: int):
    return hub.stream(request, f"order:{number}")


PAGE = """
<!doctype html>
<p>Order 7: <b id="state">unknown</b></p>
<ol></ol>
<script>
  function listen(id) {
    const after = id ? `?last_event_id=${encodeURIComponent(id)}` : "";
    const source = new EventSource(`/orders/7/events${after}`);
    source.onmessage = (event) => {
      id = event.lastEventId;
      document.querySelector("#state").textContent = JSON.parse(event.data).state;
      document.querySelector("ol").append(document.createElement("li"));
    };
    source.addEventListener("reset", () => location.reload()); // load the current state
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED) {
        setTimeout(listen, 3000 + 3000 * Math.random(), id); // the browser has given up
      }
    };
  }
  listen();
</script>
"""


@app.get("/", response_class=HTMLResponse)
async def page() -> str:
    return PAGE


def current_user(authorization: Annotated[str | None, Header()] = None) -> str:
    if authorization != "Bearer t-ann":
        raise HTTPException(401, "log in")
    return "ann"


@app.get("/my/events")
async def my_events(request: Request, user: Annotated[str, Depends(current_user)]):
    return hub.stream(request, [f"user:{user}", "news"])
