"""Health: how a connection to a broker is, and what it has counted. From any thread."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Literal

from .. import logs
from ..stats import BackendStats

State = Literal["closed", "connected", "reconnecting"]


class Health:
    """See the module.

    Args:
        lock: The hub's.

    Attributes:
        state: Whether there is a connection.
        error: What went wrong last, if anything has.
    """

    def __init__(self, lock: AbstractContextManager[object]) -> None:
        self._lock = lock
        self.state: State = "closed"
        self.error: str | None = None
        self._since = time.time()
        self._gaps = 0
        self._missed = 0  # messages that a blocked event loop had no space for
        self._malformed = 0

    def become(self, state: State, error: Exception | None = None) -> None:
        """Take note of a state, and of why it is so."""
        with self._lock:
            if state != self.state:
                self.state, self._since = state, time.time()
            if error is not None:
                self.error = logs.describe(error)

    def note(self, error: str) -> None:
        """Take note of an error that leaves the connection as it is."""
        with self._lock:
            self.error = error

    def count(self, *, gaps: int = 0, missed: int = 0, malformed: int = 0) -> None:
        """Count what has happened."""
        with self._lock:
            self._gaps += gaps
            self._missed += missed
            self._malformed += malformed

    def snapshot(
        self, *, alive: bool, lost: int, channels: int, queued: int, refused: int
    ) -> BackendStats:
        """Return it with what others know."""
        with self._lock:
            return BackendStats(
                state=self.state if alive else "closed",
                since=self._since,
                error=self.error,
                gaps=self._gaps,
                lost=lost + self._missed,
                malformed=self._malformed,
                channels=channels,
                queued=queued,
                refused=refused,
            )
