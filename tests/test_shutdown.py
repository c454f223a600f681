"""What a server that shuts down, or reloads, finds of the hub, and what it is told of its workers.

Real servers in processes of their own, each with open streams that a subscriber feeds. Coverage
does not see those processes, so what the library reads of each is also tested in this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import gunicorn.arbiter
import httpx
import hypercorn.config
import pytest
import uvicorn.config

import streams_app
from server_process import HERE, ServerProcess
from starcast import Broadcast, server
from support import DEADLINE, Broker, Bus, OtherLoop, Served, until

pytestmark = pytest.mark.anyio

APP = "streams_app:app"
PROMPT = 3.0  # seconds in which a server ends after SIGTERM
WARNING = "this hub is on memory://"

UVICORN = ["uvicorn", "--port", "{port}", APP]
GUNICORN = ["gunicorn", "--bind", "127.0.0.1:{port}", APP]
HYPERCORN = ["hypercorn", "--bind", "127.0.0.1:{port}", APP]
GRANIAN = ["granian", "--interface", "asgi", "--port", "{port}", APP]

# Each server's exit code, which it has without the library too, and how many processes warn.
SERVERS: dict[str, tuple[list[str], int, int]] = {
    "uvicorn": (UVICORN, -signal.SIGTERM, 0),
    "uvicorn-workers": ([*UVICORN, "--workers", "2"], 0, 2),
    "uvicorn-reload": ([*UVICORN, "--reload"], 0, 0),
    "uvicorn-h11-asyncio": ([*UVICORN, "--http", "h11", "--loop", "asyncio"], -signal.SIGTERM, 0),
    "gunicorn-uvicorn": ([*GUNICORN, "-k", "uvicorn_worker.UvicornWorker"], 0, 0),
    "gunicorn-workers": ([*GUNICORN, "-k", "uvicorn_worker.UvicornWorker", "-w", "2"], 0, 2),
    "gunicorn-asgi": ([*GUNICORN, "-k", "asgi", "-w", "2"], 0, 2),
    "hypercorn": (HYPERCORN, 0, 0),
    "hypercorn-alone": ([*HYPERCORN, "--workers", "0"], 0, 0),
    "hypercorn-workers": ([*HYPERCORN, "--workers", "2"], 0, 2),
    "granian": (GRANIAN, 0, 0),
    "granian-uvloop": ([*GRANIAN, "--loop", "uvloop"], 0, 0),
    "granian-workers": ([*GRANIAN, "--workers", "2"], 0, 1),  # the first one cannot know
}
# From Python 3.12 on, hypercorn 0.18 never ends while a client is there, whatever the app.
END = [name for name in SERVERS if "hypercorn" not in name or sys.version_info < (3, 12)]
STREAMS = ["/sse", "/stream", "/forward"]


class Listener:
    """A client of a stream, which reads until it ends."""

    def __init__(self, process: ServerProcess, path: str) -> None:
        self.got = ""
        self._listen = self._websocket if path == "/forward" else self._response
        self.task = asyncio.create_task(self._listen(process, path))

    async def _response(self, process: ServerProcess, path: str) -> None:
        url = f"http://127.0.0.1:{process.port}{path}"
        async with (
            httpx.AsyncClient(trust_env=False, timeout=DEADLINE) as client,
            client.stream("GET", url) as response,
        ):
            async for text in response.aiter_text():
                self.got += text

    async def _websocket(self, process: ServerProcess, path: str) -> None:
        async with process.connect(path) as client:
            async for text in client:
                self.got += text

    async def subscribed(self) -> None:
        await until(lambda: "subscribed" in self.got or self.task.done())
        assert not self.task.done(), self.task


@contextlib.asynccontextmanager
async def listening(process: ServerProcess, *paths: str):
    listeners = [Listener(process, path) for path in paths]
    try:
        for listener in listeners:
            await listener.subscribed()
        yield listeners
    finally:
        for listener in listeners:
            listener.task.cancel()
        await asyncio.gather(*(each.task for each in listeners), return_exceptions=True)


@contextlib.contextmanager
def started(command: list[str], tmp_path: Path, folder: Path = HERE, **environment: str):
    process = ServerProcess(command, tmp_path / "log", folder, **environment)
    try:
        yield process
    finally:
        process.kill()


async def ended(process: ServerProcess, sign: signal.Signals = signal.SIGTERM) -> int:
    """Send it a signal, and return its exit code; fail if it takes too long."""
    process.process.send_signal(sign)
    begin = time.monotonic()
    await until(lambda: process.process.poll() is not None)
    assert time.monotonic() - begin < PROMPT, process.log
    assert "Traceback" not in process.log
    assert "Cancel" not in process.log
    return process.process.returncode


@pytest.mark.parametrize("name", END)
async def test_a_server_ends_with_open_streams(name, tmp_path):
    command, code, warnings = SERVERS[name]
    with started(command, tmp_path) as process:
        async with listening(process, *STREAMS) as listeners:
            await until(lambda: process.log.count(WARNING) >= warnings)
            assert await ended(process) == code
            for listener in listeners:  # cleanly or not: that is up to the server
                await asyncio.wait([listener.task], timeout=DEADLINE)
    for scheme in (WARNING, "redis://", "nats://", "postgresql://"):
        assert process.log.count(scheme) == warnings


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)])
async def test_each_kind_of_stream_ends(path, sign, code, tmp_path):
    with started(UVICORN, tmp_path) as process:
        async with listening(process, path) as (listener,):
            assert await ended(process, sign) == code
            if path != "/forward":  # a complete response
                await asyncio.wait_for(listener.task, DEADLINE)


async def test_a_reload_loads_the_new_code_with_open_streams(tmp_path):
    program = (HERE / "streams_app.py").read_text()
    code = tmp_path / "reloaded_app.py"
    code.write_text(program)
    command = ["uvicorn", "--port", "{port}", "--reload", "reloaded_app:app"]
    with started(command, tmp_path, tmp_path, PYTHONDONTWRITEBYTECODE="1") as process:
        async with listening(process, *STREAMS):
            new = program.replace('VERSION = "1"', 'VERSION = "2"')
            assert new != program
            code.write_text(new)
            version = ""
            async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(DEADLINE):
                while version != '"2"':
                    with contextlib.suppress(httpx.TransportError):
                        url = f"http://127.0.0.1:{process.port}/version"
                        version = (await client.get(url, timeout=1)).text
        assert await ended(process) == 0


@pytest.mark.parametrize(
    ("variable", "command", "warnings"),
    [
        ("2", UVICORN, 2),
        ("2", [*UVICORN, "--reload"], 0),
        ("1", UVICORN, 0),
        ("2", [*GUNICORN, "-k", "uvicorn_worker.UvicornWorker"], 2),
    ],
)
async def test_the_workers_of_the_environment(variable, command, warnings, tmp_path):
    with started(command, tmp_path, WEB_CONCURRENCY=variable) as process:
        async with listening(process, "/stream"):
            await until(lambda: process.log.count(WARNING) >= warnings)
            await ended(process)
        assert process.log.count(WARNING) == warnings


# In this process


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
        assert [await take(hub) for _ in range(3)] == [[], [], []]
        assert time.monotonic() - begin > 0.1, "subscribing in a loop keeps nobody busy"
        await subscribers(hub, 0)
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_without_a_handler_sigterm_is_left_alone():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    hub = Broadcast()
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
        await asyncio.sleep(2 * server.POLL_INTERVAL)

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
def started_with(monkeypatch):
    """What a server started this process with."""
    process = sys.modules["multiprocessing.process"].current_process()

    def start(*args, name="SpawnProcess-1", **kwargs):
        monkeypatch.setattr(process, "_args", args, raising=False)
        monkeypatch.setattr(process, "_kwargs", kwargs, raising=False)
        monkeypatch.setattr(process, "_name", name)

    return start


async def test_what_the_servers_say_of_their_workers(started_with, monkeypatch):
    assert server.worker_processes() == 1
    started_with(config=uvicorn.config.Config(APP, workers=3))
    assert server.worker_processes() == 3
    started_with(config=uvicorn.config.Config(APP, reload=True))
    assert server.worker_processes() == 1
    config = hypercorn.config.Config()
    config.workers = 4
    stop = asyncio.Event()
    started_with(config=config)
    assert not server.is_stopping()
    started_with(config=config, shutdown_event=stop)
    assert server.worker_processes() == 4
    assert not server.is_stopping()
    stop.set()
    assert server.is_stopping()
    started_with(1, "starcast", name="granian-worker")
    assert server.worker_processes() == 1
    started_with(2, "starcast", name="granian-worker")
    assert server.worker_processes() == 2
    started_with(name="granian-worker")
    assert server.worker_processes() == 1
    started_with(config={"workers": 5})
    assert server.worker_processes() == 1

    arbiter = object.__new__(gunicorn.arbiter.Arbiter)
    arbiter._num_workers = 6
    before = signal.signal(signal.SIGTTIN, arbiter.signal)
    try:
        assert server.worker_processes() == 6
    finally:
        signal.signal(signal.SIGTTIN, before)

    monkeypatch.delitem(sys.modules, "multiprocessing.process")
    assert server.worker_processes() == 1


async def test_one_warning_a_process(started_with, caplog):
    server.warn_of_workers.cache_clear()
    started_with(config=uvicorn.config.Config(APP, workers=2))
    async with Broadcast(backend=Bus(Broker())):
        assert caplog.messages == []
    for _ in range(2):
        async with Broadcast(), Broadcast():
            pass
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert WARNING in record.getMessage()
    server.warn_of_workers.cache_clear()


async def test_no_warning_before_a_hub_opens(started_with, caplog):
    started_with(config=uvicorn.config.Config(APP, workers=2))
    Broadcast()
    assert caplog.messages == []
