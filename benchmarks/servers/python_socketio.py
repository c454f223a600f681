"""python-socketio as an ASGI app, on uvicorn as it comes."""

import sys

import socketio
import uvicorn

sio = socketio.AsyncServer(async_mode="asgi")


@sio.event
async def message(sid, data):
    await sio.emit("message", data)


app = socketio.ASGIApp(sio)

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
