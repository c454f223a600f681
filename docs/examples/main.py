from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from starcast import Broadcast

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)
app.mount("/live", hub)  # a WebSocket at /live/{channel} gets what is published to that channel


@app.post("/orders/{number}")
async def change(number: int, state: str):
    await hub.publish("orders", {"number": number, "state": state})


@app.get("/", response_class=HTMLResponse)
async def page():
    return """
      <!doctype html>
      <title>Orders</title>
      <button onclick="fetch('/orders/7?state=paid', { method: 'POST' })">Pay order 7</button>
      <ul></ul>
      <script>
        const socket = new WebSocket(location.origin.replace("http", "ws") + "/live/orders");
        socket.onmessage = (event) => {
          const order = JSON.parse(event.data);
          const line = document.createElement("li");
          line.textContent = `Order ${order.number} is ${order.state}`;
          document.querySelector("ul").append(line);
        };
      </script>
    """
