"""Session: one session of PostgreSQL, as asyncpg has it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import asyncpg

# Errors whose messages are known not to repeat a URL.
_SAFE_ERRORS = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.TargetServerAttributeNotMatched,
)


class Session(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no type hints
    """A session that hands over every notification.

    asyncpg's own `add_listener` sends one LISTEN at a time, in two round trips. For many channels
    that takes long after an outage. Here several are sent together, and asyncpg is not told.
    """

    receive: Callable[[int, str, str], None]
    heard_at = 0.0  # when a notification arrived last, in `time.monotonic()`
    asked_at = math.inf  # when what was published was sent, if that is not answered yet

    def _process_notification(self, pid: int, name: str, text: str) -> None:
        self.heard_at = time.monotonic()
        self.receive(pid, name, text)


def reason(error: Exception) -> str:
    """Describe an error without anything that may contain a password."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, _SAFE_ERRORS):
        return str(error)
    return type(error).__name__
