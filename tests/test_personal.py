"""Messages to one client: their sender waits for it, and nobody else does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from starcast import Broadcast, ClientGone, ConnectionManager, NotConnected, Tuning
from starcast.event import OVERHEAD
from starcast.outbox import MAX_BUFFER, OVERFLOWS
from support import (
    BUSY,
    DEADLINE,
    Broker,
    Bus,
    OtherLoop,
    Peer,
    Served,
    by_another,
    joined,
    starcast_tasks,
    until,
)

pytestmark = pytest.mark.anyio

PROTOCOL = "starcast.uvicorn:BroadcastProtocol"
KIB = 1024
ONE = 1 + OVERHEAD  # what a message of one character counts for


@pytest.fixture(params=["auto", PROTOCOL])
def ws(request: pytest.FixtureRequest) -> str:
    return request.param


async def behind(hub: Broadcast, peer: Peer, messages: int = 1) -> None:
    """From now on the client takes nothing; one message is in flight and some wait."""
    peer.open.clear()
    await hub.send("in flight", to=peer.websocket)
    for number in range(messages):
        await hub.send(str(number), to=peer.websocket)


def sending(hub: Broadcast, peer: Peer, data: object = "x") -> asyncio.Task[bool]:
    return asyncio.create_task(hub.send(data, to=peer.websocket))


def senders(hub: Broadcast) -> int:
    return hub.stats().waiting_senders


# A slow client


async def read_slowly(
    server: Served, path: str, size: int, behind: Callable[[], bool]
) -> list[str]:
    """Take frames off a socket with a small buffer, pausing now and then, until `size` bytes.

    It begins when the server says that it is behind.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * KIB)
    sock.connect((server.host, server.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=8 * KIB)
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    await until(behind)
    got: list[str] = []
    pause_at, between = 0, size // 40
    while size > 0:
        _, length = await reader.readexactly(2)
        if length > 125:
            length = int.from_bytes(await reader.readexactly(2 if length == 126 else 8))
        text = (await reader.readexactly(length)).decode()
        got.append(text.strip())
        if not text.startswith("published"):
            size -= length
            pause_at += length
        if pause_at > between:
            pause_at = 0
            await asyncio.sleep(0.01)
    writer.close()
    return got


@pytest.mark.parametrize(("size", "count"), [(64 * KIB, 160), (100, 3_000)])
async def test_much_more_than_the_buffer_reaches_a_client_on_a_slow_line(serve, ws, size, count):
    """And meanwhile others get what is published at once, and so does the slow one, in order."""
    hub = Broadcast(max_buffer=min(MAX_BUFFER, size * count // 10))

    async def endpoint(websocket: WebSocket):
        await hub.connect(websocket)
        with contextlib.suppress(WebSocketDisconnect):
            if websocket.path_params["who"] == "slow":
                for number in range(count):
                    assert await hub.send(f"{number:06}".ljust(size), to=websocket)
            await websocket.receive_text()

    server = await serve(
        Starlette(routes=[WebSocketRoute("/{who}", endpoint)]),
        ws=ws,
        ws_ping_interval=None,
        send_buffer=8 * KIB,
    )

    def behind() -> bool:
        return hub.stats().waiting_senders > 0

    async with server.connect("/quick") as quick:
        reading = asyncio.create_task(read_slowly(server, "/slow", count * size, behind))
        published: list[str] = []
        while not reading.done():
            if len(hub) == 2:
                published.append(f"published {len(published)}")
                await hub.publish("default", published[-1])
                assert await asyncio.wait_for(quick.recv(), DEADLINE) == published[-1]
            await asyncio.sleep(0.05)
        got = reading.result()
    assert [text for text in got if text[0] != "p"] == [f"{number:06}" for number in range(count)]
    assert [text for text in got if text[0] == "p"] == published[: len(got) - count]
    assert len(published) > 2  # none of them waits until the slow client has read all
    assert hub.stats().dropped == hub.stats().slow_clients == 0
    await until(lambda: len(hub) == 0)


@pytest.mark.parametrize("overflow", OVERFLOWS)
async def test_a_message_waits_until_the_client_has_taken_others(road, overflow):
    hub = Broadcast(max_buffer=4 * ONE)
    peer = await joined(hub, overflow=overflow)
    await behind(hub, peer, 2)
    tasks = [sending(hub, peer, str(number)) for number in range(2, 20)]
    await until(lambda: senders(hub) == 18)
    assert hub.stats().buffered == 2 * ONE  # the other half is for what is published
    await hub.send("published")
    peer.open.set()
    assert await asyncio.gather(*tasks) == [True] * 18
    await until(lambda: len(peer.got) == 22)
    assert [text for text in peer.got if text.isdigit()] == [str(n) for n in range(20)]
    assert hub.stats().dropped == hub.stats().slow_clients == senders(hub) == 0
    await hub.disconnect()


@pytest.mark.parametrize("overflow", OVERFLOWS)
async def test_a_message_larger_than_the_buffer_waits_until_nothing_is_ahead_of_it(road, overflow):
    hub = Broadcast(max_buffer=4 * ONE)
    peer = await joined(hub, overflow=overflow)
    await behind(hub, peer)
    task = sending(hub, peer, "x" * 1000)
    await until(lambda: senders(hub) == 1)
    peer.open.set()
    assert await task is True
    await until(lambda: peer.got == ["in flight", "0", "x" * 1000])
    await hub.disconnect()


@pytest.mark.parametrize("overflow", OVERFLOWS)
async def test_after_ten_seconds_without_space_the_policy_applies(road, overflow):
    hub = Broadcast(max_buffer=2 * ONE, tuning=Tuning(space_timeout=0.05))
    peer = await joined(hub, overflow=overflow)
    await behind(hub, peer)
    began = time.monotonic()
    tasks = [sending(hub, peer, str(number)) for number in range(1, 6)]
    await asyncio.gather(*tasks, return_exceptions=True)
    assert time.monotonic() - began < 5 * 0.05 + BUSY
    assert senders(hub) == 0
    peer.open.set()
    if overflow == "disconnect":
        await until(lambda: peer.closed == 1013)
        assert hub.stats().slow_clients == 1
    else:
        left = ["0", "1"] if overflow == "drop_newest" else ["4", "5"]
        await until(lambda: peer.got == ["in flight", *left])
        assert hub.stats().dropped == 4
    await hub.disconnect()


class OneAtATime(Peer):
    """Takes one message whenever it is opened."""

    async def send(self, message) -> None:
        await super().send(message)
        if message["type"] == "websocket.send":
            self.open.clear()


async def test_a_client_that_takes_something_now_and_then_is_waited_for():
    hub = Broadcast(max_buffer=4 * ONE, tuning=Tuning(space_timeout=0.5))
    peer = OneAtATime()
    await hub.connect(peer.websocket)
    await behind(hub, peer, 2)
    task = sending(hub, peer, "y" * 200)  # more than the buffer: everything has to go first
    await until(lambda: senders(hub) == 1)
    for number in range(2):
        await asyncio.sleep(0.35)  # less than the timeout, but twice that is more
        assert not task.done()
        peer.open.set()
        await until(lambda number=number: len(peer.got) > number)
    assert await task is True
    assert peer.got == ["in flight", "0"]
    for number in (3, 4):
        peer.open.set()
        await until(lambda number=number: len(peer.got) == number)
    assert peer.got[2:] == ["1", "y" * 200]
    await hub.disconnect()


async def test_publish_never_waits_for_a_slow_client(road):
    hub = Broadcast(max_buffer=4 * ONE, overflow="drop_oldest")
    peer, quick = await joined(hub), await joined(hub)
    await behind(hub, peer, 2)
    task = sending(hub, peer)
    await until(lambda: senders(hub) == 1)
    async with asyncio.timeout(DEADLINE):
        for number in range(20):
            await hub.send(f"p{number}")
    assert quick.got == [f"p{number}" for number in range(20)]
    assert not task.done()
    peer.open.set()
    assert await task is True
    await hub.disconnect()


# The end of waiting


async def test_a_sender_that_is_cancelled_leaves_nothing_behind(road):
    hub = Broadcast(max_buffer=4 * ONE)
    peer = await joined(hub)
    await behind(hub, peer, 2)
    tasks = [sending(hub, peer, letter) for letter in "abc"]
    await until(lambda: senders(hub) == 3)
    for task in tasks[:2]:
        task.cancel()
    await asyncio.wait(tasks[:2])
    assert senders(hub) == 1
    peer.open.set()
    assert await tasks[2] is True
    await until(lambda: peer.got == ["in flight", "0", "1", "c"])
    assert senders(hub) == 0
    await hub.disconnect()
    await until(lambda: not starcast_tasks())


@pytest.mark.parametrize("end", ["told", "disconnect", "close", "hub"])
async def test_a_client_that_leaves_ends_the_waiting_for_it(road, end):
    hub = Broadcast(max_buffer=4 * ONE)
    peer = await joined(hub)
    await behind(hub, peer, 2)
    own = [sending(hub, peer) for _ in range(3)]
    others = [asyncio.create_task(by_another(hub.send("x", to=peer.websocket))) for _ in range(3)]
    await until(lambda: senders(hub) == 6)
    closing = None
    if end == "told":
        peer.leave()
        with pytest.raises(WebSocketDisconnect):
            await peer.websocket.receive_text()
    elif end == "disconnect":
        closing = asyncio.create_task(hub.disconnect(peer.websocket))
    elif end == "close":
        closing = asyncio.create_task(hub.close(peer.websocket, 4000))
    else:
        closing = asyncio.create_task(hub.disconnect())
    if closing is not None:
        await asyncio.sleep(0)
        peer.open.set()
    own_outcomes = await asyncio.gather(*own, return_exceptions=True)
    others_outcomes = await asyncio.gather(*others, return_exceptions=True)
    if end == "disconnect":  # by its handler: it lives on and is nobody's
        assert {type(each) for each in own_outcomes + others_outcomes} == {NotConnected}
    else:
        assert {type(each) for each in own_outcomes} == {ClientGone}
        assert others_outcomes == [False] * 3
    if closing is not None:
        await closing
    assert senders(hub) == 0


@pytest.mark.parametrize("end", ["disconnect", "close", "hub", "gap"])
async def test_the_end_of_a_client_that_reads_nothing_ends_the_waiting_at_once(road, end):
    broker = Broker()
    hub = Broadcast(backend=Bus(broker), max_buffer=4 * ONE, after_gap="close")
    peer = await joined(hub)
    await behind(hub, peer, 2)
    own = [sending(hub, peer) for _ in range(3)]
    other = asyncio.create_task(by_another(hub.send("x", to=peer.websocket)))
    await until(lambda: senders(hub) == 4)
    closing = None
    if end == "disconnect":
        closing = asyncio.create_task(hub.disconnect(peer.websocket))
    elif end == "close":
        closing = asyncio.create_task(hub.close(peer.websocket, 4000))
    elif end == "hub":
        closing = asyncio.create_task(hub.disconnect())
    else:
        broker.kill()
        broker.up = True
    await until(lambda: senders(hub) == 0, 5)  # less than the time for closing
    outcomes = await asyncio.gather(*own, other, return_exceptions=True)
    if end == "disconnect":
        assert {type(each) for each in outcomes} == {NotConnected}
    else:
        codes = {"close": 4000, "hub": 1001, "gap": 1012}
        assert [each.code for each in outcomes[:3]] == [codes[end]] * 3
        assert outcomes[3] is False
    peer.open.set()
    if closing is not None:
        await closing
    await hub.disconnect()


async def test_a_client_that_vanishes_ends_the_waiting_for_it(serve, ws):
    hub = Broadcast(max_buffer=64 * KIB)
    ended = []

    async def endpoint(websocket: WebSocket):
        await hub.connect(websocket)
        try:
            while True:
                await hub.send("x" * 16 * KIB, to=websocket)
        except WebSocketDisconnect as exc:
            ended.append(exc)

    server = await serve(Starlette(routes=[WebSocketRoute("/ws", endpoint)]), ws=ws)
    client = await server.connect("/ws", max_queue=1, compression=None)
    await until(lambda: hub.stats().waiting_senders)
    client.transport.abort()
    await until(lambda: ended, 3)
    assert type(ended[0]) is ClientGone
    await until(lambda: not starcast_tasks())


# From anywhere


async def test_senders_on_another_loop_wait_too(road, other: OtherLoop):
    hub = Broadcast(max_buffer=4 * ONE)
    peer = await joined(hub)
    await behind(hub, peer, 2)

    async def send_many() -> list[bool]:
        return [await hub.send(str(number), to=peer.websocket) for number in range(2, 200)]

    task = asyncio.create_task(asyncio.to_thread(other.run, send_many()))
    await until(lambda: senders(hub) == 1)
    peer.open.set()
    assert await task == [True] * 198
    await until(lambda: len(peer.got) == 201)
    assert peer.got[1:] == [str(number) for number in range(200)]
    assert hub.stats().slow_clients == 0
    await hub.disconnect()


async def test_the_manager_waits_for_its_client(road):
    manager = ConnectionManager(Broadcast(max_buffer=4 * ONE))
    peer = Peer()
    await manager.connect(peer.websocket)
    await behind(manager.hub, peer, 2)
    task = asyncio.create_task(manager.send_personal_message("x", peer.websocket))
    await until(lambda: senders(manager.hub) == 1)
    peer.open.set()
    assert await task is True
    await manager.hub.disconnect()


async def test_a_client_that_was_never_registered_is_not_waited_for(road):
    hub = Broadcast()
    stranger, gone = Peer(), Peer()
    await stranger.websocket.accept()
    with pytest.raises(NotConnected, match="call connect"):
        await hub.send("x", to=stranger.websocket)
    await gone.websocket.accept()
    await gone.websocket.close()
    assert await by_another(hub.send("x", to=gone.websocket)) is False
    assert stranger.got == gone.got == []
