"""One connection to PostgreSQL: LISTEN over one session, NOTIFY over another."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from ..exceptions import BackendUnavailable, PayloadTooLarge
from ..history import History, Position
from .base import Deliver, Kept, Lost, MessagesRefused, Stored
from .postgres_history import PostgresHistory
from .postgres_messages import MAX_PAYLOAD, Joiner, Rows, encode_name, transactions
from .postgres_session import Session, reason

# `unnest` returns the elements in order, and `count` makes one row of them.
_NOTIFY_ONE = "SELECT pg_catalog.pg_notify($1, $2)"
_NOTIFY = "SELECT count(pg_catalog.pg_notify(c, p)) FROM unnest($1::text[], $2::text[]) AS m(c, p)"


class PostgresConnection:
    """See the module and `BrokerConnection`.

    Args:
        name: What errors call the server.
        prefix: What the names of the channels begin with.
        listener, publisher: Sessions that are open.
        open_reader: Opens a third one, to read histories with.
        deliver, lost: See `Backend.connect`.
    """

    max_payload = MAX_PAYLOAD

    def __init__(
        self,
        name: str,
        prefix: str,
        listener: Session,
        publisher: Session,
        open_reader: Callable[[], Awaitable[Session]],
        deliver: Deliver,
        lost: Lost,
    ) -> None:
        self._name = name
        self._prefix = prefix
        self._listener = listener
        self._publisher = publisher
        self._deliver = deliver
        self._lost: Lost | None = lost  # until it was called, or the connection is closed
        encoding = getattr(publisher.get_settings(), "server_encoding", "UTF8")
        self._is_utf8 = encoding == "UTF8"
        self._channels: dict[str, str] = {}  # by their names in PostgreSQL
        self._joiner = Joiner()
        self._history = PostgresHistory(name, self._is_utf8, publisher, open_reader)
        # The listener runs one statement at a time. Those that wait for it are run together.
        self._statements: list[tuple[str, asyncio.Future[None]]] = []
        self._runner: asyncio.Task[None] | None = None
        listener.receive = self._receive
        for session in (listener, publisher):
            session.add_termination_listener(self._on_end)

    async def subscribe(self, channel: str) -> None:
        """See `BrokerConnection`."""
        name = self._encode(channel)
        self._channels[name] = channel
        try:
            await self._run(f"LISTEN {_quoted(name)}")
        except Exception:
            self._channels.pop(name, None)
            raise

    async def unsubscribe(self, channel: str) -> None:
        """See `BrokerConnection`."""
        name = self._encode(channel)
        self._channels.pop(name, None)
        await self._run(f"UNLISTEN {_quoted(name)}")

    async def publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        """See `BrokerConnection`."""
        _check_size(payload for _, payload in messages)
        named = [(self._encode(channel), payload) for channel, payload in messages]
        for first, rows in transactions(named, self._is_utf8):
            try:
                await self._notify(rows)
            except BackendUnavailable as error:
                if not first:
                    raise
                reasons = dict.fromkeys(range(first, len(messages)), str(error))
                raise MessagesRefused(str(error), reasons) from error

    async def publish_kept(self, messages: Sequence[Kept]) -> list[Position]:
        """See `HistoryConnection`."""
        _check_size(message.payload for message in messages)
        self._check_open()
        return await self._history.publish(
            [message._replace(channel=self._encode(message.channel)) for message in messages]
        )

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
        self._check_open()
        name = self._encode(channel)
        return await self._history.read(name, history, since, limit, reverse, known)

    @property
    def heard_at(self) -> float:
        """See `BrokerConnection`. A large message arrives in many notifications."""
        return float(min(self._listener.heard_at, self._publisher.asked_at))

    async def close(self) -> None:
        """See `BrokerConnection`. The server is not told, because it may not be listening."""
        self._lost = None
        for session in (self._listener, self._publisher):
            session.terminate()  # calls in progress raise
        await self._history.close()
        if self._runner is not None and self._runner.get_loop() is asyncio.get_running_loop():
            await asyncio.wait([self._runner])
        await asyncio.sleep(0)  # the sockets are closed in the event loop's next iteration

    def _encode(self, channel: str) -> str:
        return encode_name(self._prefix + channel, self._is_utf8)

    def _check_open(self) -> None:
        if self._lost is None:
            raise BackendUnavailable(f"not connected to {self._name}")

    async def _notify(self, rows: Rows) -> None:
        self._check_open()
        publisher = self._publisher
        publisher.asked_at = time.monotonic()
        try:
            if len(rows) == 1:
                await publisher.execute(_NOTIFY_ONE, *next(iter(rows)))
            else:
                await publisher.execute(_NOTIFY, *zip(*rows, strict=True))
        except Exception as error:
            raise BackendUnavailable(f"{self._name}: {reason(error)}") from error
        finally:
            publisher.asked_at = math.inf

    def _run(self, statement: str) -> asyncio.Future[None]:
        """Have the listener run a statement."""
        self._check_open()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._statements.append((statement, done))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run_statements())
        return done

    async def _run_statements(self) -> None:
        # In a task of its own, so that a caller can be cancelled. asyncpg would interrupt the
        # statement, which may be that of several callers.
        while self._statements:
            statements, self._statements = self._statements, []
            failure = None
            try:
                await self._listener.execute(";".join(statement for statement, _ in statements))
            except asyncio.CancelledError:  # the event loop ends; later statements fail at once
                self._listener.terminate()
                failure = "cancelled"
            except Exception as error:
                failure = reason(error)
            for _, done in statements:
                if done.done():
                    continue  # its caller was cancelled
                if failure is None:
                    done.set_result(None)
                else:
                    done.set_exception(BackendUnavailable(f"{self._name}: {failure}"))

    def _receive(self, pid: int, name: str, text: str) -> None:
        channel = self._channels.get(name)
        if channel is None:
            return  # it has been unsubscribed from
        message = self._joiner.receive(pid, name, text)
        if message is None:
            return  # there are more pieces
        payload, position = message
        if position is None:
            self._deliver(channel, payload)
        else:
            self._deliver(channel, payload, position)

    def _on_end(self, session: Any) -> None:
        lost, self._lost = self._lost, None
        if lost is not None:
            lost(BackendUnavailable(f"{self._name} closed the connection"))


def _check_size(payloads: Iterable[bytes]) -> None:
    for payload in payloads:
        if len(payload) > MAX_PAYLOAD:
            raise PayloadTooLarge(
                f"a message has {len(payload)} bytes, and {MAX_PAYLOAD} are possible"
            )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
