"""Opening: how long to wait for a broker, and how long between two attempts to connect to it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable

from ..backends.base import LoginRefused
from ..exceptions import BackendUnavailable, ConfigurationError

logger = logging.getLogger("starcast")

# Seconds for which a hub that is being opened waits for its broker. If both are started together,
# as containers are, it takes a few; gunicorn kills a worker that is not up within 30.
OPEN_TIMEOUT = 10.0

# Seconds that the last attempt gets, however little time is left, so that it can say what is wrong.
LAST_ATTEMPT = 1.0

# Seconds between two probes.
PROBE_INTERVAL = 3.0
MAX_PROBE_INTERVAL = 3600.0

CLOSED = "the hub was closed"


def check_timing(open_timeout: float, probe_interval: float) -> None:
    """Refuse settings that make no sense.

    Raises:
        ConfigurationError: One of them is not a possible number of seconds.
    """
    if not (isinstance(open_timeout, int | float) and open_timeout >= 0):
        raise ConfigurationError(
            f"open_timeout must be a number of seconds, or 0 to try once, not {open_timeout!r}"
        )
    if not (isinstance(probe_interval, int | float) and 0 < probe_interval <= MAX_PROBE_INTERVAL):
        raise ConfigurationError(
            f"probe_interval must be more than 0 and at most {MAX_PROBE_INTERVAL:.0f} seconds, "
            f"not {probe_interval!r}"
        )


class Backoff:
    """How long to wait before the next attempt.

    Each wait is a random part of its limit, so that a hundred processes do not try all at once, and
    each limit is half as long again as the one before.

    Args:
        first: The limit of the first wait, in seconds.
        longest: The limit that is not exceeded, in seconds.
    """

    def __init__(self, first: float, longest: float) -> None:
        self._limit = first
        self._longest = longest

    def next(self) -> float:
        """Return how long to wait now, in seconds."""
        wait = random.uniform(0, self._limit)
        self._limit = min(1.5 * self._limit, self._longest)
        return wait


async def keep_trying(
    connect: Callable[[float | None], Awaitable[None]],
    seconds: float,
    backoff: Backoff,
    on_failure: Callable[[Exception], None],
    is_closing: Callable[[], bool],
) -> None:
    """Connect for the first time, trying again until there is no time left.

    Args:
        connect: Called with the seconds that it may take; None if that is up to it.
        seconds: How long to try; 0 to try once.
        backoff: How long to wait between two attempts.
        on_failure: Called with the error of each attempt.
        is_closing: Returns whether to give up.

    Raises:
        BackendUnavailable: The last attempt failed, the login was refused, or the hub is closing.
    """
    until = time.monotonic() + seconds
    while True:
        left = max(until - time.monotonic(), LAST_ATTEMPT) if seconds else None
        try:
            await connect(left)
            return
        except BackendUnavailable as exc:
            on_failure(exc)
            wait = backoff.next()
            left = until - time.monotonic() - wait
            if left <= 0 or isinstance(exc, LoginRefused):
                raise
            logger.warning(
                "no connection to the broker yet, trying again for %.1f seconds: %s", left, exc
            )
        await asyncio.sleep(wait)
        if is_closing():
            raise BackendUnavailable(CLOSED)
