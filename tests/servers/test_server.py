"""What a hub learns of the server that runs it.

The servers themselves run in scenarios/test_shutdown.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time

import httpx
import pytest
import uvicorn

import streams_app
from starcast import Broadcast
from starcast.servers import stopping, workers
from support import DEADLINE, Broker, Bus, OtherLoop, Served, until

pytestmark = pytest.mark.anyio


async def take(hub: Broadcast, channel: str = "news") -> list[object]:
    """Everything that a subscriber gets until it ends."""
    async with hub.subscribe(channel) as subscriber:
        return [event.message async for event in subscriber]


@contextlib.contextmanager
def handled(handler):
    """SIGTERM with a handler of somebody's."""
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
        assert signal.getsignal(signal.SIGTERM) == handler, "nobody has replaced it for good"
    finally:
        signal.signal(signal.SIGTERM, before)


async def subscribers(hub: Broadcast, count: int) -> None:
    await until(lambda: hub.stats().subscribers == count)


async def test_the_handler_that_was_there_is_called_and_put_back():
    received = []

    def handler(signum, frame):
        received.append((signum, frame is not None))

    hubs = [Broadcast(), Broadcast()]
    with handled(handler):
        for _ in range(2):  # it is taken away and installed again
            tasks = [asyncio.create_task(take(hub)) for hub in hubs]
            for hub in hubs:
                await subscribers(hub, 1)
                await hub.publish("news", "before")
            assert signal.getsignal(signal.SIGTERM) is not handler
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await until(lambda: signal.getsignal(signal.SIGTERM) is handler)
    assert received == []


async def test_sigterm_ends_what_is_subscribed_and_what_subscribes_then():
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        hub = Broadcast()
        tasks = [asyncio.create_task(take(hub)) for _ in range(2)]
        await subscribers(hub, 2)
        hub.publish_nowait("news", "last")
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE) == [["last"], ["last"]]
        assert received == [True]
        begin = time.monotonic()
        for _ in range(10):  # for longer than it takes to notice that nobody is left
            assert await asyncio.wait_for(take(hub), DEADLINE) == []
        took = time.monotonic() - begin
        assert took > 4 * stopping.POLL_INTERVAL, "to subscribe again and again keeps nobody busy"
        await subscribers(hub, 0)
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_without_a_handler_sigterm_is_left_alone():
    hub = Broadcast()
    with handled(signal.SIG_DFL):
        async with hub.subscribe("news"):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


async def test_a_loop_in_another_thread_leaves_the_handler_alone(other: OtherLoop):
    def handler(signum, frame):
        raise AssertionError

    async def subscribe_and_look():
        async with Broadcast().subscribe("news"):
            return signal.getsignal(signal.SIGTERM)

    with handled(handler):
        assert await asyncio.to_thread(other.run, subscribe_and_look()) is handler


async def test_a_loop_in_another_thread_cannot_put_it_back(other: OtherLoop):
    """It leaves that to the main thread's loop, whose subscribers still need it."""

    async def subscribe():
        async with Broadcast().subscribe("news"):
            pass
        await asyncio.sleep(2 * stopping.POLL_INTERVAL)

    with handled(lambda *_: None):
        handler = signal.getsignal(signal.SIGTERM)
        hub = Broadcast()
        async with hub.subscribe("news"):
            assert signal.getsignal(signal.SIGTERM) is not handler
            await asyncio.to_thread(other.run, subscribe())
            assert signal.getsignal(signal.SIGTERM) is not handler
        await until(lambda: signal.getsignal(signal.SIGTERM) is handler)


@pytest.mark.parametrize("limit", [1, None])
async def test_uvicorn_stops_after_its_last_request_or_by_a_flag(limit, serve):
    served = await serve(streams_app.app, limit_max_requests=limit)
    url = f"http://127.0.0.1:{served.port}"
    async with (
        httpx.AsyncClient(trust_env=False, timeout=DEADLINE) as client,
        client.stream("GET", f"{url}/stream") as response,
    ):
        lines = response.aiter_lines()
        assert await anext(lines) == "subscribed"
        handler = signal.getsignal(signal.SIGTERM)
        assert handler == served.server.handle_exit, "others look for the server there too"
        await client.get(f"{url}/version")
        if limit is None:
            served.server.should_exit = True
        assert [line async for line in lines] == []


def run(server_: uvicorn.Server, sock: socket.socket, how: str) -> None:
    """Run a server on this thread, as test suites do in one of their own."""

    async def serve() -> None:  # the name that uvicorn's own has too
        await server_.serve([sock])

    if how == "run":
        server_.run([sock])
    else:
        asyncio.run(serve())


@pytest.mark.parametrize("how", ["run", "among others"])
async def test_a_server_in_a_thread_ends_its_streams(how):
    for _ in range(2):  # one after another
        sock = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(streams_app.app, log_config=None, timeout_graceful_shutdown=20)
        server_ = uvicorn.Server(config)
        thread = threading.Thread(target=run, args=[server_, sock, how], daemon=True)
        thread.start()
        await until(lambda it=server_: it.started)
        async with (
            httpx.AsyncClient(trust_env=False, timeout=DEADLINE) as client,
            client.stream("GET", f"http://127.0.0.1:{sock.getsockname()[1]}/stream") as response,
        ):
            lines = response.aiter_lines()
            assert await anext(lines) == "subscribed"
            server_.should_exit = True
            assert [line async for line in lines] == []
        await asyncio.to_thread(thread.join, DEADLINE)
        assert not thread.is_alive()
        sock.close()


async def test_a_server_that_has_stopped_and_left_its_handler():
    first, second = Served(streams_app.app), Served(streams_app.app)
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGINT)}
    try:
        for server_ in (first, second):
            await server_.start()
        for server_ in (first, second):
            await server_.stop()
        assert signal.getsignal(signal.SIGTERM) == first.server.handle_exit
        hub = Broadcast()
        async with hub.subscribe("news") as subscriber:
            await hub.publish("news", "hello")
            assert (await anext(subscriber)).message == "hello"
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


# Workers


@pytest.fixture
def two_workers(monkeypatch):
    """As in a process that `uvicorn --workers 2` has started, which has warned of nothing yet."""
    monkeypatch.setattr(workers, "worker_processes", lambda: 2)
    workers.warn_of_workers.cache_clear()
    yield
    workers.warn_of_workers.cache_clear()


async def test_one_warning_a_process(two_workers, caplog):
    async with Broadcast(backend=Bus(Broker())):
        assert caplog.messages == []
    for _ in range(2):
        async with Broadcast(), Broadcast():
            pass
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "memory://" in record.getMessage()


async def test_no_warning_before_a_hub_opens(two_workers, caplog):
    Broadcast()
    assert caplog.messages == []
