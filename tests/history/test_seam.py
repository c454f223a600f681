"""Members that join while others publish: random runs, in memory and on each broker.

`STARCAST_SEAMS` is how many runs there are, in memory; on brokers it is a fifth of that.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from history.keeping import TUNING, KeepingBroker, KeepingBus
from starcast import Broadcast, History
from support import DEADLINE, OtherLoop, Peer, starcast_tasks, until

pytestmark = pytest.mark.anyio

RUNS = int(os.environ.get("STARCAST_SEAMS", "40"))  # .ci/slow does 1,000
END = "the end"


def offset(id: str) -> int:
    return int(id.partition("-")[2])


class FramesPeer(Peer):
    """A client that takes ready-made frames."""

    frames = True


@dataclasses.dataclass
class Seam:
    """One run.

    Args:
        rng: Decides on everything.
        hubs: They share their channels.
        others: Publish on other event loops: called with what to run.
    """

    rng: random.Random
    hubs: list[Broadcast]
    others: list[Callable[[Any], Any]]

    def __post_init__(self) -> None:
        self.ids: list[str] = []  # of what was published so far, in the order in which it was known
        self.members = 0

    async def publish(self, name: str) -> None:
        hub = self.rng.choice(self.hubs)
        for number in range(self.rng.randint(5, 25)):
            self.ids.append(await hub.publish("room", f"{name} {number}"))
            if self.rng.random() < 0.3:
                await asyncio.sleep(self.rng.choice([0, 0, 0, 0.001]))

    def wish(self) -> dict[str, Any]:
        wish: dict[str, Any] = {}
        if self.ids and self.rng.random() < 0.8:
            wish["since"] = self.rng.choice(self.ids[-20:])
        if self.rng.random() < 0.5:
            wish["history"] = self.rng.randint(0, 30)
        return wish

    async def subscribe(self) -> None:
        hub, wish = self.rng.choice(self.hubs), self.wish()
        got: list[str] = []
        async with hub.subscribe("room", **wish) as subscriber:
            self.joined += 1
            async for event in subscriber:
                got.append(event.id)
                if event.message == END:
                    break
        self.check(wish, subscriber.resumed, got)

    async def connect(self) -> None:
        hub, wish = self.rng.choice(self.hubs), self.wish()
        peer = self.rng.choice([Peer, FramesPeer])()
        resumed = await hub.connect(peer.websocket, "room", ids=True, **wish)
        self.joined += 1
        await until(lambda: peer.got and END in peer.got[-1])
        notice, *events = map(json.loads, peer.got)
        ids = [event["id"] for event in events]
        assert offset(notice["id"]) == offset(ids[0]) - 1
        assert notice["past"] == sum(offset(id) <= offset(resumed.id) for id in ids)
        assert notice.get("recovered") == resumed.recovered
        self.check(wish, resumed, ids)
        await hub.disconnect(peer.websocket)

    def check(self, wish: dict[str, Any], resumed: Any, got: list[str]) -> None:
        """What a member got has no hole and nothing twice, and begins where it should."""
        self.members += 1
        epoch = resumed.id.partition("-")[0]
        assert {id.partition("-")[0] for id in got} == {epoch}
        offsets = list(map(offset, got))
        assert offsets == list(range(offsets[0], offsets[-1] + 1))
        here = offset(resumed.id)
        if resumed.recovered:
            assert offsets[0] == offset(wish["since"]) + 1
        else:
            assert here + 1 - wish.get("history", 0) <= offsets[0] <= here + 1

    async def run(self) -> None:
        async with self.hubs[0].subscribe("room") as witness:
            publishers = [self.publish(name) for name in "ab"]
            elsewhere = [asyncio.to_thread(run, self.publish("c")) for run in self.others]
            joining = []
            for _ in range(8):
                kind = self.rng.choice([self.subscribe, self.connect])
                joining.append(asyncio.create_task(self.later(kind)))
            async with asyncio.timeout(DEADLINE):
                await asyncio.gather(*publishers, *elsewhere)
                await until(lambda: self.joined == 8)  # who joins later does not get the end
                await self.hubs[0].publish("room", END)
                await asyncio.gather(*joining)
                everything = []
                while not everything or everything[-1].message != END:
                    everything.append(await witness.get())
        assert [event.position.offset for event in everything] == list(range(1, len(self.ids) + 2))
        assert {event.id for event in everything[:-1]} == set(self.ids)

    joined = 0

    async def later(self, kind: Callable[[], Any]) -> None:
        for _ in range(self.rng.randint(0, 30)):
            await asyncio.sleep(0)
        await kind()


def history(rng: random.Random) -> History:
    return History(size=rng.choice([3, 10, 1000]), ttl=60)


@pytest.mark.parametrize("kind", ["memory", "bus"])
async def test_random_runs(kind, other: OtherLoop):
    for seed in range(RUNS):
        rng = random.Random(seed)
        kept = history(rng)
        if kind == "memory":
            hubs, others = [Broadcast(history=kept)], [other.run]
        else:
            broker = KeepingBroker()
            buses = [KeepingBus(broker) for _ in range(2)]
            hubs = [
                Broadcast(backend=bus, name="both", history=kept, tuning=TUNING) for bus in buses
            ]
            others = []
        for hub in hubs:
            await hub.connect()
        try:
            await Seam(rng, hubs, others).run()
        finally:
            for hub in hubs:
                await hub.disconnect()
    await until(lambda: not starcast_tasks())


async def test_random_runs_on_a_broker(kept_url):
    for seed in range(RUNS // 5):
        rng = random.Random(seed)
        kept = history(rng)
        async with (
            Broadcast(kept_url, name=f"seam{seed}", history=kept) as one,
            Broadcast(kept_url, name=f"seam{seed}", history=kept) as two,
        ):
            await Seam(rng, [one, two], []).run()
    await until(lambda: not starcast_tasks())
