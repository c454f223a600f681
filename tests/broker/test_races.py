"""Races and ends of the connection to a broker, each of which was a fault once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time

import pytest

from broker.conftest import TUNING, make_hub, quick
from starcast import BackendUnavailable, PublishQueueFull
from starcast.broker import opening
from starcast.event import OVERHEAD
from support import Bus, OtherLoop, Peer, joined, starcast_tasks, subscribed, until

pytestmark = pytest.mark.anyio


async def turns(n):
    for _ in range(n):
        await asyncio.sleep(0)


async def test_release_during_the_resubscribing_leaves_no_subscription(broker):
    """With a backend like that of NATS, where each subscribe is one more subscription."""
    times = 0

    async def count_subscribe(connection, channel, proceed):
        nonlocal times
        await proceed()
        times += channel == "room"

    async def count_unsubscribe(connection, channel, proceed):
        nonlocal times
        await proceed()
        times -= channel == "room"
        if times:
            connection.channels.add(channel)

    async def count_none(bus, proceed):
        nonlocal times
        times = 0
        return await proceed()

    bus = Bus(
        broker,
        on_connect=count_none,
        on_subscribe=count_subscribe,
        on_unsubscribe=count_unsubscribe,
    )
    hub = make_hub(bus)
    peer = await joined(hub, "room")
    broker.kill()
    await until(lambda: hub.stats().backend.state == "reconnecting")
    broker.open.clear()
    broker.up = True
    for _ in ("connect", "the probe's channel", "the probe"):
        await until(lambda: broker.stalled)
        broker.open.set()
        broker.open.clear()
        await turns(3)
    await until(lambda: broker.stalled and broker.calls[-1] == ("subscribe", "room"))
    await hub.disconnect(peer.websocket)  # leaves while "room" is being subscribed to
    broker.open.set()
    await until(lambda: hub.stats().backend.state == "connected")
    await turns(20)
    left = subscribed(broker)
    await joined(hub, "room")
    assert times == 1, "subscribed twice: NATS delivers each message twice"
    await hub.disconnect()
    assert not left


@pytest.mark.parametrize("steps", range(1, 8))
async def test_closing_is_cancelled(broker, steps):
    async def slow(connection, proceed):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await proceed()

    hub = make_hub(Bus(broker, on_close=slow))
    await joined(hub, "room")
    closing = asyncio.create_task(hub.disconnect())
    await turns(steps)
    closing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await closing
    await turns(20)
    buses = len(broker.connections)
    peer = await joined(hub, "room")
    await hub.publish("room", "hello")
    await turns(10)
    got = peer.got
    await hub.disconnect()
    assert got == ["hello"]
    assert buses == 0, "the connection was not closed"


async def test_a_blocked_loop_costs_the_others_nothing(broker, other):
    hub = make_hub(Bus(broker), tuning=quick(max_pending=100))
    peer = await joined(hub, "room")
    elsewhere = Peer()
    await asyncio.to_thread(other.run, hub.connect(elsewhere.websocket, "room"))
    go, blocked = threading.Event(), threading.Event()

    def block():
        blocked.set()
        go.wait(20)

    other.loop.call_soon_threadsafe(block)
    await asyncio.to_thread(blocked.wait, 20)
    for number in range(3):
        await hub.publish("room", str(number).ljust(60))
    await turns(20)
    go.set()
    got = len(peer.got)
    await asyncio.to_thread(other.run, hub.disconnect(elsewhere.websocket))
    await hub.disconnect()
    assert got == 3


async def test_publish_nowait_after_the_loop_of_the_connection_ended(broker):
    hub = make_hub(Bus(broker))
    first = OtherLoop()
    await asyncio.to_thread(first.run, hub.connect())
    peer = await joined(hub, "room")
    await asyncio.to_thread(first.close)
    hub.publish_nowait("room", "x")  # this loop may have taken over already
    await until(lambda: peer.got == ["x"] or hub.stats().backend.lost == 1)
    await hub.disconnect()


async def test_the_tasks_are_cancelled_but_the_loop_goes_on(broker):
    hub = make_hub(Bus(broker))
    peer = await joined(hub, "room")
    for task in starcast_tasks():
        task.cancel()
    await turns(10)
    with pytest.raises(BackendUnavailable):  # it may be the end of the loop
        await hub.publish("room", "x")
    try:
        await until(lambda: hub.stats().backend.gaps)
        await hub.publish("room", "x")
        await until(lambda: peer.got == ["x"])
    finally:
        await hub.disconnect()


async def test_empty_messages_are_bounded_too(broker):
    hub = make_hub(Bus(broker), tuning=quick(max_queued=10_000))
    await hub.connect()
    broker.open.clear()
    hub.publish_nowait("room", "x")
    await until(lambda: broker.stalled)
    try:
        with pytest.raises(PublishQueueFull):  # noqa: PT012  # the last of a loop
            for _ in range(100_000):
                hub.publish_nowait("room", "")
    finally:
        broker.open.set()
        await hub.disconnect()


async def test_the_lock_and_the_garbage_collector(broker, monkeypatch):
    """The collector may end a subscriber while the hub's lock is held; it leaves its channel."""
    collecting = []

    class Eager:  # the collector, at the worst moment
        def __init__(self):
            self._lock = real()

        def __enter__(self):
            self._lock.acquire()
            if collecting:
                gc.collect()

        def __exit__(self, *exc):
            self._lock.release()

    real = threading.RLock
    monkeypatch.setattr(threading, "RLock", Eager)
    hub = make_hub(Bus(broker))
    monkeypatch.undo()
    await joined(hub, "room")

    async def listen():
        async with hub.subscribe("room") as subscriber:
            await anext(subscriber)

    listening = listen()
    listening.send(None)
    assert hub.stats().subscribers == 1
    gc.disable()
    cycle = [listening]
    cycle.append(cycle)
    del listening, cycle
    collecting.append(True)
    thread = threading.Thread(target=hub.stats, daemon=True)
    thread.start()
    await asyncio.to_thread(thread.join, 20)
    gc.enable()
    assert not thread.is_alive(), "deadlock"
    collecting.clear()
    assert hub.stats().subscribers == 0
    await hub.disconnect()


async def test_closing_while_a_client_waits_for_the_confirmation(broker):
    hub = make_hub(Bus(broker), tuning=quick(publish_timeout=60))
    await hub.connect()
    broker.open.clear()
    connecting = asyncio.create_task(hub.connect(Peer().websocket, "room"))
    await until(lambda: broker.stalled)
    began = time.monotonic()
    await hub.disconnect()
    with contextlib.suppress(Exception):
        await connecting
    assert time.monotonic() - began < 30


async def test_closing_while_a_channel_is_left(broker):
    hub = make_hub(Bus(broker))
    peer = await joined(hub, "room")
    broker.open.clear()
    await hub.disconnect(peer.websocket)
    await until(lambda: broker.stalled)
    await hub.disconnect()
    assert hub.stats().backend.channels == 0


async def test_subscribing_while_another_loop_closes_the_hub(broker, other):
    hub = make_hub(Bus(broker))
    await hub.connect()
    broker.open.clear()
    subscriber = hub.subscribe("room")
    entering = asyncio.run_coroutine_threadsafe(subscriber.__aenter__(), other.loop)
    await until(lambda: broker.stalled)
    go, blocked = threading.Event(), threading.Event()
    other.loop.call_soon_threadsafe(lambda: (blocked.set(), go.wait(20)))
    await asyncio.to_thread(blocked.wait, 20)
    broker.open.set()
    await turns(10)
    await hub.disconnect()
    go.set()
    with contextlib.suppress(Exception):
        await asyncio.wrap_future(entering)
    assert hub.stats().subscribers == 0
    assert hub.stats().backend.channels == 0


async def test_healthy_while_the_loop_of_the_connection_ends(broker):
    hub = make_hub(Bus(broker))
    first = OtherLoop()
    await asyncio.to_thread(first.run, hub.connect())
    first.run(_clear(broker))
    asking = asyncio.create_task(hub.healthy())
    await asyncio.sleep(0.05)
    await asyncio.to_thread(first.close)
    try:
        assert await asyncio.wait_for(asking, 5) is False  # not CancelledError
    finally:
        await hub.disconnect()


async def _clear(broker):
    broker.open.clear()


@pytest.mark.parametrize("space", [100, 3, 0])
async def test_a_gap_stands_before_messages_that_come_after_it(broker, caplog, space):
    """Messages that are lost because too many are held back belong to the same gap."""
    reached, go = asyncio.Event(), asyncio.Event()

    async def slow(connection, channel, proceed):
        await proceed()
        if channel == "b" and connection.bus.connects == 2:
            reached.set()
            await go.wait()

    bus = Bus(broker, on_subscribe=slow)
    max_held_back = space * (len(b"after 0") + OVERHEAD) or 1
    hub = make_hub(bus, tuning=quick(max_subscribing=1, max_held_back=max_held_back))
    async with hub.subscribe("a", gaps=True) as a, hub.subscribe("b"):
        await hub.publish("a", "before")
        broker.restart()
        await reached.wait()
        after = [f"after {number}" for number in range(5)]
        for message in after:
            bus.connection.deliver("a", message.encode())  # "a" is subscribed to, "b" not yet
        go.set()
        await until(lambda: hub.stats().backend.gaps)
        await hub.publish("a", "last")
        kept = min(space, 5) or 1  # a single one may be larger than the space
        got = [await anext(a) for _ in range(kept + 3)]
    lost = hub.stats().backend.lost
    await hub.disconnect()
    kinds = [getattr(item, "message", "GAP") for item in got]
    assert kinds == ["before", "GAP", *after[-kept:], "last"]
    assert lost == 5 - kept
    assert (f"{lost} messages were lost" in caplog.text) == bool(lost)


async def test_what_arrives_in_an_attempt_that_fails_is_counted_as_lost(broker, caplog):
    async def fragile(connection, channel, proceed):
        await proceed()
        if channel == "room" and connection.bus.connects in (2, 3):
            connection.deliver("room", b"early")
            broker.restart()

    hub = make_hub(Bus(broker, on_subscribe=fragile))
    async with hub, hub.subscribe("room", gaps=True) as subscriber:
        broker.restart()
        await until(lambda: hub.stats().backend.gaps)
        await hub.publish("room", "last")
        seen = [await anext(subscriber) for _ in range(2)]
        assert [getattr(item, "message", "GAP") for item in seen] == ["GAP", "last"]
        assert hub.stats().backend.lost == 2
    assert "2 messages were lost" in caplog.text


async def test_a_start_waits_for_the_stop_before_it(broker):
    stopping, go = asyncio.Event(), asyncio.Event()

    async def slow(connection, proceed):
        stopping.set()
        await go.wait()
        await proceed()

    hub = make_hub(Bus(broker, on_close=slow))
    await joined(hub, "room")
    closing = asyncio.create_task(hub.disconnect())
    await stopping.wait()
    closing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await closing
    connecting = asyncio.create_task(hub.connect())
    await turns(10)
    assert not connecting.done()
    go.set()
    await connecting
    peer = await joined(hub, "room")
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])
    await hub.disconnect()


async def test_one_of_its_tasks_is_cancelled(broker):
    hub = make_hub(Bus(broker))
    peer = await joined(hub, "room")
    next(task for task in starcast_tasks() if "keep_asking" in repr(task)).cancel()
    await until(lambda: hub.stats().backend.gaps)
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])
    await hub.disconnect()
    await until(lambda: not starcast_tasks())


async def test_who_asks_whether_it_is_healthy_may_be_cancelled(broker):
    hub = make_hub(Bus(broker))
    await hub.connect()
    broker.open.clear()
    asking = asyncio.create_task(hub.healthy())
    await until(lambda: broker.stalled)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    broker.open.set()
    await hub.disconnect()


async def test_many_channels_over_a_long_way(broker):
    """Connecting takes longer than `connect_timeout` in all, though every answer is quick."""

    async def far(connection, channel, proceed):
        await asyncio.sleep(0.01)
        await proceed()

    tuning = quick(connect_timeout=0.2, max_subscribing=1)
    hub = make_hub(Bus(broker, on_subscribe=far), tuning=tuning)
    for n in range(40):
        await joined(hub, str(n))
    broker.restart()
    try:
        await until(lambda: hub.stats().backend.gaps)
    finally:
        await hub.disconnect()


async def test_each_opening_has_a_name_of_its_own(broker):
    """Hubs that were made before a fork are different hubs."""
    hub = make_hub(Bus(broker))
    names = set()
    for _ in range(2):
        await hub.connect()
        names.add(broker.probe_channel)
        await hub.disconnect()
    assert len(names) == 2


@pytest.mark.parametrize("stable", [False, True])
async def test_connections_that_do_not_last_are_tried_less_and_less_often(
    broker, monkeypatch, stable
):
    waits = []
    monkeypatch.setattr(opening.random, "uniform", lambda least, most: waits.append(most) or 0)
    tuning = quick(stable_after=1e-9) if stable else TUNING
    hub = make_hub(Bus(broker), tuning=tuning)
    await joined(hub, "room")
    for gaps in range(1, 5):
        broker.restart()
        await until(lambda: hub.stats().backend.gaps == gaps)  # noqa: B023  # awaited here
    assert waits == sorted(waits)
    assert waits[0] == TUNING.first_backoff
    assert waits[-1] == (TUNING.first_backoff if stable else TUNING.max_backoff)
    await hub.disconnect()
