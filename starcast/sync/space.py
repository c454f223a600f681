"""Space: senders wait until there is space in the outbox of a client."""

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
    """A client or a subscriber with a buffer."""

    @property
    def waiting(self) -> int:
        """How many bytes it has not taken yet."""


class Draining:
    """A client that is behind, for the senders of messages to its channel.

    They wait until its buffer is empty, not only until there is space for one more message. A
    client that reads as fast as it can gets there soon. If it takes nothing for a fifth of the
    timeout, or has not caught up after the timeout, no sender waits for it until it has, so that it
    cannot stop a channel. Neither can several clients by stalling one after another: all that are
    behind are watched at the same time.

    Args:
        client: The client, or subscriber.
        timeout: How many seconds senders wait for it at most.

    Attributes:
        full: Whether its buffer was full, so that senders wait.
        over: Whether senders wait no longer.
    """

    __slots__ = (
        "_checks",
        "_client",
        "_ended",
        "_idle_checks",
        "_interval",
        "_loop",
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
        self._waiting = client.waiting
        # Checks are counted, not seconds: a blocked event loop is not the client's fault.
        self._checks = self._idle_checks = 0
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._interval, self._check)

    def _check(self) -> None:
        before, self._waiting = self._waiting, self._client.waiting
        self._idle_checks = self._idle_checks + 1 if before == self._waiting else 0
        self._checks += self.full
        if self._idle_checks >= MAX_IDLE_CHECKS or self._checks >= MAX_CHECKS:
            self.end()
        else:
            self._timer = self._loop.call_later(self._interval, self._check)

    def end(self) -> None:
        """Let all senders continue."""
        self.over = True
        self._timer.cancel()
        self._ended.set()

    async def wait(self) -> None:
        """Return when it is over."""
        await self._ended.wait()


class SpaceQueue:
    """Serves senders in order: only the first one in the queue is woken and checks for space.

    Senders may be on any event loop. Each waiting task is one entry of the queue.

    Args:
        timeout: After how many seconds without any progress of the client a sender stops waiting.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._lock = threading.RLock()  # the garbage collector may end a sender while it is held
        self._senders: deque[_Sender] = deque()
        self._progress = 0.0  # when something has left the outbox last

    def __len__(self) -> int:
        return len(self._senders)

    def progress(self) -> None:
        """Note that something has left the outbox, and let the first sender check for space."""
        self._progress = time.monotonic()
        self.wake()

    def wake(self) -> None:
        """Let the first sender check for space. From any thread."""
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
                # Make the new one before the next check: a change after the check sets it.
                sender.waiter = Waiter()
        finally:
            with self._lock:
                self._senders.remove(sender)
            self.wake()
