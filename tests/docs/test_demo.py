"""The demo with a real broker: as compose.yaml runs it, and four workers, as the README does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets
import yaml

from backends.redis_server import RedisServer
from docs.chatting import Tab, tab
from starcast import cli
from support import DEADLINE, free_port, until_sync

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def shell_line(page: str, part: str) -> str:
    """The line of a page's shell blocks that has this in it."""
    blocks = re.findall(r"^```shell\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    (line,) = [line for block in blocks for line in block.splitlines() if part in line]
    return line


class Shell:
    """A shell that runs a command in this folder, with a uvicorn on a free port of loopback.

    What would install something does nothing: all of it is here.
    """

    def __init__(self, script: str, url: str, folder: Path) -> None:
        self.port = free_port()
        there = f'"$@" --host 127.0.0.1 --port {self.port}'
        for name, does in {
            "pip": 'echo "pip $*"',
            "python": f"exec {sys.executable} {there}",
            "uvicorn": f"exec {sys.executable} -m uvicorn {there}",
        }.items():
            command = folder / "bin" / name
            command.parent.mkdir(exist_ok=True)
            command.write_text(f"#!/bin/sh\n{does}\n")
            command.chmod(0o755)
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", script],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "PATH": path, "STARCAST_URL": url},
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def started(self, workers: int) -> bool:
        log = self.log
        complete = log.count("Application startup complete.") == workers
        return complete and "Uvicorn running on" in log  # one process says that it listens, then

    def wait(self, workers: int = 1) -> None:
        until_sync(lambda: self.started(workers) or self.process.poll() is not None, 30)
        assert self.process.poll() is None, self.log

    def connect(self, path: str, **options: Any) -> websockets.connect:
        return websockets.connect(f"ws://127.0.0.1:{self.port}{path}", proxy=None, **options)


@contextlib.contextmanager
def running(script: str, url: str, folder: Path) -> Iterator[Shell]:
    shell = Shell(script, url, folder)
    try:
        yield shell
        shell.process.terminate()
        shell.process.wait(15)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.process.pid, signal.SIGKILL)
        shell.process.wait(15)
    assert "Traceback" not in shell.log, shell.log


# compose.yaml


def test_the_services():
    assert set(COMPOSE) == {"broker", "one", "two"}
    broker = COMPOSE["broker"]
    assert broker["image"].startswith("valkey/valkey")
    assert broker["healthcheck"]["test"] == ["CMD", "valkey-cli", "ping"]
    for name, port in ("one", 8001), ("two", 8002):
        service = COMPOSE[name]
        assert service["ports"] == [f"127.0.0.1:{port}:8000"]
        assert service["environment"] == {"STARCAST_URL": "redis://broker"}
        assert service["depends_on"] == {"broker": {"condition": "service_healthy"}}
        assert service["volumes"] == [f".:{service['working_dir']}:ro"]


async def test_the_command(urls, tmp_path, monkeypatch):
    url = urls("redis")
    *shell, script = COMPOSE["one"]["command"]
    assert COMPOSE["two"]["command"] == [*shell, script]
    assert shell == ["sh", "-c"]
    words = shlex.split(script)
    command = words[words.index("exec") :]
    assert command[:5] == ["exec", "python", "-m", "uvicorn", "demo_app:app"]
    assert command[5:] == ["--host", "0.0.0.0", "--app-dir", "/build"]

    copy = tmp_path / "copy"
    with running(script.replace("/build", str(copy)), url, tmp_path) as server:
        server.wait()
        assert f"pip install --quiet {copy}[demo,redis]" in server.log
        assert {path.name for path in copy.iterdir()} >= {"setup.cfg", "demo_app.py", "starcast"}
        async with tab(server) as client:
            other_program = shlex.split(shell_line("docs/how-to/other-programs.md", "room:lobby"))
            assert other_program[0] == "starcast"
            monkeypatch.setenv("STARCAST_URL", url)
            assert await asyncio.to_thread(cli.main, other_program[1:]) == 0
            assert await client.hears() == "the kettle is on"
    assert "Finished server process" in server.log  # it is uvicorn that got the signal


# The README's command


async def test_four_workers_are_one_room_also_after_an_outage(tmp_path):
    line = shell_line("README.md", "--workers 4")
    assert "STARCAST_URL=redis://localhost uvicorn " in line
    with RedisServer() as broker:
        script = line.replace("redis://localhost", broker.url)
        with running(script, "memory://", tmp_path) as server:
            server.wait(workers=4)
            await one_room(server)
            await every_worker_knows_what_was_missed(server)
            await everybody_knows_who_is_here(server)
            await an_outage(server, broker)
            await one_room(server)


async def tabs(stack: contextlib.AsyncExitStack, server: Shell, room: str, count: int) -> list[Tab]:
    names = [f"{number}" for number in range(count)]
    return [await stack.enter_async_context(tab(server, name, room)) for name in names]


async def one_room(server: Shell) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = await tabs(stack, server, "lobby", 12)
        assert len({client.welcome["user"] for client in clients}) == 12
        for number, client in enumerate(clients):
            await client.say(str(number))
        heard = [[await client.hears() for _ in clients] for client in clients]
        assert sorted(heard[0], key=int) == [str(number) for number in range(12)]
        assert all(each == heard[0] for each in heard)

        async with asyncio.timeout(DEADLINE):
            first, *others = [client.welcome["values"] for client in clients]
            for past in others:  # the same numbers, some ticks later
                assert any(first[n:] == past[: 120 - n] for n in range(60))
            for client in clients:
                assert len((await client.ticks())["values"]) == 1


async def every_worker_knows_what_was_missed(server: Shell) -> None:
    async with tab(server, room="tea") as mira:
        since = {key: mira.joined[key] for key in ("epoch", "offset")}
        for number in range(5):
            await mira.say(str(number))
            await mira.heard()
    workers = set()
    for _ in range(12):
        async with tab(server, room="tea", recover=True, **since) as jonas:
            assert jonas.joined["recovered"]
            said = [it["data"]["text"] for it in jonas.joined["publications"]]
            assert said == [str(number) for number in range(5)]
            workers.add(jonas.welcome["worker"])
    assert len(workers) > 1


async def everybody_knows_who_is_here(server: Shell) -> None:
    """Whichever worker they are on."""
    async with contextlib.AsyncExitStack() as stack:
        clients = await tabs(stack, server, "x", 8)
        for client in clients:
            await client.sees(*(f"{number}" for number in range(8)))


async def an_outage(server: Shell, broker: RedisServer) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = await tabs(stack, server, "lobby", 8)
        broker.kill()
        for client in clients:
            assert await client.told() == {"away": True}
        mira = clients[0]
        assert await mira.error("publish", channel="room:lobby", data="the kettle is on") == 100
        broker.start()
        for client in clients:
            assert await client.told() == {"away": False}
