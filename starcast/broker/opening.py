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

# Seconds for which a hub that is being opened waits for its broker. One that is started together
# with the app, as containers are, needs a few; gunicorn kills a worker that is not up within 30.
OPEN_TIMEOUT = 10.0

# Seconds that the last attempt gets, however little is left: it shall say what is wrong.
LAST_ATTEMPT = 1.0

# Seconds between two probes.
PROBE_INTERVAL = 3.0
MAX_PROBE_INTERVAL = 3600.0

# Seconds before the first attempt to connect again, at most; each further one may wait half as long
# again, up to the longest. Each wait is a random part of that, so that a hundred processes do not
# come at once, and the longest leaves half a second of the two that it may take.
FIRST_WAIT = 0.1
LONGEST_WAIT = 1.5

CLOSED = "the hub was closed"


def check_timing(open_timeout: float, probe_interval: float) -> None:
    """Refuse settings that make no sense.

    Raises:
        ConfigurationError: One of them is not a number of seconds that is possible.
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
    """How long to wait before the next attempt to connect.

    Args:
        most: Seconds that a wait takes at most; `LONGEST_WAIT` by default.
    """

    def __init__(self, most: float | None = None) -> None:
        self._most = LONGEST_WAIT if most is None else most
        self._longest = FIRST_WAIT

    def next(self) -> float:
        """Return the seconds, more each time."""
        wait = random.uniform(0, self._longest)
        self._longest = min(1.5 * self._longest, self._most)
        return wait


async def keep_trying(
    connect: Callable[[float | None], Awaitable[None]],
    seconds: float,
    on_failure: Callable[[Exception], None],
    is_closing: Callable[[], bool],
) -> None:
    """Connect for the first time, again and again until there is no time left.

    Args:
        connect: Called with the seconds that it has; None leaves that to it.
        seconds: How long to try; 0 for once.
        on_failure: Called with the reason of each attempt that failed.
        is_closing: Whether nobody wants it any more.

    Raises:
        BackendUnavailable: The last attempt failed, the login was refused, or nobody wants it.
    """
    until = time.monotonic() + seconds
    backoff = Backoff()
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
