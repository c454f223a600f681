"""The chat of encode/broadcaster's README, on uvicorn as it comes."""

import contextlib
import os
import sys

import anyio
import uvicorn
from broadcaster import Broadcast
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

URL = os.environ["BROKER_URL"]

broadcast = Broadcast(URL)


async def chatroom_ws(websocket):
    await websocket.accept()

    async with anyio.create_task_group() as task_group:
        # run until first is complete
        async def run_chatroom_ws_receiver() -> None:
            await chatroom_ws_receiver(websocket=websocket)
            task_group.cancel_scope.cancel()

        task_group.start_soon(run_chatroom_ws_receiver)
        await chatroom_ws_sender(websocket)


async def chatroom_ws_receiver(websocket):
    async for message in websocket.iter_text():
        await broadcast.publish(channel="chatroom", message=message)


async def chatroom_ws_sender(websocket):
    async with broadcast.subscribe(channel="chatroom") as subscriber:
        async for event in subscriber:
            await websocket.send_text(event.message)


# The README says on_startup= and on_shutdown=, which Starlette no longer has.
@contextlib.asynccontextmanager
async def lifespan(app):
    async with broadcast, contextlib.AsyncExitStack() as stack:
        if URL != "memory://":
            # With redis 8 its listener ends while the first subscription waits for Redis and starts
            # again with the next. And of clients that come while the first one of their channel
            # waits, only the last gets anything. So there are subscriptions before any client.
            for channel in ("nothing", "chatroom"):
                await stack.enter_async_context(broadcast.subscribe(channel=channel))
        yield


app = Starlette(routes=[WebSocketRoute("/ws", chatroom_ws)], lifespan=lifespan)

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
