"""Logging: log a warning once per process or once in ten seconds, and escape what clients send."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("starcast")

# How many kinds of lines `once` logs in a process: in all, and starting with the same word.
# Clients may be able to cause new kinds without limit. They must not fill a disk, and one cause
# must not use up the lines of the others.
MAX_KINDS = 100
MAX_ALIKE = 20

# A `LogLimit` lets one line of each kind through in this many seconds by default.
SECONDS = 10.0

# How many recent kinds a `LogLimit` remembers. While it is full, new kinds are not logged.
KINDS = 20

# What may differ between two errors of one kind: names, which brokers quote, and numbers.
_DETAILS = re.compile(r"""'[^']*'|"[^"]*"|\d+""")


class LogLimit:
    """Lets one line of each kind through in an interval. May be used from any thread.

    Args:
        seconds: The interval.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._last: dict[tuple[str, str], float] = {}

    def allows(self, text: str, about: str = "") -> bool:
        """Return whether no line of this kind has been let through in the interval.

        Two lines are of one kind if `about` is the same, and if their texts differ only in numbers
        and in what they quote.
        """
        kind = (_DETAILS.sub("", text), about)
        now = time.monotonic()
        with self._lock:
            self._last = {k: last for k, last in self._last.items() if now - last < self._seconds}
            if kind in self._last or len(self._last) >= KINDS:
                return False
            self._last[kind] = now
            return True


_logged: set[tuple[str, ...]] = set()
_lock = threading.Lock()
_limit = LogLimit()


def once(kind: tuple[str, ...], message: str, *args: object, level: int = logging.WARNING) -> None:
    """Log a line unless this process has logged one of the same kind. Safe from any thread."""
    if not logger.isEnabledFor(level):
        return
    with _lock:
        alike = sum(1 for logged in _logged if logged[0] == kind[0])
        if kind in _logged or len(_logged) >= MAX_KINDS or alike >= MAX_ALIKE:
            return
        _logged.add(kind)
    logger.log(level, message, *args)


def seldom(kind: str, message: str, *args: object) -> None:
    """Log a warning at most once in ten seconds for each kind. Safe from any thread."""
    if _limit.allows(kind):
        logger.warning(message, *args)


def client(scope: Mapping[str, Any]) -> str:
    """Return what a client with this ASGI scope has asked for."""
    return "a WebSocket" if scope["type"] == "websocket" else "an event stream"


def describe(error: BaseException) -> str:
    """Return the error's message, or the name of its type if it has none."""
    return str(error) or type(error).__name__


def escape(text: str) -> str:
    """Escape characters that would start a new line or control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reset() -> None:
    """Forget what has been logged, so that tests do not depend on each other."""
    global _limit
    with _lock:
        _logged.clear()
        _limit = LogLimit()
