"""Clients on several event loops."""

from __future__ import annotations

import asyncio
import threading

import pytest

from starcast import (
    Broadcast,
)
from support import several

pytestmark = pytest.mark.anyio


async def test_the_end_of_the_hub_reaches_every_loop(other):
    hub = Broadcast()
    here, there = (await several(hub, 1))[0], other.run(several(hub, 1))[0]
    await hub.send("last words")
    await hub.disconnect()
    assert here.closed == there.closed == 1001
    assert here.got == there.got == ["last words"]


async def listen(hub: Broadcast, subscribed: threading.Event) -> list[str]:
    async with hub.subscribe() as subscriber:
        subscribed.set()
        return [event.message async for event in subscriber]


async def test_a_subscriber_on_another_loop(other):
    hub = Broadcast()
    subscribed = threading.Event()
    listening = asyncio.run_coroutine_threadsafe(listen(hub, subscribed), other.loop)
    await asyncio.to_thread(subscribed.wait, 20)
    await hub.send("hello")
    await hub.disconnect()
    assert await asyncio.wrap_future(listening) == ["hello"]


async def test_the_clients_of_a_closed_loop_are_forgotten(other):
    hub = Broadcast()
    (here,) = await several(hub, 1)
    other.run(several(hub, 3))
    other.run(hub.subscribe().__aenter__())
    assert hub.stats().subscribers == 1
    other.run(hub.send("all"))
    assert len(hub) == 4
    other.close()
    await hub.send("the living")
    assert here.got == ["all", "the living"]
    assert len(hub) == 1
    assert hub.stats().subscribers == 0
    assert hub.stats().delivered == 4 + 1  # the counters of the closed loop stay


async def test_a_loop_that_closes_while_it_is_woken(other, monkeypatch):
    hub = Broadcast()
    other.run(several(hub, 1))
    other.close()
    monkeypatch.setattr(other.loop, "is_closed", lambda: False)  # it still was when that looked

    def wake(*arguments):
        monkeypatch.undo()
        assert len(hub) == 0  # another thread finds it at the same time
        raise RuntimeError("Event loop is closed")

    monkeypatch.setattr(other.loop, "call_soon_threadsafe", wake)
    await hub.send("nobody")
    assert len(hub) == 0


async def test_the_clients_of_a_closed_loop_are_not_counted(other):
    hub = Broadcast()
    other.run(several(hub, 2))
    other.close()
    assert len(hub) == 0
    assert not hub.channels
    assert hub.clients() == []


async def test_the_hubs_end_does_not_wait_for_a_closed_loop(other):
    hub = Broadcast()
    other.run(several(hub, 1))
    other.close()
    await asyncio.wait_for(hub.disconnect(), 5)
    assert len(hub) == 0
