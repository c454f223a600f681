"""Common: make a hub and print a line, for all commands."""

from __future__ import annotations

import sys
from typing import TextIO

from ..backends import Backend
from ..broadcast import Broadcast


def open_hub(backend: Backend, name: str) -> Broadcast:
    """Return a hub that is not open yet."""
    # The command fails at once, and its caller can try again.
    return Broadcast(backend=backend, name=name, open_timeout=0)


def say(line: str, out: TextIO | None = None) -> None:
    """Print and flush a line. Characters that the encoding of the output lacks are escaped."""
    out = sys.stdout if out is None else out
    encoding = out.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=out, flush=True)
