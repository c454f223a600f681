"""What the kernel knows about a process: CPU time and memory."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path


def family(pid: int) -> list[int]:
    """Return the process and all others of its session: a server is started in one of its own."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in brackets, may hold anything; the session is the fourth field after it.
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == pid:
                pids.append(int(stat.parent.name))
    return pids or [pid]


def cpu_seconds(pids: list[int]) -> float:
    """Return the CPU time of all their threads so far, from the scheduler's accounting."""
    total = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9


def memory_bytes(pids: list[int]) -> int:
    """Return their proportional set size. What the kernel holds for sockets is not in it."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def machine() -> dict[str, str | int]:
    """Describe this machine, without saying which one it is."""
    model = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }
