import asyncio

from starcast import Broadcast


async def tell(url, channel, message):
    async with Broadcast(url) as hub:
        await hub.publish(channel, message)


def job(url):
    asyncio.run(tell(url, "room", {"type": "report", "ready": True}))
