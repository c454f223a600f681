from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from chromium import chromium
from starcast import logs
from support import OtherLoop, Peer, Served, program

pytest_plugins = ["backends.servers"]

# How long an example takes, by the clock, depends on what else the machine does. The examples are
# the same in each run, unless .ci/slow asks for many of them.
hypothesis.settings.register_profile(
    "starcast", deadline=None, derandomize="STARCAST_EXAMPLES" not in os.environ
)
hypothesis.settings.load_profile("starcast")

# asyncio's debug mode logs each step of a loop that takes more than 0.1 seconds. That tells how
# busy the machine is, and tests that count log lines are not about that.
logging.getLogger("asyncio").addFilter(lambda record: not record.msg.startswith("Executing "))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported: many tests call it, and count what is left."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def anyio_backend() -> str:
    """Tests marked `anyio` run on asyncio, the one that starcast supports."""
    return "asyncio"


@pytest.fixture(autouse=True)
def no_stray_log_records(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """An error in the log that no test asked for fails that test.

    A test that expects one takes it out of `caplog` with `caplog.clear()` after looking at it.
    """
    yield
    errors = [record for record in caplog.get_records("call") if record.levelname == "ERROR"]
    assert not errors, [record.getMessage() for record in errors]


@pytest.fixture(autouse=True)
def no_log_line_was_seen() -> None:
    """What a process logs once, it logs once in each test."""
    logs.reset()


@pytest.fixture(autouse=True)
def sigterm_as_it_was() -> Iterator[None]:
    """Servers of one test that end in another order than they began leave a handler behind."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
async def serve(anyio_backend: str):
    """`server = await serve(app)` runs uvicorn on this event loop and a free port of loopback."""
    servers: list[Served] = []

    async def start(app, **config) -> Served:
        server = Served(app, **config)
        servers.append(server)
        await server.start()
        return server

    yield start
    await asyncio.gather(*(server.stop() for server in servers))


@pytest.fixture
def other() -> Iterator[OtherLoop]:
    """A second event loop, in a thread of its own."""
    loop = OtherLoop()
    yield loop
    if not loop.loop.is_closed():
        loop.close()


@pytest.fixture(params=["asgi", "frames"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both roads to a `Peer`: ASGI messages, and ready-made frames."""
    monkeypatch.setattr(Peer, "frames", request.param == "frames")
    return request.param


@pytest.fixture
def demo_app() -> Any:
    """The demo, in whose rooms nothing has been said yet."""
    return program(Path(__file__).parents[1] / "demo_app.py")


@pytest.fixture
async def browser(anyio_backend):
    async with chromium() as browser:
        yield browser
