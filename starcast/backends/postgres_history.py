"""History in PostgreSQL: a table of messages, and one of positions.

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
from .base import Kept, MessagesRefused, Stored, StoredMessage
from .postgres_messages import kept_texts, transactions_of_kept
from .postgres_session import Session, reason

# What makes the tables. The number stands for this module: without the lock, two programs that
# begin together would disturb each other. Row updates stay within a page that has space.
TABLES = """
SELECT pg_advisory_xact_lock(7598452219);
CREATE TABLE IF NOT EXISTS starcast_positions (
    channel text COLLATE "C" NOT NULL,
    key bytea NOT NULL,
    epoch text NOT NULL,
    "offset" bigint NOT NULL,
    expires timestamptz NOT NULL,
    PRIMARY KEY (channel, key)
) WITH (fillfactor = 50);
CREATE INDEX IF NOT EXISTS starcast_positions_expires ON starcast_positions (expires);
CREATE TABLE IF NOT EXISTS starcast_messages (
    channel text COLLATE "C" NOT NULL,
    epoch text NOT NULL,
    "offset" bigint NOT NULL,
    published timestamptz NOT NULL,
    expires timestamptz NOT NULL,
    payload bytea NOT NULL,
    PRIMARY KEY (channel, epoch, "offset")
);
CREATE INDEX IF NOT EXISTS starcast_messages_expires ON starcast_messages (expires);
"""

NOT_ALLOWED = (
    "let the user make the two tables of the history (GRANT CREATE ON SCHEMA), or have them made "
    "with starcast.backends.postgres_history.TABLES and GRANT SELECT, INSERT, UPDATE, DELETE ON "
    "starcast_positions, starcast_messages"
)

# How much later than it must, in seconds, a position expires at most. So not every message changes
# the time, which is in an index.
SLACK = 3600

# How many more messages of a channel are in the table at most than are to be kept. So there is not
# as often something to remove.
SURPLUS = 100

# A statement does not see, and does not remove, what others have published while it waited for
# them. So it looks for that among so many older messages of the channel.
OVERLOOKED = 1000

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

# $1 to $7: of each channel, in order: its name, the number of messages, how many are kept, the time
# to live of its position, an epoch in case it has none, an epoch that is known and its offset.
# $8 to $14: of each notification: the number of its channel; of its message the number within the
# channel, the payload (NULL after the first notification), the time to live, the idempotency key
# and the time to live of that; what follows the id.
#
# NULL is not allowed in a row. It undoes everything if the offset is behind the one that is known,
# or if a message with the same key was published meanwhile.
_PUBLISH = f"""
WITH given AS (
    SELECT * FROM unnest(
        $1::text[], $2::int8[], $3::int8[], $4::float8[], $5::text[], $6::text[], $7::int8[]
    ) WITH ORDINALITY AS given (
        channel, count, size, ttl, new_epoch, known_epoch, known_offset, number
    )
), counted AS (
    INSERT INTO starcast_positions AS p (channel, key, epoch, "offset", expires)
    SELECT channel, '', new_epoch, count, clock_timestamp() + make_interval(secs => ttl)
    FROM given
    ON CONFLICT (channel, key) DO UPDATE SET
        "offset" = p."offset" + excluded."offset",
        expires = CASE
            WHEN p.expires < excluded.expires - make_interval(secs => {SLACK}) THEN excluded.expires
            ELSE p.expires
        END
    RETURNING channel, epoch, "offset", clock_timestamp() AS now
), located AS (
    SELECT number, counted.channel, epoch, now, count - size AS too_many,
        CASE
            WHEN epoch = known_epoch AND "offset" - count < known_offset THEN NULL
            ELSE "offset" - count
        END AS before,
        CASE WHEN "offset" / {SURPLUS} > ("offset" - count) / {SURPLUS} THEN "offset" - size END
            AS last_old,
        "offset" - size - count - {OVERLOOKED} AS first_old,
        count + {OVERLOOKED} AS most_old
    FROM given JOIN counted USING (channel)
), placed AS (
    SELECT row, channel, epoch, before + place AS "offset", now, place > too_many AS fits, payload,
        ttl, key, key_ttl, text
    FROM unnest(
        $8::int8[], $9::int8[], $10::bytea[], $11::float8[], $12::bytea[], $13::float8[],
        $14::text[]
    ) WITH ORDINALITY AS notification (
        number, place, payload, ttl, key, key_ttl, text, row
    )
    JOIN located USING (number)
), kept AS (
    INSERT INTO starcast_messages (channel, epoch, "offset", published, expires, payload)
    SELECT channel, epoch, "offset", now, now + make_interval(secs => ttl), payload
    FROM placed
    WHERE payload IS NOT NULL AND fits
), keys AS (
    INSERT INTO starcast_positions AS p (channel, key, epoch, "offset", expires)
    SELECT channel, key, epoch, "offset", now + make_interval(secs => key_ttl)
    FROM placed
    WHERE key IS NOT NULL
    ON CONFLICT (channel, key) DO UPDATE SET
        epoch = excluded.epoch,
        "offset" = excluded."offset",
        expires = CASE
            WHEN p.expires <= clock_timestamp() OR p.epoch <> excluded.epoch THEN excluded.expires
        END
), trimmed AS (
    DELETE FROM starcast_messages WHERE ctid = ANY (ARRAY(
        SELECT old.ctid FROM located CROSS JOIN LATERAL (
            SELECT m.ctid FROM starcast_messages AS m
            WHERE m.channel = located.channel AND m.epoch = located.epoch
                AND m."offset" BETWEEN first_old AND last_old
            LIMIT most_old
        ) AS old
    ))
)
SELECT epoch, "offset", pg_catalog.pg_notify(channel, chr(16) || epoch || '-' || "offset" || text)
FROM (SELECT channel, epoch, "offset", text FROM placed ORDER BY row) AS notification
"""

# $1, $2: channels and idempotency keys. Returns those that are known.
_FIND_KEYS = """
SELECT k.channel, k.key, k.epoch, k."offset"
FROM unnest($1::text[], $2::bytea[]) AS asked (channel, key)
JOIN starcast_positions AS k USING (channel, key)
JOIN starcast_positions AS p ON p.channel = k.channel AND p.key = '' AND p.epoch = k.epoch
WHERE k.expires > clock_timestamp()
"""

# $1: a channel; $2: a new epoch; $3, $4: a known epoch and its offset. The messages of an old epoch
# are not found any more, and expire.
_RENEW = """
UPDATE starcast_positions SET epoch = $2, "offset" = 0
WHERE channel = $1 AND key = '' AND epoch = $3 AND "offset" < $4
"""

# $1 to $5: of each read: the channel, the offset to begin after (or before), how many messages, the
# size, the times to live of messages and of the position.
# Returns, for each message, the number of the read, the position of the channel, whether that
# expires too soon, and the offset of the oldest message that is valid.
_READ = """
SELECT number, p.epoch, p."offset" AS top,
    p.expires < now() + make_interval(secs => position_ttl) AS is_due,
    oldest."offset" AS first, message."offset", message.payload
FROM unnest($1::text[], $2::int8[], $3::int8[], $4::int8[], $5::float8[], $6::float8[])
    WITH ORDINALITY AS asked (channel, since, count, size, ttl, position_ttl, number)
CROSS JOIN LATERAL (
    SELECT * FROM starcast_positions AS p WHERE p.channel = asked.channel AND p.key = '' LIMIT 1
) AS p
LEFT JOIN LATERAL (
    SELECT m."offset" FROM starcast_messages AS m
    WHERE m.channel = p.channel AND m.epoch = p.epoch AND m."offset" > p."offset" - size
        AND m.published > now() - make_interval(secs => ttl)
    ORDER BY m."offset" LIMIT 1
) AS oldest ON true
LEFT JOIN LATERAL (
    SELECT m."offset", m.payload FROM starcast_messages AS m
    WHERE m.channel = p.channel AND m.epoch = p.epoch AND m."offset" >= oldest."offset"
        AND (since IS NULL OR m."offset" {comparison} since)
    ORDER BY m."offset" {direction} LIMIT count
) AS message ON true
"""
_READ_FORWARD = _READ.format(comparison=">", direction="ASC")
_READ_REVERSE = _READ.format(comparison="<", direction="DESC")

# $1 to $3: names of channels, in order, the times to live of their positions, epochs for new ones.
_TOUCH = """
INSERT INTO starcast_positions AS p (channel, key, epoch, "offset", expires)
SELECT channel, '', epoch, 0, clock_timestamp() + make_interval(secs => ttl)
FROM unnest($1::text[], $2::float8[], $3::text[]) AS touched (channel, ttl, epoch)
ON CONFLICT (channel, key) DO UPDATE SET expires = greatest(p.expires, excluded.expires)
"""

# Rows that somebody has locked are left for the next time, so nobody waits for nobody.
_SWEEP = [
    f"""
    DELETE FROM {table} WHERE expires < now() AND ctid = ANY (ARRAY(
        SELECT ctid FROM {table} WHERE expires < now()
        ORDER BY expires LIMIT $1 FOR UPDATE SKIP LOCKED
    ))
    """
    for table in ("starcast_messages", "starcast_positions")
]


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
                if error.column_name not in ("offset", "expires"):
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
        rows = await self._ask(self._publisher, _FIND_KEYS, *zip(*keys, strict=True))
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
        answer = await self._ask(self._publisher, _PUBLISH, *arguments)
        return [Position(answer[number][0], answer[number][1]) for number in firsts]

    async def _renew(self, session: Session, channel: str, known: Position) -> None:
        """Give the channel a new epoch if it is not as far as it was."""
        await self._ask(session, _RENEW, channel, _new_epoch(), *known)

    async def _sweep(self, count: int) -> None:
        """Remove what has expired, if that is due."""
        self._unswept += count
        now = time.monotonic()
        if self._unswept < SWEEP_MESSAGES and now < self._sweep_at:
            return
        for statement in _SWEEP:
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
        statement = _READ_REVERSE if reads[0].reverse else _READ_FORWARD
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
                    due[read.channel] = _position_ttl(read.history) + SLACK
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
                await self._ask(reader, _TOUCH, *zip(*touched, strict=True))
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
                await session.execute(TABLES)
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
        """Return what `_PUBLISH` is told about it, after its name."""
        ttl = _position_ttl(self._history) + SLACK
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
