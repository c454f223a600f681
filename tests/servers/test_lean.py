"""Lean: what stands where uvicorn has a queue and an event behaves as these do."""

from __future__ import annotations

import asyncio
import contextvars
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from starcast import Broadcast
from starcast.servers.lean import Gate, Inbox, Inflater, Turn
from support import examples, until
from test_uvicorn import Client

pytestmark = pytest.mark.anyio

STEPS = st.lists(st.tuples(st.sampled_from(["put", "get", "cancel", "turn"]), st.integers(0, 3)))


async def story(queue: Any, steps: list[tuple[str, int]]) -> Any:
    """What those get who wait for a queue, some of whom are cancelled."""
    waiting: list[asyncio.Task[Any]] = []
    for number, (step, which) in enumerate(steps):
        if step == "put":
            queue.put_nowait(number)
        elif step == "get":
            waiting.append(asyncio.create_task(queue.get()))
        elif step == "cancel" and waiting:
            waiting[which % len(waiting)].cancel()
        elif step == "turn":
            await asyncio.sleep(0)
    for _ in range(3):
        await asyncio.sleep(0)
    got = [task.result() if task.done() and not task.cancelled() else None for task in waiting]
    left = queue.qsize()
    assert queue.empty() == (not left)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return got, left


@settings(max_examples=examples(200))
@given(STEPS)
def test_an_inbox_is_a_queue(steps):
    assert asyncio.run(story(Inbox(), steps)) == asyncio.run(story(asyncio.Queue(), steps))


async def test_a_message_goes_to_another_one_if_who_was_woken_for_it_is_cancelled():
    inbox = Inbox()
    woken, next_one = asyncio.create_task(inbox.get()), asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    inbox.put_nowait({"type": "websocket.connect"})
    woken.cancel()
    assert await asyncio.wait_for(next_one, 20) == {"type": "websocket.connect"}
    assert woken.cancelled()


async def test_who_gives_up_waiting_leaves_nothing_behind():
    inbox, gate = Inbox(), Gate()
    gate.clear()
    for wait in (inbox.get, gate.wait):
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(wait(), 0.001)
    inbox.put_nowait({"type": "websocket.connect"})
    assert await inbox.get() == {"type": "websocket.connect"}
    gate.set()
    await gate.wait()


@settings(max_examples=examples(100))
@given(st.lists(st.sampled_from(["set", "clear", "wait", "cancel", "turn"])))
def test_a_gate_is_an_event(steps):
    async def told(event: Any) -> list[bool]:
        event.set()
        waiting: list[asyncio.Task[Any]] = []
        for step in steps:
            if step == "wait":
                waiting.append(asyncio.create_task(event.wait()))
            elif step == "cancel" and waiting:
                waiting[0].cancel()
            elif step == "turn":
                await asyncio.sleep(0)
            elif step in ("set", "clear"):
                getattr(event, step)()
        for _ in range(3):
            await asyncio.sleep(0)
        done = [task.done() for task in waiting]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return [*done, event.is_set()]

    assert asyncio.run(told(Gate())) == asyncio.run(told(asyncio.Event()))


def test_an_inflater_makes_place_for_a_decompressor():
    extension = SimpleNamespace(remote_max_window_bits=12)
    extension.decoder = Inflater(extension)
    deflate = zlib.compressobj(wbits=-12)
    for text in (b"hello", b"hello again"):
        data = deflate.compress(text) + deflate.flush(zlib.Z_SYNC_FLUSH)
        assert extension.decoder.decompress(data, 4) == text[:4]
        tail = extension.decoder.unconsumed_tail
        assert extension.decoder.decompress(tail) == text[4:]


@pytest.mark.parametrize("ws", ["auto", "starcast.uvicorn:BroadcastProtocol"])
async def test_a_decompressor_that_was_used_stays(serve, ws):
    """Whatever a client has sent before it joins a hub, and however often it joins."""
    hub = Broadcast()
    got: list[str] = []

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        for _ in range(3):
            for _ in range(2):
                got.append(await websocket.receive_text())
            await hub.connect(websocket)
            for _ in range(2):
                got.append(await websocket.receive_text())
            await hub.disconnect(websocket)

    server = await serve(Starlette(routes=[WebSocketRoute("/ws", endpoint)]), ws=ws)
    client = await Client.connect(server, "/ws", window=12)
    deflate = zlib.compressobj(wbits=-12)
    sent: list[str] = []
    for number in range(12):
        sent.append(f"{number} refers back to what came before it")
        data, bits = sent[-1].encode(), 0x80
        if number:  # the first one is not compressed
            data, bits = (deflate.compress(data) + deflate.flush(zlib.Z_SYNC_FLUSH))[:-4], 0xC0
        await client.send(data, bits=bits)
        await until(lambda: got == sent)
    client.close()


@pytest.mark.parametrize("ws", ["auto", "starcast.uvicorn:BroadcastProtocol"])
@pytest.mark.parametrize("early", [False, True])
async def test_what_a_connection_keeps(serve, ws, early):
    """A client has a decompressor once it has sent something, and then it is the right one."""
    hub = Broadcast()
    got: list[str] = []

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        if early:
            got.append(await websocket.receive_text())
        await hub.connect(websocket)
        async for text in websocket.iter_text():
            got.append(text)

    server = await serve(Starlette(routes=[WebSocketRoute("/ws", endpoint)]), ws=ws)
    async with server.connect("/ws") as client:
        sent = ["hello " * 100] * early
        for text in sent:
            await client.send(text)
        await until(lambda: len(hub) == 1)
        (protocol,) = server.server.server_state.connections
        (extension,) = protocol.conn.extensions
        assert isinstance(extension.decoder, Inflater) == (not early)
        assert isinstance(protocol.queue, Inbox)
        assert isinstance(protocol.writable, Gate)
        assert not protocol.request.headers
        assert not protocol.response.headers
        for text in ("hello " * 100, "hello"):  # the second refers back to the first
            sent.append(text)
            await client.send(text)
            await until(lambda: got == sent)
        assert not isinstance(extension.decoder, Inflater)


async def test_a_turn_keeps_the_context_of_its_task():
    """Also if somebody else wants to know when it is over."""
    context = contextvars.copy_context()
    turn = Turn(asyncio.get_running_loop(), lambda content, payload: True)
    turn.add_done_callback(print, context=context)
    turn.add_done_callback(print)
    assert turn.context is context
    assert turn.task is asyncio.current_task()
    turn.remove_done_callback(print)
