"""Clock: the timers of one connection, and how many commands it may send."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from .model import Limits

# Before something expires, a client is given this part of the time, and at most so many seconds, to
# renew it.
LEAD_PART = 4
MAX_LEAD = 10.0

# The longest time that a client can be told: in Protobuf, it is a number of 32 bits.
MAX_TTL = 2**32 - 1


class Clock:
    """See the module. It belongs to the event loop of the connection."""

    def __init__(self, limits: Limits) -> None:
        self._loop = asyncio.get_running_loop()
        self._limits = limits
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._left = float(limits.burst)  # commands
        self._counted = self._loop.time()

    def call(self, name: str, seconds: float, callback: Callable[..., None], *args: object) -> None:
        """Call something later, instead of what was to be called under this name."""
        self.cancel(name)
        self._timers[name] = self._loop.call_later(seconds, callback, *args)

    def cancel(self, name: str) -> None:
        """Do not call what was to be called under this name."""
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        """Call nothing any more."""
        while self._timers:
            self._timers.popitem()[1].cancel()

    def take(self) -> bool:
        """Count a command; False if it is one too many."""
        now = self._loop.time()
        self._left += (now - self._counted) * self._limits.commands
        self._left = min(self._left, float(self._limits.burst))
        self._counted = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def remaining(expires_at: float) -> float:
    """Return for how many seconds something is still valid."""
    return expires_at - time.time()


def ttl(expires_at: float) -> int:
    """Return in how many seconds a client has to renew something that expires then."""
    left = remaining(expires_at)
    return min(MAX_TTL, max(1, int(left - min(MAX_LEAD, left / LEAD_PART))))
