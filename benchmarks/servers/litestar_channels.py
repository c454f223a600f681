"""Litestar's channels plugin, in memory, on uvicorn as it comes."""

import sys

import uvicorn
from litestar import Litestar, WebSocket, websocket
from litestar.channels import ChannelsPlugin
from litestar.channels.backends.memory import MemoryChannelsBackend
from litestar.exceptions import WebSocketDisconnect


@websocket("/ws")
async def handler(socket: WebSocket, channels: ChannelsPlugin) -> None:
    await socket.accept()
    async with (
        channels.start_subscription("chat") as subscriber,
        subscriber.run_in_background(socket.send_text),
    ):
        try:
            while True:
                channels.publish(await socket.receive_text(), "chat")
        except WebSocketDisconnect:
            pass


app = Litestar(
    [handler], plugins=[ChannelsPlugin(backend=MemoryChannelsBackend(), channels=["chat"])]
)

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
