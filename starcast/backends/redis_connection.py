"""One connection to Redis: SUBSCRIBE over one socket, PUBLISH over another.

A subscriber that is behind must not hold up publishing, and Redis disconnects it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, RedisError, ResponseError

from ..exceptions import BackendUnavailable
from ..history import History, Position
from . import redis_history
from .base import Deliver, Kept, Lost, MessagesRefused, Stored
from .redis_history import Script

Command = tuple[str | bytes, ...]

# How long to wait before a loss that a cancellation has caused is reported, in seconds. Most likely
# the event loop is ending, and there is nothing to report.
REPORT_DELAY = 0.1


class RedisConnection:
    """See the module and `BrokerConnection`.

    Args:
        name: What errors call the server.
        prefix: What the names of the channels begin with.
        max_payload: See `BrokerConnection`.
        subscriber, publisher: Sockets that are connected.
        deliver, lost: See `Backend.connect`.
    """

    def __init__(
        self,
        name: str,
        prefix: str,
        max_payload: int,
        subscriber: AbstractConnection,
        publisher: AbstractConnection,
        deliver: Deliver,
        lost: Lost,
    ) -> None:
        self.max_payload = max_payload
        self._name = name
        self._prefix = prefix
        self._deliver = deliver
        self._lost = lost
        self._error: BackendUnavailable | None = None  # why it cannot be used any more
        self._closed = False
        self._server = ""  # what names it in the keys of channels; empty until it was asked
        self._subscriber = _Stream(subscriber, self._receive, self._break)
        self._publisher = _Stream(publisher, self._receive, self._break)

    async def subscribe(self, channel: str) -> None:
        """See `BrokerConnection`."""
        await self._execute(self._subscriber, [("SUBSCRIBE", self._encode(channel))])

    async def subscribe_all(self, hub: str) -> None:
        """Subscribe to all channels of the hub with this name. For the command line."""
        start = re.sub(rb"[\\*?\[\]^]", rb"\\\g<0>", self._encode(f"{hub}:"))
        await self._execute(self._subscriber, [("PSUBSCRIBE", start + b"*")])

    async def unsubscribe(self, channel: str) -> None:
        """See `BrokerConnection`."""
        await self._execute(self._subscriber, [("UNSUBSCRIBE", self._encode(channel))])

    async def publish_kept(self, messages: Sequence[Kept]) -> list[Position]:
        """See `HistoryConnection`."""
        server = self._server or await self._ask_server()
        calls = [
            redis_history.publish_arguments(self._prefix, server, message) for message in messages
        ]
        answers = await self._call(redis_history.PUBLISH, calls)
        refused = {n: refusal(it) for n, it in enumerate(answers) if isinstance(it, Exception)}
        positions = [
            None if number in refused else redis_history.position(answer)
            for number, answer in enumerate(answers)
        ]
        if refused:
            raise MessagesRefused(next(iter(refused.values())), refused, positions)
        return [position for position in positions if position is not None]

    async def read_kept(
        self,
        channel: str,
        history: History,
        since: int | None,
        limit: int,
        reverse: bool,
        known: Position | None = None,
    ) -> Stored:
        """See `HistoryConnection`."""
        server = self._server or await self._ask_server()
        call = redis_history.read_arguments(
            self._prefix, server, channel, history, since, limit, reverse, known
        )
        (answer,) = await self._call(redis_history.READ, [call])
        if isinstance(answer, Exception):
            raise BackendUnavailable(refusal(answer))
        return redis_history.stored(answer)

    async def _ask_server(self) -> str:
        """Return what names the server in the keys of channels. It is asked once."""
        answers: list[Any] = []
        with contextlib.suppress(MessagesRefused):  # the user may not ask
            await self._execute(
                self._publisher, [("INFO", "server"), ("INFO", "persistence")], answers
            )
        info = b"".join(answer for answer in answers if isinstance(answer, bytes))
        self._server = redis_history.server_of(info)
        return self._server

    async def _call(self, script: Script, calls: Sequence[Command]) -> list[Any]:
        """Call a script several times; return the answers, with an error for each refused call."""
        answers: dict[int, Any] = {}
        open_calls = list(range(len(calls)))
        load = False
        while open_calls:
            commands: list[Command] = [
                ("EVALSHA", script.digest, *calls[number]) for number in open_calls
            ]
            if load:
                commands[0] = ("EVAL", script.source, *calls[open_calls[0]])
            answered: list[Any] = []
            with contextlib.suppress(MessagesRefused):  # the errors are among the answers
                await self._execute(self._publisher, commands, answered)
            answers |= zip(open_calls, answered, strict=True)
            # The server does not know the script, or not any more, if it says so. It is given it
            # with the first of these calls.
            open_calls = [
                number for number in open_calls if isinstance(answers[number], NoScriptError)
            ]
            load = True
        return [answers[number] for number in range(len(calls))]

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> asyncio.Future[Any]:
        """See `BrokerConnection`."""
        commands = [("PUBLISH", self._encode(channel), payload) for channel, payload in messages]
        return self._execute(self._publisher, commands)

    @property
    def receivers(self) -> int | None:
        """How many connections to the broker the last message was sent to."""
        answer = self._publisher.answer
        return answer if isinstance(answer, int) else None

    @property
    def heard_at(self) -> float:
        """See `BrokerConnection`."""
        return min(self._subscriber.message_at, self._publisher.silent_since)

    async def close(self) -> None:
        """See `BrokerConnection`."""
        self._closed = True
        self._abort("was closed")
        streams = (self._subscriber, self._publisher)
        for stream in streams:
            await abort(stream.connection)
        here = asyncio.get_running_loop()  # tasks of a loop that has ended never end
        if tasks := [stream.task for stream in streams if stream.task.get_loop() is here]:
            await asyncio.wait(tasks)

    def _encode(self, channel: str) -> bytes:
        return (self._prefix + channel).encode()

    def _receive(self, name: bytes, payload: bytes) -> None:
        # Only a pattern can match a name that is not ours, and not UTF-8.
        channel = name.decode(errors="replace")[len(self._prefix) :]
        if payload.startswith(redis_history.KEPT):
            self._deliver(channel, *redis_history.split(payload))
        else:
            self._deliver(channel, payload)

    def _execute(
        self, stream: _Stream, commands: Sequence[Command], answers: list[Any] | None = None
    ) -> asyncio.Future[None]:
        if self._error is not None:
            raise BackendUnavailable(f"there is no connection to {self._name}")
        return stream.execute(commands, answers)

    def _break(self, error: BaseException) -> None:
        if self._error is not None:
            return
        self._abort(f"is lost: {reason(error)}")
        if isinstance(error, asyncio.CancelledError):
            asyncio.get_running_loop().call_later(REPORT_DELAY, self._report_lost)
        else:
            self._report_lost()

    def _report_lost(self) -> None:
        if not self._closed:
            assert self._error is not None
            self._lost(self._error)

    def _abort(self, how: str) -> None:
        if self._error is None:
            self._error = BackendUnavailable(f"the connection to {self._name} {how}")
            self._subscriber.close(self._error)
            self._publisher.close(self._error)


class _Stream:
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
