"""Waiter and Lock: what event loops of several threads need to wait for each other."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Generator


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop of this thread, if one is running."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Waiter:
    """Made on the loop that awaits it; may be set from anywhere, also after that loop has ended."""

    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()

    def set(self) -> None:
        if running_loop() is self._loop:
            self._set()
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def __await__(self) -> Generator[None, None, None]:
        return self._future.__await__()


class Lock:
    """Like `asyncio.Lock`, for tasks of any event loops."""

    def __init__(self) -> None:
        self._guard = threading.RLock()  # the garbage collector may end a holder under it
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
