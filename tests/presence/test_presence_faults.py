"""What becomes of members when workers, brokers, event loops and callers fail."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid

import pytest

from presence.rooms import QUICK, TUNING, are, hubs, ids, member, told, until_counts, worker
from starcast import (
    BackendUnavailable,
    Broadcast,
    ConfigurationError,
    History,
    Member,
    MemberCounts,
    Presence,
    Tuning,
)
from support import BUSY, Broker, Bus, OtherLoop, Peer, starcast_tasks, until

pytestmark = pytest.mark.anyio

LONG = Presence(ttl=600, grace=0.3, interval=0.02)


# Workers


async def test_the_members_of_a_killed_worker_are_gone_within_the_ttl(url):
    name = uuid.uuid4().hex
    presence = Presence(ttl=1.5, grace=0.3, interval=0.02)
    async with (
        Broadcast(url, name=name, presence=presence) as hub,
        worker(url, name, presence.ttl) as process,
        hub.watch_members("room") as watch,
    ):
        await member(hub, "me")
        await are(hub, "ada", "me")
        process.kill()
        killed = time.monotonic()
        await asyncio.sleep(presence.ttl / 4)
        assert await ids(hub) == ["ada", "me"]  # it might just be slow
        while "ada" not in [it.id for it in (await watch.get()).left]:
            pass
        assert time.monotonic() - killed < presence.ttl + BUSY
        assert await ids(hub) == ["me"]


async def test_a_blocked_loop_does_not_take_the_others_for_gone(urls):
    name = uuid.uuid4().hex
    async with (
        Broadcast(urls("redis"), name=name, presence=QUICK) as hub,
        worker(urls("redis"), name),
    ):
        await are(hub, "ada")
        watcher = Peer()
        await hub.connect(watcher.websocket, "room", join_leave=True)
        for _ in range(2):
            time.sleep(QUICK.ttl * 2)  # noqa: ASYNC251  # which is what this is about
            await member(hub, "me")
            await until(lambda: told(watcher))
        assert all(left == [] for _, left in told(watcher))
        assert await ids(hub) == ["ada", "me"]


async def test_a_hub_that_is_opened_again_begins_anew():
    broker = Broker()
    async with (
        Broadcast(backend=Bus(broker), presence=LONG, tuning=TUNING) as one,
        Broadcast(backend=Bus(broker), presence=LONG, tuning=TUNING) as two,
    ):
        for _ in range(3):
            await member(one, "ada")
            await member(two, "bob")
            await are(one, "ada", "bob")
            await are(two, "ada", "bob")
            await two.disconnect()
            await two.disconnect()
            await are(one, "ada")
            await two.connect()
            assert await ids(two) == ["ada"]
        await one.disconnect()
        await are(two)
    assert not starcast_tasks()


async def test_a_hub_that_is_closed_meanwhile_has_no_members():
    broker = Broker()
    async with Broadcast(backend=Bus(broker), presence=LONG, tuning=TUNING) as hub:
        await hub.connect(Peer().websocket, "other")
        broker.open.clear()
        asking = asyncio.create_task(hub.members("room"))
        await until(lambda: broker.stalled > 1)
        closing = asyncio.create_task(hub.disconnect())
        await asyncio.sleep(0.01)
        broker.open.set()
        await closing
        with pytest.raises(BackendUnavailable):
            await asking
    assert not starcast_tasks()


async def test_a_hub_that_is_closed_twice_is_closed():
    hub = Broadcast(presence=LONG)
    for _ in range(2):
        assert await ids(hub) == []
        await hub.disconnect()
        await hub.disconnect()


# Event loops


BRIEF = Presence(ttl=60, grace=0.05, interval=0.02)


async def test_members_of_a_loop_that_is_closed_are_lost():
    """As when a test suite or a thread runs a loop of its own with `asyncio.run`."""
    broker = Broker()
    async with (
        Broadcast(backend=Bus(broker), presence=BRIEF, tuning=TUNING) as one,
        Broadcast(backend=Bus(broker), presence=BRIEF, tuning=TUNING) as two,
    ):
        await member(one, "bob")
        other = OtherLoop()
        other.run(member(one, "ada"))
        await are(two, "ada", "bob")
        other.close()
        await are(one, "bob")
        await are(two, "bob")


async def test_a_client_is_taken_off_a_channel_from_another_loop():
    other = OtherLoop()
    async with Broadcast(presence=BRIEF) as hub:
        ada = other.run(member(hub, "ada"))
        other.run(hub.connect(ada.websocket, "other"))
        await are(hub, "ada")
        await hub.disconnect(ada.websocket, "room")
        await are(hub)
        other.run(hub.connect(ada.websocket, "room", member=Member("ada")))
        await are(hub, "ada")
        other.close()
        await hub.disconnect(ada.websocket, "room")
        await are(hub)


# What others say, and when


def slow_whole(seconds: float):
    """A hook of `publish` that keeps back what is behind the first part of a worker's members."""

    async def publish(connection, messages, proceed):
        if any(b'"whole"' in data and b'"part": 0' not in data for _, data in messages):
            await asyncio.sleep(seconds)
        await proceed()

    return publish


@pytest.mark.parametrize("seconds", [0.6, 3.0])
async def test_a_new_worker_waits_for_those_it_has_heard_of_but_not_forever(seconds):
    broker = Broker()
    # One message in a batch, so that the parts of a whole arrive one after another.
    tuning = Tuning(first_backoff=0.01, max_backoff=0.05, batch_messages=1, publish_timeout=1.5)
    async with (
        Broadcast(
            backend=Bus(broker, on_publish=slow_whole(seconds)), presence=LONG, tuning=tuning
        ) as one,
        Broadcast(backend=Bus(broker), presence=LONG, tuning=tuning) as two,
    ):
        for number in range(300):
            await member(one, f"{number} {'x' * 100}")
        started = time.monotonic()
        count = len(await two.members("room"))
        if seconds < tuning.publish_timeout:
            assert count == 300
        else:
            assert count == 0
            assert time.monotonic() - started < tuning.publish_timeout + BUSY
            await until_counts(two, MemberCounts(300, 300))


async def test_a_watcher_on_a_new_worker_is_not_told_of_those_who_were_there():
    async with hubs(2, LONG) as (one, two):
        for number in range(50):
            await member(one, str(number))
        watcher = Peer()
        await two.connect(watcher.websocket, "room", member=Member("me"), join_leave=True)
        await until(lambda: told(watcher))
        assert told(watcher) == [(["me"], [])]


async def test_what_is_lost_on_the_way_is_asked_for():
    broker = Broker()
    losing = False

    async def publish(connection, messages, proceed):
        if not (losing and any(b'"change"' in data for _, data in messages)):
            await proceed()

    presence = Presence(ttl=2, grace=0.3, interval=0.02)
    async with (
        Broadcast(backend=Bus(broker, on_publish=publish), presence=presence) as one,
        Broadcast(backend=Bus(broker), presence=presence) as two,
    ):
        await member(one, "ada")
        await are(two, "ada")
        losing = True
        await member(one, "bob")
        await asyncio.sleep(0.1)
        losing = False
        await are(two, "ada", "bob")  # a beat tells that there was something


async def test_what_cannot_be_said_is_said_later():
    """While the broker is slow, more may be said than waits for it."""
    broker = Broker()
    presence = Presence(ttl=2, grace=0.3, interval=0.02)
    small = Tuning(max_queued=2000, publish_timeout=1)
    async with (
        Broadcast(backend=Bus(broker), presence=presence, tuning=small) as one,
        Broadcast(backend=Bus(broker), presence=presence) as two,
    ):
        await one.connect(Peer().websocket, "room")
        first = await member(one, "ada")
        await are(two, "ada")
        broker.open.clear()
        for number in range(100):
            peer = await member(one, f"{number} {'x' * 100}", "room")
            await one.disconnect(peer.websocket, "room")
            await asyncio.sleep(0.001)
        await one.disconnect(first.websocket, "room")
        await member(one, "bob")
        await asyncio.sleep(0.1)
        broker.open.set()
        await are(two, "bob")


# Brokers


async def test_members_are_there_again_after_their_broker(server):
    presence = Presence(ttl=600, grace=0.3, interval=0.02)
    name = uuid.uuid4().hex
    async with (
        Broadcast(server.url, name=name, presence=presence, tuning=TUNING) as one,
        Broadcast(server.url, name=name, presence=presence, tuning=TUNING) as two,
        two.watch_members("room") as watch,
    ):
        ada = await member(one, "ada")
        await member(one, "bob")
        await member(two, "eve")
        await are(two, "ada", "bob", "eve")
        server.kill()
        await until(lambda: two.stats().backend.state == "reconnecting")
        await until(lambda: one.stats().backend.state == "reconnecting")
        await one.disconnect(ada.websocket, "room")
        assert await ids(two) == ["ada", "bob", "eve"]  # as far as it can know
        await asyncio.to_thread(server.start)
        for hub in (one, two):
            await are(hub, "bob", "eve")
        here = {it.id for it in watch.members}
        while here != {"bob", "eve"}:
            change = await watch.get()
            here |= {it.id for it in change.joined}
            here -= {it.id for it in change.left}


async def test_members_have_no_history_and_do_not_count():
    async with Broadcast(presence=QUICK, history=History()) as hub:
        ada = await member(hub, "ada")
        async with hub.watch_members("room"):
            await are(hub, "ada")
            stats = hub.stats()
            assert (stats.clients, stats.subscribers, stats.published) == (1, 0, 0)
            assert stats.channels == hub.channels == {"room": 1}
            past = await hub.history("room")
            assert past.events == []
        await hub.disconnect(ada.websocket)


async def test_a_hub_without_members_says_nothing():
    broker = Broker()
    async with Broadcast(backend=Bus(broker)) as hub:
        await hub.connect(Peer().websocket, "room")
        await hub.publish("room", "hello")
        assert not any("presence" in str(call) for call in broker.calls)


# Callers


async def test_a_connect_that_is_cancelled_leaves_no_member():
    """At each of its steps."""
    steps, done = 0, False
    while not done:
        async with hubs(1, LONG) as (hub,):
            peer = Peer()
            connecting = asyncio.create_task(
                hub.connect(peer.websocket, "room", member=Member("ada"))
            )
            for _ in range(steps):
                await asyncio.sleep(0)
            done = connecting.done()
            connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await connecting
            if connecting.cancelled():
                assert "room" not in hub.channels
                assert await ids(hub) == []
                await member(hub, "bob")
                assert await ids(hub) == ["bob"]
        steps += 1
    assert steps > 5


async def test_one_that_is_cancelled_while_it_waits_for_other_workers_leaves_none():
    async with hubs(2, LONG) as (one, two):
        peer = Peer()
        connecting = asyncio.create_task(
            one.connect(peer.websocket, "room", member=Member("ada"), join_leave=True)
        )
        await until(lambda: "room" in one.channels)
        await asyncio.sleep(0.1)
        connecting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await connecting
        assert one.channels == {}
        assert await ids(one) == await ids(two) == []


async def test_a_connect_that_fails_alone_says_nothing_in_the_log(caplog):
    """Its error is nobody's when the caller has been cancelled meanwhile."""
    broker = Broker()
    async with Broadcast(
        backend=Bus(broker), presence=LONG, tuning=Tuning(publish_timeout=0.1)
    ) as hub:
        await hub.connect(Peer().websocket, "room")
        broker.refused.add("default:\x01presence")
        for count in (1, 2):  # one caller, and several that wait for the same
            calls = [asyncio.create_task(hub.members("room")) for _ in range(count)]
            await asyncio.sleep(0.01)
            calls[0].cancel()
            for result in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(result, asyncio.CancelledError | BackendUnavailable)
        await until(lambda: not [it for it in starcast_tasks() if "_open" in str(it)])
    assert "never retrieved" not in caplog.text


def test_only_settings_are_settings():
    with pytest.raises(ConfigurationError):
        Broadcast(presence=True)
