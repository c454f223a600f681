"""Deadlines that do not expire just because the event loop was blocked.

A handler calls `time.sleep(3)` or parses a huge file. When the event loop continues, the broker's
answer has been in the socket for long, but the timer is due too and would fire first: asyncio runs
timers in the turn in which it notices that the socket is readable, and uvloop before that. The
answer still has to pass through a stream, a parser and the tasks that wait for it. This took four
to six turns with all three brokers on both loops, and some milliseconds more where PostgreSQL needs
a second round trip.

So a timer that is due first lets the loop run for `TURNS` turns, with a pause before each of them
in which more data can arrive. The pauses are longer if the loop was blocked shortly before: the
request may not have been sent yet, and much data may be ahead of the answer.

A slow connection is not taken for a dead one either: while data arrives, the deadline is extended
until nothing has arrived for the whole timeout.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

# The number of turns that the loop gets after a deadline, and the pause in seconds before each of
# them: 0.05 in total, or 0.5 if the loop was blocked.
TURNS = 10
PAUSE = 0.005
PAUSE_LATE = 0.05

# Seconds by which a timer may be late on a loop that is busy, but not blocked.
LATE = 0.03

# The fraction of the timeout after which a first timer checks whether the loop is blocked. If it is
# not, the rest of the timeout is enough for an answer.
FIRST_CHECK = 0.8


class Overdue:
    """Calls a function after a timeout, unless it is cancelled first.

    Create it on the loop on which the function is to be called.

    Args:
        seconds: The timeout; negative if the deadline has passed already.
        callback: The function to call, without arguments.
        heard_at: Returns when data last arrived from the other side, in `time.monotonic()`. The
            function is not called until none has arrived for `seconds`. Default: the timeout is
            never extended.
    """

    __slots__ = (
        "_blocked",
        "_callback",
        "_due",
        "_handle",
        "_heard_at",
        "_loop",
        "_remaining",
        "_seconds",
        "_turns",
    )

    def __init__(
        self,
        seconds: float,
        callback: Callable[[], object],
        heard_at: Callable[[], float] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._callback = callback
        self._heard_at = heard_at
        self._seconds = seconds
        self._turns = TURNS
        self._blocked = False
        first = FIRST_CHECK * seconds
        self._remaining = seconds - first
        # Not the loop's own time: on uvloop, it is still the time at which the loop was blocked.
        self._due = time.monotonic() + first
        self._handle = self._loop.call_later(max(first, 0.0), self._fire)

    def cancel(self) -> None:
        self._handle.cancel()

    def _fire(self) -> None:
        now = time.monotonic()
        late = now - self._due
        self._blocked = self._blocked or late > LATE
        if self._remaining > 0.0:
            pause, self._remaining = max(self._remaining - late, 0.0), 0.0
        elif self._turns:
            self._turns -= 1
            pause = PAUSE_LATE if self._blocked else PAUSE
        elif self._heard_at is not None and self._heard_at() + self._seconds > now:
            pause, self._turns = self._heard_at() + self._seconds - now, TURNS
        else:
            self._callback()
            return
        self._due = now + pause
        self._handle = self._loop.call_later(pause, self._fire)


class Deadline:
    """Like `asyncio.timeout`, but a blocked event loop is not mistaken for a slow broker.

        async with Deadline(2.0):
            await answer

    Args:
        seconds: How long the block may take.
        heard_at: See `Overdue`.

    Raises:
        TimeoutError: The block took longer than `seconds` plus the extra turns of the loop.
    """

    __slots__ = ("_heard_at", "_overdue", "_seconds", "_timeout")

    def __init__(self, seconds: float, heard_at: Callable[[], float] | None = None) -> None:
        self._seconds = seconds
        self._heard_at = heard_at
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._overdue = Overdue(self._seconds, self._expire, self._heard_at)

    def _expire(self) -> None:
        self._timeout.reschedule(0.0)  # 0.0 is in the past on every loop: expire at once

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._overdue.cancel()
        await self._timeout.__aexit__(exc_type, exc, traceback)
