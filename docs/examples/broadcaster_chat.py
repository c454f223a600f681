import anyio
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocketDisconnect, WebSocketState

from starcast import Broadcast

broadcast = Broadcast("memory://")


async def chatroom_ws(websocket):
    await websocket.accept()
    try:
        async with anyio.create_task_group() as task_group:

            async def receive_until_the_client_leaves():
                await chatroom_ws_receiver(websocket)
                task_group.cancel_scope.cancel()

            task_group.start_soon(receive_until_the_client_leaves)
            await chatroom_ws_sender(websocket)
    except* WebSocketDisconnect:
        pass  # the client left while something was being sent to it


async def chatroom_ws_receiver(websocket):
    async for message in websocket.iter_text():
        await broadcast.publish(channel="chatroom", message=message)
        if websocket.application_state is WebSocketState.DISCONNECTED:
            break  # a message could not be sent; Starlette refuses to receive now


async def chatroom_ws_sender(websocket):
    async with broadcast.subscribe(channel="chatroom") as subscriber:
        async for event in subscriber:
            await websocket.send_text(event.message)


app = Starlette(
    routes=[WebSocketRoute("/", chatroom_ws, name="chatroom_ws")],
    lifespan=broadcast.lifespan,
)
