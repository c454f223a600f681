"""redis-py's PUBLISH and SUBSCRIBE from one process to another."""

import contextlib
from functools import partial

from redis.asyncio import Redis

from ..trips import CHANNEL, receive


@contextlib.asynccontextmanager
async def publishing(url):
    async with Redis.from_url(url) as client:
        yield partial(client.publish, CHANNEL)


@contextlib.asynccontextmanager
async def receiving(url):
    async with Redis.from_url(url) as client, client.pubsub() as pubsub:
        await pubsub.subscribe(CHANNEL)
        messages = pubsub.listen()
        await anext(messages)  # that it is subscribed
        yield (message["data"] async for message in messages)


if __name__ == "__main__":
    receive(receiving)
