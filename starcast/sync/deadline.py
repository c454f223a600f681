"""Deadlines that a blocked event loop does not use up.

Somebody's handler calls `time.sleep(3)`, or parses a huge file. When the event loop goes on, the
broker's answer has long been in the socket, but the timer is due in the same turn and would be
first: asyncio runs timers that are due in the turn in which it notices that the socket is readable,
uvloop before that. The answer then still has to pass through a stream, a parser and the tasks that
wait for it: four to six turns were measured with all three brokers on both loops, and some
milliseconds where PostgreSQL is asked a second question.

So a timer that is due first lets the loop take `TURNS` turns, with a pause before each of them in
which the kernel can bring more. The pauses are longer if the loop has been blocked shortly before:
then the question itself may not have left yet, and much may have piled up in front of the answer.

Nor is a slow line taken for a dead one: an answer that waits behind seconds of data has until
nothing has arrived for that long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

# Turns that the loop gets after a deadline, and the seconds before each: 0.05 in all, or 0.5 if the
# loop has been blocked.
TURNS = 10
PAUSE = 0.005
PAUSE_LATE = 0.05

# Seconds by which a timer may be late on a loop that is only busy.
LATE = 0.03

# The part of the time after which a first timer sees whether the loop is blocked. Whoever is free
# from then on has enough of it left.
LOOK_AT = 0.8


class Overdue:
    """Calls a function when something has not happened in time, unless it is cancelled before.

    Made on the loop on which the function is called.

    Args:
        seconds: How long to wait; may be negative, if the deadline has passed already.
        callback: What is called, without arguments.
        heard_at: Returns when the other side was heard last, in `time.monotonic()`. It has until it
            has been silent for so many seconds.
    """

    __slots__ = (
        "_blocked",
        "_callback",
        "_due",
        "_handle",
        "_heard_at",
        "_left",
        "_loop",
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
        look = LOOK_AT * seconds
        self._left = seconds - look
        # Not the loop's own time, which uvloop keeps as it was before it was blocked.
        self._due = time.monotonic() + look
        self._handle = self._loop.call_later(max(look, 0.0), self._fire)

    def cancel(self) -> None:
        self._handle.cancel()

    def _fire(self) -> None:
        now = time.monotonic()
        late = now - self._due
        self._blocked = self._blocked or late > LATE
        if self._left > 0.0:
            pause, self._left = max(self._left - late, 0.0), 0.0
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
    """Like `asyncio.timeout`, but a blocked event loop is not taken for a slow broker.

        async with Deadline(2.0):
            await answer

    Args:
        seconds: How long the block may take.
        heard_at: See `Overdue`.

    Raises:
        TimeoutError: The block took longer than so many seconds, and a moment more.
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
        self._timeout.reschedule(0.0)  # which has passed on every loop: at once

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._overdue.cancel()
        await self._timeout.__aexit__(exc_type, exc, traceback)
