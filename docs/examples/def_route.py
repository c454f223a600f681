import os
from functools import partial

from anyio import from_thread
from fastapi import FastAPI, HTTPException

from starcast import BackendUnavailable, Broadcast

hub = Broadcast(os.environ.get("STARCAST_URL", "memory://"))

app = FastAPI(lifespan=hub.lifespan)
app.mount("/live", hub)


@app.post("/orders/{number}")
def order(number: int):
    try:
        from_thread.run(hub.publish, "orders", {"order": number})
    except BackendUnavailable:
        raise HTTPException(503, headers={"Retry-After": "1"}) from None
    return {"published": True}


@app.post("/notes")
def note(text: str):
    from_thread.run(partial(hub.publish, "notes", text, encoding="json"))
