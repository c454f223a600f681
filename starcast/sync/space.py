"""Space: senders that wait until there is space in the outbox of a client."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from .waiter import Waiter

# How often a client that is behind is checked within the timeout of those who wait for it, and how
# many checks in a row may find that it has taken nothing.
MAX_CHECKS = 20
MAX_IDLE_CHECKS = 4


class _Sender:
    __slots__ = ("waiter",)

    def __init__(self) -> None:
        self.waiter = Waiter()


class Measured(Protocol):
    """What is known of somebody for whom something waits."""

    @property
    def waiting(self) -> int:
        """How many bytes that are."""


class Draining:
    """A buffer that had no space, as those see it whose messages go to a whole room.

    They wait until it is empty, not until there is space for one message more. A client that reads
    as fast as it can gets there soon. One that takes nothing for a fifth of the timeout, or has
    not caught up when that is over, is waited for no more until it has, so that it cannot hold its
    room up at will. Nor
    can many of them one after another: who still has space is looked at meanwhile too.

    Args:
        client: Whose buffer it is.
        timeout: How many seconds a room waits for it at most.

    Attributes:
        full: Whether there was no space, so that they wait.
        over: Whether nobody waits any more.
    """

    __slots__ = (
        "_client",
        "_idle",
        "_interval",
        "_looks",
        "_loop",
        "_seen",
        "_timer",
        "_waiting",
        "full",
        "over",
    )

    def __init__(self, client: Measured, timeout: float) -> None:
        self.full = False
        self.over = False
        self._client = client
        self._interval = timeout / MAX_CHECKS
        self._seen = client.waiting
        # They are counted, not timed: a loop that was blocked is no fault of the client's.
        self._looks = self._idle = 0
        self._waiting = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._interval, self._look)

    def _look(self) -> None:
        before, self._seen = self._seen, self._client.waiting
        self._idle = self._idle + 1 if before == self._seen else 0
        self._looks += self.full
        if self._idle >= MAX_IDLE_CHECKS or self._looks >= MAX_CHECKS:
            self.end()
        else:
            self._timer = self._loop.call_later(self._interval, self._look)

    def end(self) -> None:
        """Let everybody go on."""
        self.over = True
        self._timer.cancel()
        self._waiting.set()

    async def wait(self) -> None:
        """Return when it is over."""
        await self._waiting.wait()


class SpaceQueue:
    """First come, first served; only the first one in the queue is woken and looks for space.

    Senders may live on any event loop. The queue is as long as there are tasks that wait in it.

    Args:
        timeout: After how many seconds without any progress of the client a sender stops waiting.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._lock = threading.RLock()  # the garbage collector may end a sender under it
        self._senders: deque[_Sender] = deque()
        self._progress = 0.0  # when something has left the outbox last

    def __len__(self) -> int:
        return len(self._senders)

    def progress(self) -> None:
        """Note that something has left the outbox, and let the first sender look."""
        self._progress = time.monotonic()
        self.wake()

    def wake(self) -> None:
        """Let the first sender look. From any thread."""
        with self._lock:
            if self._senders:
                self._senders[0].waiter.set()

    async def wait(self, has_space: Callable[[], bool]) -> None:
        """Return when it is this sender's turn and there is space.

        It also returns when nothing has left the outbox for as long as the timeout.
        """
        sender = _Sender()
        with self._lock:
            if not self._senders:
                self._progress = time.monotonic()
            self._senders.append(sender)
        try:
            while not (self._senders[0] is sender and has_space()):
                if self._senders[0] is not sender:
                    await sender.waiter
                elif (left := self._progress + self._timeout - time.monotonic()) > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(left):
                            await sender.waiter
                else:
                    return
                # A new one before the next look: what changes after the look sets it.
                sender.waiter = Waiter()
        finally:
            with self._lock:
                self._senders.remove(sender)
            self.wake()
