"""Tests of members that join, leave and come back at awkward moments."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import threading

import pytest

from history.conftest import HISTORY
from history.keeping import TUNING, KeepingBus
from history.test_tracks import CHANNEL, kept, take, take_all
from starcast import BackendUnavailable, Broadcast, History
from support import OtherLoop, Peer, joined, starcast_tasks, until

pytestmark = pytest.mark.anyio


async def test_a_member_of_another_loop_gets_its_past(hub, other: OtherLoop):
    """That is not the one of the connection to the broker."""
    ids = [await hub.publish("room", str(n)) for n in range(3)]

    async def resume() -> list[object]:
        async with hub.subscribe("room", since=ids[0]) as subscriber:
            return await take(subscriber, 2)

    for _ in range(20):
        assert await asyncio.to_thread(other.run, resume()) == ["1", "2"]


async def test_a_channel_released_and_acquired_while_its_position_is_asked_for(broker):
    async def subscribe(connection, channel, proceed):
        await proceed()
        if channel == CHANNEL:
            broker.open.clear()  # so that the read suspends

    backend = KeepingBus(broker, on_subscribe=subscribe)
    async with Broadcast(backend=backend, history=HISTORY, tuning=TUNING) as hub:
        first = asyncio.create_task(hub.subscribe("room").__aenter__())
        await until(lambda: broker.stalled)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        entering = asyncio.create_task(hub.subscribe("room").__aenter__())
        await asyncio.sleep(0.01)
        broker.open.set()
        second = await entering
        assert second.resumed is not None
        await hub.publish("room", "text")
        assert await take(second, 1) == ["text"]
        await second.__aexit__()
        await until(lambda: hub.stats().backend.channels == 0)


class SlowBus(KeepingBus):
    """Its reads take a moment."""

    async def connect(self, deliver, lost):
        connection = await super().connect(deliver, lost)
        read = connection.read_kept

        async def read_kept(*arguments):
            stored = await read(*arguments)
            await asyncio.sleep(0.02)
            return stored

        connection.read_kept = read_kept
        return connection


async def test_a_refused_channel_that_is_restored_by_a_new_session_is_filled_once(broker):
    async with (
        Broadcast(backend=SlowBus(broker), history=HISTORY, tuning=TUNING) as hub,
        hub.subscribe("room", gaps=True) as subscriber,
    ):
        await hub.publish("room", "0")
        broker.refused.add(CHANNEL)
        broker.restart()
        await until(lambda: hub.stats().backend.refused == 1)
        for number in range(1, 4):
            broker.keep(kept(str(number)))
        broker.kill()
        broker.refused.clear()
        broker.up = True
        await until(lambda: hub.stats().backend.refused == 0)
        await until(lambda: hub.stats().backend.state == "connected")
        await hub.publish("room", "4")
        assert await take_all(subscriber, "4") == [*"01234"]
    assert hub.stats().backend.gaps == 0


async def test_a_fill_that_is_larger_than_what_may_wait_for_a_loop(broker):
    """All of it is in the history, so none of it is missed."""
    tuning = dataclasses.replace(TUNING, max_pending=100_000)
    history = History(size=1000)
    hub = Broadcast(
        backend=KeepingBus(broker), history=history, tuning=tuning, max_buffer=10_000_000
    )
    async with hub, hub.subscribe("room", gaps=True) as subscriber:
        await hub.publish("room", "before")
        broker.kill()
        for number in range(500):
            broker.keep(kept(f"{number:01000}")._replace(history=history))
        broker.up = True
        await until(lambda: hub.stats().backend.state == "connected")
        await hub.publish("room", "after")
        got = await take_all(subscriber, "after")
    assert got == ["before", *(f"{number:01000}" for number in range(500)), "after"]


async def test_members_that_read_the_same_share_it_also_if_the_first_read_is_too_old(broker):
    hub = Broadcast(backend=SlowBus(broker), history=HISTORY, tuning=TUNING)
    async with hub, hub.subscribe("room") as first:
        ids = [await hub.publish("room", str(n)) for n in range(3)]
        await take(first, 3)

        async def resume() -> list[object]:
            async with hub.subscribe("room", since=ids[0]) as subscriber:
                return await take(subscriber, 3)

        before = len(broker.asked("read_kept"))
        early = asyncio.create_task(resume())
        await asyncio.sleep(0.01)
        await hub.publish("room", "3")
        await take(first, 1)
        results = await asyncio.gather(*(resume() for _ in range(50)), early)
        assert all(result == [*"123"] for result in results)
        assert len(broker.asked("read_kept")) <= before + 3


async def test_who_waits_in_vain_for_a_history_leaves_no_task(hub, broker):
    async with hub.subscribe("room"):
        await hub.publish("room", "0")
        broker.dropped, broker.unreadable = 1, 10**6
        await hub.publish("room", "1")
        await hub.publish("room", "2")
        tasks = len(starcast_tasks())
        ahead = str(broker.keep(kept("3"))).partition("-")[0] + "-999"
        for _ in range(3):
            with pytest.raises(BackendUnavailable):
                async with hub.subscribe("room", since=ahead):
                    pass
        await until(lambda: len(starcast_tasks()) <= tasks, 3)
        broker.unreadable = 0


async def test_channels_come_and_go_on_another_loop_while_positions_are_checked(
    broker, other: OtherLoop, monkeypatch
):
    tuning = dataclasses.replace(TUNING, position_interval=0.002)
    hub = Broadcast(backend=KeepingBus(broker), history=HISTORY, tuning=tuning)
    interval = sys.getswitchinterval()
    async with hub, contextlib.AsyncExitStack() as stack:
        for number in range(1000):
            await stack.enter_async_context(hub.subscribe(f"room{number}"))

        async def come_and_go() -> None:
            for number in range(300):
                subscriber = hub.subscribe(f"room x{number}")
                entering = asyncio.create_task(subscriber.__aenter__())
                await asyncio.sleep(0.0005)
                entering.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await entering
                    await subscriber.__aexit__()

        sys.setswitchinterval(1e-5)
        try:
            await asyncio.to_thread(other.run, come_and_go())
        finally:
            sys.setswitchinterval(interval)
        assert hub.stats().backend.error is None


async def test_channels_that_were_only_asked_for_go_first():
    """Clients may ask for any number of channels. What was published elsewhere stays."""
    hub = Broadcast(history=History(max_channels=10))
    id = await hub.publish("room", "0")
    await hub.publish("room", "1")
    for number in range(50):
        async with hub.subscribe(f"other {number}", history=1):
            pass
    async with hub.subscribe("room", since=id) as subscriber:
        assert subscriber.resumed.recovered


async def test_a_client_that_joins_and_leaves_without_reading_piles_up_nothing(road):
    """It gets no history that it does not read."""
    hub = Broadcast(history=History(size=100))
    for number in range(100):
        await hub.publish("room", f"{number:01000}")
    peer = await joined(hub, "other")
    peer.open.clear()
    await hub.publish("other", "first")
    joined_it = 0
    with contextlib.suppress(TimeoutError):
        for _ in range(200):
            async with asyncio.timeout(0.1):
                await hub.connect(peer.websocket, "room", history=100)
                joined_it += 1
                await hub.disconnect(peer.websocket, "room")
                await asyncio.sleep(0)
    assert joined_it <= 2


@pytest.mark.parametrize("wish", ["since", "history"])
async def test_a_long_past_in_memory_is_read_in_several_turns(wish):
    hub = Broadcast(history=History(size=100_000))
    ids = [await hub.publish("room", str(number)) for number in range(5500)]
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    wishes = {"since": {"since": ids[0]}, "history": {"history": 5499}}
    async with hub.subscribe("room", **wishes[wish]) as subscriber:
        assert turns >= 5
        counting.cancel()
        ids.append(await hub.publish("room", "live"))
        async with asyncio.timeout(5):
            assert [(await subscriber.get()).id for _ in range(5500)] == ids[1:]


async def test_a_client_that_has_missed_messages_comes_back_for_them(broker, other):
    """Its event loop was blocked. It does not go on with an id behind what it has missed."""
    tuning = dataclasses.replace(TUNING, max_pending=300)
    hub = Broadcast(backend=KeepingBus(broker), history=HISTORY, tuning=tuning)
    async with hub:
        peers = {channel: Peer() for channel in ("room", "plain", "quiet")}
        for channel, peer in peers.items():
            await asyncio.to_thread(other.run, hub.connect(peer.websocket, channel))
        go, blocked = threading.Event(), threading.Event()
        other.loop.call_soon_threadsafe(lambda: (blocked.set(), go.wait(20)))
        await asyncio.to_thread(blocked.wait, 20)
        ids = [await hub.publish("room", f"{number}".ljust(60)) for number in range(5)]
        await hub.publish("plain", "text")
        go.set()
        await until(lambda: peers["room"].closed == 1013)
        got = len(peers["room"].got)
        assert 0 < got < 5
        again = Peer()
        connecting = hub.connect(again.websocket, "room", since=ids[got - 1])
        resumed = await asyncio.to_thread(other.run, connecting)
        assert resumed.recovered
        await until(lambda: len(again.got) == 5 - got)
        for channel in ("plain", "quiet"):
            await hub.publish(channel, "end")
            await until(lambda: peers[channel].got == ["end"])  # noqa: B023  # awaited here
            assert peers[channel].closed is None
