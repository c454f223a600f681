"""aiohttp's WebSocketResponse, on uvloop."""

import sys

import uvloop
from aiohttp import WSMsgType, web

clients = set()


async def handler(request):
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    clients.add(websocket)
    try:
        async for message in websocket:
            if message.type == WSMsgType.TEXT:
                for client in list(clients):
                    await client.send_str(message.data)
    finally:
        clients.discard(websocket)
    return websocket


app = web.Application()
app.add_routes([web.get("/ws", handler)])

if __name__ == "__main__":
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        access_log=None,
        print=None,
        loop=uvloop.new_event_loop(),
    )
