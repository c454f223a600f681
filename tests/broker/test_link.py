"""The connection to a broker: kept, lost, found again. On a broker that a test can stop at will."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest

from starcast import (
    BackendUnavailable,
    Broadcast,
    ClientGone,
    ConfigurationError,
    Gap,
    PayloadTooLarge,
    PublishQueueFull,
    Tuning,
    dispatcher,
    testing,
)
from starcast.backends.base import SubscriptionRevoked
from starcast.broker import life, probe, sender, session
from support import (
    DEADLINE,
    Broker,
    Bus,
    OtherLoop,
    Peer,
    joined,
    starcast_tasks,
    subscribed,
    until,
)

pytestmark = pytest.mark.anyio


def asked(broker: Broker) -> list[tuple[str, str]]:
    return [
        (name, what)
        for name, what in broker.calls
        if name in ("subscribe", "unsubscribe") and not what.startswith("starcast-probe")
    ]


def batches(broker: Broker) -> list[int]:
    """How many messages were published together, without those of the hub to itself."""
    return [
        len(what)
        for name, what in broker.calls
        if name == "publish" and not what[0][0].startswith("starcast-probe")
    ]


async def lost(hub: Broadcast) -> None:
    await until(lambda: hub.stats().backend.state == "reconnecting")


# Messages


async def test_two_hubs_are_one_room(hub, broker):
    other = Broadcast(backend=Bus(broker))
    here, there = await joined(hub, "room"), await joined(other, "room")
    await hub.publish("room", "text")
    await other.publish("room", b"bytes")
    await hub.publish("room", {"a": 1})
    await hub.publish("room", "not here", exclude=here.websocket)
    await hub.publish("elsewhere", "nobody")
    expected = ["text", b"bytes", '{"a":1}']
    await until(lambda: there.got == [*expected, "not here"])
    assert here.got == expected
    await other.disconnect()


async def test_awaited_means_that_the_broker_has_it(hub, broker):
    await joined(hub, "room")
    broker.open.clear()
    publishing = asyncio.create_task(hub.publish("room", "x"))
    await until(lambda: broker.stalled)
    assert not publishing.done()
    broker.open.set()
    await publishing


async def test_what_comes_while_a_batch_is_under_way_is_the_next_one(hub, broker):
    peer = await joined(hub, "room")
    broker.open.clear()
    hub.publish_nowait("room", "0")
    await until(lambda: broker.stalled)
    for number in range(1, 100):
        hub.publish_nowait("room", str(number))
    broker.open.set()
    await until(lambda: len(peer.got) == 100)
    assert peer.got == [str(number) for number in range(100)]
    assert batches(broker) == [1, 99]


async def test_a_batch_has_its_bounds(hub, broker, monkeypatch):
    monkeypatch.setattr(sender, "BATCH", 10)
    monkeypatch.setattr(sender, "BATCH_BYTES", 20)
    peer = await joined(hub, "room")
    for _ in range(15):
        hub.publish_nowait("room", "x")
    for _ in range(3):
        hub.publish_nowait("room", "x" * 15)
    await until(lambda: len(peer.got) == 18)
    assert batches(broker) == [10, 6, 2]


async def test_from_threads_and_other_loops(hub, other):
    peer = await joined(hub, "room")
    elsewhere = Peer()
    await asyncio.to_thread(other.run, hub.connect(elsewhere.websocket, "room"))
    thread = threading.Thread(target=hub.publish_nowait, args=("room", "thread"))
    thread.start()
    await until(lambda: peer.got == ["thread"])
    thread.join()
    await asyncio.to_thread(other.run, hub.publish("room", "loop"))
    await until(lambda: peer.got == elsewhere.got == ["thread", "loop"])
    await asyncio.to_thread(other.run, hub.disconnect(elsewhere.websocket))


async def test_a_message_that_is_too_large_is_refused_before_anything_is_sent(hub, broker):
    peer = await joined(hub, "room")
    hub._hub.link._backend.max_payload = 10
    for message in ("x" * 11, b"x" * 8):
        with pytest.raises(PayloadTooLarge, match="at most 10"):
            await hub.publish("room", message)
        with pytest.raises(PayloadTooLarge):
            hub.publish_nowait("room", message)
    await hub.publish("room", "x" * 10)
    await until(lambda: peer.got == ["x" * 10])


async def test_what_waits_for_the_broker_has_a_bound(hub, broker, monkeypatch):
    hub._hub.link._sender.queue.bound = 100
    monkeypatch.setattr(dispatcher, "PUBLISH_TIMEOUT", 0.2)
    peer = await joined(hub, "room")
    broker.open.clear()
    hub.publish_nowait("room", "first")
    await until(lambda: broker.stalled)
    hub.publish_nowait("room", "x" * 200)  # one always may
    with pytest.raises(PublishQueueFull):
        hub.publish_nowait("room", "x")
    with pytest.raises(PublishQueueFull):
        await hub.publish("room", "x")
    assert hub.stats().failed == 2
    assert not hub._hub.link._sender.queue.waiters
    broker.open.set()
    await until(lambda: len(peer.got) == 2)


async def test_who_waits_gets_the_room_that_is_made(hub, broker):
    hub._hub.link._sender.queue.bound = 100
    peer = await joined(hub, "room")
    broker.open.clear()
    hub.publish_nowait("room", "first")
    await until(lambda: broker.stalled)
    hub.publish_nowait("room", "x" * 200)
    waiting = [asyncio.create_task(hub.publish("room", str(number))) for number in range(3)]
    await until(lambda: len(hub._hub.link._sender.queue.waiters) == 3)
    broker.open.set()
    await asyncio.gather(*waiting)
    await until(lambda: len(peer.got) == 5)
    assert sorted(peer.got[2:]) == ["0", "1", "2"]


async def test_closing_while_somebody_waits_for_room(hub, broker):
    hub._hub.link._sender.queue.bound = 100
    await hub.connect()
    broker.open.clear()
    hub.publish_nowait("room", "first")
    await until(lambda: broker.stalled)
    hub.publish_nowait("room", "x" * 200)
    waiting = asyncio.create_task(hub.publish("room", "last"))
    await until(lambda: hub._hub.link._sender.queue.waiters)
    await hub.disconnect()
    with pytest.raises(BackendUnavailable):
        await waiting


@pytest.mark.parametrize("how", ["future", "coroutine", "at once"])
async def test_a_batch_that_the_broker_refuses(hub, broker, monkeypatch, how):
    """`publish` of a backend may be an `async def`, or return a future, or raise."""
    await hub.connect()

    async def refuse(messages):
        raise PermissionError("nobody may")

    def publish(messages):
        if how == "future":
            refused = asyncio.get_running_loop().create_future()
            refused.set_exception(PermissionError("nobody may"))
            return refused
        if how == "coroutine":
            return refuse(messages)
        raise PermissionError("nobody may")

    monkeypatch.setattr(hub._hub.link._backend, "publish", publish)
    hub.publish_nowait("room", "x")
    with pytest.raises(BackendUnavailable, match="nobody may"):
        await hub.publish("room", "x")
    assert hub.stats().backend.lost == 1
    monkeypatch.undo()
    await hub.publish("room", "x")


async def test_a_publish_that_the_backend_never_ends(hub, broker, monkeypatch):
    peer = await joined(hub, "room")
    monkeypatch.setattr(
        hub._hub.link._backend,
        "publish",
        lambda messages: asyncio.get_running_loop().create_future(),
    )
    hub.publish_nowait("room", "lost")
    await until(lambda: hub._hub.link._sender._sending)
    monkeypatch.undo()
    broker.kill()
    broker.up = True
    await until(lambda: hub.stats().backend.gaps)
    assert hub.stats().backend.lost == 1
    await hub.publish("room", "x")
    await until(lambda: peer.got == ["x"])


async def test_each_connection_is_watched_by_one_task(hub, broker):
    await hub.connect()
    for number in range(1, 4):
        broker.kill()
        broker.up = True
        await until(lambda: hub.stats().backend.gaps == number)  # noqa: B023  # called here
    watching = [task for task in starcast_tasks() if "_watch" in repr(task.get_coro())]
    await until(lambda: sum(not task.done() for task in watching) == 1)
    assert hub._hub.link.alive


async def test_what_is_neither_text_nor_ours_is_dropped_and_counted(hub, broker):
    peer = await joined(hub, "room")
    await hub._hub.link._backend.publish(
        [("room", b"\xfe"), ("room", b"\xff\x09"), ("room", b"text")]
    )
    assert hub.stats().backend.malformed == 2
    await until(lambda: peer.got == ["text"])


class Listener:
    """Reads a channel on a loop of its own, until "end"; gaps are there by their name."""

    def __init__(self, hub: Broadcast, channel: str) -> None:
        self.got: list[str] = []
        self.gaps: list[Gap] = []
        self.ready = threading.Event()
        self._hub, self._channel = hub, channel

    async def read(self) -> None:
        async with self._hub.subscribe(self._channel, gaps=True) as subscriber:
            self.ready.set()
            async for item in subscriber:
                if isinstance(item, Gap):
                    self.gaps.append(item)
                    self.got.append("GAP")
                elif item.message == "end":
                    return
                else:
                    self.got.append(item.message.strip())


async def blocked_in(loop: asyncio.AbstractEventLoop) -> threading.Event:
    """Block a loop of another thread until the event is set."""
    go, blocked = threading.Event(), threading.Event()
    loop.call_soon_threadsafe(lambda: (blocked.set(), go.wait(20)))
    assert await asyncio.to_thread(blocked.wait, 20)
    return go


@pytest.mark.parametrize("after_gap", ["keep", "close"])
async def test_a_blocked_event_loop_is_told_of_what_it_misses(broker, other, caplog, after_gap):
    """At its place, and only who is on that loop and on a channel of which something is missing."""
    gaps: list[tuple[Gap, asyncio.AbstractEventLoop]] = []
    hub = Broadcast(
        tuning=Tuning(max_pending=300),
        backend=Bus(broker),
        on_gap=lambda gap: gaps.append((gap, asyncio.get_running_loop())),
        after_gap=after_gap,
    )
    here = await joined(hub, "room", "quiet")
    elsewhere, quiet = Peer(), Peer()
    await asyncio.to_thread(other.run, hub.connect(elsewhere.websocket, "room"))
    await asyncio.to_thread(other.run, hub.connect(quiet.websocket, "quiet"))
    room, silent = Listener(hub, "room"), Listener(hub, "quiet")
    tasks = [asyncio.run_coroutine_threadsafe(it.read(), other.loop) for it in (room, silent)]
    await asyncio.to_thread(room.ready.wait, 20)
    await asyncio.to_thread(silent.ready.wait, 20)
    for times in (1, 2):
        go = await blocked_in(other.loop)
        for message in ("0", "1", "2" * 200, "3"):  # "3" would fit
            await hub.publish("room", message.ljust(60))
        assert hub.stats().backend.lost == 2 * times
        assert len(gaps) == times - 1
        go.set()
        await until(lambda: len(gaps) == times)  # noqa: B023  # awaited here
        await hub.publish("room", "later")
        await until(lambda: room.got[-1:] == ["later"])
    for channel in ("room", "quiet"):
        await hub.publish(channel, "end")
    for task in tasks:
        await asyncio.wrap_future(task)
    assert room.got == ["0", "1", "GAP", "later"] * 2
    assert silent.got == []
    assert [gap for gap, _ in gaps] == room.gaps
    assert {loop for _, loop in gaps} == {asyncio.get_running_loop()}
    assert room.gaps[0].error == "an event loop was blocked or too slow and missed 2 messages"
    assert 0 <= room.gaps[0].seconds < 20
    assert abs(room.gaps[0].since - time.time()) < 60
    assert hub.stats().backend.gaps == 2
    assert hub.stats().backend.state == "connected"
    assert caplog.text.count("missed 2 messages") == 1  # in ten seconds
    assert len(here.got) == 12
    assert quiet.got == ["end"]
    if after_gap == "close":
        assert elsewhere.closed == 1012
        assert [message.strip() for message in elsewhere.got] == ["0", "1"]
    else:
        assert [message.strip() for message in elsewhere.got][:3] == ["0", "1", "later"]
    assert quiet.closed is here.closed is None
    await hub.disconnect()


async def test_a_blocked_event_loop_that_ends_is_told_nothing(broker):
    gaps: list[Gap] = []
    hub = Broadcast(backend=Bus(broker), on_gap=gaps.append, tuning=Tuning(max_pending=100))
    await hub.connect()
    other = OtherLoop()
    await asyncio.to_thread(other.run, hub.connect(Peer().websocket, "room"))
    await asyncio.to_thread(other.stop)
    for number in range(3):
        await hub.publish("room", str(number).ljust(60))
    assert hub.stats().backend.lost == 2
    assert len(hub._hub.registry._missed) == 1
    await asyncio.to_thread(other.close)
    peer = await joined(hub, "room")
    await hub.publish("room", "later")
    await until(lambda: peer.got == ["later"])
    assert not hub._hub.registry._missed
    assert not gaps
    await hub.disconnect()


# Subscriptions


async def test_one_subscription_a_channel_until_the_last_one_leaves(hub, broker):
    peers = [await joined(hub, "room") for _ in range(3)]
    async with hub.subscribe("room"):
        await hub.connect(peers[0].websocket, "room")  # again
        assert subscribed(broker) == {"room"}
        for peer in peers:
            await hub.disconnect(peer.websocket)
        assert subscribed(broker) == {"room"}
    await until(lambda: not subscribed(broker))
    assert asked(broker) == [("subscribe", "room"), ("unsubscribe", "room")]


async def test_everybody_who_comes_at_once_waits_for_the_same_confirmation(hub, broker):
    await hub.connect()
    broker.open.clear()
    peers = [Peer() for _ in range(5)]
    connecting = [asyncio.create_task(hub.connect(peer.websocket, "room")) for peer in peers]
    await until(lambda: broker.stalled)
    assert not any(task.done() for task in connecting)
    assert not any(peer.sent for peer in peers)  # not even accepted
    broker.open.set()
    await asyncio.gather(*connecting)
    await hub.publish("room", "hello")
    await until(lambda: all(peer.got == ["hello"] for peer in peers))
    assert asked(broker) == [("subscribe", "room")]


async def test_a_channel_that_is_left_and_wanted_again_meanwhile(hub, broker):
    peer = await joined(hub, "room")
    broker.open.clear()
    await hub.disconnect(peer.websocket)
    await until(lambda: broker.stalled)  # in unsubscribe
    again = Peer()
    connecting = asyncio.create_task(hub.connect(again.websocket, "room"))
    await asyncio.sleep(0)
    assert not connecting.done()
    broker.open.set()
    await connecting
    await hub.publish("room", "hello")
    await until(lambda: again.got == ["hello"])
    assert [name for name, _ in asked(broker)] == ["subscribe", "unsubscribe", "subscribe"]


async def test_a_broker_that_does_not_confirm(hub, broker):
    await hub.connect()
    broker.open.clear()
    peer, accepted = Peer(), Peer()
    with pytest.raises(BackendUnavailable):
        await hub.connect(peer.websocket, "room")
    assert not peer.sent
    await accepted.websocket.accept()
    with pytest.raises(BackendUnavailable) as caught:
        await hub.connect(accepted.websocket, "room")
    assert caught.value.code == 1013
    with pytest.raises(BackendUnavailable):
        await hub.subscribe("room").__aenter__()
    assert not hub._hub.link.subscriptions.holds["room"].count
    assert not hub._hub.link.subscriptions.holds["room"].waiting
    broker.open.set()
    await until(lambda: not hub._hub.link.subscriptions.holds)
    assert not subscribed(broker)


async def test_a_channel_that_the_broker_refuses(hub, broker, caplog):
    broker.refused.add("secret")
    peer = await joined(hub, "room")
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="nobody may have secret"):
            await hub.connect(peer.websocket, "secret")
    with pytest.raises(BackendUnavailable, match="nobody may have secret"):
        await hub.publish("secret", "x")
    hub.publish_nowait("secret", "x")
    await until(lambda: hub.stats().backend.lost == 1)
    assert hub.channels == {"room": 1}
    await until(lambda: list(hub._hub.link.subscriptions.holds) == ["room"])
    await hub.publish("room", "still there")
    await until(lambda: peer.got == ["still there"])
    assert hub._hub.link._backend.starts == 1
    broker.refused.clear()
    await hub.connect(peer.websocket, "secret")
    assert caplog.text.count("refused the subscription to the channel 'secret'") == 1


async def test_a_channel_that_the_broker_refuses_after_an_outage(hub, broker, caplog):
    peer = await joined(hub, "room", "secret")
    broker.refused.add("secret")
    broker.kill()
    broker.up = True
    await until(lambda: hub.stats().backend.gaps)
    assert subscribed(broker) == {"room"}
    await hub.publish("room", "still there")
    await until(lambda: peer.got == ["still there"])
    await until(lambda: hub.stats().backend.refused == 1)
    assert not await hub.healthy()
    await hub.disconnect(peer.websocket)
    await until(lambda: not hub._hub.link.subscriptions.holds)
    assert hub.stats().backend.refused == 0
    assert await hub.healthy()


async def test_a_channel_that_is_refused_again_and_again_has_one_gap(hub, broker, caplog):
    async with hub.subscribe("secret", gaps=True) as subscriber:
        for number in range(2):  # of the second time nothing is logged: it was told just now
            broker.refused.add("secret")
            for _ in range(2):
                gaps = hub.stats().backend.gaps
                broker.kill()
                broker.up = True
                await until(lambda: hub.stats().backend.gaps > gaps)  # noqa: B023  # awaited here
                await until(lambda: hub.stats().backend.refused)
                asked = len(broker.calls)
                await until(
                    lambda: broker.calls[asked:].count(("subscribe", "secret")) > 1  # noqa: B023  # awaited here
                )
            broker.refused.clear()
            await until(lambda: not hub.stats().backend.refused)
            await hub.publish("secret", str(number))
            async with asyncio.timeout(DEADLINE):
                seen = [await anext(subscriber) for _ in range(4)]
            assert [isinstance(each, Gap) for each in seen] == [True, True, True, False]
            assert [each.channel for each in seen[:3]] == [None, None, "secret"]
            assert seen[0].since < seen[2].since < seen[1].since + seen[1].seconds
            assert seen[3].message == str(number)
            assert hub.stats().backend.error == "nobody may have secret"
    assert caplog.text.count("'secret', which is asked for again until it is back: nobody") == 1
    assert caplog.text.count("subscribed to the channel 'secret' again") == 1


async def test_a_message_that_comes_with_the_confirmation_is_behind_the_gap(broker):
    class Prompt(Bus):
        async def subscribe(self, channel):
            await super().subscribe(channel)
            if channel == "secret" and self.starts == 2:
                self.deliver("secret", b"after")  # in the same turn, as from the same read

    hub = Broadcast(backend=Prompt(broker))
    async with hub, hub.subscribe("secret", gaps=True) as subscriber:
        broker.refused.add("secret")
        broker.kill()
        broker.up = True
        await until(lambda: hub.stats().backend.gaps and hub.stats().backend.refused)
        broker.refused.clear()
        async with asyncio.timeout(DEADLINE):
            seen = [await anext(subscriber) for _ in range(3)]
    assert [getattr(item, "message", "GAP") for item in seen] == ["GAP", "GAP", "after"]
    assert seen[1].channel == "secret"


async def test_many_refused_channels_are_some_lines(hub, broker, caplog):
    names = [f"secret {number}" for number in range(50)]
    await joined(hub, *names)
    broker.refused.update(names)
    broker.kill()
    broker.up = True
    await until(lambda: hub.stats().backend.refused == 50)
    broker.refused.clear()
    await until(lambda: not hub.stats().backend.refused)
    assert 0 < caplog.text.count("which is asked for again") < 50
    assert 0 < caplog.text.count("subscribed to the channel") < 50


async def test_what_the_broker_takes_away_in_vain(hub, broker):
    """While the connection breaks, and a channel that nobody has any more."""
    peer = await joined(hub, "room")
    backend = hub._hub.link._backend
    backend.lost(SubscriptionRevoked("nobody may", "unknown"))
    old = backend.lost
    broker.kill()
    backend.lost(SubscriptionRevoked("nobody may", "room"))
    broker.up = True
    await until(lambda: hub.stats().backend.gaps)
    old(SubscriptionRevoked("nobody may", "room"))
    assert hub.stats().backend.refused == 0
    await hub.publish("room", "x")
    await until(lambda: peer.got == ["x"])


async def test_who_is_cancelled_while_waiting_holds_nothing(hub, broker):
    await hub.connect()
    broker.open.clear()
    connecting = asyncio.create_task(hub.connect(Peer().websocket, "room"))
    await until(lambda: broker.stalled)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    broker.open.set()
    await until(lambda: not hub._hub.link.subscriptions.holds)


async def test_a_client_that_leaves_while_the_broker_confirms(hub, broker):
    await hub.connect()
    peer = Peer()
    await peer.websocket.accept()
    broker.open.clear()
    connecting = asyncio.create_task(hub.connect(peer.websocket, "room"))
    await until(lambda: broker.stalled)
    await peer.websocket.close()
    broker.open.set()
    with pytest.raises(ClientGone):
        await connecting
    await until(lambda: not hub._hub.link.subscriptions.holds)


# Outages


async def test_after_an_outage_everything_is_subscribed_to_and_a_gap_is_told(broker, caplog):
    gaps: list[Gap] = []
    hub = Broadcast(backend=Bus(broker), on_gap=gaps.append)
    peer = await joined(hub, "a", "b")
    async with hub.subscribe("a", gaps=True) as careful, hub.subscribe("a") as plain:
        await hub.publish("a", "1")
        broker.kill()
        await lost(hub)
        backend = hub.stats().backend
        assert "killed" in backend.error
        broker.up = True
        await until(lambda: gaps)
        await hub.publish("a", "2")
        got = [await anext(careful) for _ in range(3)]
        assert [got[0].message, got[2].message] == ["1", "2"]
        assert got[1] is gaps[0]
        assert [(await anext(plain)).message for _ in range(2)] == ["1", "2"]
    assert subscribed(broker) == {"a", "b"}
    assert peer.got == ["1", "2"]
    assert gaps[0].seconds >= 0
    assert "killed" in gaps[0].error
    assert hub.stats().backend.gaps == 1
    assert hub.stats().backend.state == "connected"
    await hub.disconnect()
    assert hub.stats().backend.state == "closed"


async def test_it_tries_for_ever(hub, broker):
    await joined(hub, "room")
    starts = hub._hub.link._backend.starts
    broker.kill()
    await until(lambda: hub._hub.link._backend.starts >= starts + 20)
    assert "the broker is down" in hub.stats().backend.error
    broker.up = True
    await until(lambda: hub.stats().backend.state == "connected")
    assert subscribed(broker) == {"room"}


async def test_publishing_during_an_outage(hub, broker):
    peer = await joined(hub, "room")
    broker.kill()
    await lost(hub)
    with pytest.raises(BackendUnavailable):
        await hub.publish("room", "in vain")
    hub.publish_nowait("room", "lost")
    await until(lambda: hub.stats().backend.lost == 1)
    assert hub.stats().failed == 1
    publishing = asyncio.create_task(hub.publish("room", "patient"))
    await asyncio.sleep(0)
    broker.up = True
    await publishing
    await until(lambda: peer.got == ["patient"])


async def test_what_was_under_way_when_the_connection_broke(hub, broker):
    await joined(hub, "room")
    broker.open.clear()
    publishing = asyncio.create_task(hub.publish("room", "x"))
    await until(lambda: broker.stalled)
    hub.publish_nowait("room", "y")
    hub.publish_nowait("room", "z")
    broker.kill()
    broker.open.set()
    with pytest.raises(BackendUnavailable):
        await publishing
    await lost(hub)
    await until(lambda: hub.stats().backend.lost == 2)
    assert not await hub.healthy()


async def test_a_broker_that_says_nothing_any_more_is_noticed(broker, monkeypatch):
    monkeypatch.setattr(probe, "PROBE_TIMEOUT", 0.1)
    gaps: list[Gap] = []
    hub = Broadcast(backend=Bus(broker), on_gap=gaps.append, probe_interval=0.02)
    await joined(hub, "room")
    assert await hub.healthy()
    heard = hub._hub.link.probe.heard
    await until(lambda: hub._hub.link.probe.heard > heard)
    broker.open.clear()
    assert not await hub.healthy()
    await lost(hub)
    assert "did not answer" in hub.stats().backend.error
    broker.open.set()
    await until(lambda: gaps)
    assert await hub.healthy()
    await hub.disconnect()


async def test_a_gap_begins_when_what_was_answered_last_was_asked(broker):
    """And not when the answer came: what was sent after the answer may have been behind it."""
    gaps: list[Gap] = []
    hub = Broadcast(backend=Bus(broker), on_gap=gaps.append, probe_interval=0.1)
    async with hub, hub.subscribe("room"):
        heard = hub._hub.link.probe.heard
        broker.open.clear()
        await until(lambda: broker.stalled)
        asked_by = time.time()
        await asyncio.sleep(0.02)
        broker.open.set()
        await until(lambda: hub._hub.link.probe.heard > heard)
        broker.kill()
        broker.up = True
        await until(lambda: gaps)
    assert heard < gaps[0].since <= asked_by


async def test_a_loop_that_is_blocked_is_no_outage(broker, monkeypatch):
    monkeypatch.setattr(probe, "PROBE_TIMEOUT", 0.2)
    hub = Broadcast(backend=Bus(broker), probe_interval=0.01)
    await joined(hub, "room")
    for _ in range(3):
        asked = sum(name == "publish" for name, _ in broker.calls)
        broker.open.clear()  # the answer is there when the loop looks again
        await until(lambda: sum(name == "publish" for name, _ in broker.calls) > asked)  # noqa: B023  # awaited here
        asyncio.get_running_loop().call_soon(time.sleep, 0.25)
        asyncio.get_running_loop().call_soon(broker.open.set)
        await asyncio.sleep(0.02)
    assert hub.stats().backend.gaps == 0
    assert hub.stats().backend.state == "connected"
    await hub.disconnect()


async def test_a_connection_that_breaks_while_it_is_being_made(hub, broker):
    await joined(hub, "room")
    broker.kill()
    await lost(hub)
    broker.open.clear()
    broker.up = True
    await until(lambda: broker.stalled)
    broker.open.set()
    broker.kill()
    broker.up = True
    await until(lambda: hub.stats().backend.state == "connected")
    assert subscribed(broker) == {"room"}


async def test_clients_may_be_closed_after_a_gap(broker):
    hub = Broadcast(backend=Bus(broker), after_gap="close")
    peer, other = await joined(hub, "room"), await joined(hub, "room")
    broker.kill()
    broker.up = True
    await until(lambda: peer.closed == other.closed == 1012)
    assert len(hub) == 0
    await hub.disconnect()


async def test_who_is_there_already_need_not_wait_for_the_broker(hub, broker):
    """As with `connect` and then `serve`."""
    peer = await joined(hub, "room")
    broker.kill()
    await until(lambda: hub.stats().backend.state == "reconnecting")
    await hub.connect(peer.websocket, "room")
    broker.up = True
    await until(lambda: hub.stats().backend.gaps)
    await hub.publish("room", "x")
    await until(lambda: peer.got == ["x"])
    await hub.disconnect(peer.websocket)
    await until(lambda: not hub._hub.link.subscriptions.holds)


async def test_who_comes_during_an_outage_has_no_gap(broker, monkeypatch):
    monkeypatch.setattr(sender, "TIMEOUT", 10)
    hub = Broadcast(backend=Bus(broker), after_gap="close")
    before = await joined(hub, "room")
    broker.kill()
    await until(lambda: hub.stats().backend.state == "reconnecting")
    coming = asyncio.create_task(joined(hub, "room"))
    others = asyncio.create_task(joined(hub, "another room"))
    await until(lambda: hub.stats().backend.channels == 2)
    broker.up = True
    during, other = await coming, await others
    await until(lambda: before.closed == 1012)
    await hub.publish("room", "x")
    await hub.publish("another room", "y")
    await until(lambda: (during.got, other.got) == (["x"], ["y"]))
    await hub.disconnect()


async def test_who_comes_when_only_its_channel_is_back_has_no_gap(broker, monkeypatch):
    monkeypatch.setattr(sender, "TIMEOUT", 10)
    go = asyncio.Event()

    class Gated(Bus):
        async def subscribe(self, channel):
            if self.starts == 2 and channel == "slow":
                await go.wait()
            await super().subscribe(channel)

    hub = Broadcast(backend=Gated(broker), after_gap="close")
    before = await joined(hub, "room", "slow")
    broker.kill()
    broker.up = True
    await until(lambda: hub._hub.link._backend.starts == 2)
    holds = hub._hub.link.subscriptions.holds
    await until(lambda: holds["room"].subscribed)
    coming = asyncio.create_task(joined(hub, "room"))
    await until(lambda: holds["room"].count == 2)
    go.set()
    during = await coming
    await until(lambda: before.closed == 1012)
    await hub.publish("room", "x")
    await until(lambda: during.got == ["x"])
    await hub.disconnect()


async def test_an_error_in_on_gap_is_logged(broker, caplog):
    def raising(gap: Gap) -> None:
        raise LookupError("a mistake")

    hub = Broadcast(backend=Bus(broker), on_gap=raising)
    peer = await joined(hub, "room")
    broker.kill()
    broker.up = True
    await until(lambda: hub.stats().backend.gaps)
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])
    assert "on_gap raised" in caplog.text
    caplog.clear()
    await hub.disconnect()


async def test_clients_that_send_during_an_outage_stay_if_the_hook_lets_them(hub, broker, caplog):
    peer = Peer()
    told = []
    note = lambda websocket, data, exc: told.append(data)  # noqa: E731  # one line says it
    serving = asyncio.create_task(hub.serve(peer.websocket, "room", on_publish_error=note))
    await until(lambda: len(hub) == 1)
    broker.kill()
    await lost(hub)
    for number in range(300):
        peer.say(str(number))
    await until(lambda: hub.stats().backend.lost == 299)  # one is waited for
    await until(lambda: hub.stats().failed == 1)
    await until(lambda: len(told) == 300)
    assert told == [str(number) for number in range(300)]
    assert [r.levelname for r in caplog.records].count("ERROR") == 1
    caplog.clear()
    broker.up = True
    await until(lambda: hub.stats().backend.state == "connected")
    peer.say("works")
    await until(lambda: peer.got == ["works"])
    peer.leave()
    await serving


# Opening and closing


async def test_a_broker_that_is_not_there_is_said_at_once(broker):
    broker.up = False
    hub = Broadcast(backend=Bus(broker), open_timeout=0)
    with pytest.raises(BackendUnavailable, match="is down"):
        await hub.connect()
    peer = Peer()
    with pytest.raises(BackendUnavailable):
        await hub.connect(peer.websocket)
    assert not peer.sent
    with pytest.raises(BackendUnavailable, match="not open"):
        hub.publish_nowait("room", "x")
    assert not await hub.healthy()
    assert hub.stats().backend.state == "closed"
    broker.up = True
    await hub.connect()
    await hub.disconnect()
    with pytest.raises(BackendUnavailable, match="not open"):
        await hub.publish("room", "x")
    await hub.connect()
    assert await hub.healthy()
    await hub.disconnect()


async def test_a_broker_that_takes_too_long(broker, monkeypatch):
    monkeypatch.setattr(session, "CONNECT_TIMEOUT", 0.05)
    broker.open.clear()
    hub = Broadcast(backend=Bus(broker), open_timeout=0)
    with pytest.raises(BackendUnavailable, match="in time"):
        await hub.connect()
    assert not broker.buses


async def test_closing_during_an_outage(broker):
    hub = Broadcast(backend=Bus(broker))
    peer = await joined(hub, "room")
    broker.kill()
    await lost(hub)
    await hub.disconnect()
    assert peer.closed == 1001
    assert not starcast_tasks()
    assert not hub._hub.link.subscriptions.holds


async def test_closing_while_a_publish_is_under_way(broker):
    hub = Broadcast(backend=Bus(broker))
    await joined(hub, "room")
    broker.open.clear()
    publishing = asyncio.create_task(hub.publish("room", "x"))
    await until(lambda: broker.stalled)
    await hub.disconnect()
    with pytest.raises(BackendUnavailable):
        await publishing


async def test_a_backend_that_does_not_stop(broker, monkeypatch, caplog):
    monkeypatch.setattr(life, "STOP_TIMEOUT", 0.2)

    class Stuck(Bus):
        async def stop(self) -> None:
            await asyncio.Event().wait()

    hub = Broadcast(backend=Stuck(broker))
    await hub.connect()
    await hub.disconnect()
    await until(lambda: "was not closed cleanly" in caplog.text)


async def test_closing_from_another_loop(broker, other):
    hub = Broadcast(backend=Bus(broker))
    peer = await joined(hub, "room")
    await asyncio.to_thread(other.run, hub.disconnect())
    assert hub.stats().backend.state == "closed"
    await until(lambda: peer.closed == 1001)
    assert not broker.buses


async def test_the_loop_of_the_connection_ends(broker):
    """As with bare TestClient sockets, each of which has a loop of its own."""
    gaps: list[Gap] = []
    hub = Broadcast(backend=Bus(broker), on_gap=gaps.append)
    first = OtherLoop()
    await asyncio.to_thread(first.run, hub.connect())
    peer = await joined(hub, "room")
    await asyncio.to_thread(first.close)
    assert not await hub.healthy()
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])
    assert hub._hub.link._life.loop is asyncio.get_running_loop()
    assert len(gaps) == 1
    await hub.disconnect()


async def test_a_hub_that_was_never_opened_closes(broker):
    await Broadcast(backend=Bus(broker)).disconnect()
    assert not broker.calls


async def test_closing_after_the_loop_of_the_connection_has_ended(broker):
    hub = Broadcast(backend=Bus(broker))
    first = OtherLoop()
    await asyncio.to_thread(first.run, hub.connect())
    await asyncio.to_thread(first.close)
    await hub.disconnect()
    assert hub.stats().backend.state == "closed"
    assert not broker.buses


async def test_an_earlier_connection_has_no_say_any_more(hub, broker):
    peer = await joined(hub, "room")
    bus = hub._hub.link._backend
    deliver, lost_before = bus.deliver, bus.lost
    broker.kill()
    broker.up = True
    await until(lambda: hub.stats().backend.gaps)
    lost_before(ConnectionError("late"))
    deliver("room", b"late")
    await hub.publish("room", "in time")
    await until(lambda: peer.got == ["in time"])
    assert hub.stats().backend.state == "connected"


async def test_a_connection_that_breaks_while_it_subscribes(broker):
    class Fragile(Bus):
        async def subscribe(self, channel: str) -> None:
            if channel == "room" and self.starts == 2:
                del self.broker.buses[self]
                self.lost(ConnectionError("broke again"))
            await super().subscribe(channel)

    bus = Fragile(broker)
    hub = Broadcast(backend=bus)
    peer = await joined(hub, "room")
    broker.kill()
    broker.up = True
    await until(lambda: hub.stats().backend.gaps)
    assert bus.starts == 3
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])
    await hub.disconnect()


@pytest.mark.parametrize("leaving", [False, True])
async def test_a_subscription_under_way_when_the_connection_breaks(hub, broker, leaving):
    peer = await joined(hub, "room")
    broker.open.clear()
    if leaving:
        await hub.disconnect(peer.websocket)
    else:
        connecting = asyncio.create_task(hub.connect(peer.websocket, "another"))
    await until(lambda: broker.stalled)
    broker.kill()
    broker.up = True
    broker.open.set()
    await until(lambda: hub.stats().backend.gaps)
    if leaving:
        await until(lambda: not hub._hub.link.subscriptions.holds)
        assert not subscribed(broker)
    else:
        with contextlib.suppress(BackendUnavailable):  # which of both comes first
            await connecting
        await until(lambda: subscribed(broker) == set(hub.channels))


def test_what_becomes_of_clients_after_a_gap_is_one_of_two():
    with pytest.raises(ConfigurationError, match="after_gap"):
        Broadcast(after_gap="explode")


# What checks a backend of one's own


async def test_a_check_says_what_is_wrong(monkeypatch):
    monkeypatch.setattr(testing, "DEADLINE", 0.05)

    class Deaf(Bus):
        async def publish(self, messages) -> None:
            pass

    class Leaking(Bus):
        async def stop(self) -> None:
            await super().stop()
            tasks.append(asyncio.create_task(asyncio.Event().wait()))

    class Complaining(Bus):
        async def stop(self) -> None:
            self.lost(ConnectionError("stopped"))

    tasks: list[asyncio.Task] = []
    with pytest.raises(AssertionError, match="0 of 2 messages"):
        await testing.what_is_published_arrives(Deaf)
    with pytest.raises(AssertionError, match="tasks are left"):
        await testing.nothing_is_left_behind(Leaking)
    with pytest.raises(AssertionError, match="`lost` was called"):
        await testing.a_channel_that_is_left_is_silent(Complaining)
    for task in tasks:
        task.cancel()
