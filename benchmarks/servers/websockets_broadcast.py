"""The server of `websockets` and its broadcast(), on uvloop."""

import asyncio
import sys

import uvloop
from websockets.asyncio.server import broadcast, serve

clients = set()


async def handler(websocket):
    clients.add(websocket)
    try:
        async for message in websocket:
            broadcast(clients, message)
    finally:
        clients.remove(websocket)


async def main():
    async with serve(handler, "127.0.0.1", int(sys.argv[1])):
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    uvloop.run(main())
