from __future__ import annotations

import dataclasses
import inspect

import pytest

from starcast import Broadcast, EncodingError, Stats
from starcast.event import OVERHEAD
from starcast.stats import Counters
from support import Peer, until

pytestmark = pytest.mark.anyio

EMPTY = Stats(
    open=False,
    clients=0,
    subscribers=0,
    channels={},
    published=0,
    failed=0,
    delivered=0,
    dropped=0,
    slow_clients=0,
    pending=0,
    buffered=0,
)


def test_a_new_hub_has_done_nothing():
    assert Broadcast().stats() == EMPTY


def test_a_snapshot_cannot_be_changed():
    stats = Broadcast().stats()
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.clients = 1


async def test_the_channels_of_a_snapshot_are_a_copy():
    hub = Broadcast()
    peer = Peer()
    await hub.connect(peer.websocket, "room")
    stats = hub.stats()
    stats.channels["room"] = 7
    stats.channels["other"] = 1
    assert hub.channels == hub.stats().channels == {"room": 1}
    before = hub.stats()
    await hub.disconnect()
    assert before.channels == {"room": 1}
    assert hub.stats().channels == {}


def test_every_field_is_explained():
    documented = inspect.getdoc(Stats).partition("Attributes:")[2]
    for field in dataclasses.fields(Stats):
        assert f"\n    {field.name}: " in documented


def test_counters_add_up():
    one, two = Counters(), Counters()
    assert (one.delivered, one.dropped, one.slow_clients) == (0, 0, 0)
    one.delivered, one.dropped, one.slow_clients = 1, 2, 3
    two.delivered, two.dropped, two.slow_clients = 10, 20, 30
    one.add(two)
    assert (one.delivered, one.dropped, one.slow_clients) == (11, 22, 33)
    assert (two.delivered, two.dropped, two.slow_clients) == (10, 20, 30)


async def test_a_hub_counts_who_is_there_and_what_was_done():
    hub = Broadcast()
    one, two = Peer(), Peer()
    await hub.connect(one.websocket, "a")
    await hub.connect(one.websocket, "b")
    await hub.connect(two.websocket, "a")
    async with hub.subscribe("a") as subscriber:
        before = hub.stats()
        await hub.publish("a", "to three")
        await anext(subscriber)
        await hub.publish("b", "to one")
        await hub.publish("c", "to nobody")
        await hub.send("personal", to=two.websocket)
        after = hub.stats()
    assert before.open
    assert (before.clients, before.subscribers) == (2, 1)
    assert before.channels == {"a": 2, "b": 1}
    assert (before.published, before.delivered) == (0, 0)
    assert (after.published, after.delivered, after.pending) == (3, 5, 0)
    assert (after.failed, after.dropped, after.slow_clients) == (0, 0, 0)
    await hub.disconnect()
    stats = hub.stats()
    assert not stats.open
    assert (stats.clients, stats.subscribers, stats.channels) == (0, 0, {})
    assert (stats.published, stats.delivered) == (3, 5)


async def test_what_is_on_its_way_is_pending():
    hub = Broadcast()
    peer = Peer()
    await hub.connect(peer.websocket)
    hub.publish_nowait("default", "one")
    hub.publish_nowait("default", "two")
    assert hub.stats().pending == 2
    await until(lambda: hub.stats().pending == 0)
    assert peer.got == ["one", "two"]
    await hub.disconnect()


async def test_what_waits_for_slow_clients_and_subscribers_is_buffered():
    hub = Broadcast()
    peer = Peer()
    await hub.connect(peer.websocket)
    peer.open.clear()
    async with hub.subscribe() as subscriber:
        await hub.send("in flight")
        await hub.send("x" * 100)
        in_flight, waiting = len("in flight") + OVERHEAD, 100 + OVERHEAD
        assert hub.stats().buffered == (in_flight + waiting) + waiting
        await anext(subscriber)
        assert hub.stats().buffered == waiting + waiting
    assert hub.stats().buffered == waiting
    peer.open.set()
    await until(lambda: hub.stats().buffered == 0)
    assert hub.stats().delivered == 3  # one of the subscriber's two was never handed out
    await hub.disconnect()


@pytest.mark.parametrize(
    ("overflow", "dropped", "slow_clients"),
    [("drop_oldest", 2, 0), ("drop_newest", 2, 0), ("latest", 3, 0), ("disconnect", 3, 1)],
)
async def test_what_a_client_did_not_get_is_counted(overflow, dropped, slow_clients):
    hub = Broadcast(max_buffer=2 * (1 + OVERHEAD), overflow=overflow)
    peer = Peer()
    await hub.connect(peer.websocket)
    peer.open.clear()
    # One is in flight, two have room, two have not; whoever is cut off gets no more.
    for number in "12345":
        await hub.send(number)
    stats = hub.stats()
    assert (stats.dropped, stats.slow_clients) == (dropped, slow_clients)
    assert stats.clients == 1 - slow_clients
    peer.open.set()
    await until(lambda: hub.stats().buffered == 0 and len(hub.stats().channels) == 1 - slow_clients)
    await hub.disconnect()
    assert hub.stats().delivered == len(peer.got)


async def test_what_was_not_published_is_not_counted():
    hub = Broadcast()
    with pytest.raises(EncodingError):
        await hub.send(object())
    assert hub.stats() == EMPTY
