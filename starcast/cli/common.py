"""What the commands share: a hub, and how a line is printed."""

from __future__ import annotations

import sys
from typing import TextIO

from ..backends import Backend
from ..broadcast import Broadcast


def open_hub(backend: Backend, name: str) -> Broadcast:
    """Return a hub that is not open yet."""
    # A person, or a cron job, learns at once what is wrong, and can try again.
    return Broadcast(backend=backend, name=name, open_timeout=0)


def say(line: str, out: TextIO | None = None) -> None:
    """Print a line at once, whatever the terminal can show of it."""
    out = sys.stdout if out is None else out
    encoding = out.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=out, flush=True)
