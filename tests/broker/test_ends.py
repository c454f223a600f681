"""Ends of every kind: of event loops, of the hub, of tasks. Each was a fault once."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from starcast import BackendUnavailable, Broadcast, dispatcher, guard
from starcast.broker import life, link, probe, sender
from starcast.sync.waiter import Lock, running_loop
from support import Broker, Bus, OtherLoop, Peer, joined, starcast_tasks, until

pytestmark = pytest.mark.anyio


class Slow(Bus):
    """Its `stop` takes as long as a test wants."""

    async def stop(self):
        await self.broker.called("stop")
        await super().stop()


class Strict(Bus):
    """Notes what is called on another loop than its own, while that one runs."""

    home = None

    def __init__(self, broker):
        super().__init__(broker)
        self.wrong = []

    def look(self, call):
        if self.home is not None and self.home is not running_loop() and self.home.is_running():
            self.wrong.append(call)

    async def start(self, deliver, lost):
        self.look("start")
        await super().start(deliver, lost)
        self.home = running_loop()

    async def stop(self):
        self.look("stop")
        self.home = None
        await super().stop()

    async def publish(self, messages):
        self.look("publish")
        await super().publish(messages)


async def on_another_loop(hub: Broadcast) -> OtherLoop:
    """Open the hub on another event loop."""
    other = OtherLoop()
    await asyncio.to_thread(other.run, hub.connect())
    return other


# Of the loop


async def test_a_loop_that_ends_while_it_connects(broker):
    """What it still does to its connection is no harm to the next one."""

    class Clinging(Bus):
        async def start(self, deliver, lost):
            if self.starts == 1:
                self.starts = 2
                try:
                    await asyncio.Event().wait()
                finally:
                    await asyncio.sleep(0.1)  # as NATS, which takes some time to close
            await super().start(deliver, lost)

    hub = Broadcast(backend=Clinging(broker), probe_interval=0.1)
    first = await on_another_loop(hub)
    peer = await joined(hub, "room")
    first.loop.call_soon_threadsafe(broker.kill)
    await until(lambda: hub._hub.link._backend.starts == 2)
    broker.up = True
    await asyncio.to_thread(first.close)
    await until(lambda: hub.stats().backend.gaps)
    heard = hub._hub.link.probe.heard
    await until(lambda: hub._hub.link.probe.heard > heard)  # it is being watched
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])
    await hub.disconnect()


@pytest.mark.parametrize("which", ["_live", "_watch", "all"])
async def test_nothing_is_called_from_another_loop(broker, which):
    backend = Strict(broker)
    hub = Broadcast(backend=backend, probe_interval=0.05)
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
    await until(lambda: not asyncio.all_tasks(first.loop))
    heard = hub._hub.link.probe.heard
    await until(lambda: hub._hub.link.probe.heard > heard)
    await hub.disconnect()
    await asyncio.to_thread(first.close)
    assert not backend.wrong


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


async def test_opening_does_not_wait_for_ever(hub, broker, monkeypatch):
    monkeypatch.setattr(link, "TIMEOUT", 0.05)
    first = await on_another_loop(hub)
    await joined(hub, "room")
    async with hub._hub.lifecycle.switching:  # or it moves at once
        await asyncio.to_thread(first.close)
        broker.up = False
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


async def test_who_is_excluded_stays_so_after_a_move(hub, broker, monkeypatch):
    monkeypatch.setattr(sender, "TIMEOUT", 10)
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
    async with hub._hub.lifecycle.switching:  # or it moves at once
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


async def test_wanting_a_channel_while_there_is_no_loop(hub, broker):
    first = await on_another_loop(hub)
    async with hub._hub.lifecycle.switching:  # or it moves at once
        await asyncio.to_thread(first.close)
        with pytest.raises(BackendUnavailable):
            await hub._hub.link.subscriptions.hold("room")
        assert hub.stats().backend.channels == 0


async def test_an_earlier_life_that_is_left_late(hub, broker):
    first = await on_another_loop(hub)
    life = hub._hub.link._life
    await joined(hub, "room")
    await asyncio.to_thread(first.close)
    await hub.connect()
    await hub._hub.link._leave(life)
    assert await hub.healthy()


async def test_opening_what_is_open_elsewhere(hub, broker):
    first = await on_another_loop(hub)
    await hub.connect()
    assert hub._hub.link._life.loop is first.loop
    await hub.disconnect()
    await asyncio.to_thread(first.close)


async def test_asking_on_a_loop_that_is_not_its_own_any_more(hub, broker):
    first = await on_another_loop(hub)
    life = hub._hub.link._life
    await asyncio.to_thread(first.close)
    await hub.connect()
    answered = sender.Taken()
    hub._hub.link._answer(life, answered)
    assert not answered._future.done()
    assert await hub.healthy()


# Of the hub


async def test_closing_from_another_loop_is_cancelled(broker, other):
    """It goes on: half of it would be no end."""
    hub = Broadcast(backend=Slow(broker))
    await asyncio.to_thread(other.run, hub.connect())
    other.loop.call_soon_threadsafe(broker.open.clear)
    closing = asyncio.create_task(hub.disconnect())
    await until(lambda: ("stop", None) in broker.calls)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    again = asyncio.create_task(hub.disconnect())  # waits for the same end
    other.loop.call_soon_threadsafe(broker.open.set)
    await again
    assert not broker.buses
    assert not hub._hub.link._sender._open


async def test_a_closing_that_comes_late(broker, other, monkeypatch):
    """The loop of the connection was blocked, and the hub is open again elsewhere."""
    monkeypatch.setattr(life, "STOP_TIMEOUT", 0.1)
    hub = Broadcast(backend=Bus(broker))
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
    """Its loop has ended as well, so that what was left of it was to be done here."""
    hub = Broadcast(backend=Bus(broker))
    await asyncio.to_thread(other.run, hub.connect())
    asyncio.get_running_loop().call_soon(other.close)  # this loop is blocked until then
    await hub.disconnect()
    peer = await joined(hub, "room")
    await hub.publish("room", "1")
    await until(lambda: peer.got == ["1"])
    await hub.disconnect()


@pytest.mark.parametrize("where", ["the same loop", "another loop"])
async def test_a_closing_that_is_cut_off_by_the_end_of_its_loop(broker, where):
    class Stuck(Bus):
        async def stop(self):
            if len(stops) < 1:
                stops.append(None)
                await asyncio.Event().wait()
            await super().stop()

    stops = []
    hub = Broadcast(backend=Stuck(broker))
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
    assert len(broker.buses) == 1
    await hub.disconnect()
    assert not broker.buses


@pytest.mark.parametrize("steps", range(6))
async def test_the_loop_ends_while_the_hub_is_closed(steps):
    """At whatever moment: the connection is closed."""

    async def main():
        broker = Broker()
        hub = Broadcast(backend=Bus(broker))
        await joined(hub, "room")
        tasks.append(asyncio.create_task(hub.disconnect()))
        for _ in range(steps):
            await asyncio.sleep(0)
        return broker

    tasks = []
    broker = await asyncio.to_thread(asyncio.run, main())
    assert not broker.buses


@pytest.mark.parametrize("how", ["guard", "publish"])
async def test_it_is_not_opened_on_a_loop_that_ends(monkeypatch, how):
    """A handler takes a moment to end, or says goodbye."""
    monkeypatch.setattr(life, "REST", 60)

    async def main():
        async def handler():
            peer = await joined(hub, "room")
            going.set()
            try:
                await asyncio.Event().wait()
            finally:
                await until(lambda: not hub._hub.link.alive)
                if how == "guard":
                    await asyncio.sleep(3 * guard.GUARD_EVERY)
                else:
                    with pytest.raises(BackendUnavailable, match="is ending"):
                        await hub.publish("room", "bye")
                await hub.disconnect(peer.websocket)
                ended.append(True)

        going, broker = asyncio.Event(), Broker()
        hub = Broadcast(backend=Bus(broker))
        await hub.connect()
        tasks.append(asyncio.create_task(handler()))
        await going.wait()
        return broker

    tasks, ended = [], []
    broker = await asyncio.to_thread(asyncio.run, main())
    assert ended
    assert not broker.buses


async def test_closing_for_a_loop_that_closes_without_a_word(broker):
    hub = Broadcast(backend=Bus(broker))
    first = await on_another_loop(hub)
    await asyncio.to_thread(first.stop)
    closing = asyncio.create_task(hub.disconnect())
    await until(lambda: hub._hub.link._stopping and hub._hub.link._stopping.waiters)
    tasks = asyncio.all_tasks(first.loop)
    first.loop.close()
    await closing
    assert not broker.buses
    for _ in range(3):
        await hub.disconnect()
    assert not hub._hub.link._stopping.waiters
    for task in tasks:
        task._log_destroy_pending = False
        task.get_coro().close()


async def test_what_waits_goes_out_before_it_closes(broker):
    async with Broadcast(backend=Bus(broker)) as listening:
        peer = await joined(listening, "room")
        hub = Broadcast(backend=Bus(broker))
        await hub.connect()
        broker.open.clear()
        hub.publish_nowait("room", "under way")
        await until(lambda: broker.stalled)
        hub.publish_nowait("room", "waiting")
        closing = asyncio.create_task(hub.disconnect())
        await until(lambda: hub._hub.link._stopping)
        broker.open.set()
        await closing
        await until(lambda: peer.got == ["under way", "waiting"])
        assert hub.stats().backend.lost == 0


async def test_closing_does_not_wait_for_ever_for_what_waits(broker):
    hub = Broadcast(backend=Bus(broker))
    await hub.connect()
    broker.open.clear()
    hub.publish_nowait("room", "under way")
    await until(lambda: broker.stalled)
    hub.publish_nowait("room", "waiting")
    await hub.disconnect()
    assert hub.stats().backend.lost == 2


async def test_clients_do_not_wait_for_the_broker_to_be_told(broker):
    hub = Broadcast(backend=Slow(broker))
    peer = await joined(hub, "room")
    broker.open.clear()
    closing = asyncio.create_task(hub.disconnect())
    await until(lambda: peer.closed == 1001)
    assert not closing.done()
    broker.open.set()
    await closing


async def test_a_backend_that_ignores_a_cancellation(broker, monkeypatch):
    monkeypatch.setattr(life, "STOP_TIMEOUT", 0.1)
    go = asyncio.Event()

    class Stubborn(Bus):
        async def subscribe(self, channel):
            if channel == "room":
                while not go.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await go.wait()
            await super().subscribe(channel)

    hub = Broadcast(backend=Stubborn(broker))
    await hub.connect()
    with pytest.raises(BackendUnavailable):
        await joined(hub, "room")
    await hub.disconnect()
    go.set()


async def test_a_publish_while_the_hub_is_being_closed(hub, broker):
    await hub.connect()
    hub._hub.link._sender.close("the hub was closed")
    with pytest.raises(BackendUnavailable, match="closed"):
        await hub.publish("room", "x")
    assert not len(hub._hub.link._sender.queue)


# Of a connection, and of what is on its way


async def test_a_connection_that_breaks_in_the_moment_in_which_it_is_made(broker):
    class Fragile(Bus):
        async def publish(self, messages):
            await super().publish(messages)
            if self.starts == 1:
                self.broker.kill()

    hub = Broadcast(backend=Fragile(broker))
    await hub.connect()
    await until(lambda: hub.stats().backend.state == "reconnecting")
    publishing = asyncio.create_task(hub.publish("room", "patient"))
    await until(lambda: hub.stats().backend.queued)
    broker.up = True
    await publishing
    await hub.disconnect()


async def test_publish_raises_within_its_time_also_when_it_waits_for_room(hub, broker, monkeypatch):
    """Two seconds in all, not two for room and two more."""
    hub._hub.link._sender.queue.bound = 1000
    await hub.connect()
    broker.open.clear()
    hub.publish_nowait("room", "first")
    await until(lambda: broker.stalled)
    hub.publish_nowait("room", "x" * 2000)
    deadlines = []

    async def wait(taken, deadline=None):
        deadlines.append(deadline)

    monkeypatch.setattr(sender.Taken, "wait", wait)
    clock = asyncio.get_running_loop().time
    began = clock()
    waiting = asyncio.create_task(hub.publish("room", "y"))
    await until(lambda: hub._hub.link._sender.queue.waiters)
    latest = clock() + dispatcher.PUBLISH_TIMEOUT
    broker.open.set()
    await waiting
    assert began + dispatcher.PUBLISH_TIMEOUT <= deadlines[0] <= latest


async def test_a_connection_that_breaks_while_it_subscribes_is_one_line(broker, caplog):
    asked, go = [], asyncio.Event()

    class Gated(Bus):
        async def subscribe(self, channel):
            if self.starts == 2 and channel.isdigit():
                asked.append(channel)
                await go.wait()
            await super().subscribe(channel)

    hub = Broadcast(backend=Gated(broker))
    peer = await joined(hub, *map(str, range(50)))
    broker.kill()
    broker.up = True
    await until(lambda: len(asked) == 50)
    broker.kill()
    broker.up = True
    go.set()
    await until(lambda: hub.stats().backend.gaps)
    assert len(caplog.records) < 5
    await hub.publish("49", "x")
    await until(lambda: peer.got == ["x"])
    await hub.disconnect()


async def test_health_checks_at_the_wrong_moment(broker, monkeypatch):
    """Somebody asks in the turn in which the answer to the watch is there."""
    monkeypatch.setattr(probe, "PROBE_TIMEOUT", 0.2)
    hub = Broadcast(backend=Bus(broker), probe_interval=0.05)
    await joined(hub, "room")
    real, times = hub._hub.link.probe.came, []

    def came(mark):
        if len(times) < 2:
            times.append(asyncio.get_running_loop().call_soon(hub._hub.link.probe.ask))
        real(mark)

    monkeypatch.setattr(hub._hub.link.probe, "came", came)
    heard = 0
    for _ in range(4):
        await until(lambda heard=heard: hub._hub.link.probe.heard > heard)
        heard = hub._hub.link.probe.heard
    assert len(times) == 2
    assert hub.stats().backend.error is None
    await hub.disconnect()


async def test_no_task_is_made_under_the_lock(hub, broker):
    """A task factory of the app's may run it at once."""
    peer = await joined(hub, "room")
    under = []

    def factory(loop, coro, **options):
        if hub._hub.lock._is_owned():
            under.append(coro)
        return asyncio.Task(coro, loop=loop, **options)

    asyncio.get_running_loop().set_task_factory(factory)
    await joined(hub, "another room")
    await hub.disconnect(peer.websocket)
    await until(lambda: hub.stats().backend.channels == 1)
    asyncio.get_running_loop().set_task_factory(None)
    assert not under


async def test_a_cancellation_that_a_backend_swallows(broker, monkeypatch):
    monkeypatch.setattr(life, "STOP_TIMEOUT", 0.1)

    class Swallows(Bus):
        async def start(self, deliver, lost):
            if self.starts:
                self.starts += 1
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.05)
                raise BackendUnavailable("no")
            await super().start(deliver, lost)

    backend = Swallows(broker)
    hub = Broadcast(backend=backend)
    await hub.connect()
    broker.kill()
    await until(lambda: backend.starts > 2)
    await hub.disconnect()
    await until(lambda: not starcast_tasks())


async def test_a_publish_inside_a_publish(hub, broker, monkeypatch):
    """Something publishes in the middle of a backend's call: it is the next batch."""
    peer = await joined(hub, "room")
    backend = hub._hub.link._backend
    real, inner = backend.publish, []

    def publish(messages):
        if not inner:
            inner.append(hub._hub.link._sender.put("room", b"inner", True))
        return real(messages)

    monkeypatch.setattr(backend, "publish", publish)
    await hub.publish("room", "outer")
    await inner[0].wait()
    await until(lambda: peer.got == ["outer", "inner"])


async def test_a_large_message_over_a_thin_line(broker, monkeypatch):
    """The probe waits behind it, and that is no outage."""
    monkeypatch.setattr(probe, "PROBE_TIMEOUT", 0.1)
    monkeypatch.setattr(probe, "SLOWEST", 1000)

    class Thin(Bus):
        async def publish(self, messages):
            await asyncio.sleep(sum(len(data) for _, data in messages) / 20_000)
            await super().publish(messages)

    hub = Broadcast(backend=Thin(broker), probe_interval=0.05)
    peer = await joined(hub, "room")
    hub.publish_nowait("room", "x" * 10_000)
    await until(lambda: peer.got)
    heard = hub._hub.link.probe.heard
    await until(lambda: hub._hub.link.probe.heard > heard)
    assert hub.stats().backend.gaps == 0
    await hub.disconnect()


async def test_the_garbage_collector_under_the_guard_of_a_lock():
    lock = Lock()

    async def hold():
        async with lock:
            await asyncio.Event().wait()

    abandoned = [hold()]
    abandoned[0].send(None)
    real = lock._guard

    class Eager:
        def __enter__(self):
            real.acquire()
            while abandoned:
                abandoned.pop().close()  # as the collector does, at the worst moment

        def __exit__(self, *exc):
            real.release()

    lock._guard = Eager()
    async with lock:
        assert lock._held
