"""asyncpg with LISTEN and NOTIFY from one process to another."""

import asyncio
import contextlib
from functools import partial

import asyncpg

from ..trips import CHANNEL, receive


@contextlib.asynccontextmanager
async def publishing(url):
    connection = await asyncpg.connect(url)
    try:
        yield partial(connection.execute, "SELECT pg_notify($1, $2)", CHANNEL)
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def receiving(url):
    connection = await asyncpg.connect(url)
    queue = asyncio.Queue()

    async def messages():
        while True:
            yield await queue.get()

    try:
        await connection.add_listener(CHANNEL, lambda *call: queue.put_nowait(call[-1]))
        yield messages()
    finally:
        await connection.close()


if __name__ == "__main__":
    receive(receiving)
