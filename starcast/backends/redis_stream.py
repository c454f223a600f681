"""One socket to Redis: commands are written at once, and a task reads the answers."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError, ResponseError

from .base import MessagesRefused

Command = tuple[str | bytes, ...]


class Stream:
    """One socket. Commands are written at once, and a task reads the answers, which come in order.

    All reading and writing is done here, so each answer belongs to the oldest open command, even if
    calls are cancelled.
    """

    def __init__(
        self,
        connection: AbstractConnection,
        receive: Callable[[bytes, bytes], None],
        on_break: Callable[[BaseException], None],
    ) -> None:
        # redis-py has no public way to write without waiting, which a cancellation would turn into
        # a broken connection, nor to close without waiting for a server that does not read.
        writer, reader = connection._writer, connection._reader
        assert writer is not None
        assert reader is not None
        self.connection = connection
        # In `time.monotonic()`: when any bytes arrived last; of these, those that ended the last
        # message, and the last message or answer; and when the first pending command was written.
        self._bytes_at = self._message_at = self._read_at = self._pending_since = 0.0
        feed = reader.feed_data

        def feed_data(data: bytes) -> None:
            self._bytes_at = time.monotonic()
            feed(data)

        # Nothing else shows that a part of a message has arrived, so this one reader is patched.
        reader.feed_data = feed_data  # type: ignore[method-assign, assignment]  # on purpose
        self.answer: object = None  # the last one
        self._writer = writer
        self._receive = receive
        self._on_break = on_break
        # The futures of calls, one for each command without an answer.
        # With each future, the list that its answers are added to, if anybody wants them.
        self._pending: deque[tuple[asyncio.Future[None], list[Any] | None]] = deque()
        # Of the call whose answers are arriving: their number, and the reasons of the refused ones.
        self._answered = 0
        self._refused: dict[int, str] = {}
        self.task = asyncio.create_task(self._read())

    @property
    def message_at(self) -> float:
        """When a message, or a part of one, arrived last. Complete answers do not count."""
        return self._message_at if self._read_at == self._bytes_at else self._bytes_at

    @property
    def silent_since(self) -> float:
        """Since when an answer is due and no bytes have arrived."""
        return max(self._bytes_at, self._pending_since) if self._pending else math.inf

    def execute(
        self, commands: Sequence[Command], answers: list[Any] | None = None
    ) -> asyncio.Future[None]:
        """Write commands, and return a future that is done when the last of them is answered.

        It fails with `MessagesRefused` if some of them were refused.

        Args:
            commands: The commands.
            answers: What the answers are added to, with a `ResponseError` for a refusal.
        """
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if commands:
            if not self._pending:
                self._pending_since = time.monotonic()
            self._writer.writelines(self.connection.pack_commands(commands))
            self._pending.extend([(answered, answers)] * len(commands))
        else:
            answered.set_result(None)
        return answered

    def close(self, error: Exception) -> None:
        self._writer.transport.abort()
        self.task.cancel()
        for answered, _ in self._pending:
            if not answered.done():
                answered.set_exception(error)
        self._pending.clear()

    async def _read(self) -> None:
        try:
            while True:
                try:
                    # This does not suspend as long as there is something to parse.
                    answer = await self.connection.read_response(disable_decoding=True)
                except ResponseError as error:
                    if not self._pending:
                        raise
                    self._answer(error)
                else:
                    if isinstance(answer, list) and answer[0] in (b"message", b"pmessage"):
                        self._message_at = self._read_at = self._bytes_at
                        self._receive(answer[-2], answer[-1])
                    else:
                        self.answer = answer
                        self._answer(answer)
        except asyncio.CancelledError as error:
            self._on_break(error)  # unless it was `close`
            raise
        except Exception as error:
            self._on_break(error)

    def _answer(self, answer: object) -> None:
        self._read_at = self._bytes_at
        answered, answers = self._pending.popleft()
        if isinstance(answer, ResponseError):
            self._refused[self._answered] = refusal(answer)
        if answers is not None:
            answers.append(answer)
        self._answered += 1
        if self._pending and self._pending[0][0] is answered:
            return
        refused, self._refused, self._answered = self._refused, {}, 0
        if answered.done():
            return  # cancelled
        if refused:
            answered.set_exception(MessagesRefused(next(iter(refused.values())), refused))
        else:
            answered.set_result(None)


async def abort(connection: AbstractConnection) -> None:
    """Close a socket at once. Does not suspend."""
    if connection._writer is not None:
        connection._writer.transport.abort()
    await connection.disconnect(nowait=True)


def refusal(error: Exception) -> str:
    """Describe the error that a command was answered with."""
    return f"Redis refuses: {reason(error)}"


def reason(error: BaseException) -> str:
    """Describe an error, without the arguments of a rejected command: AUTH has the password."""
    text = str(error) if isinstance(error, RedisError | OSError) else type(error).__name__
    return text.partition(", with args")[0]
