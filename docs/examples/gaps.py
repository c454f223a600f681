from starcast import Broadcast, Gap

hub = Broadcast("redis://localhost", on_gap=lambda gap: print(f"away for {gap.seconds:.1f} s"))


async def keep_up(prices):
    async with hub.subscribe("prices", gaps=True) as subscriber:
        async for item in subscriber:
            if isinstance(item, Gap):
                await prices.load_again()
            else:
                prices.update(item.json())
