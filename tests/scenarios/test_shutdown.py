"""What a server that shuts down, or reloads, finds of the hub, and what it is told of its workers.

Real servers in processes of their own, each with open streams that a subscriber feeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
from pathlib import Path

import gunicorn.arbiter
import httpx
import hypercorn.config
import pytest
import uvicorn.config

from server_process import HERE, ServerProcess
from starcast.servers import stopping, workers
from support import DEADLINE, until

pytestmark = pytest.mark.anyio

APP = "streams_app:app"
PROMPT = 30.0  # seconds in which a server ends after SIGTERM
PATIENT = ["--graceful-timeout", "90"]  # of those that would wait for the streams this long
WARNING = "this hub is on memory://"

UVICORN = ["uvicorn", "--port", "{port}", APP]
GUNICORN = ["gunicorn", "--no-control-socket", *PATIENT, "--bind", "127.0.0.1:{port}", APP]
HYPERCORN = ["hypercorn", *PATIENT, "--bind", "127.0.0.1:{port}", APP]
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
STREAMS = ["/sse", "/stream", "/live/news", "/forward"]


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
        begun = re.compile("subscribed|retry:")
        await until(lambda: begun.search(self.got) or self.task.done())
        assert not self.task.done(), self.task


async def serving(process: ServerProcess, workers: int) -> None:
    """Wait until each of its worker processes has answered a request, so none is still starting.

    A worker of granian's loses a SIGTERM that it gets before, whatever the app: until it runs its
    event loop nothing handles the signal, or what handles it is what the main process left there.
    """
    pids = set()
    url = f"http://127.0.0.1:{process.port}/pid"

    async def ask() -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=DEADLINE) as client:
            pids.add((await client.get(url)).json())

    async with asyncio.timeout(DEADLINE):
        while len(pids) < workers:
            await asyncio.gather(*(ask() for _ in range(workers)))


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
    await until(lambda: process.process.poll() is not None, PROMPT)
    assert "Traceback" not in process.log
    assert "Cancel" not in process.log
    return process.process.returncode


@pytest.mark.parametrize("name", END)
async def test_a_server_ends_with_open_streams(name, tmp_path):
    command, code, warnings = SERVERS[name]
    with started(command, tmp_path) as process:
        await serving(process, workers=2 if "2" in command else 1)
        async with listening(process, *STREAMS):
            pass  # these leave before, and nothing of them must stay
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


# gunicorn's --reload does nothing with uvicorn's worker, whatever the app: the worker goes on.
@pytest.mark.parametrize(
    "name", [name for name in END if name in ("uvicorn", "hypercorn", "granian")]
)
async def test_a_reload_loads_the_new_code_with_open_streams(name, tmp_path):
    program = (HERE / "streams_app.py").read_text()
    folder = tmp_path / "app"  # without the log: granian looks at every file
    folder.mkdir()
    code = folder / "reloaded_app.py"
    code.write_text(program)
    command = [part.replace("streams_app", "reloaded_app") for part in SERVERS[name][0]]
    command.append("--reload")
    with started(command, tmp_path, folder, PYTHONDONTWRITEBYTECODE="1") as process:
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


# What the library reads of them, which coverage does not see in other processes


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
    assert workers.worker_processes() == 1
    started_with(config=uvicorn.config.Config(APP, workers=3))
    assert workers.worker_processes() == 3
    started_with(config=uvicorn.config.Config(APP, reload=True, workers=2))
    assert workers.worker_processes() == 1
    config = hypercorn.config.Config()
    config.workers = 4
    stop = asyncio.Event()
    started_with(config=config)
    assert not stopping.is_stopping()
    started_with(config=config, shutdown_event=stop)
    assert workers.worker_processes() == 4
    assert not stopping.is_stopping()
    stop.set()
    assert stopping.is_stopping()
    started_with(1, "starcast", name="granian-worker")
    assert workers.worker_processes() == 1
    started_with(2, "starcast", name="granian-worker")
    assert workers.worker_processes() == 2
    started_with(name="granian-worker")
    assert workers.worker_processes() == 1
    started_with(config={"workers": 5})
    assert workers.worker_processes() == 1

    arbiter = object.__new__(gunicorn.arbiter.Arbiter)
    arbiter._num_workers = 6
    before = signal.signal(signal.SIGTTIN, arbiter.signal)
    try:
        assert workers.worker_processes() == 6
    finally:
        signal.signal(signal.SIGTTIN, before)

    monkeypatch.delitem(sys.modules, "multiprocessing.process")
    assert workers.worker_processes() == 1
