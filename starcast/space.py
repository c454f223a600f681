"""Space: senders that wait until there is space in the outbox of one client."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable

from .waiter import Waiter

# Seconds without any progress of the client after which a sender stops waiting for it.
TIMEOUT = 10.0


class _Sender:
    __slots__ = ("waiter",)

    def __init__(self) -> None:
        self.waiter = Waiter()


class SpaceQueue:
    """First come, first served; only the first one in the queue is woken and looks for space.

    Senders may live on any event loop. The queue is as long as there are tasks that wait in it.
    """

    def __init__(self) -> None:
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

        It also returns when nothing has left the outbox for `TIMEOUT` seconds.
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
                elif (left := self._progress + TIMEOUT - time.monotonic()) > 0:
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
