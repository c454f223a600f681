"""Lean: stand-ins for what uvicorn and websockets keep for each connection, in less memory.

An asyncio queue and an asyncio event take four kilobytes, because each of their deques has space
for 64 items. A decompressor takes seven, and most clients send nothing compressed.
"""

from __future__ import annotations

import asyncio
import zlib
from asyncio import _enter_task, _leave_task
from contextvars import Context
from typing import TYPE_CHECKING, Any

from ..handler import Take

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent

Waiter = asyncio.Future[None]


def _wake_first(waiters: list[Waiter]) -> None:
    """Wake the one that has waited longest and was not cancelled."""
    while waiters:
        waiter = waiters.pop(0)
        if not waiter.done():
            waiter.set_result(None)
            break


def _leave(waiters: list[Waiter], waiter: Waiter) -> None:
    if waiter in waiters:
        waiters.remove(waiter)


class Turn(asyncio.Future[None]):
    """The current task's wait for the next message, which it may handle without being woken.

    Attributes:
        take: See `Inbox.get`.
        task: The task.
        context: That of the task, as soon as it waits.
    """

    __slots__ = ("context", "take", "task")
    context: Context

    def __init__(self, loop: asyncio.AbstractEventLoop, take: Take) -> None:
        super().__init__(loop=loop)
        self.take = take
        task = asyncio.current_task(loop)
        assert task is not None
        self.task = task

    def add_done_callback(self, callback: Any, *, context: Context | None = None) -> None:
        """Called by the task, with its context."""
        if context is not None:
            self.context = context
        super().add_done_callback(callback, context=context)


class Inbox:
    """Messages that the app has not received yet: what uvicorn uses of an `asyncio.Queue`.

    They are few, because nothing is read from the client while there are many.
    """

    __slots__ = ("_messages", "_waiters")

    def __init__(self) -> None:
        self._messages: list[ASGIReceiveEvent] = []
        self._waiters: list[Waiter] = []

    def put_nowait(self, message: ASGIReceiveEvent) -> None:
        self._messages.append(message)
        _wake_first(self._waiters)

    def handle(self, content: str | bytes, payload: bytes) -> bool:
        """Let the task whose turn it is handle a message without being woken, if it can.

        What it gave to `get` is called as it would call that: in its context, and as if it were the
        current task.

        Args:
            content: The message.
            payload: The same as bytes.

        Returns:
            Whether it has. If not, put the message.
        """
        waiters = self._waiters
        while waiters and waiters[0].done():
            del waiters[0]
        if self._messages or not waiters:
            return False
        turn = waiters[0]
        if not isinstance(turn, Turn):
            return False
        loop = turn.get_loop()
        try:
            _enter_task(loop, turn.task)
        except RuntimeError:  # it is a task that hands over what was read
            return False
        try:
            handled = turn.context.run(turn.take, content, payload)
        finally:
            _leave_task(loop, turn.task)
        if handled and len(waiters) > 1 and waiters[0] is turn:
            waiters.append(waiters.pop(0))  # as if it had received the message and waited again
        return handled

    async def get(self, take: Take | None = None) -> ASGIReceiveEvent:
        """Remove and return the oldest message. Wait for one if there is none.

        Args:
            take: Handles a message in place of this task, while it waits, or returns False.
        """
        while not self._messages:
            loop = asyncio.get_running_loop()
            waiter = loop.create_future() if take is None else Turn(loop, take)
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                _leave(self._waiters, waiter)
                if self._messages and not waiter.cancelled():
                    _wake_first(self._waiters)  # this one was woken, and does not take it
                raise
        return self._messages.pop(0)

    def qsize(self) -> int:
        return len(self._messages)

    def empty(self) -> bool:
        return not self._messages


class Gate:
    """Whether something may go on, and who waits for that: what is used of an `asyncio.Event`."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self) -> None:
        self._is_set = True
        self._waiters: list[Waiter] = []

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        while self._waiters:
            _wake_first(self._waiters)

    def clear(self) -> None:
        self._is_set = False

    async def wait(self) -> None:
        if not self._is_set:
            waiter: Waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                _leave(self._waiters, waiter)


Decompressor = type(zlib.decompressobj())


class Inflater:
    """Stands where an extension of websockets has a decompressor, until it needs one."""

    __slots__ = ("_extension",)
    unconsumed_tail = b""

    def __init__(self, extension: Any) -> None:
        self._extension = extension

    def decompress(self, data: bytes, max_length: int = 0) -> bytes:
        """Decompress, and leave the place to a decompressor."""
        decoder = zlib.decompressobj(wbits=-self._extension.remote_max_window_bits)
        self._extension.decoder = decoder
        return decoder.decompress(data, max_length)
