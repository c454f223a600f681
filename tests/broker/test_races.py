"""Races and ends of the connection to a broker, each of which was a fault once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time

import pytest

from starcast import BackendUnavailable, Broadcast, PublishQueueFull, Tuning
from starcast.broker import link, opening, sender, session, subscriptions
from starcast.event import OVERHEAD
from support import Bus, OtherLoop, Peer, joined, starcast_tasks, subscribed, until

pytestmark = pytest.mark.anyio


async def turns(n):
    for _ in range(n):
        await asyncio.sleep(0)


class Twice(Bus):
    """As NATS: each subscribe is one more subscription."""

    async def start(self, deliver, lost):
        await super().start(deliver, lost)
        self.times = {}

    async def subscribe(self, channel):
        await super().subscribe(channel)
        self.times[channel] = self.times.get(channel, 0) + 1

    async def unsubscribe(self, channel):
        await super().unsubscribe(channel)
        self.times[channel] -= 1
        if self.times[channel]:
            self.channels.add(channel)


async def test_release_during_the_resubscribing_leaves_no_subscription(broker):
    bus = Twice(broker)
    hub = Broadcast(backend=bus)
    peer = await joined(hub, "room")
    broker.kill()
    await until(lambda: hub.stats().backend.state == "reconnecting")
    broker.open.clear()
    broker.up = True
    for _ in ("start", "the probe's channel", "the probe"):
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
    times = bus.times["room"]
    await hub.disconnect()
    assert times == 1, "subscribed twice: NATS delivers each message twice"
    assert not left


@pytest.mark.parametrize("steps", range(1, 8))
async def test_closing_is_cancelled(broker, steps):
    class Slow(Bus):
        async def stop(self):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await super().stop()

    hub = Broadcast(backend=Slow(broker))
    await joined(hub, "room")
    closing = asyncio.create_task(hub.disconnect())
    await turns(steps)
    closing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await closing
    await turns(20)
    buses = len(broker.buses)
    peer = await joined(hub, "room")
    await hub.publish("room", "hello")
    await turns(10)
    got = peer.got
    await hub.disconnect()
    assert got == ["hello"]
    assert buses == 0, "the connection was not closed"


async def test_a_blocked_loop_costs_the_others_nothing(broker, other):
    hub = Broadcast(backend=Bus(broker), tuning=Tuning(max_pending=100))
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
    hub = Broadcast(backend=Bus(broker))
    first = OtherLoop()
    await asyncio.to_thread(first.run, hub.connect())
    peer = await joined(hub, "room")
    await asyncio.to_thread(first.close)
    before = hub.stats().backend
    hub.publish_nowait("room", "x")
    await asyncio.sleep(0.3)
    after = hub.stats().backend
    try:
        assert before.state != "connected"
        assert peer.got == ["x"] or after.lost == 1, after
    finally:
        await hub.disconnect()


async def test_the_tasks_are_cancelled_but_the_loop_goes_on(broker):
    hub = Broadcast(backend=Bus(broker))
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


async def test_empty_messages_are_bounded_too(broker, monkeypatch):
    monkeypatch.setattr(sender, "MAX_WAITING", 10_000)
    hub = Broadcast(backend=Bus(broker))
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


async def test_the_lock_and_the_garbage_collector(broker):
    """The collector may end a handler while the link's lock is held; it leaves its channel."""
    hub = Broadcast(backend=Bus(broker))
    peer = await joined(hub, "room")

    class Eager:  # the collector, at the worst moment
        def __enter__(self):
            real.acquire()
            gc.collect()

        def __exit__(self, *exc):
            real.release()

    real, hub._hub.link._lock = hub._hub.link._lock, Eager()

    def handler():
        try:
            yield
        finally:
            hub._hub.leave(peer.websocket)  # as in `serve`

    suspended = handler()
    next(suspended)
    cycle = [suspended]
    cycle.append(cycle)
    gc.disable()
    del suspended, cycle
    done = threading.Event()
    thread = threading.Thread(target=lambda: (hub.stats(), done.set()), daemon=True)
    thread.start()
    ok = await asyncio.to_thread(done.wait, 2)
    gc.enable()
    if not ok:
        real.release()
        await asyncio.to_thread(thread.join, 2)
    hub._hub.link._lock = real if ok else threading.Lock()
    await hub.disconnect()
    assert ok, "deadlock"


async def test_closing_while_a_client_waits_for_the_confirmation(broker, monkeypatch):
    monkeypatch.setattr(link, "TIMEOUT", 60)
    hub = Broadcast(backend=Bus(broker))
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
    hub = Broadcast(backend=Bus(broker))
    peer = await joined(hub, "room")
    broker.open.clear()
    await hub.disconnect(peer.websocket)
    await until(lambda: broker.stalled)
    await hub.disconnect()
    assert not hub._hub.link.subscriptions.holds
    assert hub.stats().backend.channels == 0


async def test_subscribing_while_another_loop_closes_the_hub(broker, other):
    hub = Broadcast(backend=Bus(broker))
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
    assert not hub._hub.link.subscriptions.holds


async def test_healthy_while_the_loop_of_the_connection_ends(broker):
    hub = Broadcast(backend=Bus(broker))
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
async def test_a_gap_stands_before_what_came_after_it(broker, monkeypatch, caplog, space):
    """And what is lost because there was no space for it until then is missing in its place."""
    monkeypatch.setattr(subscriptions, "AT_ONCE", 1)
    monkeypatch.setattr(session, "MAX_EARLY", space * (len(b"after 0") + OVERHEAD))
    reached, go = asyncio.Event(), asyncio.Event()

    class Slow(Bus):
        async def subscribe(self, channel):
            await super().subscribe(channel)
            if channel == "b" and self.starts == 2:
                reached.set()
                await go.wait()

    bus = Slow(broker)
    hub = Broadcast(backend=bus)
    async with hub.subscribe("a", gaps=True) as a, hub.subscribe("b"):
        await hub.publish("a", "before")
        broker.kill()
        broker.up = True
        await reached.wait()
        after = [f"after {number}" for number in range(5)]
        for message in after:
            bus.deliver("a", message.encode())  # "a" is subscribed to, "b" not yet
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
    class Fragile(Bus):
        async def subscribe(self, channel):
            await super().subscribe(channel)
            if channel == "room" and self.starts in (2, 3):
                self.deliver("room", b"early")
                broker.kill()
                broker.up = True

    hub = Broadcast(backend=Fragile(broker))
    async with hub, hub.subscribe("room", gaps=True) as subscriber:
        broker.kill()
        broker.up = True
        await until(lambda: hub.stats().backend.gaps)
        await hub.publish("room", "last")
        seen = [await anext(subscriber) for _ in range(2)]
        assert [getattr(item, "message", "GAP") for item in seen] == ["GAP", "last"]
        assert hub.stats().backend.lost == 2
    assert "2 messages were lost" in caplog.text


async def test_a_start_waits_for_the_stop_before_it(broker):
    stopping, go = asyncio.Event(), asyncio.Event()

    class Slow(Bus):
        async def stop(self):
            stopping.set()
            await go.wait()
            await super().stop()

    hub = Broadcast(backend=Slow(broker))
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
    hub = Broadcast(backend=Bus(broker))
    peer = await joined(hub, "room")
    (watching,) = [task for task in starcast_tasks() if "_watch" in repr(task)]
    watching.cancel()
    await until(lambda: hub.stats().backend.gaps)
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])
    await hub.disconnect()
    await until(lambda: not starcast_tasks())


async def test_who_asks_whether_it_is_healthy_may_be_cancelled(broker):
    hub = Broadcast(backend=Bus(broker))
    await hub.connect()
    broker.open.clear()
    asking = asyncio.create_task(hub.healthy())
    await until(lambda: broker.stalled)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    broker.open.set()
    await hub.disconnect()


async def test_many_channels_over_a_long_way(broker, monkeypatch):
    """Connecting takes longer than CONNECT_TIMEOUT as a whole, though every answer is quick."""
    monkeypatch.setattr(session, "CONNECT_TIMEOUT", 0.2)

    class Far(Bus):
        async def subscribe(self, channel):
            await asyncio.sleep(0.01)
            await super().subscribe(channel)

    monkeypatch.setattr(subscriptions, "AT_ONCE", 1)
    hub = Broadcast(backend=Far(broker))
    for n in range(40):
        await joined(hub, str(n))
    broker.kill()
    broker.up = True
    try:
        await until(lambda: hub.stats().backend.gaps)
    finally:
        await hub.disconnect()


async def test_each_start_has_a_name_of_its_own(broker):
    """Hubs that were made before a fork are different hubs."""
    hub = Broadcast(backend=Bus(broker))
    names = set()
    for _ in range(2):
        await hub.connect()
        names.add(hub._hub.link.hub)
        await hub.disconnect()
    assert len(names) == 2


async def test_a_connection_that_does_not_hold_is_waited_for_longer_and_longer(broker, monkeypatch):
    waits = []
    monkeypatch.setattr(opening.random, "uniform", lambda least, most: waits.append(most) or 0)
    hub = Broadcast(backend=Bus(broker))
    await joined(hub, "room")
    for gaps in range(1, 5):
        broker.kill()
        broker.up = True
        await until(lambda: hub.stats().backend.gaps == gaps)  # noqa: B023  # awaited here
    assert waits == sorted(waits)
    assert waits[-1] == opening.LONGEST_WAIT
    monkeypatch.setattr(link, "HELD", -1)
    for gaps in range(5, 7):
        broker.kill()
        broker.up = True
        await until(lambda: hub.stats().backend.gaps == gaps)  # noqa: B023  # awaited here
    assert waits[-1] == opening.FIRST_WAIT
    await hub.disconnect()
