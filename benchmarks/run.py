"""Starts a server, lets the load at it, and stops it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from . import brokers
from .load import HOST, Failed
from .scenarios import Point
from .servers import Server

START = 20.0  # seconds for a server to start
LOAD = 90.0  # seconds for the load, beside the timed part
STOP = 5.0  # seconds for a server to end

ROOT = Path(__file__).parent.parent


class NotRun(Exception):
    """A server cannot be measured, and why."""


class NoBroker(Failed):
    """A broker cannot be started, and why."""


@dataclasses.dataclass(frozen=True)
class Cores:
    """Who runs where."""

    workers: list[int]
    load: int
    broker: int


def cores(workers: int = 1) -> Cores:
    """Return the cores of the server's workers, of the load and of the broker.

    If there are enough, everybody has one. If not, the workers share one, and the load and the
    broker another.
    """
    available = sorted(os.sched_getaffinity(0))
    if len(available) >= workers + 2:
        return Cores(available[:workers], available[-1], available[-2])
    return Cores([available[0]] * workers, available[-1], available[-1])


def _command(core: int, module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.pinned", str(core), module, *arguments]


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def _running(
    command: list[str],
    ready: Callable[[], bool],
    ending: signal.Signals = signal.SIGKILL,
    **environment: str,
) -> Iterator[int]:
    """Run a command, in a session of its own, as long as the block does. Gives its process id."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            _wait_for(process, ready, log)
            yield process.pid
        finally:
            if ending != signal.SIGKILL:
                process.send_signal(ending)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], ready: Callable[[], bool], log: IO[bytes]) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            raise NotRun(lines[-1][:200] if lines else f"it ended with {process.returncode}")
        if ready():
            return
        time.sleep(0.02)
    raise NotRun(f"it did not listen within {START:g} seconds")


@contextlib.contextmanager
def serving(server: Server, core: int, url: str) -> Iterator[tuple[int, int]]:
    """Run a server as long as the block does. Gives its process id and its port."""
    port = _free_port()

    def listens() -> bool:
        try:
            with socket.create_connection((HOST, port), 1):
                return True
        except OSError:
            return False

    command = _command(core, f"benchmarks.servers.{server.name}", str(port))
    with _running(command, listens, BROKER_URL=url) as pid:
        yield pid, port


@contextlib.contextmanager
def broker(name: str) -> Iterator[str]:
    """Run a broker as long as the block does. Gives its URL.

    Raises:
        NoBroker: It cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="starcast-bench-") as made:
        port, folder = _free_port(), Path(made)
        url = brokers.prepare(name, port, folder)
        command = _command(cores().broker, "benchmarks.brokers", name, str(port), made)
        ready = functools.partial(brokers.is_ready, name, port, folder)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_running(command, ready, brokers.ending(name)))
            except NotRun as exc:
                raise NoBroker(f"{name}: {exc}") from None
            yield url


def measure(point: Point, seconds: float, **more: Any) -> dict[str, Any]:
    """Start the server of a point, run its load once, and return the figures.

    Raises:
        NotRun: The server cannot be started.
        NoBroker: The broker cannot.
        Failed: They were started, and there are no figures.
    """
    settings = {**point.settings, **more}
    name, workers = settings.pop("broker", None), settings.pop("workers", 1)
    load = "benchmarks.trips" if settings.get("kind") == "trips" else "benchmarks.load"
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(broker(name)) if name else "memory://"
        try:
            started = [
                stack.enter_context(serving(point.server, core, url))
                for core in cores(workers).workers
            ]
        except NotRun as exc:
            if name:  # it may still run without
                raise Failed(str(exc)) from None
            raise
        task = {
            "pids": [pid for pid, _ in started],
            "ports": [port for _, port in started],
            "seconds": seconds,
            **settings,
        }
        if load == "benchmarks.trips":
            task |= {"program": point.server.name, "url": url}
        return _load(load, task, LOAD + seconds)


def _load(module: str, task: dict[str, Any], timeout: float) -> dict[str, Any]:
    try:
        load = subprocess.run(
            _command(cores().load, module),
            input=json.dumps(task).encode(),
            capture_output=True,
            timeout=timeout,
            cwd=ROOT,
        )
    except subprocess.TimeoutExpired:
        raise Failed("the load did not end in time") from None
    if load.returncode:
        lines = load.stderr.decode(errors="replace").strip().splitlines()
        raise Failed(lines[-1][:200] if lines else "the load was stopped")
    result = json.loads(load.stdout)
    if "failed" in result:
        raise Failed(result["failed"])
    return result
