"""Which of the programs that a machine has a test's server is: the newest."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path


@functools.cache
def version(program: str | Path) -> tuple[int, ...]:
    """Return what `program --version` says: `(9, 1, 2)`. Nothing if it does not run."""
    try:
        said = subprocess.run(
            [program, "--version"],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            check=True,
            cwd="/",
            timeout=20,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    # "Valkey server v=9.1.2 sha=...", "nats-server: v2.15.1", "postgres (PostgreSQL) 18.4"
    number = re.search(r"\d+(?:\.\d+)*", said)
    return tuple(map(int, number[0].split("."))) if number else ()


def newest(programs: Iterable[str | Path | None]) -> list[str | Path]:
    """Return those that are there and run, the newest first; of equals the one named first."""
    found = [program for program in programs if program and version(program)]
    return sorted(found, key=version, reverse=True)
