"""starcast from one process to another, without any client."""

import contextlib
from functools import partial

from starcast import Broadcast

from ..trips import CHANNEL, receive


@contextlib.asynccontextmanager
async def publishing(url):
    async with Broadcast(url) as broadcast:
        yield partial(broadcast.publish, CHANNEL)


@contextlib.asynccontextmanager
async def receiving(url):
    async with Broadcast(url) as broadcast, broadcast.subscribe(CHANNEL) as subscriber:
        yield (event.message async for event in subscriber)


if __name__ == "__main__":
    receive(receiving)
