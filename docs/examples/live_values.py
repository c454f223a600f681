from fastapi import FastAPI, HTTPException, WebSocket

from starcast import Broadcast, History

SYMBOLS = {"AMS", "LIS", "OSL"}

newest = History(size=1, ttl=24 * 3600)
hub = Broadcast("memory://", overflow="latest", history={"price:*": newest})


def is_known(websocket: WebSocket, channel: str) -> bool:
    return channel.removeprefix("price:") in SYMBOLS


app = FastAPI(lifespan=hub.lifespan)
app.mount("/live", hub.app(history=1, authorize=is_known))  # /live/price:AMS


@app.put("/prices/{symbol}")
async def change(symbol: str, price: float):
    if symbol not in SYMBOLS:
        raise HTTPException(404)
    await hub.publish(f"price:{symbol}", {"symbol": symbol, "price": price})


@app.get("/prices/{symbol}")
async def current(symbol: str):
    past = await hub.history(f"price:{symbol}") if symbol in SYMBOLS else None
    if not past or not past.events:
        raise HTTPException(404)
    return past.events[0].json()
