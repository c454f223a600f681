from starcast import Broadcast, Gap


def on_gap(gap):
    print(f"messages of the last {gap.seconds:.1f} s may be missing")


hub = Broadcast("redis://localhost", on_gap=on_gap)


async def keep_up(prices):
    async with hub.subscribe("prices", gaps=True) as subscriber:
        async for item in subscriber:
            if isinstance(item, Gap):
                await prices.load_again()
            else:
                prices.update(item.json())
