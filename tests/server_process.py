"""An ASGI server in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import websockets

from support import free_port, until_sync

HERE = Path(__file__).parent
SHUTDOWN = 30.0  # seconds that a server may take to end after SIGTERM


class ServerProcess:
    """A server on a port of loopback.

    Args:
        command: A module to run with its arguments; `{port}` stands for the port.
        log: Where its output goes.
        folder: Where it runs. It finds what is there, in tests/ and in starcast.
        port: Instead of one that was free: that of an earlier server, which was killed.
        environment: Variables that it gets besides those of the tests.
    """

    def __init__(
        self,
        command: list[str],
        log: Path,
        folder: Path = HERE,
        port: int | None = None,
        **environment: str,
    ) -> None:
        self.port = port or free_port()
        self._log = log
        self._command = [sys.executable, "-m", *(it.format(port=self.port) for it in command)]
        self._folder = folder
        path = os.pathsep.join([str(folder), str(HERE), str(HERE.parent)])
        self._environment = {**os.environ, "PYTHONPATH": path, **environment}
        log.write_bytes(b"")
        self.start()

    def start(self) -> None:
        """Start it, again if it was killed."""
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=output,
                cwd=self._folder,
                env=self._environment,
                start_new_session=True,  # a server may have workers
            )
        try:
            until_sync(self._answers)
        except BaseException:
            self.kill()
            raise

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        return False

    @property
    def log(self) -> str:
        return self._log.read_text()

    def connect(self, path: str, **options: Any) -> Any:
        url = f"ws://127.0.0.1:{self.port}{path}"
        return websockets.connect(url, proxy=None, **options)

    def stop(self) -> None:
        """End it as a supervisor does, which would not wait without end."""
        self.process.terminate()
        self.process.wait(SHUTDOWN)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
