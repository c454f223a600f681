"""Starts a server, lets the load at it, and stops it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from .load import HOST, Failed
from .scenarios import Point
from .servers import Server

START = 20.0  # seconds for a server to start
LOAD = 90.0  # seconds for the load, beside the timed part

ROOT = Path(__file__).parent.parent


class NotRun(Exception):
    """A server cannot be measured, and why."""


def cores() -> tuple[int, int]:
    """Return the cores of the server and of the load: one each, if there are two."""
    available = sorted(os.sched_getaffinity(0))
    return available[0], available[-1]


def _command(core: int, module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.pinned", str(core), module, *arguments]


def versions(server: Server) -> dict[str, str]:
    found = {}
    for package in server.packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextlib.contextmanager
def serving(server: Server) -> Iterator[tuple[int, int]]:
    """Run a server as long as the block does. Gives its process id and its port."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port = sock.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            _command(cores()[0], f"benchmarks.servers.{server.name}", str(port)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            _wait_for(process, port, log)
            yield process.pid, port
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            raise NotRun(lines[-1][:200] if lines else f"it ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1):
            return
        time.sleep(0.02)
    raise NotRun(f"it did not listen within {START:g} seconds")


def measure(point: Point, seconds: float, **more: Any) -> dict[str, Any]:
    """Start the server of a point, run its load once, and return the figures.

    Raises:
        NotRun: The server cannot be started.
        Failed: It was started, and there are no figures.
    """
    with serving(point.server) as (pid, port):
        task = {"pid": pid, "port": port, "seconds": seconds, **point.settings, **more}
        try:
            load = subprocess.run(
                _command(cores()[1], "benchmarks.load"),
                input=json.dumps(task).encode(),
                capture_output=True,
                timeout=LOAD + seconds,
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
