"""Another event loop takes the connection over when its own ends."""

from __future__ import annotations

import asyncio

import pytest

from broker.conftest import make_hub
from starcast import Broadcast, Gap
from starcast.broker import opening
from support import Bus, OtherLoop, joined, starcast_tasks, until

pytestmark = pytest.mark.anyio


async def on_another_loop(hub: Broadcast) -> OtherLoop:
    """Open the hub on another event loop."""
    other = OtherLoop()
    await asyncio.to_thread(other.run, hub.connect())
    return other


async def test_clients_that_only_listen_get_a_new_connection(hub, broker):
    first = await on_another_loop(hub)
    peer = await joined(hub, "room")
    async with (
        hub.subscribe("room", gaps=True) as subscriber,
        make_hub(Bus(broker)) as publisher,
    ):
        await asyncio.to_thread(first.close)
        gap = await anext(subscriber)  # nobody here has published or connected
        await publisher.publish("room", "hello")
        await until(lambda: peer.got == ["hello"])
        assert isinstance(gap, Gap)
        assert "event loop" in gap.error
        assert await hub.healthy()


async def test_two_loops_that_end_together(hub, broker, bus):
    first = await on_another_loop(hub)
    second = OtherLoop()
    await asyncio.to_thread(second.run, joined(hub, "room"))
    peer = await joined(hub, "room")
    broker.open.clear()
    await asyncio.to_thread(first.close)
    await asyncio.to_thread(second.close)
    broker.open.set()
    await until(lambda: hub.stats().backend.gaps)
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])


async def test_a_loop_that_ends_right_after_it_has_taken_over(hub, broker):
    first = await on_another_loop(hub)
    second = OtherLoop()
    await asyncio.to_thread(second.run, joined(hub, "room"))
    await asyncio.to_thread(first.close)
    await until(lambda: hub.stats().backend.gaps)
    peer = await joined(hub, "room")
    await asyncio.to_thread(second.close)
    assert not asyncio.all_tasks(second.loop)
    await until(lambda: hub.stats().backend.gaps == 2)
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])


async def test_its_tasks_are_cancelled_and_the_loop_lives_on(hub, broker):
    """A loop that cancels tasks is probably ending, but this one is not."""
    peer = await joined(hub, "room")
    for task in starcast_tasks():
        task.cancel()
    await until(lambda: hub.stats().backend.gaps)
    async with make_hub(Bus(broker)) as publisher:
        await publisher.publish("room", "hello")
        await until(lambda: peer.got == ["hello"])


async def test_a_hub_that_is_closed_is_not_opened_again(hub, broker):
    first = await on_another_loop(hub)
    await joined(hub, "room")
    broker.open.clear()
    closing = asyncio.create_task(hub.disconnect())
    await asyncio.sleep(0)
    await asyncio.to_thread(first.close)
    broker.open.set()
    await closing
    await until(lambda: not starcast_tasks())
    assert not broker.connections
    assert hub.stats().backend.state == "closed"


async def test_a_mistake_of_ours_is_no_end(hub, broker, monkeypatch, caplog):
    peer = await joined(hub, "room")
    monkeypatch.setattr(opening.random, "uniform", None)
    broker.restart()
    await until(lambda: caplog.records and caplog.records[-1].levelname == "ERROR")
    monkeypatch.undo()
    await until(lambda: hub.stats().backend.gaps)
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])
    caplog.clear()


async def test_a_mistake_of_ours_in_a_task_of_the_session(hub, broker, monkeypatch, caplog):
    peer = await joined(hub, "room", "secret")
    backoffs = iter([0, LookupError("a mistake")])  # before the reconnect, and of the channel

    def uniform(least, most):
        if isinstance(backoff := next(backoffs), Exception):
            raise backoff
        return backoff

    monkeypatch.setattr(opening.random, "uniform", uniform)
    broker.refused.add("secret")
    broker.restart()
    await until(lambda: caplog.records and caplog.records[-1].levelname == "ERROR")
    monkeypatch.undo()
    broker.refused.clear()
    await until(lambda: hub.stats().backend.state == "connected")
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])
    caplog.clear()


async def test_what_was_under_way_on_a_loop_that_just_stopped(hub, broker):
    first = await on_another_loop(hub)
    await joined(hub, "room")
    broker.open.clear()
    hub.publish_nowait("room", "under way")
    await until(lambda: broker.stalled)
    await asyncio.to_thread(first.stop)
    tasks = asyncio.all_tasks(first.loop)
    first.loop.close()  # no task was cancelled, and nobody can know
    for task in tasks:
        task._log_destroy_pending = False
        task.get_coro().close()
    broker.open.set()
    assert not await hub.healthy()
    await hub.connect()
    await until(lambda: hub.stats().backend.gaps)
    assert hub.stats().backend.lost == 1
