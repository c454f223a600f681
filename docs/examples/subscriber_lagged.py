import asyncio

from starcast import Broadcast, SubscriberLagged

hub = Broadcast("memory://")


async def record(channel, log):
    """Write a channel's messages to a log, and a line wherever some are missing."""
    while True:
        try:
            async with hub.subscribe(channel, max_buffer=64 * 1024) as subscriber:
                async for event in subscriber:
                    log.append(event.message)
                    await asyncio.sleep(0)  # for example, a slow write to a disk
                return  # the hub was closed
        except SubscriberLagged:
            log.append("(messages are missing here)")
