"""Health: the state of a link and what it has counted. It may be used from any thread."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Literal

from .. import logs
from ..stats import BackendStats

State = Literal["closed", "connected", "reconnecting"]


class Health:
    """The state of a link, over all its connections.

    Args:
        lock: The hub's.

    Attributes:
        state: Whether there is a connection.
        error: The last error, or None.
        answered: When the last request that the broker has answered was sent, in seconds since
            1970. Everything that the broker had for this hub before that has arrived, so a gap
            begins here. The answer itself may have been delayed by a slow connection or a blocked
            event loop, and messages behind it may be missing.
    """

    def __init__(self, lock: AbstractContextManager[object]) -> None:
        self._lock = lock
        self.state: State = "closed"
        self.error: str | None = None
        self.answered = 0.0
        self._since = time.time()
        self._gaps = 0
        self._lost = 0
        self._malformed = 0

    def become(self, state: State, error: Exception | None = None) -> None:
        """Record a state, and the error that led to it."""
        with self._lock:
            if state != self.state:
                self.state, self._since = state, time.time()
            if error is not None:
                self.error = logs.describe(error)

    def note(self, error: str) -> None:
        """Record an error that does not change the state."""
        with self._lock:
            self.error = error

    def count(self, *, gaps: int = 0, lost: int = 0, malformed: int = 0) -> None:
        """Count gaps, messages that arrived and were lost, and messages that made no sense."""
        with self._lock:
            self._gaps += gaps
            self._lost += lost
            self._malformed += malformed

    def snapshot(
        self, *, alive: bool, lost: int, channels: int, queued: int, refused: int
    ) -> BackendStats:
        """Return the state, together with what only others know."""
        with self._lock:
            return BackendStats(
                state=self.state if alive else "closed",
                since=self._since,
                error=self.error,
                gaps=self._gaps,
                lost=lost + self._lost,
                malformed=self._malformed,
                channels=channels,
                queued=queued,
                refused=refused,
            )
