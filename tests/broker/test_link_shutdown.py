"""Ends that the link survives: of event loops, of the hub, of tasks. Each was a fault once."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from broker.conftest import TUNING, make_hub, quick, tuned
from starcast import BackendUnavailable, Broadcast
from starcast.sync.waiter import Lock, running_loop
from support import Broker, Bus, OtherLoop, Peer, joined, starcast_tasks, until

pytestmark = pytest.mark.anyio


async def slow(connection, proceed):
    """Close as slowly as a test wants."""
    await connection.broker.called("close")
    await proceed()


async def on_another_loop(hub: Broadcast) -> OtherLoop:
    """Open the hub on another event loop."""
    other = OtherLoop()
    await asyncio.to_thread(other.run, hub.connect())
    return other


# Of the loop


async def test_a_loop_that_ends_while_it_connects(broker):
    """What it still does to its connection does not affect the next one."""

    async def clinging(bus, proceed):
        if bus.connects == 2:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.1)  # as NATS, which takes some time to close
        return await proceed()

    bus = Bus(broker, on_connect=clinging)
    hub = make_hub(bus, probe_interval=0.1)
    first = await on_another_loop(hub)
    peer = await joined(hub, "room")
    first.loop.call_soon_threadsafe(broker.kill)
    await until(lambda: bus.connects == 2)
    broker.up = True
    await asyncio.to_thread(first.close)
    await until(lambda: hub.stats().backend.gaps)
    probes = broker.probes
    await until(lambda: broker.probes > probes)  # it is being probed
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])
    await hub.disconnect()


@pytest.mark.parametrize("which", ["supervise", "keep_asking", "all"])
async def test_nothing_is_called_from_another_loop(broker, which):
    wrong, homes = [], {}

    async def remember(bus, proceed):
        connection = await proceed()
        homes[connection] = running_loop()
        return connection

    async def check(connection, *what):
        *what, proceed = what
        if homes[connection] is not running_loop():
            wrong.append(what)
        await proceed()

    bus = Bus(broker, on_connect=remember, on_subscribe=check, on_publish=check, on_close=check)
    hub = make_hub(bus, probe_interval=0.05)
    first = await on_another_loop(hub)
    await joined(hub, "room")
    tasks = [
        task
        for task in asyncio.all_tasks(first.loop)
        if which in repr(task.get_coro()) or which == "all"
    ]
    for task in tasks:
        first.loop.call_soon_threadsafe(task.cancel)
    await until(lambda: hub.stats().backend.gaps)
    probes = broker.probes
    await until(lambda: broker.probes > probes)
    await hub.disconnect()
    await asyncio.to_thread(first.close)
    assert not wrong


async def test_a_loop_that_is_stopped_and_nobody_there(hub, broker):
    """It is not up to a loop that does not run to look after the connection."""
    first = await on_another_loop(hub)
    second = OtherLoop()
    left = await asyncio.to_thread(second.run, joined(hub, "room"))
    await asyncio.to_thread(second.run, hub.disconnect(left.websocket))
    await joined(hub, "room")
    await asyncio.to_thread(second.stop)
    await asyncio.to_thread(first.close)
    await until(lambda: hub.stats().backend.gaps)
    second.loop.close()


async def test_a_loop_that_ends_while_a_client_is_accepted(hub, broker):
    first = await on_another_loop(hub)
    peer = Peer()
    peer.open.clear()
    connecting = asyncio.create_task(hub.connect(peer.websocket, "room"))
    await until(lambda: peer.stalled)  # the channel is held, and nobody is on it
    await asyncio.to_thread(first.close)
    peer.open.set()
    await connecting
    await until(lambda: hub.stats().backend.gaps)


async def test_opening_waits_for_the_new_connection(hub, broker):
    first = await on_another_loop(hub)
    await asyncio.to_thread(first.close)
    await hub.connect()
    hub.publish_nowait("room", "x")
    assert hub.stats().backend.state == "connected"
    assert hub.stats().backend.lost == 0


@tuned(publish_timeout=0.05)
async def test_opening_waits_for_a_limited_time(hub, broker):
    first = await on_another_loop(hub)
    await joined(hub, "room")
    broker.up = False
    await asyncio.to_thread(first.close)
    await hub.connect()
    assert hub.stats().backend.state == "reconnecting"


async def test_opening_says_that_there_is_no_broker_if_nobody_is_there(hub, broker):
    first = await on_another_loop(hub)
    await asyncio.to_thread(first.close)
    broker.up = False
    for _ in range(2):
        with pytest.raises(BackendUnavailable):
            await hub.connect()
    broker.up = True
    await hub.publish("room", "x")
    assert hub.stats().backend.gaps == 0


@tuned(publish_timeout=10)
async def test_excluded_clients_stay_excluded_when_another_loop_takes_over(hub, broker):
    first = await on_another_loop(hub)
    me, you = await joined(hub, "room"), await joined(hub, "room")
    first.loop.call_soon_threadsafe(broker.kill)
    await until(lambda: hub.stats().backend.state == "reconnecting")
    publishing = asyncio.create_task(hub.publish("room", "x", exclude=me.websocket))
    await until(lambda: hub.stats().backend.queued)
    await asyncio.to_thread(first.close)
    broker.up = True
    await publishing
    await until(lambda: you.got == ["x"])
    assert me.got == []


async def test_leaving_after_the_loop_has_ended(hub, broker):
    first = await on_another_loop(hub)
    peer = await joined(hub, "room")
    broker.up = False
    await asyncio.to_thread(first.close)
    await hub.disconnect(peer.websocket)
    assert hub.stats().backend.channels == 0


async def test_a_subscriber_whose_loop_was_closed():
    hub = Broadcast()
    loop = asyncio.new_event_loop()

    async def listen():
        async with hub.subscribe("room") as subscriber:
            await anext(subscriber)

    def run():
        listening = loop.create_task(listen())
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        listening._log_destroy_pending = False
        listening.get_coro().close()  # as the garbage collector does

    await asyncio.to_thread(run)
    assert hub.stats().subscribers == 0


async def test_subscribing_while_there_is_no_loop(hub, broker):
    first = await on_another_loop(hub)
    broker.up = False
    await asyncio.to_thread(first.close)
    with pytest.raises(BackendUnavailable):
        await hub.connect(Peer().websocket, "room")
    assert hub.stats().backend.channels == 0


async def test_opening_on_another_loop_leaves_the_connection_where_it_is(hub, broker, bus):
    first = await on_another_loop(hub)
    await hub.connect()
    assert bus.connects == 1
    await hub.disconnect()
    await asyncio.to_thread(first.close)


# Of the hub


async def test_closing_from_another_loop_is_cancelled(broker, other):
    """It goes on."""
    hub = make_hub(Bus(broker, on_close=slow))
    await asyncio.to_thread(other.run, hub.connect())
    other.loop.call_soon_threadsafe(broker.open.clear)
    closing = asyncio.create_task(hub.disconnect())
    await until(lambda: ("close", None) in broker.calls)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    again = asyncio.create_task(hub.disconnect())  # waits for the same end
    other.loop.call_soon_threadsafe(broker.open.set)
    await again
    assert not broker.connections


async def test_a_closing_that_comes_late(broker, other):
    """The loop of the connection was blocked, and the hub is open again elsewhere."""
    hub = make_hub(Bus(broker), tuning=quick(stop_timeout=0.1))
    await asyncio.to_thread(other.run, hub.connect())
    go, blocked = threading.Event(), threading.Event()
    other.loop.call_soon_threadsafe(lambda: (blocked.set(), go.wait(20)))
    await asyncio.to_thread(blocked.wait, 20)
    await hub.disconnect()
    peer = await joined(hub, "room")
    await hub.publish("room", "1")
    go.set()
    await until(lambda: not asyncio.all_tasks(other.loop))
    await hub.publish("room", "2")
    await until(lambda: peer.got == ["1", "2"])
    assert hub.stats().backend.state == "connected"
    await hub.disconnect()


async def test_a_closing_that_ends_when_the_hub_is_open_again(broker, other):
    """Its loop has ended as well, so the rest was done here."""
    hub = make_hub(Bus(broker))
    await asyncio.to_thread(other.run, hub.connect())
    asyncio.get_running_loop().call_soon(other.close)  # this loop is blocked until then
    await hub.disconnect()
    peer = await joined(hub, "room")
    await hub.publish("room", "1")
    await until(lambda: peer.got == ["1"])
    await hub.disconnect()


@pytest.mark.parametrize("where", ["the same loop", "another loop"])
async def test_a_closing_that_is_cut_off_by_the_end_of_its_loop(broker, where):
    async def stuck(connection, proceed):
        if not stops:
            stops.append(None)
            await asyncio.Event().wait()
        await proceed()

    stops = []
    hub = make_hub(Bus(broker, on_close=stuck))
    first = await on_another_loop(hub)
    if where == "another loop":
        closing = asyncio.create_task(hub.disconnect())
    else:
        closing = asyncio.wrap_future(
            asyncio.run_coroutine_threadsafe(hub.disconnect(), first.loop)
        )
    await until(lambda: stops)
    await asyncio.to_thread(first.close)
    with contextlib.suppress(asyncio.CancelledError):
        await closing
    assert closing.cancelled() is (where == "the same loop")
    await hub.connect()
    assert hub.stats().backend.state == "connected"
    assert len(broker.connections) == 1
    await hub.disconnect()
    assert not broker.connections


@pytest.mark.parametrize("steps", range(6))
async def test_the_loop_ends_while_the_hub_is_closed(steps):
    """At whatever moment: the connection is closed."""

    async def main():
        broker = Broker()
        hub = make_hub(Bus(broker))
        await joined(hub, "room")
        tasks.append(asyncio.create_task(hub.disconnect()))
        for _ in range(steps):
            await asyncio.sleep(0)
        return broker

    tasks = []
    broker = await asyncio.to_thread(asyncio.run, main())
    assert not broker.connections


@pytest.mark.parametrize("how", ["wait", "publish"])
async def test_it_is_not_opened_on_a_loop_that_ends(how):
    """A handler takes a moment to end, or says goodbye."""

    async def main():
        async def handler():
            peer = await joined(hub, "room")
            going.set()
            try:
                await asyncio.Event().wait()
            finally:
                # In the very iteration in which it has ended.
                while hub.stats().backend.state != "closed":  # noqa: ASYNC110  # not later
                    await asyncio.sleep(0)
                if how == "wait":
                    await asyncio.sleep(3 * TUNING.restart_delay)
                else:
                    with pytest.raises(BackendUnavailable, match="is ending"):
                        await hub.publish("room", "bye")
                await hub.disconnect(peer.websocket)
                ended.append(True)

        going, broker = asyncio.Event(), Broker()
        hub = make_hub(Bus(broker), tuning=quick(restart_delay=60))
        await hub.connect()
        tasks.append(asyncio.create_task(handler()))
        await going.wait()
        return broker

    tasks, ended = [], []
    broker = await asyncio.to_thread(asyncio.run, main())
    assert ended
    assert not broker.connections


async def test_closing_for_a_loop_that_closes_without_a_word(broker):
    hub = make_hub(Bus(broker))
    first = await on_another_loop(hub)
    await asyncio.to_thread(first.stop)
    tasks = asyncio.all_tasks(first.loop)
    closing = asyncio.create_task(hub.disconnect())
    await asyncio.sleep(0)
    first.loop.close()
    await closing
    assert not broker.connections
    for _ in range(3):
        await hub.disconnect()
    for task in tasks:
        task._log_destroy_pending = False
        task.get_coro().close()


async def test_closing_for_a_loop_that_closes_before_it_gets_there(broker):
    hub = make_hub(Bus(broker), tuning=quick(stop_timeout=0.1))
    first = await on_another_loop(hub)
    go, blocked = threading.Event(), threading.Event()
    first.loop.call_soon_threadsafe(lambda: (blocked.set(), go.wait(20), first.loop.stop()))
    await asyncio.to_thread(blocked.wait, 20)
    await hub.disconnect()
    assert broker.connections
    go.set()
    await asyncio.to_thread(first.stop)
    tasks = asyncio.all_tasks(first.loop)
    first.loop.close()
    await hub.disconnect()
    assert not broker.connections
    for task in tasks:
        task._log_destroy_pending = False
        task.get_coro().close()


async def test_queued_messages_are_sent_before_it_closes(broker):
    async with make_hub(Bus(broker)) as listening:
        peer = await joined(listening, "room")
        hub = make_hub(Bus(broker))
        await hub.connect()
        broker.open.clear()
        hub.publish_nowait("room", "under way")
        await until(lambda: broker.stalled)
        hub.publish_nowait("room", "waiting")
        closing = asyncio.create_task(hub.disconnect())
        await until(lambda: hub.stats().backend.state == "closed")
        broker.open.set()
        await closing
        await until(lambda: peer.got == ["under way", "waiting"])
        assert hub.stats().backend.lost == 0


async def test_closing_waits_for_queued_messages_for_a_limited_time(broker):
    hub = make_hub(Bus(broker))
    await hub.connect()
    broker.open.clear()
    hub.publish_nowait("room", "under way")
    await until(lambda: broker.stalled)
    hub.publish_nowait("room", "waiting")
    await hub.disconnect()
    assert hub.stats().backend.lost == 2


async def test_clients_are_closed_before_the_broker_confirms(broker):
    hub = make_hub(Bus(broker, on_close=slow))
    peer = await joined(hub, "room")
    broker.open.clear()
    closing = asyncio.create_task(hub.disconnect())
    await until(lambda: peer.closed == 1001)
    assert not closing.done()
    broker.open.set()
    await closing


async def test_a_backend_that_ignores_a_cancellation(broker):
    go = asyncio.Event()

    async def stubborn(connection, channel, proceed):
        while channel == "room" and not go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go.wait()
        await proceed()

    hub = make_hub(Bus(broker, on_subscribe=stubborn), tuning=quick(stop_timeout=0.1))
    await hub.connect()
    with pytest.raises(BackendUnavailable):
        await joined(hub, "room")
    await hub.disconnect()
    go.set()


# Of a connection, and of what is on its way


async def test_a_connection_that_breaks_in_the_moment_in_which_it_is_made(broker):
    async def fragile(connection, messages, proceed):
        await proceed()
        if connection.bus.connects == 1:
            broker.kill()

    hub = make_hub(Bus(broker, on_publish=fragile))
    await hub.connect()
    await until(lambda: hub.stats().backend.state == "reconnecting")
    publishing = asyncio.create_task(hub.publish("room", "patient"))
    await until(lambda: hub.stats().backend.queued)
    broker.up = True
    await publishing
    await hub.disconnect()


@tuned(max_queued=1000, publish_timeout=3)
async def test_publish_waits_for_space_and_confirmation_together(hub, broker):
    """Three seconds in all, not two and a half for space and three more."""
    await hub.connect()
    broker.open.clear()
    hub.publish_nowait("room", "first")
    await until(lambda: broker.stalled)
    hub.publish_nowait("room", "x" * 2000)
    clock = asyncio.get_running_loop().time
    began = clock()
    waiting = asyncio.create_task(hub.publish("room", "y"))
    await asyncio.sleep(2.5)
    broker.open.set()
    broker.open.clear()  # there is space now, and nothing is confirmed
    with pytest.raises(BackendUnavailable, match="did not answer in time"):
        await waiting
    assert clock() - began < 5


async def test_a_connection_that_breaks_while_it_subscribes_is_one_line(broker, caplog):
    asked, go = [], asyncio.Event()

    async def gated(connection, channel, proceed):
        if connection.bus.connects == 2 and channel.isdigit():
            asked.append(channel)
            await go.wait()
        await proceed()

    hub = make_hub(Bus(broker, on_subscribe=gated))
    peer = await joined(hub, *map(str, range(50)))
    broker.restart()
    await until(lambda: len(asked) == 50)
    broker.restart()
    go.set()
    await until(lambda: hub.stats().backend.gaps)
    assert len(caplog.records) < 5
    await hub.publish("49", "x")
    await until(lambda: peer.got == ["x"])
    await hub.disconnect()


async def test_health_checks_at_the_wrong_moment(broker):
    """Somebody asks in the iteration in which the answer to a probe arrives."""
    checks = []

    async def ask(connection, messages, proceed):
        await proceed()
        if len(checks) < 2 and connection.bus.connects and broker.probes > 1:
            checks.append(asyncio.create_task(hub.healthy()))

    bus = Bus(broker, on_publish=ask)
    hub = make_hub(bus, probe_interval=0.05, tuning=quick(probe_timeout=0.2))
    await joined(hub, "room")
    await until(lambda: broker.probes > 6)
    assert await asyncio.gather(*checks) == [True, True]
    assert hub.stats().backend.error is None
    await hub.disconnect()


async def test_no_task_is_made_under_the_lock(broker, monkeypatch):
    """A task factory of the app's may run it at once."""
    locks, under = [], []

    def lock():
        locks.append(real())
        return locks[-1]

    real = threading.RLock
    monkeypatch.setattr(threading, "RLock", lock)
    hub = make_hub(Bus(broker))
    monkeypatch.undo()
    peer = await joined(hub, "room")

    def factory(loop, coro, **options):
        if any(it._is_owned() for it in locks):
            under.append(coro)
        return asyncio.Task(coro, loop=loop, **options)

    asyncio.get_running_loop().set_task_factory(factory)
    await joined(hub, "another room")
    await hub.disconnect(peer.websocket)
    await until(lambda: hub.stats().backend.channels == 1)
    asyncio.get_running_loop().set_task_factory(None)
    assert locks
    assert not under
    await hub.disconnect()


async def test_a_cancellation_that_a_backend_swallows(broker):
    async def swallows(bus, proceed):
        if bus.connects > 1:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05)
            raise BackendUnavailable("no")
        return await proceed()

    backend = Bus(broker, on_connect=swallows)
    hub = make_hub(backend, tuning=quick(stop_timeout=0.1))
    await hub.connect()
    broker.kill()
    await until(lambda: backend.connects > 2)
    await hub.disconnect()
    await until(lambda: not starcast_tasks())


async def test_a_publish_inside_a_publish(hub, bus):
    """Something publishes in the middle of a backend's call: it is the next batch."""
    peer = await joined(hub, "room")
    inner = []

    def publish(connection, messages, proceed):
        if not inner:
            inner.append(hub.publish_nowait("room", "inner"))
        return proceed()

    bus.on_publish = publish
    await hub.publish("room", "outer")
    await until(lambda: peer.got == ["outer", "inner"])


async def test_a_large_message_over_a_slow_connection(broker):
    """The probe waits behind it, and that is no outage."""

    async def publish_slowly(connection, messages, proceed):
        await asyncio.sleep(sum(len(data) for _, data in messages) / 20_000)
        await proceed()

    tuning = quick(probe_timeout=0.1, min_throughput=1000)
    bus = Bus(broker, on_publish=publish_slowly)
    hub = make_hub(bus, probe_interval=0.05, tuning=tuning)
    peer = await joined(hub, "room")
    hub.publish_nowait("room", "x" * 10_000)
    await until(lambda: peer.got)
    probes = broker.probes
    await until(lambda: broker.probes > probes + 1)
    assert hub.stats().backend.gaps == 0
    await hub.disconnect()


async def test_the_garbage_collector_under_the_guard_of_a_lock(monkeypatch):
    abandoned = []

    class Eager:
        def __init__(self):
            self.real = real()

        def __enter__(self):
            self.real.acquire()
            while abandoned:
                abandoned.pop().close()  # as the collector does, at the worst moment

        def __exit__(self, *exc):
            self.real.release()

    real = threading.RLock
    monkeypatch.setattr(threading, "RLock", Eager)
    lock = Lock()
    monkeypatch.undo()

    async def hold():
        async with lock:
            await asyncio.Event().wait()

    holding = hold()
    holding.send(None)
    abandoned.append(holding)
    async with asyncio.timeout(10), lock:
        assert not abandoned  # it was released, or this would wait forever
