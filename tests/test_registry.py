"""Who is there, on several event loops, and whom an end, a gap or a message concerns."""

from __future__ import annotations

import asyncio
import threading

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from starcast import Broadcast, Tuning
from support import Bus, Peer, by_another, joined, several, until

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


# Who is told


async def test_a_subscriber_in_the_handler_of_a_client_is_registered_while_that_runs(serve):
    hub = Broadcast()

    async def forward(websocket: WebSocket) -> None:
        await websocket.accept()
        async with hub.subscribe("news") as subscriber:
            await websocket.send_text((await anext(subscriber)).message)

    server = await serve(Starlette(routes=[WebSocketRoute("/", forward)]))
    async with server.connect("/") as client:
        await until(lambda: hub.stats().subscribers == 1)
        await hub.publish("news", "hello")
        assert await client.recv() == "hello"
    await until(lambda: hub.stats().subscribers == 0)


async def test_a_gap_of_one_channel_is_told_to_its_members_only(caplog):
    bus, gaps = Bus(), []
    tuning = Tuning(subscribe_backoff=0.01)
    hub = Broadcast(backend=bus, on_gap=gaps.append, after_gap="close", tuning=tuning)
    async with hub.subscribe("room", gaps=True) as room, hub.subscribe("quiet", gaps=True) as quiet:
        bus.broker.refused.add("default:room")
        bus.broker.restart()
        await until(lambda: hub.stats().backend.refused == 1)
        bus.broker.refused.clear()
        await until(lambda: len(gaps) == 2)
        peer = await joined(hub, "room")
        await hub.publish("quiet", "later")
        assert [await anext(room) for _ in gaps] == gaps
        assert [gap.channel for gap in gaps] == [None, "room"]
        assert await anext(quiet) == gaps[0]
        assert (await anext(quiet)).message == "later"
    assert peer.closed is None  # it came after the gap
    await hub.disconnect()


async def waiting(hub: Broadcast, peer: Peer) -> list[asyncio.Task[bool]]:
    """Tasks that send more to a client that takes nothing than there is space for."""
    peer.open.clear()
    sending = [
        asyncio.create_task(by_another(hub.send(str(number), to=peer.websocket)))
        for number in range(5)
    ]
    await until(lambda: hub.stats().waiting_senders == 3)  # one is in flight, and one fits
    return sending


async def test_senders_go_on_when_their_messages_have_arrived():
    hub = Broadcast(max_buffer=200)
    peer = await joined(hub)
    sending = await waiting(hub, peer)
    peer.open.set()
    assert await asyncio.gather(*sending) == [True] * 5
    await until(lambda: peer.got == ["0", "1", "2", "3", "4"])
    assert hub.stats().buffered == 0


async def test_senders_go_on_when_their_client_is_closed():
    hub = Broadcast(max_buffer=200)
    peer = await joined(hub)
    sending = await waiting(hub, peer)
    closing = asyncio.create_task(hub.close(peer.websocket, 4000))
    assert await asyncio.gather(*sending) == [True, True, False, False, False]
    peer.open.set()
    await closing
    assert peer.got == ["0", "1"]
