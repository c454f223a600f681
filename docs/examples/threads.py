import asyncio
import threading

from anyio import from_thread
from fastapi import FastAPI

from starcast import Broadcast

hub = Broadcast("memory://")

app = FastAPI()
app.mount("/live", hub)


@app.post("/orders/{number}")
def order(number: int):  # FastAPI runs a plain function in a thread
    hub.publish_nowait("orders", {"order": number})
    return {"published": True}


@app.post("/payments/{number}")
def payment(number: int):
    from_thread.run(hub.publish, "payments", {"payment": number})
    return {"published": True}


def watch(read, stop):
    """Publish a sensor's readings until `stop` is set."""
    while not stop.is_set():
        hub.publish_nowait("sensor", read())
        stop.wait(0.2)


def start_watching(read):
    stop = threading.Event()
    threading.Thread(target=watch, args=(read, stop), daemon=True).start()
    return stop


def run_a_job():
    """A job with its own event loop, in its own thread."""

    async def job():
        for percent in (0, 50, 100):
            await hub.publish("job", {"percent": percent})

    asyncio.run(job())
