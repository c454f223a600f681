from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from starcast import Broadcast

hub = Broadcast("memory://")
app = FastAPI(lifespan=hub.lifespan)
app.mount("/live", hub)  # a WebSocket for each channel: /live/{channel}


@app.post("/orders/{number}/{state}")
async def change(number: int, state: str):
    await hub.publish("orders", {"number": number, "state": state})


@app.get("/", response_class=HTMLResponse)
async def page():
    return """
    <!doctype html>
    <title>Orders</title>
    <button onclick="fetch('/orders/7/paid', {method: 'POST'})">Pay</button>
    <ul></ul>
    <script>
      const socket = new WebSocket("/live/orders");
      socket.onmessage = (event) => {
        const order = JSON.parse(event.data);
        const line = document.createElement("li");
        line.textContent = `Order ${order.number} is ${order.state}`;
        document.querySelector("ul").append(line);
      };
    </script>
    """
