"""One connection to Redis: SUBSCRIBE over one socket, PUBLISH over another.

A subscriber that is behind must not hold up publishing, and Redis disconnects it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

from redis.asyncio.connection import AbstractConnection

from ..exceptions import BackendUnavailable
from ..history import History, Position
from . import redis_history
from .base import Deliver, Kept, Lost, MessagesRefused, Stored
from .redis_nodes import Nodes, OpenNode
from .redis_stream import Command, Stream, abort, reason, refusal

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
        open_node: Connects to another node of a cluster.
        deliver, lost: See `Backend.connect`.
    """

    def __init__(
        self,
        name: str,
        prefix: str,
        max_payload: int,
        subscriber: AbstractConnection,
        publisher: AbstractConnection,
        open_node: OpenNode,
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
        self._subscriber = Stream(subscriber, self._receive, self._break)
        self._publisher = Stream(publisher, self._receive, self._break)
        self._nodes = Nodes(self._publisher, open_node, self._make_stream)

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
        answers = await self._nodes.call(
            redis_history.PUBLISH,
            [redis_history.publish_arguments(self._prefix, message) for message in messages],
        )
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
        call = redis_history.read_arguments(
            self._prefix, channel, history, since, limit, reverse, known
        )
        (answer,) = await self._nodes.call(redis_history.READ, [call])
        if isinstance(answer, Exception):
            raise BackendUnavailable(refusal(answer))
        return redis_history.stored(answer)

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
        return min(self._subscriber.message_at, self._nodes.silent_since)

    async def close(self) -> None:
        """See `BrokerConnection`."""
        self._closed = True
        self._abort("was closed")
        streams = [self._subscriber, *self._nodes.streams]
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

    def _execute(self, stream: Stream, commands: Sequence[Command]) -> asyncio.Future[None]:
        if self._error is not None:
            raise BackendUnavailable(f"there is no connection to {self._name}")
        return stream.execute(commands)

    def _make_stream(self, socket: AbstractConnection) -> Stream:
        """Return the stream of another node."""
        stream = Stream(socket, self._receive, self._break)
        if self._error is not None:  # pragma: no cover  # it was closed while the socket was opened
            stream.close(self._error)
            raise self._error
        return stream

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
            for stream in (self._subscriber, *self._nodes.streams):
                stream.close(self._error)
