"""Cancellation at every await, one after another: nothing is left, and the others go on."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from starlette.websockets import WebSocketDisconnect

from starcast import Broadcast, BroadcastEndpoint, ConnectionManager
from support import Peer, starcast_tasks, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("road")]


class Slow(Peer):
    """A peer whose every receive and send suspends once."""

    async def receive(self):
        await asyncio.sleep(0)
        return await super().receive()

    async def send(self, message):
        await asyncio.sleep(0)
        await super().send(message)


async def serve(hub, peer):
    peer.say("1")
    peer.say("2")
    peer.leave()
    await hub.serve(peer.websocket)


async def endpoint(hub, peer):
    class Chat(BroadcastEndpoint):
        broadcast = hub

        async def on_receive(self, websocket, data):
            await super().on_receive(websocket, data)
            await websocket.send_text("ok")

    peer.say("1")
    peer.leave()
    await Chat(peer.scope, peer.receive, peer.send)
    assert peer.got.count("ok") == 1


async def listen_only(hub, peer):
    peer.scope |= {"path": "/x", "path_params": {}, "root_path": ""}
    peer.leave()

    async def authorize(websocket, channel):
        await asyncio.sleep(0)
        return True

    await hub.app(authorize=authorize)(peer.scope, peer.receive, peer.send)


async def rejected(hub, peer):
    peer.say_bytes(b"not text")
    await hub.serve(peer.websocket)


async def handler(hub, peer):
    """What people write by hand."""
    await peer.websocket.accept()
    await hub.connect(peer.websocket)
    try:
        await hub.send("1")
        await hub.send("2", to=peer.websocket)
        await peer.websocket.send_text("3")
        await hub.publish("other", "4", exclude=peer.websocket)
        await hub.close(peer.websocket)
    finally:
        await hub.disconnect(peer.websocket)


async def manager(hub, peer):
    its = ConnectionManager(hub)
    peer.say("x")
    peer.leave()
    try:
        await its.connect(peer.websocket)
        while True:
            data = await peer.websocket.receive_text()
            await its.send_personal_message(data, peer.websocket)
            await its.broadcast(data)
    except WebSocketDisconnect:
        await its.broadcast("left")
    finally:
        its.disconnect(peer.websocket)


async def subscriber(hub, peer):
    async with hub.subscribe() as events:
        await hub.send("1")
        async for event in events:
            assert event.message == "1"
            break


async def opened_and_closed(hub, peer):
    await hub.connect(peer.websocket)
    await hub.disconnect()
    async with hub.lifespan(), hub:
        await hub.connect()


async def behind(hub, peer):
    """A client that is behind for a while, with its handler waiting for a turn."""

    async def read_again():
        for _ in range(10):
            await asyncio.sleep(0)
        peer.open.set()

    await hub.connect(peer.websocket)
    peer.open.clear()
    reading = asyncio.create_task(read_again())
    try:
        await hub.send("1")
        await hub.send("2")
        await peer.websocket.send_text("3")
        await peer.websocket.close()
    finally:
        await reading
        await hub.disconnect(peer.websocket)


SCENARIOS = [
    serve,
    endpoint,
    listen_only,
    rejected,
    handler,
    manager,
    subscriber,
    opened_and_closed,
    behind,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_cancelled_after_any_number_of_steps(scenario):
    steps, cancelled = 0, True
    while cancelled:
        hub = Broadcast()
        healthy = Peer()
        await hub.connect(healthy.websocket)
        peer = Slow()
        task = asyncio.create_task(scenario(hub, peer))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        cancelled = task.cancelled()
        # A hub that was closed has closed the healthy one too.
        if healthy.closed is None:
            await hub.send("alive")
            await until(lambda healthy=healthy: healthy.got[-1] == "alive")
            await hub.disconnect(healthy.websocket)
        await hub.disconnect(peer.websocket)
        await until(lambda hub=hub: not (hub.stats().pending or starcast_tasks()))
        assert len(hub) == 0
        assert not hub.channels
        assert hub.stats().subscribers == 0
        assert hub.stats().buffered == 0
        steps += 1
    assert steps > 1  # it was cancelled somewhere


async def test_the_tasks_of_the_hub_cancelled_after_any_number_of_steps():
    """As at the end of `asyncio.run`, but the loop goes on: the hub must not be stuck."""
    for steps in range(12):
        hub = Broadcast()
        peers = [Slow() for _ in range(3)]
        for peer in peers:
            await hub.connect(peer.websocket)
        sends = [asyncio.create_task(hub.send(str(number))) for number in range(3)]
        for _ in range(steps):
            await asyncio.sleep(0)
        for task in starcast_tasks():
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*sends, return_exceptions=True), 10)
        healthy = Peer()
        await hub.connect(healthy.websocket)
        await hub.send("alive")
        assert healthy.got == ["alive"]
        await hub.disconnect()
        assert len(hub) == 0
        await until(lambda: not starcast_tasks())
