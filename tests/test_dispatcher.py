"""What waits for an event loop: its bound, and who waits for space."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import pickle
import threading
from types import SimpleNamespace

import pytest

from starcast import (
    BackendUnavailable,
    Broadcast,
    ConfigurationError,
    ConnectionManager,
    NotConnected,
    PublishQueueFull,
    Tuning,
    forks,
)
from starcast.broker.local import LocalLink
from starcast.dispatcher import Dispatcher
from starcast.event import Event
from starcast.frames import PLAIN
from starcast.history import Histories
from starcast.registry import Registry
from support import Broker, Bus, Peer, several, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def blocked(other):
    """The other loop gets no turn until the test releases it."""
    release, entered = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        release.wait(20)

    def start() -> threading.Event:
        other.loop.call_soon_threadsafe(block)
        assert entered.wait(20)
        return release

    yield start
    release.set()


@pytest.fixture
def small() -> Tuning:
    return Tuning(max_pending=1000)


def fill(hub: Broadcast) -> None:
    """Publish as much as may wait for a loop that gets no turn."""
    with contextlib.suppress(PublishQueueFull):
        while True:
            hub.publish_nowait("default", "x")


async def test_what_waits_for_a_loop_is_bounded_and_refused_by_name(other, blocked, small):
    hub = Broadcast(tuning=small)
    (here,) = await several(hub, 1, "room")
    (there,) = other.run(several(hub, 1, "room"))
    release = blocked()
    sent = []
    with pytest.raises(PublishQueueFull, match="waiting") as caught:  # noqa: PT012  # of a loop
        for number in range(100):
            hub.publish_nowait("room", str(number))
            sent.append(str(number))
            await hub.send("somewhere else")  # other channels are untouched
    sent_on = pickle.loads(pickle.dumps(caught.value))
    assert (type(sent_on), str(sent_on)) == (PublishQueueFull, str(caught.value))
    assert 0 < len(sent) < 20
    assert hub.stats().failed == 1
    assert hub.stats().pending == len(sent)
    release.set()
    await until(lambda: len(there.got) == len(sent))
    assert here.got == there.got == sent


async def test_publish_waits_for_room(other, blocked, small):
    hub = Broadcast(tuning=small)
    (there,) = other.run(several(hub, 1))
    release = blocked()
    fill(hub)
    sent = hub.stats().pending
    # Room on this loop is not what it waits for.
    (here,) = await several(hub, 1, "here")
    hub.publish_nowait("here", "x")
    publishing = asyncio.create_task(hub.publish("default", "at last"))
    await until(lambda: here.got)
    gone = asyncio.create_task(hub.publish("default", "never"))
    await until(lambda: hub.stats().waiting_senders == 2)
    gone.cancel()
    await asyncio.wait([gone])
    assert hub.stats().waiting_senders == 1
    assert not publishing.done()
    release.set()
    await publishing
    await until(lambda: there.got[-1:] == ["at last"])
    assert len(there.got) == sent + 1


@pytest.mark.parametrize("seconds", [0.05, 1e-9])
async def test_publish_gives_up_if_there_is_no_space(other, blocked, small, seconds):
    hub = Broadcast(tuning=dataclasses.replace(small, publish_timeout=seconds))
    other.run(several(hub, 1))
    blocked()
    fill(hub)
    failed = hub.stats().failed
    with pytest.raises(PublishQueueFull):
        await hub.publish("default", "x")
    assert hub.stats().failed == failed + 1
    assert hub.stats().waiting_senders == 0


async def test_a_personal_message_waits_for_room_too(other, blocked, small):
    hub = Broadcast(tuning=small)
    (there,) = other.run(several(hub, 1))
    release = blocked()
    fill(hub)
    sending = asyncio.create_task(hub.send("you", to=there.websocket))
    await until(lambda: hub.stats().waiting_senders == 1)
    release.set()
    await sending
    await until(lambda: there.got[-1:] == ["you"])


async def test_a_message_larger_than_the_bound_passes_when_nothing_waits(small):
    hub = Broadcast(tuning=small)
    (peer,) = await several(hub, 1)
    await hub.send("x" * 5000)
    assert peer.got == ["x" * 5000]


async def test_a_client_that_leaves_while_a_message_to_it_waits_for_room(other, blocked, small):
    hub = Broadcast(tuning=small)
    (there,) = other.run(several(hub, 1))
    release = blocked()
    fill(hub)
    sending = asyncio.create_task(hub.send("too late", to=there.websocket))
    await until(lambda: hub.stats().waiting_senders == 1)
    ConnectionManager(hub).disconnect(there.websocket)
    release.set()
    with pytest.raises(NotConnected):
        await sending
    await until(lambda: not hub.stats().pending)
    assert "too late" not in there.got


async def test_space_that_others_have_taken_is_waited_for_again(small):
    hub = Broadcast(tuning=small)
    (peer,) = await several(hub, 1)
    sending = [asyncio.create_task(hub.publish("default", letter * 600)) for letter in "abc"]
    fill(hub)
    await asyncio.gather(*sending)  # there is space for one of them at a time
    assert sorted(got[0] for got in peer.got if len(got) == 600) == ["a", "b", "c"]
    assert hub.stats().failed == 1  # what `fill` was refused


async def test_what_the_garbage_collector_runs_may_publish(other, monkeypatch):
    """Finalizers run wherever memory is allocated, also while the hub's lock is held."""
    hub = Broadcast()
    (there,) = other.run(several(hub, 1))

    class Last:
        def __init__(self):
            self.itself = self  # so that only the collector finds it

        def __del__(self):
            hub.publish_nowait("default", "last words")

    def is_closed() -> bool:  # the hub asks its event loops with its lock held
        monkeypatch.undo()
        Last()
        gc.collect()
        return False

    monkeypatch.setattr(other.loop, "is_closed", is_closed)
    assert len(hub) == 1
    await until(lambda: there.got == ["last words"])


# Before it waits


@pytest.mark.parametrize("backend", [None, Bus])
async def test_a_hub_that_is_closed_or_the_parents_takes_no_message(backend):
    hub = Broadcast(backend=backend and backend())
    async with hub:
        pass
    with pytest.raises(BackendUnavailable, match="not open"):
        await hub.publish("default", "x")
    with pytest.raises(BackendUnavailable, match="not open"):
        hub.publish_nowait("default", "x")
    await hub.connect()
    forks.after_fork()
    with pytest.raises(ConfigurationError, match="before the process was forked"):
        await hub.publish("default", "x")
    with pytest.raises(ConfigurationError, match="before the process was forked"):
        hub.publish_nowait("default", "x")
    assert hub.stats().published == 0


async def test_a_hub_with_a_broker_that_was_never_opened_is_one_line_in_the_log(caplog):
    hub = Broadcast(backend=Bus())
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="not open"):
            hub.publish_nowait("default", "x")
    (line,) = caplog.messages
    assert line.startswith("publish_nowait failed: the hub is not open")


# The end of waiting


async def test_what_the_broker_does_not_confirm_has_failed():
    broker = Broker()
    hub = Broadcast(backend=Bus(broker), tuning=Tuning(publish_timeout=0.05))
    async with hub:
        await hub.publish("default", "x")
        assert (hub.stats().published, hub.stats().failed) == (1, 0)
        broker.kill()
        with pytest.raises(BackendUnavailable):
            await hub.publish("default", "x")
        assert hub.stats().failed == 1


async def test_what_a_client_says_waits_for_space_on_another_loop(other, blocked, small):
    hub = Broadcast(tuning=small)
    (there,) = other.run(several(hub, 1))
    peer = Peer()
    serving = asyncio.create_task(hub.serve(peer.websocket))
    await until(lambda: len(hub) == 2)
    release = blocked()
    fill(hub)
    peer.say("at last")
    await until(lambda: hub.stats().waiting_senders == 1)
    assert peer.got[-1:] != ["at last"]
    release.set()
    await until(lambda: peer.got[-1:] == there.got[-1:] == ["at last"])
    peer.leave()
    await serving


async def test_who_publishes_without_a_pause_leaves_turns_to_other_tasks(road):
    hub = Broadcast()
    (peer,) = await several(hub, 1)
    turns = 0

    async def work() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    working = asyncio.create_task(work())
    for number in range(1000):
        await hub.publish("default", str(number))
        assert peer.got[-1] == str(number)
    working.cancel()
    assert turns > 10  # with ready frames, no message is waited for


class Member:
    """A member on the fast path that does something when it is written to."""

    def __init__(self, write) -> None:
        self.frames = SimpleNamespace(direct=write, wire_format=PLAIN)
        self.id = 0


async def test_what_is_queued_behind_a_delivery_in_progress_has_a_bound():
    registry = Registry(
        Tuning(), lambda channel: None, lambda missed: None, lambda command, members: None
    )
    dispatcher = Dispatcher(registry, LocalLink(registry, Histories(None)), Histories(None))
    dispatcher.open_here()
    shard = registry.here()
    events = [Event("room", f"{number}") for number in range(3)]
    written: list[bytes] = []
    taken: list[bool] = []

    def write(frames: bytes) -> None:
        written.append(frames)
        if not taken:  # the delivery of the first one is in progress
            taken.append(dispatcher.write_now(events[1], shard, events[1].cost))
            taken.append(dispatcher.write_now(events[2], shard, events[1].cost))

    with registry.lock:
        shard.join(Member(write), "room")
    dispatcher.publish(events[0])
    await until(lambda: not shard.awake)
    assert taken == [True, False]
    assert written == [event.frame(PLAIN) for event in events[:2]]
    assert dispatcher.write_now(events[2], shard, 0)
    assert written[2:] == [events[2].frame(PLAIN)]
