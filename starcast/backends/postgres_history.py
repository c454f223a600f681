"""History in PostgreSQL: what a connection does with the tables.

Each transaction that publishes is one statement. It first increases the offset of each channel,
whose row stays locked until the commit, so that offsets grow in the order of the notifications.
Everybody locks the rows in the order of the channels' names, so no two wait for each other.
No lock is ever held while the server waits for this program.

Messages are removed when others take their place, and what has expired is removed now and then,
before something else is published.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import asyncpg

from ..exceptions import BackendUnavailable
from ..history import POSITION_TTL, History, Position
from ..sync.deadline import Deadline
from . import postgres_tables as tables
from .base import Kept, MessagesRefused, Stored, StoredMessage
from .postgres_messages import kept_texts, transactions_of_kept
from .postgres_session import Session, reason

NOT_ALLOWED = (
    "let the user make the two tables of the history (GRANT CREATE ON SCHEMA), or have them made "
    "with starcast.backends.postgres_tables.TABLES and GRANT SELECT, INSERT, UPDATE, DELETE ON "
    "starcast_positions, starcast_messages"
)

# After so many messages, or so many seconds, what has expired is removed, up to twice as many rows.
SWEEP_MESSAGES = 500
SWEEP_SECONDS = 60.0

# How many channels are read at once, and how many messages, unless one read asks for more.
READ_CHANNELS = 100
READ_MESSAGES = 10_000

# How long reading takes at most, in seconds. A session that does nothing for long may be cut off
# without a word.
READ_TIMEOUT = 30.0

# Times to live are no longer than this, in seconds, and no more messages are read at once, so that
# PostgreSQL can represent them.
MAX_TTL = 1e10
MAX_LIMIT = 10**9

# What is raised if the user may not use or make the tables, or has no schema to make them in.
_FORBIDDEN = (asyncpg.InsufficientPrivilegeError, asyncpg.InvalidSchemaNameError)


class PostgresHistory:
    """What a connection to PostgreSQL keeps in tables. Channels have the names that it gives them.

    Args:
        name: What errors call the server.
        is_utf8: Whether the encoding of the database is UTF-8.
        publisher: The session that publishes, one call after another.
        open_session: Opens the session that reads, when something is first read.
        read_timeout: How long reading takes at most, in seconds.
    """

    def __init__(
        self,
        name: str,
        is_utf8: bool,
        publisher: Session,
        open_session: Callable[[], Awaitable[Session]],
        read_timeout: float = READ_TIMEOUT,
    ) -> None:
        self._name = name
        self._is_utf8 = is_utf8
        self._publisher = publisher
        self._open_session = open_session
        self._read_timeout = read_timeout
        self._unswept = 0  # messages since what has expired was removed
        self._sweep_at = 0.0  # when that is due, whatever was published, in `time.monotonic()`
        self._reader: Session | None = None
        # The reader runs one statement at a time. Those that wait for it are run together.
        self._reads: list[_Read] = []
        self._runner: asyncio.Task[None] | None = None

    async def publish(self, messages: Sequence[Kept]) -> list[Position]:
        """See `HistoryConnection.publish_kept`."""
        positions: list[Position] = []
        for first, end in transactions_of_kept(messages):
            try:
                await self._sweep(end - first)
                positions += await self._publish(messages[first:end])
            except BackendUnavailable as error:
                if not first:
                    raise
                reasons = dict.fromkeys(range(first, len(messages)), str(error))
                accepted = [*positions, *[None] * len(reasons)]
                raise MessagesRefused(str(error), reasons, accepted) from error
        return positions

    async def _publish(self, messages: Sequence[Kept]) -> list[Position]:
        """Publish messages in one transaction, without those whose keys are known."""
        while True:
            found = await self._find_keys(messages)
            new = list(_without_known(messages, found))
            try:
                published = iter(await self._publish_new(new) if new else ())
            except asyncpg.NotNullViolationError as error:
                if error.column_name not in ("offset", "expires"):  # see `tables.PUBLISH`
                    raise BackendUnavailable(f"{self._name}: {reason(error)}") from error
                for message in new:
                    if message.known is not None:
                        await self._renew(self._publisher, message.channel, message.known)
                continue
            positions: list[Position] = []
            for message in messages:
                position = found.get((message.channel, message.key))
                if position is None:
                    position = next(published)
                    if message.key is not None:
                        found[message.channel, message.key] = position
                positions.append(position)
            return positions

    async def _find_keys(self, messages: Sequence[Kept]) -> dict[tuple[str, str | None], Position]:
        """Return the positions of what was published before, by channel and idempotency key."""
        keys = [(it.channel, it.key.encode()) for it in messages if it.key is not None]
        if not keys:
            return {}
        rows = await self._ask(self._publisher, tables.FIND_KEYS, *zip(*keys, strict=True))
        return {
            (channel, key.decode()): Position(epoch, offset) for channel, key, epoch, offset in rows
        }

    async def _publish_new(self, messages: Sequence[Kept]) -> list[Position]:
        names = sorted({message.channel for message in messages})
        channels = {name: _Channel(number) for number, name in enumerate(names, 1)}
        rows: list[tuple[Any, ...]] = []
        firsts: list[int] = []  # where the notifications of each message begin
        for name, payload, history, key, known in messages:
            channel = channels[name]
            channel.add(history, known)
            firsts.append(len(rows))
            place = channel.number, channel.count
            data: tuple[Any, ...] = payload, _seconds(history.ttl), None, None
            if key is not None:
                data = *data[:2], key.encode(), _seconds(history.key_ttl)
            for text in kept_texts(payload, self._is_utf8):
                rows.append((*place, *data, text))
                data = None, None, None, None
        given = [(name, *channel.arguments()) for name, channel in channels.items()]
        arguments = [*zip(*given, strict=True), *zip(*rows, strict=True)]
        answer = await self._ask(self._publisher, tables.PUBLISH, *arguments)
        return [Position(answer[number][0], answer[number][1]) for number in firsts]

    async def _renew(self, session: Session, channel: str, known: Position) -> None:
        """Give the channel a new epoch if it is not as far as it was."""
        await self._ask(session, tables.RENEW, channel, _new_epoch(), *known)

    async def _sweep(self, count: int) -> None:
        """Remove what has expired, if that is due."""
        self._unswept += count
        now = time.monotonic()
        if self._unswept < SWEEP_MESSAGES and now < self._sweep_at:
            return
        for statement in tables.SWEEP:
            await self._ask(self._publisher, statement, 2 * max(self._unswept, SWEEP_MESSAGES))
        self._unswept, self._sweep_at = 0, now + SWEEP_SECONDS

    def read(
        self,
        channel: str,
        history: History,
        since: int | None,
        limit: int,
        reverse: bool,
        known: Position | None,
    ) -> asyncio.Future[Stored]:
        """See `HistoryConnection.read_kept`."""
        done: asyncio.Future[Stored] = asyncio.get_running_loop().create_future()
        self._reads.append(_Read(channel, history, since, limit, reverse, known, done))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run_reads())
        return done

    async def close(self) -> None:
        """Close the session that reads. Calls in progress raise."""
        if self._reader is not None:
            self._reader.terminate()
        runner = self._runner
        if runner is not None and runner.get_loop() is asyncio.get_running_loop():
            runner.cancel()
            await asyncio.wait([runner])

    async def _run_reads(self) -> None:
        # In a task of its own, so that a caller can be cancelled, and the others get answers.
        try:
            while self._reads:
                reads = self._next_reads()
                try:
                    async with Deadline(self._read_timeout):
                        await self._answer(reads)
                except Exception as error:
                    if isinstance(error, TimeoutError):
                        if self._reader is not None:
                            self._reader.terminate()
                        error = BackendUnavailable(f"{self._name}: {reason(error)}")
                    _fail(reads, error)
                del self._reads[: len(reads)]
        finally:  # it was cancelled, or there are none
            _fail(self._reads, BackendUnavailable(f"{self._name}: cancelled"))
            self._reads = []

    def _next_reads(self) -> list[_Read]:
        """Return those that are made together, which are the first ones."""
        limit = 0
        for count, read in enumerate(self._reads[:READ_CHANNELS]):
            limit += read.limit
            if count and (limit > READ_MESSAGES or read.reverse != self._reads[0].reverse):
                return self._reads[:count]
        return self._reads[:READ_CHANNELS]

    async def _answer(self, reads: list[_Read]) -> None:
        reader = self._reader
        if reader is None or reader.is_closed():
            reader = self._reader = await self._open_session()
        statement = tables.READ_REVERSE if reads[0].reverse else tables.READ_FORWARD
        while reads:
            answers: list[list[Any]] = [[] for _ in reads]
            arguments = zip(*(read.arguments() for read in reads), strict=True)
            for row in await self._ask(reader, statement, *arguments):
                answers[row["number"] - 1].append(row)
            again: list[_Read] = []
            done: list[tuple[_Read, Stored]] = []
            due: dict[str, float] = {}  # channels, and how long their positions are kept
            for read, rows in zip(reads, answers, strict=True):
                stored = read.stored(rows)
                if stored is None or rows[0]["is_due"]:
                    due[read.channel] = _position_ttl(read.history) + tables.SLACK
                if stored is not None and _is_behind(stored.position, read.known):
                    assert read.known is not None
                    await self._renew(reader, read.channel, read.known)
                    stored = None
                if stored is None:
                    again.append(read)
                else:
                    done.append((read, stored))
            if due:
                touched = [(name, due[name], _new_epoch()) for name in sorted(due)]
                await self._ask(reader, tables.TOUCH, *zip(*touched, strict=True))
            for read, stored in done:
                if not read.done.done():
                    read.done.set_result(stored)
            reads = again

    async def _ask(self, session: Session, statement: str, *arguments: Any) -> list[Any]:
        """Run a statement. The tables are made if there are none."""
        session.asked_at = time.monotonic()
        try:
            try:
                rows: list[Any] = await session.fetch(statement, *arguments)
            except asyncpg.UndefinedTableError:
                await session.execute(tables.TABLES)
                rows = await session.fetch(statement, *arguments)
        except asyncpg.NotNullViolationError:
            raise
        except Exception as error:
            advice = f"; {NOT_ALLOWED}" if isinstance(error, _FORBIDDEN) else ""
            raise BackendUnavailable(f"{self._name}: {reason(error)}{advice}") from error
        finally:
            session.asked_at = math.inf
        return rows


class _Channel:
    """A channel of a transaction, which has this number in it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.count = 0
        self._history = History()
        self._known: Position | None = None

    def add(self, history: History, known: Position | None) -> None:
        self.count += 1
        self._history = history
        self._known = known or self._known

    def arguments(self) -> tuple[Any, ...]:
        """Return what `tables.PUBLISH` is told about it, after its name."""
        ttl = _position_ttl(self._history) + tables.SLACK
        return (
            *(self.count, self._history.size, ttl, _new_epoch()),
            *((None, None) if self._known is None else self._known),
        )


class _Read(NamedTuple):
    """A call of `read`, and what it waits for."""

    channel: str
    history: History
    since: int | None
    limit: int
    reverse: bool
    known: Position | None
    done: asyncio.Future[Stored]

    def arguments(self) -> tuple[Any, ...]:
        """Return those of the statement."""
        history = self.history
        return (
            *(self.channel, self.since, min(self.limit, MAX_LIMIT), history.size),
            *(_seconds(history.ttl), _position_ttl(history)),
        )

    def stored(self, rows: list[Any]) -> Stored | None:
        """Return what was answered; None if the channel is not known."""
        if not rows:
            return None
        since, position = self.since, Position(rows[0]["epoch"], rows[0]["top"])
        first = rows[0]["first"]
        complete = (
            since is None or since >= position.offset or (first is not None and first <= since + 1)
        )
        messages = [
            StoredMessage(row["offset"], row["payload"])
            for row in rows
            if row["offset"] is not None
        ]
        messages.sort(reverse=self.reverse)
        return Stored(position, messages, complete)


def _without_known(
    messages: Iterable[Kept], found: dict[tuple[str, str | None], Position]
) -> Iterator[Kept]:
    """Yield the messages that are to be published: of those with one key, the first."""
    keys: set[tuple[str, str | None]] = set(found)
    for message in messages:
        if message.key is not None:
            key = message.channel, message.key
            if key in keys:
                continue
            keys.add(key)
        yield message


def _fail(reads: Iterable[_Read], error: Exception) -> None:
    for read in reads:
        if not read.done.done():
            read.done.set_exception(error)


def _is_behind(position: Position, known: Position | None) -> bool:
    return known is not None and position.epoch == known.epoch and position < known


def _new_epoch() -> str:
    return secrets.token_hex(6)


def _seconds(ttl: float) -> float:
    return float(min(ttl, MAX_TTL))


def _position_ttl(history: History) -> float:
    return _seconds(history.ttl + POSITION_TTL)
