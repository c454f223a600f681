"""Life: the time of a link on one event loop, and the end of it.

A life begins when the link is started and ends when the link is stopped or when its loop comes to
its end, which cancels its tasks. A `Stopping` brings about the former, from whichever loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ..sync.waiter import Waiter, running_loop

logger = logging.getLogger("starcast")

# Seconds that a backend, and the tasks of a life, have to stop.
STOP_TIMEOUT = 5.0

# Seconds between two looks, while waiting for a stop, at whether its loop still exists.
STOP_LOOK = 0.2

# Seconds for which the link is not started again on a loop that has cancelled its tasks: most
# likely that loop is ending, and would not wait for new ones.
REST = 1.0


class Life:
    """What belongs to one event loop. Made on it.

    Attributes:
        loop: The event loop.
        broken: Set when the connection has broken.
        connected: Set when there has been a connection.
        tasks: What ends with this life.
        watching: The one of them that looks at the probe.
        living: The one that looks after the connection, whose end is the end.
        last_attempt: Whether no further attempt at a first connection shall be made.
        leaving: Whether it is coming to its end in good order.
        ended: When `living` had ended, in `time.monotonic()`; 0 if it has not.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.broken = asyncio.Event()
        self.connected = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()
        self.watching: asyncio.Task[None] | None = None
        self.living: asyncio.Task[None] | None = None
        self.last_attempt = False
        self.leaving = False
        self.ended = 0.0

    @property
    def alive(self) -> bool:
        """Whether the event loop is still there, and the tasks are."""
        return not (self.ended or self.loop.is_closed())

    @property
    def resting(self) -> bool:
        """Whether the tasks were cancelled a moment ago, on this loop."""
        if self.loop is not running_loop():
            return False
        return bool(self.ended) and time.monotonic() < self.ended + REST

    @property
    def is_here(self) -> bool:
        """Whether this is its loop, and it goes on."""
        return not self.leaving and self.loop is running_loop()

    def run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have a task for it. On the loop."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task has ended. If it was cancelled, or we made a mistake, all of them end."""
        if task is self.living:
            self.ended = time.monotonic()
        if task not in self.tasks:
            return
        self.tasks.remove(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error(
                "the connection to the broker is started again after an error", exc_info=error
            )
        if (error is not None or task.cancelled()) and not self.leaving:
            self.cancel()

    def cancel(self) -> None:
        """Have all tasks end."""
        for task in self.tasks:
            task.cancel()

    async def end(self) -> None:
        """End all tasks but this one, if this is the loop."""
        if self.loop is running_loop():
            tasks = self.tasks - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=STOP_TIMEOUT)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call it on the loop, in its next turn; here, if that loop is closed."""
        if running_loop() is self.loop:
            self.loop.call_soon(function, *arguments)  # not under a lock of the caller's
            return
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # it is closed
            function(*arguments)


class Stopping:
    """A stop that is under way, and who waits for it.

    Args:
        life: What ends.
        stop: Called on its loop, or here if that is closed, and made a task of.
        is_current: Whether the link has not been started anew since.
    """

    def __init__(
        self,
        life: Life,
        stop: Callable[[Life], Coroutine[Any, Any, None]],
        is_current: Callable[[Stopping], bool],
    ) -> None:
        self.life = life
        self.waiters: set[Waiter] = set()
        self._stop = stop
        self._is_current = is_current
        self._loop = life.loop  # where it happens
        self._task: asyncio.Task[None] | None = None
        self._done = False

    def begin(self) -> None:
        """Begin, from any loop."""
        here = asyncio.get_running_loop()
        if self._loop is not here and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it was closed in this moment
                self._loop.call_soon_threadsafe(self._begin)
                return
        self._loop = here
        self._begin()

    async def wait(self) -> None:
        """Wait for it, and no longer than it takes if nothing is blocked."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + 2 * STOP_TIMEOUT
        while not self._done and clock() < deadline:
            waiter = Waiter()
            self.waiters.add(waiter)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_LOOK):
                    await waiter
            self.waiters.discard(waiter)
            if self._loop.is_closed():
                self.begin()

    def _begin(self) -> None:
        if self._is_current(self):
            self._task = asyncio.get_running_loop().create_task(self._stop(self.life))
            self._task.add_done_callback(self._end)
            return
        self.life.leaving = True  # it has been started anew since, elsewhere
        self.life.cancel()

    def _end(self, task: asyncio.Task[None]) -> None:
        """Its task has ended; if that was cancelled, the link's own one does what is left."""
        self._done = True
        for waiter in list(self.waiters):
            waiter.set()
