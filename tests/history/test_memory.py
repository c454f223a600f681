"""Tests of the bounds of what is kept in memory."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc

import pytest

from starcast import Broadcast, History
from support import OtherLoop

pytestmark = pytest.mark.anyio


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.moved = 0.0
        self._monotonic = time.monotonic

    def monotonic(self) -> float:
        return self._monotonic() + self.moved

    def time(self) -> float:
        return time.time()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("starcast.broker.memory_log.time", clock)
    return clock


async def texts(hub: Broadcast, channel: str = "room") -> list[str | bytes]:
    return [event.message for event in (await hub.history(channel)).events]


async def test_messages_expire(clock):
    hub = Broadcast(history=History(ttl=10))
    old = await hub.publish("room", "old")
    clock.moved = 6
    await hub.publish("room", "new")
    assert await texts(hub) == ["old", "new"]
    clock.moved = 11
    assert await texts(hub) == ["new"]
    async with hub.subscribe("room", since=old) as subscriber:  # it has that one already
        assert subscriber.resumed.recovered
        assert (await subscriber.get()).message == "new"
    clock.moved = 17
    assert await texts(hub) == []
    async with hub.subscribe("room", since=old) as subscriber:
        assert not subscriber.resumed.recovered
    last = await hub.publish("room", "last")
    assert last.partition("-")[0] == old.partition("-")[0]
    assert last.endswith("-3")


async def test_a_client_of_a_quiet_room_has_missed_nothing(clock):
    hub = Broadcast(history=History(ttl=10))
    id = await hub.publish("room", "text")
    await hub.publish("room2", "text")
    clock.moved = 3600
    await hub.publish("room3", "text")
    await hub.publish("room2", "text")
    async with hub.subscribe("room", since=id) as subscriber:
        assert subscriber.resumed.recovered


async def test_an_idempotency_key_expires(clock):
    hub = Broadcast(history=History(ttl=10))
    first = await hub.publish("room", "text", idempotency_key="key")
    clock.moved = 9
    assert await hub.publish("room", "text", idempotency_key="key") == first
    clock.moved = 11
    assert await hub.publish("room", "text", idempotency_key="key") != first


async def test_an_idempotency_key_is_known_for_five_minutes_at_most(clock):
    hub = Broadcast(history=History(ttl=3600))
    first = await hub.publish("room", "text", idempotency_key="key")
    clock.moved = 299
    assert await hub.publish("room", "text", idempotency_key="key") == first
    clock.moved = 301
    assert await hub.publish("room", "text", idempotency_key="key") != first


async def test_idempotency_keys_are_bounded(monkeypatch):
    monkeypatch.setattr("starcast.broker.memory_log.MAX_KEYS", 3)
    hub = Broadcast(history=History())
    ids = [await hub.publish("room", "text", idempotency_key=str(n)) for n in range(5)]
    assert await hub.publish("room", "text", idempotency_key="4") == ids[4]
    assert await hub.publish("room", "text", idempotency_key="0") not in ids


async def test_the_channels_that_were_not_used_for_the_longest_time_go_first():
    hub = Broadcast(history=History(max_channels=3))
    ids = {name: await hub.publish(name, "text") for name in "abc"}
    await hub.publish("a", "again")
    await hub.publish("d", "text")  # and b goes
    for name, recovered in (("a", True), ("c", True), ("b", False)):
        async with hub.subscribe(name, since=ids[name]) as subscriber:
            assert subscriber.resumed.recovered is recovered


async def test_who_joins_channels_without_messages_drives_out_no_history():
    hub = Broadcast(history=History(max_channels=3))
    id = await hub.publish("room", "text")
    for number in range(10):
        async with hub.subscribe(f"made up {number}", history=5) as subscriber:
            assert subscriber.resumed.id.endswith("-0")
        assert (await hub.history(f"made up {number}")).events == []
    async with hub.subscribe("room", since=id) as subscriber:
        assert subscriber.resumed.recovered


async def test_a_channel_that_was_driven_out_begins_another_epoch():
    hub = Broadcast(history=History(max_channels=1))
    empty = (await hub.history("a")).id
    ids = [await hub.publish("a", "text")]
    await hub.publish("b", "text")
    for _ in range(3):
        ids.append(await hub.publish("a", "text"))
        await hub.publish("b", "text")
    assert len({id.partition("-")[0] for id in ids}) == 4
    for id in (empty, *ids):
        async with hub.subscribe("a", since=id) as subscriber:
            assert not subscriber.resumed.recovered


async def test_quiet_channels_go_before_others(clock):
    hub = Broadcast(history=History(max_channels=3, ttl=10))
    quiet = await hub.publish("quiet", "text")
    clock.moved = 11
    kept = await hub.publish("kept", "text")
    await hub.publish("b", "text")
    await hub.publish("c", "text")
    async with hub.subscribe("kept", since=kept) as subscriber:
        assert subscriber.resumed.recovered
    async with hub.subscribe("quiet", since=quiet) as subscriber:
        assert not subscriber.resumed.recovered


async def test_each_setting_has_a_bound_of_its_own():
    hub = Broadcast(history={"a*": History(max_channels=1), "b*": History(5, max_channels=1)})
    ids = {name: await hub.publish(name, "text") for name in ("a1", "b1")}
    for name, id in ids.items():
        async with hub.subscribe(name, since=id) as subscriber:
            assert subscriber.resumed.recovered


async def test_a_history_outlives_the_hub_being_closed():
    hub = Broadcast(history=History())
    async with hub:
        id = await hub.publish("room", "one")
        await hub.publish("room", "two")
    async with hub, hub.subscribe("room", since=id) as subscriber:
        assert subscriber.resumed.recovered
        assert (await subscriber.get()).message == "two"


async def test_clients_of_several_loops(other: OtherLoop):
    hub = Broadcast(history=History())
    ids = [await hub.publish("room", str(number)) for number in range(3)]

    async def there() -> list[str | bytes]:
        async with hub.subscribe("room", since=ids[0]) as subscriber:
            await hub.publish("room", "from there")
            return [(await subscriber.get()).message for _ in range(3)]

    async with hub.subscribe("room", since=ids[1]) as subscriber:
        assert await asyncio.to_thread(other.run, there()) == ["1", "2", "from there"]
        assert [(await subscriber.get()).message for _ in range(2)] == ["2", "from there"]


async def test_a_history_takes_little_memory():
    hub = Broadcast(history=History(size=100))
    await hub.publish("warm", "up")
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(200):
            await hub.publish("room", f"{number:0200}")
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 40 * 1024  # 100 messages of 200 bytes


async def test_a_past_that_is_shared_is_bounded(monkeypatch):
    monkeypatch.setattr("starcast.resume.MAX_SHARED", 1000)
    hub = Broadcast(history=History())
    ids = [await hub.publish("room", f"{number:0200}") for number in range(20)]
    for number in range(20):
        async with hub.subscribe("room", since=ids[number]) as subscriber:
            for id in ids[number + 1 :]:
                assert (await subscriber.get()).id == id


async def test_a_past_that_is_shared_is_let_go_of(monkeypatch):
    monkeypatch.setattr("starcast.resume.SHARED_FOR", 0.01)
    hub = Broadcast(history=History())
    await hub.publish("room", "text")
    for _ in range(3):
        assert await texts(hub) == ["text"]
        await asyncio.sleep(0.03)


async def test_event_loops_that_have_ended_are_forgotten():
    hub = Broadcast(history=History())
    await hub.publish("room", "text")

    async def resume() -> str | bytes:
        async with hub.subscribe("room", history=1) as subscriber:
            return (await subscriber.get()).message

    for _ in range(2):
        assert await asyncio.to_thread(asyncio.run, resume()) == "text"
    assert await resume() == "text"
