"""`python -m benchmarks.pinned CORE MODULE [ARGUMENT...]`: run a module on one core.

What it runs may open many sockets, and ends when the process that started it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1
_FILES = 24_000


def allow_files() -> None:
    """Let this process and its children have as many sockets as they may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in ((max(_FILES, soft), max(_FILES, hard)), (hard, hard)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            break


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    core, *module = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    die_with_parent()
    allow_files()
    os.execv(sys.executable, [sys.executable, "-m", *module])


if __name__ == "__main__":
    main()
