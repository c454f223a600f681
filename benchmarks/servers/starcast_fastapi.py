"""starcast in a FastAPI app that `fastapi run` starts."""

import sys

from fastapi import FastAPI, WebSocket
from fastapi_cli.cli import main

from starcast import Broadcast

hub = Broadcast()
app = FastAPI(lifespan=hub.lifespan)


@app.websocket("/ws/{room}")
async def chat(websocket: WebSocket, room: str):
    await hub.serve(websocket, room)


if __name__ == "__main__":
    sys.argv[:] = ["fastapi", "run", __file__, "--host", "127.0.0.1", "--port", sys.argv[1]]
    main()
