"""One event loop's clients: fan-out, fairness to other tasks, threads, loops that end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import types
from collections.abc import AsyncIterator

import pytest

from starcast import Broadcast, Tuning, shard
from starcast.connection import Connection
from support import Peer, several, starcast_tasks, until, until_sync

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("road")]


@contextlib.asynccontextmanager
async def ticking() -> AsyncIterator[list[int]]:
    """Another task of the loop, which counts how often it gets its turn."""
    turns = [0]

    async def tick() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(tick())
    try:
        yield turns
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_nobody_waits_for_clients_that_are_behind():
    hub = Broadcast()
    peers = await several(hub, 200)
    for peer in peers[::2]:
        peer.open.clear()
    for number in range(3):
        await hub.send(str(number))
    assert all(peer.got == ["0", "1", "2"] for peer in peers[1::2])
    assert len(starcast_tasks()) == 100  # one for each that is behind, none for the others
    for peer in peers[::2]:
        peer.open.set()
    await until(lambda: not starcast_tasks())
    assert all(peer.got == ["0", "1", "2"] for peer in peers)
    assert hub.stats().delivered == 600


class Suspending(Peer):
    """A peer whose every send suspends."""

    async def send(self, message):
        await asyncio.sleep(0)
        await super().send(message)


async def test_a_server_whose_every_send_suspends_needs_few_turns_of_the_loop():
    hub = Broadcast()
    peers = await several(hub, 500, peer=Suspending)
    async with ticking() as turns:
        await hub.send("hello")
        while not all(peer.got for peer in peers):  # noqa: ASYNC110  # its turns are counted
            await asyncio.sleep(0)
        assert turns[0] < 100
    assert all(peer.got == ["hello"] for peer in peers)


async def test_many_deliveries_leave_turns_to_other_tasks():
    hub = Broadcast(tuning=Tuning(time_slice=1e-9))
    peers = await several(hub, 20 * shard.STEP)
    async with ticking() as turns:
        await hub.send("hello")
        assert turns[0] >= 19  # with slices of no length, each step is one
        assert len(starcast_tasks()) <= 1
    assert all(peer.got == ["hello"] for peer in peers)


async def test_very_many_get_what_one_of_them_does_not():
    hub = Broadcast()
    peers = await several(hub, 300)
    await hub.send("hello", exclude=peers[150].websocket)
    assert [index for index, peer in enumerate(peers) if peer.got != ["hello"]] == [150]
    assert hub.stats().delivered == 299


async def test_exclude_and_the_handlers_own_turn():
    hub = Broadcast()
    peers = await several(hub, 2)
    peers[0].open.clear()
    await hub.send("1", exclude=peers[1].websocket)
    own = asyncio.create_task(peers[0].websocket.send_text("2"))
    await until(lambda: hub.stats().pending == 0 and len(starcast_tasks()) == 1)
    peers[0].open.set()
    await own
    hub.publish_nowait("default", "3")
    await peers[0].websocket.send_text("4")
    assert [peer.got for peer in peers] == [["1", "2", "3", "4"], ["3"]]


async def test_a_burst_for_clients_that_are_behind_leaves_turns_to_other_tasks():
    hub = Broadcast(tuning=Tuning(time_slice=1e-9))
    (peer,) = await several(hub, 1)
    peer.open.clear()
    async with ticking() as turns:
        for number in range(50):
            hub.publish_nowait("default", str(number) + "x" * 15_000)
        await hub.send("last")
        assert turns[0] >= 12  # 64 KiB are one step
    peer.open.set()
    await until(lambda: len(peer.got) == 51)


async def test_one_message_for_very_many_that_are_behind_leaves_turns_to_other_tasks():
    hub = Broadcast(tuning=Tuning(time_slice=1e-9))
    peers = await several(hub, 1000)
    for peer in peers:
        peer.open.clear()
    await hub.send("1")
    async with ticking() as turns:
        await hub.send("2")
        assert turns[0] >= 7  # one for each 128 of them
    for peer in peers:
        peer.open.set()
    await until(lambda: not starcast_tasks())
    assert all(peer.got == ["1", "2"] for peer in peers)


async def test_a_fan_out_to_ten_thousand_does_not_hold_the_loop(monkeypatch):
    """Nothing else waits for longer than 10 ms, by a clock that each send moves on by 10 us."""
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(shard, "time", clock)

    class Sent(list):
        def append(self, message) -> None:
            clock.now += 10e-6
            super().append(message)

    hub = Broadcast()
    peers = await several(hub, 10_000)
    for peer in peers:
        peer.sent = Sent()
    clock.now = 0.0
    turns: list[float] = []  # when another task of the loop had its turn

    async def watch() -> None:
        while True:
            turns.append(clock.now)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    await until(lambda: turns)
    await hub.publish("default", "hello")
    assert clock.now == pytest.approx(0.1)
    turns.append(clock.now)
    watching.cancel()
    assert max(later - earlier for earlier, later in itertools.pairwise(turns)) < 0.01
    assert all(peer.got == ["hello"] for peer in peers)


def test_the_end_of_asyncio_run_destroys_no_task(caplog):
    async def main() -> None:
        hub = Broadcast()
        peers = await several(hub, 50)
        for peer in peers[::2]:
            peer.open.clear()
        await hub.send("1")
        hub.publish_nowait("default", "2")
        own = asyncio.create_task(peers[0].websocket.send_text("own"))
        await asyncio.sleep(0)
        hub.publish_nowait("default", "3")
        await asyncio.sleep(0)
        assert not own.done()

    asyncio.run(main())
    gc.collect()
    assert not caplog.records


async def test_publish_nowait_from_a_thread_keeps_that_threads_order():
    hub = Broadcast()
    peers = await several(hub, 3)

    def publish(name: str) -> None:
        for number in range(200):
            hub.publish_nowait("default", f"{name}{number}")

    await asyncio.gather(*(asyncio.to_thread(publish, name) for name in "abc"))
    await until(lambda: all(len(peer.got) == 600 for peer in peers))
    assert peers[0].got == peers[1].got == peers[2].got
    for name in "abc":
        mine = [message for message in peers[0].got if message.startswith(name)]
        assert mine == [f"{name}{number}" for number in range(200)]


async def test_clients_on_several_loops_see_one_order(other):
    hub = Broadcast()
    here = await several(hub, 2)
    there = other.run(several(hub, 2))

    async def publish(name: str) -> None:
        for number in range(100):
            await hub.publish("default", f"{name}{number}")

    theirs = asyncio.run_coroutine_threadsafe(publish("there"), other.loop)
    await publish("here")
    await asyncio.wrap_future(theirs)
    await until(lambda: all(len(peer.got) == 200 for peer in here + there))
    assert here[0].got == here[1].got == there[0].got == there[1].got


async def test_a_client_may_be_told_and_left_and_closed_from_another_loop(other):
    hub = Broadcast()
    one, two = other.run(several(hub, 2))
    await hub.send("to you", to=one.websocket)
    await hub.disconnect(one.websocket)
    await hub.close(two.websocket, 4000)
    assert two.closed == 4000
    await until(lambda: one.got == ["to you"])
    assert len(hub) == 0


def test_a_publisher_without_any_loop(other):
    hub = Broadcast()
    (peer,) = other.run(several(hub, 1))
    hub.publish_nowait("default", "from a plain thread")
    until_sync(lambda: peer.got)
    assert peer.got == ["from a plain thread"]


async def test_a_publisher_in_a_tight_loop_starves_nobody_and_grows_nothing():
    hub = Broadcast()
    (peer,) = await several(hub, 1)
    stop = asyncio.Event()

    async def publish(channel: str) -> int:
        count = 0
        while not stop.is_set():
            await hub.publish(channel, "x" * 100)
            count += 1
        return count

    publishers = [asyncio.create_task(publish(channel)) for channel in ("default", "empty")]
    async with ticking() as turns:
        for _ in range(5):
            before, got = turns[0], len(peer.got)
            await until(lambda: turns[0] > before + 100 and len(peer.got) > got)  # noqa: B023  # awaited here
            assert hub.stats().pending < 10
            assert hub.stats().buffered == 0
    stop.set()
    assert all(await asyncio.gather(*publishers))


async def test_cancelled_runners_are_replaced_in_a_moment():
    hub = Broadcast()
    peers = await several(hub, 3)
    peers[0].open.clear()
    monitored = asyncio.create_task(hub.send("1"))
    await until(lambda: peers[0].stalled)
    hub.publish_nowait("default", "2")
    await asyncio.sleep(0)
    for task in starcast_tasks() - {monitored}:  # on a busy machine that has not ended yet
        task.cancel()
    await monitored
    await until(lambda: peers[1].got == peers[2].got == ["1", "2"])
    await until(lambda: len(hub) == 2)


async def test_a_mistake_in_a_delivery_is_logged_and_is_not_the_end(monkeypatch, caplog):
    hub = Broadcast()
    peers = await several(hub, 2)
    peers[0].open.clear()
    await hub.send("1")

    def mistaken(connection, item):
        monkeypatch.undo()
        raise LookupError("a mistake")

    monkeypatch.setattr(Connection, "offer", mistaken)
    # Whoever waits for a message is told all the same.
    lost = hub.send("lost", to=peers[1].websocket)
    await asyncio.wait_for(asyncio.gather(lost, hub.send("2")), 10)
    hub.publish_nowait("default", "3")
    await until(lambda: peers[1].got[-1] == "3")
    assert [record.getMessage() for record in caplog.records] == ["messages were lost"]
    caplog.clear()
    peers[0].open.set()
    await until(lambda: not starcast_tasks())


@pytest.mark.parametrize("turns", range(12))
async def test_a_client_falls_behind_while_the_others_are_looked_up(turns):
    hub = Broadcast(tuning=Tuning(time_slice=1e-9))
    peers = await several(hub, 6 * shard.STEP)
    sending = asyncio.create_task(hub.send("1"))
    for _ in range(turns):
        await asyncio.sleep(0)
    peers[-1].open.clear()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    peers[-1].open.set()
    await sending
    await hub.send("2")
    await until(lambda: peers[-1].got[-1:] == ["2"])
    assert all(peer.got == ["1", "2"] for peer in peers)
    await until(lambda: not starcast_tasks())


async def test_what_a_handler_sends_itself_waits_for_no_turn_of_the_loop():
    hub = Broadcast()
    (peer,) = await several(hub, 1)
    await peer.websocket.send_text("hello")
    assert peer.got == ["hello"]


async def test_a_client_talks_to_others_that_keep_up():
    hub = Broadcast()
    others = await several(hub, 3)
    peer = Peer()
    for number in range(5):
        peer.say(str(number))
    peer.leave()
    await hub.serve(peer.websocket)
    await until(lambda: all(len(each.got) == 5 for each in others))
    assert all(each.got == ["0", "1", "2", "3", "4"] for each in others)


async def test_a_client_that_talks_waits_for_another_that_has_fallen_behind():
    hub = Broadcast(max_buffer=4096)
    (other,) = await several(hub, 1)
    peer = Peer()
    serving = asyncio.create_task(hub.serve(peer.websocket))
    await until(lambda: len(hub) == 2)
    texts = [str(number) * 1000 for number in range(8)]
    other.open.clear()
    while not hub.stats().waiting_senders:
        said = len(peer.got)
        peer.say(texts[said])
        await until(lambda said=said: hub.stats().waiting_senders or len(peer.got) > said)
    assert 0 < len(peer.got) < len(texts)
    assert other.got == []
    other.open.set()
    await until(lambda: other.got == texts[: len(peer.got)] and not hub.stats().waiting_senders)
    assert other.closed is None
    peer.leave()
    await serving
