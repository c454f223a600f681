"""What clients say waits until their room can take it, and for nobody who does not read."""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint, SubscriberLagged, Tuning
from starcast.frames import TEXT
from support import Broker, Bus, Peer, Served, stalled, starcast_tasks, until
from test_uvicorn import masked

pytestmark = pytest.mark.anyio

KIB = 1024
PROTOCOLS = ["auto", "starcast.uvicorn:BroadcastProtocol"]


def app_of(hub: Broadcast) -> Starlette:
    class Chat(BroadcastEndpoint):
        broadcast = hub

    return Starlette(routes=[WebSocketRoute("/{channel}", Chat)])


async def read(client, count: int) -> list[int]:
    return [len(await client.recv()) for _ in range(count)]


async def flood(client, message: str, count: int) -> None:
    for _ in range(count):
        await client.send(message)


async def talk(server: Served, senders: int, readers: int, size: int, count: int) -> None:
    """Let clients of a room say much at once; each of them gets all of it."""
    said = [server.connect("/room", compression=None) for _ in range(senders + readers)]
    clients = await asyncio.gather(*said)
    reading = [asyncio.create_task(read(client, senders * count)) for client in clients]
    await asyncio.gather(*(flood(client, "x" * size, count) for client in clients[:senders]))
    for got in await asyncio.wait_for(asyncio.gather(*reading), 30):
        assert got == [size] * (senders * count)
    await asyncio.gather(*(client.close() for client in clients))


@pytest.mark.parametrize("ws", PROTOCOLS)
@pytest.mark.parametrize(
    ("size", "count"), [(100 * KIB, 3), (16 * KIB, 10), (200, 500)], ids=["huge", "large", "small"]
)
async def test_no_healthy_reader_is_lost_however_much_its_room_says(serve, ws, size, count):
    hub = Broadcast(max_buffer=64 * KIB, max_message=None)
    server = await serve(app_of(hub), ws=ws, send_buffer=16 * KIB)
    await talk(server, senders=4, readers=2, size=size, count=count)
    stats = hub.stats()
    assert (stats.slow_clients, stats.dropped) == (0, 0)
    await until(lambda: not hub.stats().clients)
    await until(lambda: not starcast_tasks())


@pytest.mark.parametrize("ws", PROTOCOLS)
async def test_a_member_that_does_not_read_is_dropped_and_its_room_goes_on(serve, ws):
    hub = Broadcast(max_buffer=64 * KIB, tuning=Tuning(space_timeout=0.4, close_timeout=0.1))
    server = await serve(app_of(hub), ws=ws, send_buffer=16 * KIB)
    dead = await stalled(server, "/room")
    async with (
        server.connect("/room", compression=None) as sender,
        server.connect("/other", compression=None) as other,
    ):
        await until(lambda: len(hub) == 3)
        sending = asyncio.create_task(flood(sender, "x" * 8 * KIB, 100))
        reading = asyncio.create_task(read(sender, 100))
        waited = False
        for number in range(10_000):  # another room does not wait for it
            await other.send(str(number))
            assert await other.recv() == str(number)
            waited = waited or hub.stats().buffered > 16 * KIB
            if reading.done():
                break
        assert waited
        assert await asyncio.wait_for(reading, 20) == [8 * KIB] * 100
        await sending
        assert hub.stats().slow_clients == 1
        assert hub.channels == {"room": 1, "other": 1}
    dead.close()


async def test_a_member_that_reads_too_little_holds_its_room_up_for_a_while_only(serve):
    hub = Broadcast(max_buffer=64 * KIB, tuning=Tuning(space_timeout=0.4, close_timeout=0.1))
    server = await serve(app_of(hub), send_buffer=16 * KIB)
    slow = await stalled(server, "/room")

    async def sip():
        for _ in range(10_000):
            if not await asyncio.get_running_loop().sock_recv(slow, 512):
                break
            await asyncio.sleep(0.01)

    sipping = asyncio.create_task(sip())
    async with server.connect("/room", compression=None) as sender:
        await until(lambda: len(hub) == 2)
        reading = asyncio.create_task(read(sender, 400))
        await flood(sender, "x" * 2 * KIB, 400)
        assert await asyncio.wait_for(reading, 20) == [2 * KIB] * 400
        assert hub.stats().slow_clients == 1
    slow.close()
    sipping.cancel()
    await asyncio.gather(sipping, return_exceptions=True)


async def test_a_large_message_gets_through_a_stream_of_small_ones(serve):
    hub = Broadcast(max_buffer=64 * KIB)
    server = await serve(app_of(hub))

    async def publish():
        while True:  # in every turn of the loop
            hub.publish_nowait("busy", "x")
            await asyncio.sleep(0)

    async def listen(client):
        async for _ in client:
            pass

    async with server.connect("/busy") as listener, server.connect("/room") as sender:
        await until(lambda: len(hub) == 2)
        tasks = [asyncio.create_task(publish()), asyncio.create_task(listen(listener))]
        for _ in range(5):
            await sender.send("x" * 20 * KIB)
            assert len(await asyncio.wait_for(sender.recv(), 20)) == 20 * KIB
        assert hub.stats().slow_clients == 0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest", "latest"])
async def test_nobody_waits_for_those_whose_policy_drops(serve, overflow):
    hub = Broadcast(max_buffer=64 * KIB, overflow=overflow, tuning=Tuning(space_timeout=2000.0))
    server = await serve(app_of(hub), send_buffer=16 * KIB)
    dead = await stalled(server, "/room")
    async with server.connect("/room", compression=None) as sender:
        await until(lambda: len(hub) == 2)
        for _ in range(100):
            await sender.send("x" * 8 * KIB)
            assert len(await asyncio.wait_for(sender.recv(), 20)) == 8 * KIB
        assert hub.stats().dropped > 0
        assert hub.stats().slow_clients == 0
    linger = struct.pack("ii", 1, 0)
    dead.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    dead.close()


async def test_a_subscriber_that_reads_is_waited_for_too(serve):
    hub = Broadcast(max_buffer=64 * KIB)
    server = await serve(app_of(hub))
    async with hub.subscribe("room") as subscriber, server.connect("/room") as sender:
        flooding = asyncio.create_task(flood(sender, "x" * 8 * KIB, 50))
        reading = asyncio.create_task(read(sender, 50))
        for _ in range(50):
            assert len((await anext(subscriber)).message) == 8 * KIB
            await asyncio.sleep(0)  # its work
        await asyncio.gather(flooding, reading)
    async with hub.subscribe("room") as subscriber, server.connect("/room") as sender:
        reading = asyncio.create_task(read(sender, 50))
        await flood(sender, "x" * 8 * KIB, 50)
        await asyncio.wait_for(reading, 20)
        with pytest.raises(SubscriberLagged):
            async for _ in subscriber:
                pass


async def test_members_that_stall_one_after_another_are_not_waited_for_in_turn(serve):
    """A Wi-Fi that fails leaves many of them, and each has its buffer half full a little later."""
    waits, waiting = 0, False
    hub = Broadcast(max_buffer=64 * KIB, tuning=Tuning(space_timeout=1.0))
    server = await serve(app_of(hub), send_buffer=16 * KIB)
    dead = [await stalled(server, "/room") for _ in range(5)]
    await until(lambda: len(hub) == 5)
    for number, websocket in enumerate(hub.clients()):
        before = hub.stats().buffered
        while hub.stats().buffered < before + (number + 1) * 4 * KIB:
            await hub.send("x" * KIB, to=websocket)
    async with server.connect("/room", compression=None) as sender:
        await until(lambda: len(hub) == 6)
        for _ in range(40):
            await sender.send("x" * KIB)
            answer = asyncio.create_task(sender.recv())
            while not answer.done():
                before, waiting = waiting, hub.stats().waiting_senders > 0
                waits += waiting and not before
                await asyncio.wait([answer], timeout=0.01)
            assert len(await answer) == KIB
    assert 1 <= waits <= 2
    for sock in dead:
        sock.close()


async def test_what_waits_is_not_said_by_a_client_that_is_closed_meanwhile(serve):
    hub = Broadcast(max_buffer=64 * KIB)
    server = await serve(app_of(hub), send_buffer=16 * KIB)
    dead = await stalled(server, "/room")
    async with server.connect("/room") as sender, server.connect("/room") as listener:
        await until(lambda: len(hub) == 3)
        websockets = hub.clients()
        while hub.stats().buffered < 30 * KIB:
            await hub.send("x" * KIB, to=websockets[0])
        await sender.send("x" * 4 * KIB)
        await until(lambda: hub.stats().waiting_senders)
        await hub.close(websockets[1], 4003)
        dead.close()
        await until(lambda: not starcast_tasks() and len(hub) == 1)
        await hub.publish("room", "the end")
        assert await listener.recv() == "the end"
        await sender.wait_closed()
        assert sender.close_code == 4003


async def test_a_client_that_is_closed_and_does_not_read_says_nothing_more(serve):
    hub = Broadcast(tuning=Tuning(close_timeout=0.5))
    server = await serve(app_of(hub), send_buffer=16 * KIB)
    dead = await stalled(server, "/room")
    async with server.connect("/room", compression=None) as listener:
        await until(lambda: len(hub) == 2)
        websocket = hub.clients()[0]
        while hub.stats().buffered < 16 * KIB:
            await hub.send("x" * KIB, to=websocket)
        closing = asyncio.create_task(hub.close(websocket, 4003))
        await until(lambda: len(hub) == 1)
        await asyncio.get_running_loop().sock_sendall(dead, masked(b"still here", TEXT))
        await closing
        await hub.publish("room", "the end")
        assert await listener.recv() == "the end"
    dead.close()


async def test_a_publisher_that_never_pauses_does_not_silence_clients():
    """What is on its way to the loop is waited for, but not if more is always added to it."""
    hub = Broadcast(max_buffer=16 * KIB)
    peer = Peer()
    serving = asyncio.create_task(hub.serve(peer.websocket, "room"))
    await until(lambda: len(hub) == 1)

    async def publish() -> None:
        for number in itertools.count():
            if number < 50:
                peer.say(f"{number}")
            for _ in range(20):
                hub.publish_nowait("other", "x" * 200)
            await asyncio.sleep(0)

    async with hub.subscribe("other", overflow="drop_oldest"):
        publishing = asyncio.create_task(publish())
        await until(lambda: len(peer.got) == 50)
        publishing.cancel()
    assert peer.got == [f"{number}" for number in range(50)]
    peer.leave()
    await serving


async def test_what_has_not_come_back_from_the_broker_is_waited_for():
    """It is on its way to the buffers, whose sizes say too little until it is there."""
    broker = Broker()
    hub = Broadcast(backend=Bus(broker), max_buffer=16 * KIB)
    peer = Peer()
    serving = asyncio.create_task(hub.serve(peer.websocket, "room"))
    await until(lambda: len(hub) == 1)
    broker.open.clear()
    hub.publish_nowait("room", "x" * 3 * KIB)  # more than an eighth of the buffer
    peer.say("hello")
    await until(lambda: len(broker.asked("publish")) and broker.probes)
    assert hub.stats().published == 1
    broker.open.set()
    await until(lambda: peer.got == ["x" * 3 * KIB, "hello"])
    peer.leave()
    await serving
    await hub.disconnect()
