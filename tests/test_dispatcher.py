"""What waits for an event loop: its bound, and who waits for space."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import pickle
import threading

import pytest

from starcast import (
    Broadcast,
    ConnectionManager,
    Event,
    NotConnected,
    PublishQueueFull,
    Tuning,
)
from starcast.broker.local import LocalLink
from starcast.dispatcher import Dispatcher
from starcast.registry import Registry
from starcast.sync.bounded import BoundedQueue, Full
from support import several, until

pytestmark = pytest.mark.anyio


def parts() -> tuple[Registry, Dispatcher]:
    """Return those of a hub in memory that publish."""
    registry = Registry(Tuning(), lambda channel: None, lambda missed: None)
    return registry, Dispatcher(registry, LocalLink(registry.deliver, registry.shards))


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
    with contextlib.suppress(PublishQueueFull):
        while True:
            hub.publish_nowait("default", "x")
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


async def test_publish_gives_up_if_there_is_no_space(other, blocked, small):
    hub = Broadcast(tuning=dataclasses.replace(small, publish_timeout=0.05))
    other.run(several(hub, 1))
    blocked()
    with contextlib.suppress(PublishQueueFull):
        while True:
            hub.publish_nowait("default", "x")
    failed = hub.stats().failed
    with pytest.raises(PublishQueueFull):
        await hub.publish("default", "x")
    assert hub.stats().failed == failed + 1
    assert hub.stats().waiting_senders == 0


async def test_a_personal_message_waits_for_room_too(other, blocked, small):
    hub = Broadcast(tuning=small)
    (there,) = other.run(several(hub, 1))
    release = blocked()
    with contextlib.suppress(PublishQueueFull):
        while True:
            hub.publish_nowait("default", "x")
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
    with contextlib.suppress(PublishQueueFull):
        while True:
            hub.publish_nowait("default", "x")
    sending = asyncio.create_task(hub.send("too late", to=there.websocket))
    await until(lambda: hub.stats().waiting_senders == 1)
    ConnectionManager(hub).disconnect(there.websocket)
    release.set()
    with pytest.raises(NotConnected):
        await sending
    await until(lambda: not hub.stats().pending)
    assert "too late" not in there.got


async def test_a_refusal_that_is_not_about_a_queue_is_final():
    _, dispatcher = parts()
    with pytest.raises(PublishQueueFull, match="no space"):
        await dispatcher.retry(lambda: None, PublishQueueFull("no space"))
    assert dispatcher.failed == 1


async def test_room_that_others_have_taken_is_waited_for_again():
    registry, dispatcher = parts()
    queue: BoundedQueue[None] = BoundedQueue(registry.lock, 1000)
    outcomes = [Full("", queue), Full("", queue), None]

    def hand_over():
        if error := outcomes.pop(0):
            raise error

    await dispatcher.retry(hand_over, Full("", queue))
    assert outcomes == []
    assert dispatcher.failed == 0


def test_what_the_garbage_collector_runs_may_publish():
    """Finalizers run wherever memory is allocated, also while the hub's lock is held."""
    registry, dispatcher = parts()

    class Last:
        def __init__(self):
            self.itself = self  # so that only the collector finds it

        def __del__(self):
            dispatcher.publish(Event("default", "last words"))

    with registry.lock:
        Last()
        gc.collect()
    assert dispatcher.published == 1
