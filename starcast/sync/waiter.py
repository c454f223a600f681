"""Waiter and Lock: let tasks on the event loops of several threads wait for each other."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Generator


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that is running on this thread, or None."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Waiter:
    """An event that one loop awaits and that any thread may set, even after that loop has ended.

    Create it on the loop that awaits it.
    """

    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()

    def set(self) -> None:
        if running_loop() is self._loop:
            self._set()
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed, and no task waits
            self._loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def __await__(self) -> Generator[None, None, None]:
        return self._future.__await__()


class Lock:
    """Like `asyncio.Lock`, but for tasks on different event loops."""

    def __init__(self) -> None:
        self._guard = threading.RLock()  # reentrant: a finalizer may release the lock
        self._held = False
        self._waiting: list[Waiter] = []

    async def __aenter__(self) -> None:
        while True:
            waiter = Waiter()
            with self._guard:
                if not self._held:
                    self._held = True
                    return
                self._waiting.append(waiter)
            await waiter

    async def __aexit__(self, *exc_info: object) -> None:
        with self._guard:
            self._held = False
            waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.set()
