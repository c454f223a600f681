"""nats-py from one process to another."""

import contextlib

import nats

from ..trips import CHANNEL, receive


@contextlib.asynccontextmanager
async def publishing(url):
    async with await nats.connect(url) as client:

        async def publish(message):
            await client.publish(CHANNEL, message.encode())

        yield publish


@contextlib.asynccontextmanager
async def receiving(url):
    async with await nats.connect(url) as client:
        subscription = await client.subscribe(CHANNEL)
        await client.flush()
        yield (message.data async for message in subscription.messages)


if __name__ == "__main__":
    receive(receiving)
