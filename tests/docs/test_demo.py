"""The demo with a real broker: as compose.yaml runs it, and four workers, as the README does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import websockets
import yaml

from backends.redis_server import RedisServer
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

    def connect(self, path: str) -> websockets.connect:
        return websockets.connect(f"ws://127.0.0.1:{self.port}{path}", proxy=None)


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


async def receive(client: websockets.ClientConnection, kind: str) -> dict[str, str]:
    async with asyncio.timeout(DEADLINE):
        while True:
            content = json.loads(await client.recv())
            if "data" in content:  # the first object has none
                message: dict[str, str] = json.loads(content["data"])
                if message["type"] == kind:
                    return message


async def say(client: websockets.ClientConnection, text: str) -> None:
    await client.send(json.dumps({"type": "message", "author": "Mira", "text": text}))


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
        async with server.connect("/ws") as client:
            await receive(client, "welcome")
            other_program = shlex.split(shell_line("docs/how-to/other-programs.md", "room:lobby"))
            assert other_program[0] == "starcast"
            monkeypatch.setenv("STARCAST_URL", url)
            assert await asyncio.to_thread(cli.main, other_program[1:]) == 0
            assert (await receive(client, "message"))["text"] == "the kettle is on"
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
            await everybody_is_counted(server)
            await an_outage(server, broker)
            await one_room(server)


async def one_room(server: Shell) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(server.connect("/ws")) for _ in range(12)]
        ids = {(await receive(client, "welcome"))["id"] for client in clients}
        assert len(ids) == 12
        for number, client in enumerate(clients):
            await say(client, str(number))
        heard = [
            [(await receive(client, "message"))["text"] for _ in clients] for client in clients
        ]
        assert sorted(heard[0], key=int) == [str(number) for number in range(12)]
        assert all(each == heard[0] for each in heard)

        tickers = [
            await stack.enter_async_context(server.connect("/live/ticker")) for _ in range(12)
        ]
        async with asyncio.timeout(DEADLINE):
            first, *others = [json.loads(await ticker.recv())["values"] for ticker in tickers]
            for past in others:  # the same numbers, some ticks later
                assert any(first[n:] == past[: 120 - n] for n in range(60))
            for ticker in tickers:
                assert len(json.loads(await ticker.recv())["values"]) == 1


async def every_worker_knows_what_was_missed(server: Shell) -> None:
    async with server.connect("/ws?room=tea") as jonas:
        begin = json.loads(await jonas.recv())
    async with server.connect("/ws?room=tea") as mira:
        for number in range(5):
            await say(mira, str(number))
            await receive(mira, "message")
    workers = set()
    for _ in range(12):
        async with server.connect(f"/ws?room=tea&last_event_id={begin['id']}") as jonas:
            assert json.loads(await jonas.recv())["recovered"]
            heard = [(await receive(jonas, "message"))["text"] for _ in range(5)]
            assert heard == [str(number) for number in range(5)]
            workers.add((await receive(jonas, "welcome"))["worker"])
    assert len(workers) > 1


async def everybody_is_counted(server: Shell) -> None:
    """What the workers say adds up to how many are here."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(server.connect("/ws?room=x")) for _ in range(8)]
        served_by = [(await receive(client, "welcome"))["worker"] for client in clients]
        for client in clients:
            counts: dict[str, object] = {}
            while counts != {worker: served_by.count(worker) for worker in served_by}:
                here: dict[str, object] = await receive(client, "here")
                counts[str(here["worker"])] = here["count"]


async def an_outage(server: Shell, broker: RedisServer) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(server.connect("/ws")) for _ in range(8)]
        ticker = await stack.enter_async_context(server.connect("/live/ticker"))
        for client in clients:
            await receive(client, "welcome")  # it is on both of its channels
        broker.kill()
        for client in clients:
            assert (await receive(client, "broker"))["away"]
        mira = clients[0]
        await mira.send(json.dumps({"type": "typing", "author": "Mira"}))
        await say(mira, "the kettle is on")
        assert (await receive(mira, "unsent"))["text"] == "the kettle is on"
        broker.start()
        for client in (*clients, ticker):  # they shall connect again, and say why
            with contextlib.suppress(websockets.ConnectionClosed):
                async with asyncio.timeout(DEADLINE):
                    async for _ in client:
                        pass
            assert client.close_code == 1012
