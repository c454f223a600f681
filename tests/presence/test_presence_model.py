"""Whatever happens on several workers, all of them agree with a model once nothing happens."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from presence.rooms import TUNING, are, until_counts
from starcast import BackendUnavailable, Broadcast, Member, MemberCounts, MemberWatch, Presence
from support import DEADLINE, Broker, Bus, Peer, examples, starcast_tasks, until

pytestmark = pytest.mark.anyio

PRESENCE = Presence(ttl=1.0, grace=0.05, interval=0.01)
CHANNELS = ("room", "hall")
IDS = [str(number) for number in range(12)]


class Worker:
    """A hub whose messages about members may be lost, and code that watches a channel of it."""

    def __init__(self, world: World) -> None:
        self.world = world
        backend = Bus(world.broker, on_publish=self.publish)
        self.hub = Broadcast(backend=backend, presence=PRESENCE, tuning=TUNING)
        self.clients: list[tuple[Peer, dict[str, str]]] = []  # and who they are on which channel
        self.told: set[str] = set()  # who is in the room, as the watch says
        self.watching: asyncio.Task[None] | None = None

    async def publish(self, connection, messages, proceed) -> None:
        is_ours = any("presence" in channel for channel, _ in messages)
        if not (is_ours and self.world.chance.random() < self.world.loss):
            await proceed()

    @property
    def connected(self) -> bool:
        return self.hub.stats().backend.state == "connected"

    async def begin(self) -> None:
        await self.hub.connect()
        watch = self.hub.watch_members("room")
        await watch.__aenter__()
        self.told = {it.id for it in watch.members}
        self.watching = asyncio.create_task(self.watch(watch))

    async def watch(self, watch: MemberWatch) -> None:
        async for joined, left in watch:
            for it in left:
                self.told.remove(it.id)  # it was told that they had joined
            for it in joined:
                assert it.id not in self.told
                self.told.add(it.id)

    async def end(self) -> None:
        await self.hub.disconnect()
        await self.watching  # raises what it has found
        self.clients = []

    # What a client does

    async def come(self) -> None:
        peer, channel, id = Peer(), self.world.channel(), self.world.id()
        await self.enter((peer, {}), channel, id)

    async def enter(self, client: tuple[Peer, dict[str, str]], channel: str, id: str) -> None:
        peer, where = client
        with contextlib.suppress(BackendUnavailable):  # there is an outage
            await self.hub.connect(peer.websocket, channel, member=Member(id))
            where[channel] = id
            if client not in self.clients:
                self.clients.append(client)

    async def go_on(self) -> None:
        client = self.world.chance.choice(self.clients)
        peer, where = client
        match self.world.chance.randrange(5):
            case 0:  # its handler lets it leave all
                self.clients.remove(client)
                await self.hub.disconnect(peer.websocket)
            case 1:
                self.clients.remove(client)
                await self.hub.close(peer.websocket)
            case 2 if len(where) > 1:
                channel = self.world.chance.choice(list(where))
                del where[channel]
                await self.hub.disconnect(peer.websocket, channel)
            case 3:  # it enters another channel, or as somebody else
                await self.enter(client, self.world.channel(), self.world.id())
            case _:  # it leaves, and is back at once
                channel = self.world.chance.choice(list(where))
                if len(where) > 1:
                    await self.hub.disconnect(peer.websocket, channel)
                await self.enter(client, channel, where.pop(channel))


class World:
    """The workers, and what is to be found of them."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.broker = Broker()
        self.loss = 0.0
        self.workers = [Worker(self) for _ in range(3)]

    def channel(self) -> str:
        return self.chance.choice(CHANNELS)

    def id(self) -> str:
        return self.chance.choice(IDS)

    async def step(self) -> None:
        worker = self.chance.choice(self.workers)
        what = self.chance.random()
        if what < 0.45 or not worker.clients:
            await worker.come()
        elif what < 0.93:
            await worker.go_on()
        elif what < 0.95:
            self.broker.restart()
            await until(lambda: all(worker.connected for worker in self.workers))
        elif what < 0.97:
            self.loss = self.chance.choice([0.0, 0.5])
        elif what < 0.98:
            await worker.end()
            await worker.begin()
        else:
            await asyncio.sleep(self.chance.choice([0.001, 0.02, 0.1]))

    def expected(self, channel: str) -> list[str]:
        found = [
            where[channel]
            for worker in self.workers
            for _, where in worker.clients
            if channel in where
        ]
        return sorted(found)

    async def check(self) -> None:
        self.loss = 0.0
        for worker in self.workers:
            for channel in CHANNELS:
                expected = self.expected(channel)
                counts = MemberCounts(len(expected), len({*expected}))
                await until_counts(worker.hub, counts, channel)
                await are(worker.hub, *{*expected}, channel=channel)
            present = {*self.expected("room")}
            await until(lambda w=worker, p=present: w.told == p or w.watching.done(), DEADLINE)
            assert not worker.watching.done()


@pytest.mark.parametrize("seed", range(examples(5)))
async def test_all_workers_agree_with_the_model_at_rest(seed):
    world = World(seed)
    for worker in world.workers:
        await worker.begin()
    for _ in range(4):
        for _ in range(60):
            await world.step()
        await world.check()
    for worker in world.workers:
        await worker.end()
    assert not starcast_tasks()
