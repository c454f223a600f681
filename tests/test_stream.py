"""A stream's outbox, its heartbeats and its end, over sockets and with a server that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.routing import Mount, Route

from event_source import EventSource, stalled
from starcast import SSE, Broadcast, History, Tuning
from support import BUSY, Broker, Bus, starcast_tasks, until

pytestmark = pytest.mark.anyio

SCOPE = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
BIG = "x" * 100_000


def make_app(hub, middleware=(), **options):
    async def events(request):
        return hub.stream(request, request.path_params["channel"], **options)

    return Starlette(routes=[Route("/{channel}", events)], middleware=middleware)


async def gone(hub):
    await until(lambda: hub.stats().clients == 0 and not starcast_tasks())
    stats = hub.stats()
    assert (stats.channels, stats.asgi, stats.buffered) == ({}, {}, 0)


async def fill(hub, other):
    """Publish to "a" until a client has been cut off, which is not the other one."""
    for number in range(1, 1000):
        await hub.publish("a", BIG)
        await other.got(number)
        if hub.stats().slow_clients:
            return
    raise AssertionError("100 MB were not enough")


class Server:
    """The ASGI side of a stream, for what no server on a socket can be made to do."""

    def __init__(self, hub, **options):
        self.sent = []
        self.open = asyncio.Event()
        self.open.set()
        self.left = asyncio.Event()
        self.fail = None
        self.fail_receive = None
        self.stalled = 0
        response = hub.stream(Request(SCOPE), "a", **options)
        self.task = asyncio.create_task(response(SCOPE, self.receive, self.send))

    async def receive(self):
        if self.fail_receive is not None:
            raise self.fail_receive
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if not self.open.is_set():
            self.stalled += 1
            await self.open.wait()
        if self.fail is not None:
            raise self.fail
        self.sent.append(message)

    @property
    def bodies(self):
        return [message["body"] for message in self.sent[2:]]

    async def begun(self):
        await until(lambda: len(self.sent) >= 2 or self.task.done())
        return self

    async def ended(self):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(self.task, 10)
        return self.sent[-1].get("more_body") is False


# Writes


async def test_what_waits_goes_out_in_one_write():
    hub = Broadcast()
    server = await Server(hub).begun()
    await hub.publish("a", "1")
    await until(lambda: server.bodies == [b"data: 1\n\n"])
    server.open.clear()
    await hub.publish("a", "2")
    await until(lambda: server.stalled)
    for number in (3, 4, 5):
        await hub.publish("a", f"{number}")
    await hub.publish("a", BIG)
    await hub.publish("a", "6")
    assert hub.stats().buffered == len(BIG) + 4 + 5 * 64
    server.open.set()
    await until(lambda: len(server.bodies) == 4)
    big = b"data: " + BIG.encode() + b"\n\n"
    one, two, three, four = server.bodies
    assert (one, two) == (b"data: 1\n\n", b"data: 2\n\n")
    assert three == b"data: 3\n\ndata: 4\n\ndata: 5\n\n" + big
    assert four == b"data: 6\n\n"
    for number in (7, 8):
        hub.publish_nowait("a", f"{number}")
    await until(lambda: server.bodies[4:] == [b"data: 7\n\ndata: 8\n\n"])
    assert hub.stats().delivered == 8 + 1
    server.left.set()
    assert not await server.ended()
    await gone(hub)


async def test_a_long_past_goes_out_in_several_writes_and_before_what_is_new():
    hub = Broadcast(history=History(size=10))
    for number in range(3):
        await hub.publish("a", f"{number}{BIG}")
    server = await Server(hub, history=10).begun()
    await hub.publish("a", "3")
    await until(lambda: b"".join(server.bodies).endswith(b"data: 3\n\n"))
    whole = b"".join(message["body"] for message in server.sent[1:])
    positions = [whole.index(f"data: {number}".encode()) for number in range(4)]
    assert positions == sorted(positions)
    assert len(server.sent) > 3
    server.left.set()
    await server.ended()
    await gone(hub)


# Heartbeats, and clients that are gone


async def test_heartbeats_only_while_nothing_else_is_sent(serve):
    hub = Broadcast()
    server = await serve(make_app(hub, sse=SSE(heartbeat=0.2)))
    async with EventSource(server, "/a") as source:
        await until(lambda: source.comments >= 2)
        seen = source.comments
        for _ in range(20):
            await hub.publish("a", "x")
            await asyncio.sleep(0.02)
        assert source.comments <= seen + 1
        await until(lambda: source.comments > seen + 1)
        assert hub.stats().delivered == 20
    await gone(hub)


async def test_a_client_that_leaves_is_noticed_at_once(serve):
    hub = Broadcast()
    server = await serve(make_app(hub))
    async with EventSource(server, "/a"):
        assert (len(hub), hub.clients(), hub.channels) == (1, [], {"a": 1})
        assert hub.stats().asgi == {"event stream": 1}
        assert (hub.stats().subscribers, hub.stats().fast_path) == (0, 0)
    await gone(hub)


@pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("gone")])
async def test_a_send_that_fails_means_that_the_client_is_gone(error):
    hub = Broadcast()
    server = await Server(hub, sse=SSE(heartbeat=0.05)).begun()
    server.fail = error
    assert not await server.ended()  # at the next heartbeat
    await gone(hub)


async def test_a_client_that_is_gone_before_the_response():
    hub = Broadcast()
    server = Server(hub)
    server.fail = OSError("gone")
    await asyncio.wait_for(server.task, 10)
    await gone(hub)


async def test_a_receive_that_fails_means_that_too():
    hub = Broadcast()
    server = Server(hub)
    server.fail_receive = RuntimeError("receive was called after the disconnect")
    assert not await server.ended()
    await gone(hub)


@pytest.mark.parametrize("stuck", [False, True])
async def test_a_handler_that_is_cancelled_leaves_nothing_behind(stuck):
    hub = Broadcast()
    server = await Server(hub).begun()
    if stuck:
        server.open.clear()
        await hub.publish("a", "1")
        await until(lambda: server.stalled)
    server.task.cancel()
    assert not await server.ended()
    await gone(hub)


async def test_a_client_that_leaves_while_something_is_on_its_way():
    hub = Broadcast()
    response = hub.stream(Request(SCOPE), "a")
    await response.open()
    hub.publish_nowait("a", "1")
    response.close()
    await hub.publish("a", "2")
    assert (hub.stats().delivered, hub.stats().dropped) == (0, 0)
    await gone(hub)


async def test_a_drain_that_is_cancelled_from_outside():
    hub = Broadcast()
    server = await Server(hub).begun()
    server.open.clear()
    before = starcast_tasks()
    await hub.publish("a", "1")
    await until(lambda: server.stalled)
    (draining,) = starcast_tasks() - before
    draining.cancel()
    assert not await server.ended()
    await gone(hub)


# Clients that do not keep up


@pytest.mark.parametrize("middleware", [False, True])
async def test_a_stalled_client_is_bounded_and_cut_off(serve, middleware):
    seen = []
    hub = Broadcast(max_buffer=300_000, on_overflow=seen.append, tuning=Tuning(close_timeout=0.3))

    async def dispatch(request, call_next):
        return await call_next(request)

    hidden = [Middleware(BaseHTTPMiddleware, dispatch=dispatch)] if middleware else []
    server = await serve(make_app(hub, hidden), send_buffer=4096)
    sock = await stalled(server, "/a")
    async with EventSource(server, "/a") as other:
        await fill(hub, other)
        assert hub.stats().buffered <= 300_000
        assert hub.channels == {"a": 1}  # it gets nothing more
        start = time.monotonic()
        await until(lambda: len(server.server.server_state.connections) == 1)
        assert time.monotonic() - start < BUSY
    (overflowed,) = seen
    assert isinstance(overflowed.client, Request)
    assert overflowed.overflow == "disconnect"
    assert len(overflowed.dropped) == hub.stats().dropped == 3
    sock.close()
    await gone(hub)


@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest", "latest"])
async def test_the_other_policies_let_it_stay(serve, overflow):
    hub = Broadcast(max_buffer=300_000, overflow=overflow)
    server = await Server(hub).begun()
    server.open.clear()
    await hub.publish("a", "0")
    await until(lambda: server.stalled)
    for number in range(1, 6):
        await hub.publish("a", f"{number}{BIG[1:]}")
    stats = hub.stats()
    kept = {"drop_oldest": "45", "drop_newest": "12", "latest": "5"}[overflow]
    assert (stats.dropped, stats.slow_clients) == (5 - len(kept), 0)
    server.open.set()
    await until(lambda: hub.stats().buffered == 0)
    await until(lambda: hub.stats().delivered == 1 + len(kept))
    text = b"".join(server.bodies).decode()
    assert [block[6] for block in text.split("\n\n")[:-1]] == ["0", *kept]
    server.left.set()
    await server.ended()
    await gone(hub)


async def test_a_send_that_takes_too_long(serve):
    hub = Broadcast(tuning=Tuning(send_timeout=0.3))
    server = await Server(hub, sse=SSE(heartbeat=0.1)).begun()
    server.open.clear()
    await until(lambda: server.stalled)
    assert not await server.ended()
    await gone(hub)


async def test_a_websocket_that_publishes_waits_for_a_stream(serve):
    hub = Broadcast(max_buffer=300_000)
    uvicorn = await serve(Starlette(routes=[Mount("/live", hub.app(publish=True))]))
    server = await Server(hub).begun()
    async with uvicorn.connect("/live/a") as client:
        server.open.clear()
        for number in range(6):
            await client.send(f"{number}{BIG}")
        await until(lambda: hub.stats().waiting_senders)
        server.open.set()
        for number in range(6):
            assert (await client.recv())[0] == str(number)
    assert hub.stats().slow_clients == 0
    server.left.set()
    await server.ended()
    await gone(hub)


async def test_a_stalled_client_does_not_keep_a_server_from_stopping(serve):
    hub = Broadcast(tuning=Tuning(close_timeout=0.5))
    server = await serve(make_app(hub), send_buffer=4096, timeout_graceful_shutdown=None)
    sock = await stalled(server, "/a")
    while hub.stats().buffered < 500_000:
        await hub.publish("a", BIG)
    start = time.monotonic()
    await server.stop()
    assert time.monotonic() - start < BUSY
    sock.close()
    await gone(hub)


# The end


async def test_closing_the_hub_ends_streams_after_what_waits():
    hub = Broadcast()
    server = await Server(hub).begun()
    server.open.clear()
    await hub.publish("a", "1")
    await until(lambda: server.stalled)
    await hub.publish("a", "2")
    await hub.disconnect()
    await until(lambda: hub.channels == {})
    server.open.set()
    assert await server.ended()
    assert b"".join(server.bodies) == b"data: 1\n\ndata: 2\n\n"
    idle = await Server(hub).begun()
    await hub.disconnect()
    assert await idle.ended()
    await gone(hub)


@pytest.mark.parametrize("when", ["at once", "at its end"])
async def test_a_client_that_does_not_read_is_given_up_when_the_hub_closes(when):
    hub = Broadcast(tuning=Tuning(close_timeout=0.2))
    server = await Server(hub).begun()
    server.open.clear()
    if when == "at once":
        await hub.publish("a", "1")
        await until(lambda: server.stalled)
    await hub.disconnect()
    assert not await server.ended()
    await gone(hub)


async def test_what_overflows_before_the_response_begins():
    """A past takes its time, and so much is published meanwhile that the buffer is full."""
    hub = Broadcast(max_buffer=1000)
    response = hub.stream(Request(SCOPE), "a")
    await response.open()
    for _ in range(3):
        hub.publish_nowait("a", "x" * 600)
    await until(lambda: hub.stats().slow_clients == 1)
    response.close()
    await gone(hub)


@pytest.mark.parametrize("after_gap", ["keep", "close"])
async def test_a_gap_ends_the_stream_if_it_ends_clients(after_gap):
    broker = Broker()
    async with Broadcast(
        backend=Bus(broker), after_gap=after_gap, tuning=Tuning(first_backoff=0.01)
    ) as hub:
        server = await Server(hub).begun()
        broker.restart()
        if after_gap == "close":
            assert await server.ended()
        else:
            await until(lambda: hub.stats().backend.gaps)
            await hub.publish("a", "still here")
            await until(lambda: server.bodies == [b"data: still here\n\n"])
            server.left.set()
            await server.ended()
        await until(lambda: len(hub) == 0)
