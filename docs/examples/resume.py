from typing import Annotated

from fastapi import FastAPI, Query, WebSocket

from starcast import Broadcast, BroadcastEndpoint, Event, History

history = {"orders": History(size=500, ttl=3600), "alerts": History(size=20)}
hub = Broadcast("memory://", history=history)
app = FastAPI(lifespan=hub.lifespan)


@app.websocket("/ws/desk")
class Desk(BroadcastEndpoint):
    broadcast = hub
    history = 20
    ids = True

    def get_channel(self, websocket: WebSocket) -> str:
        return "orders"

    async def on_connect(self, websocket: WebSocket) -> None:
        await super().on_connect(websocket)
        since = websocket.query_params.get("last_alert_id")
        await hub.connect(websocket, "alerts", since=since, history=5)


@app.websocket("/ws/orders")
async def orders(websocket: WebSocket, since: str | None = None) -> None:
    resumed = await hub.connect(websocket, "orders", since=since, history=20, ids=True)
    if resumed and resumed.recovered is False:
        await hub.send({"reload": "/orders"}, to=websocket)
    await hub.serve(websocket, "orders", publish=False)


@app.get("/orders/events")
async def older(before: str, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> list[dict]:
    past = await hub.history("orders", since=before, reverse=True, limit=limit)
    if not past.complete:  # the id is none of this history, so the page has to load anew
        return []
    return [{"id": event.id, "data": event.message} for event in past.events]


async def keep_accounts(accounts) -> None:
    async with hub.subscribe("orders", since=accounts.last_id, gaps=True) as subscriber:
        if subscriber.resumed.recovered is not True:
            await accounts.load_again()
            accounts.last_id = subscriber.resumed.id
        async for item in subscriber:
            if isinstance(item, Event):
                await accounts.add(item.json())
                accounts.last_id = item.id or accounts.last_id  # None if it is not kept
            else:  # a Gap: the history no longer has all that was missed
                await accounts.load_again()
