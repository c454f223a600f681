"""What happens to presence now and then: messages in another order, loops that end, timers."""

from __future__ import annotations

import asyncio
import json

import pytest

from starcast import Broadcast, Member, Presence, Tuning
from support import Broker, Bus, OtherLoop, Peer, until

pytestmark = pytest.mark.anyio

QUICK = Presence(ttl=5, grace=0.3, interval=0.02)
CHANNEL = "default:\x01presence"


class Stranger:
    """A node that a test speaks for."""

    def __init__(self, backend: object) -> None:
        self._backend = backend

    async def say(self, **content: object) -> None:
        text = json.dumps({"node": "stranger", **content})
        await self._backend.publish([(CHANNEL, text.encode())])


def entry(client: str, id: str = "ada") -> list[object]:
    return ["room", client, id, None, None]


async def stranger(broker: Broker) -> Stranger:
    return Stranger(await Bus(broker).connect(lambda *message: None, lambda error: None))


async def clients(hub: Broadcast) -> int:
    return (await hub.member_counts(["room"]))["room"].clients


async def until_clients(hub: Broadcast, count: int) -> None:
    for _ in range(2000):
        if await clients(hub) == count:
            return
        await asyncio.sleep(0.005)
    assert await clients(hub) == count


async def test_changes_that_come_twice_or_too_late_change_nothing():
    broker = Broker()
    async with Broadcast(backend=Bus(broker), presence=QUICK) as hub:
        assert await clients(hub) == 0
        other = await stranger(broker)
        await other.say(whole=5, part=1, parts=2, **{"in": [entry("2")]})
        await other.say(whole=5, part=0, parts=2, **{"in": [entry("1")]})
        await until_clients(hub, 2)
        await other.say(change=6, **{"in": [entry("3")]})
        await other.say(change=6, **{"in": [entry("4")]})
        await other.say(whole=5, part=0, parts=1, **{"in": []})
        await other.say(change=7, out=[["room", "unknown", 0], ["room", "1", 1]])
        await until_clients(hub, 2)
        await other.say(bye=1)
        await until_clients(hub, 0)


async def test_whoever_has_missed_a_change_asks():
    broker = Broker()
    asked: list[object] = []
    async with Broadcast(backend=Bus(broker), presence=QUICK) as hub:
        assert await clients(hub) == 0
        backend = await Bus(broker).connect(
            lambda channel, data, *more: asked.append(json.loads(data)), lambda error: None
        )
        await backend.subscribe(CHANNEL)
        other = Stranger(backend)
        await other.say(beat=0)
        await other.say(change=1, **{"in": [entry("1")]})
        await until_clients(hub, 1)
        await other.say(change=3, **{"in": [entry("3")]})
        await until(lambda: any(it.get("ask") == "stranger" for it in asked))
        await other.say(beat=9)  # it has just asked
        await other.say(whole=9, part=0, parts=1, **{"in": [entry("1"), entry("2"), entry("3")]})
        await until_clients(hub, 3)
        # Nobody answers questions to somebody else.
        before = len(asked)
        await other.say(ask="somebody else")
        await other.say(ask="")
        await until(lambda: any("whole" in it for it in asked[before:] if it["node"] != "stranger"))
        await backend.close()


async def test_one_that_leaves_for_good_is_gone_before_one_that_was_lost():
    async with Broadcast(presence=Presence(grace=60, interval=0.02)) as hub:
        watcher, peers = Peer(), {}
        await hub.connect(watcher.websocket, "room", join_leave=True)
        for id in ("lost", "left"):
            peers[id] = Peer()
            await hub.connect(peers[id].websocket, "room", member=Member(id))
        await until(lambda: len(left_and_joined(watcher, "joined")) == 2)
        await hub.close(peers["lost"].websocket)
        await hub.disconnect(peers["left"].websocket, "room")
        await until(lambda: left_and_joined(watcher, "left") == ["left"])
        assert [member.id for member in await hub.members("room")] == ["lost"]
        # Once nobody is told any more, nothing is compared.
        await hub.disconnect(watcher.websocket)
        again = Peer()
        await hub.connect(again.websocket, "room", member=Member("again"))
        await until_clients(hub, 2)


async def test_others_are_told_what_they_see_of_a_member_now():
    async with Broadcast(presence=QUICK) as hub:
        watcher = Peer()
        await hub.connect(watcher.websocket, "room", join_leave=True)
        for name in ("Ada", "Ada", "Lovelace"):
            peer = Peer()
            await hub.connect(peer.websocket, "room", member=Member("7", {"name": name}))
            await until(lambda: left_and_joined(watcher, "joined"))
            if name == "Ada":
                await hub.disconnect(peer.websocket)
        await until(lambda: len(left_and_joined(watcher, "joined")) == 2)
        assert left_and_joined(watcher, "left") == []


def left_and_joined(peer: Peer, which: str) -> list[str]:
    texts = [json.loads(it["text"]) for it in peer.sent if it.get("text") is not None]
    return [it["id"] for text in texts for it in text[which]]


async def test_several_clients_open_it_once_and_those_of_ended_loops_are_forgotten():
    broker = Broker()
    async with Broadcast(backend=Bus(broker), presence=QUICK) as hub:
        other = OtherLoop()
        peer = Peer()
        connecting = hub.connect(peer.websocket, "room", member=Member("ada"))
        await asyncio.to_thread(other.run, connecting)
        other.close()
        counts = await asyncio.gather(*(hub.member_counts(["room"]) for _ in range(3)))
        assert len({it["room"] for it in counts}) == 1
        assert [name for name, what in broker.calls if what == CHANNEL].count("subscribe") == 1


async def test_presence_is_silent_while_the_broker_is_away():
    broker = Broker()
    tuning = Tuning(publish_timeout=0.1, first_backoff=0.01, max_backoff=0.05, max_queued=200)
    quick = Presence(ttl=0.3, grace=0.1, interval=0.01)
    async with Broadcast(backend=Bus(broker), presence=quick, tuning=tuning) as hub:
        peer = Peer()
        await hub.connect(peer.websocket, "room", member=Member("ada"))
        broker.kill()
        await until(lambda: hub.stats().backend.state != "connected")
        for number in range(3):
            await hub.connect(peer.websocket, "room", member=Member(f"{number}" * 100))
            await asyncio.sleep(0.05)
        broker.up = True
        await until(lambda: hub.stats().backend.state == "connected")
        assert await clients(hub) == 1


async def test_a_client_that_has_left_by_then_is_neither_member_nor_told():
    broker = Broker()
    async with Broadcast(backend=Bus(broker), presence=QUICK) as hub:
        peer = Peer()
        await hub.connect(peer.websocket, "other")
        broker.open.clear()
        joining = asyncio.create_task(
            hub.connect(peer.websocket, "room", member=Member("ada"), join_leave=True)
        )
        await until(lambda: broker.stalled)
        broker.open.set()
        await until(lambda: "room" in hub.channels)
        broker.open.clear()
        await hub.disconnect(peer.websocket)
        broker.open.set()
        await joining
        await until_clients(hub, 0)
        assert not len(hub)
