"""Many workers are one room: two uvicorn processes with two workers each, and fifty clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import websockets

from support import DEADLINE, free_port, until, until_sync

pytestmark = pytest.mark.anyio

HERE = Path(__file__).parent.parent
CLIENTS = 50


class Process:
    """`uvicorn --workers 2` on a port of loopback."""

    def __init__(self, url: str, log: Path) -> None:
        self.port = free_port()
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "worker_app:app", "--workers", "2"]
                + ["--port", str(self.port), "--ws", "starcast.uvicorn:BroadcastProtocol"],
                stdout=output,
                stderr=output,
                cwd=HERE,
                env={
                    **os.environ,
                    "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
                    "STARCAST_URL": url,
                },
                start_new_session=True,
            )

    def wait(self) -> None:
        started = "Application startup complete."
        until_sync(lambda: self.log.count(started) == 2 or self._process.poll() is not None, 30)
        assert self._process.poll() is None, self.log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


@pytest.fixture
def processes(url, tmp_path) -> Iterator[list[Process]]:
    started = [Process(url, tmp_path / f"log {number}") for number in range(2)]
    try:
        for process in started:
            process.wait()
        yield started
    finally:
        for process in started:
            process.end()
    for process in started:
        assert "Traceback" not in process.log, process.log


class Client:
    """Reads until it is cut off."""

    def __init__(self, connection: websockets.ClientConnection) -> None:
        self.connection = connection
        self.got: list[str] = []
        self.worker = 0
        self.ended = False
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in self.connection:
                if message.startswith("worker "):
                    self.worker = int(message.partition(" ")[2])
                else:
                    self.got.append(message)
        self.ended = True

    async def close(self) -> None:
        await self.connection.close()
        await self._task


@contextlib.asynccontextmanager
async def clients(processes: list[Process], count: int = CLIENTS):
    made = []
    for number in range(count):
        port = processes[number % len(processes)].port
        made.append(Client(await websockets.connect(f"ws://127.0.0.1:{port}/ws/room", proxy=None)))
    try:
        await until(lambda: all(client.worker for client in made))
        yield made
    finally:
        await asyncio.gather(*(client.close() for client in made))


def check_order(url: str, got: list[list[str]], senders: list[str]) -> None:
    """Everybody has the same, each once; with core NATS only each sender's order is the same."""
    for messages in got:
        assert Counter(messages) == Counter(got[0])
        assert max(Counter(messages).values()) == 1
        for sender in senders:
            mine = [message for message in messages if message.startswith(f"{sender} ")]
            assert mine == sorted(mine, key=lambda message: int(message.partition(" ")[2]))
        if not url.startswith("nats"):
            assert messages == got[0]


def readiness(port: int) -> dict[str, bool]:
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        answer = b""
        while more := connection.recv(4096):
            answer += more
    return json.loads(answer.partition(b"\r\n\r\n")[2])


async def test_every_message_reaches_each_client_once_and_in_one_order(url, processes):
    for process in processes:
        assert await asyncio.to_thread(readiness, process.port) == {"healthy": True}
    async with clients(processes) as everybody:
        assert len({client.worker for client in everybody}) >= 2
        senders = everybody[:10]
        for number in range(20):
            for index, client in enumerate(senders):
                await client.connection.send(f"{index} {number}")
        await until(lambda: all(len(client.got) >= 200 for client in everybody))
        got = [client.got for client in everybody]
        check_order(url, got, [str(index) for index in range(10)])
        assert len(got[0]) == 200


async def test_row_24_a_worker_is_killed(url, processes):
    async with clients(processes) as everybody:
        workers = Counter(client.worker for client in everybody)
        assert len(workers) >= 2
        victim = workers.most_common()[-1][0]
        left = [client for client in everybody if client.worker != victim]
        senders = left[:5]
        for number in range(20):
            for index, client in enumerate(senders):
                await client.connection.send(f"{index} {number}")
            if number == 10:
                os.kill(victim, signal.SIGKILL)
        await until(lambda: all(len(client.got) >= 100 for client in left))
        check_order(url, [client.got for client in left], [str(index) for index in range(5)])
        await until(lambda: all(c.ended for c in everybody if c.worker == victim))
        # Who comes back to that port is in the room again.
        async with clients(processes, 4) as back:
            await senders[0].connection.send("0 20")
            await until(lambda: all(client.got[-1:] == ["0 20"] for client in left + back))
