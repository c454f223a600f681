"""The PostgreSQL backend: LISTEN and NOTIFY, through asyncpg."""

from __future__ import annotations

import asyncio
import binascii
import functools
import hashlib
import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import asyncpg

from ..exceptions import BackendUnavailable, ConfigurationError, PayloadTooLarge
from ..sync.deadline import Deadline
from .base import Deliver, LoginRefused, Lost, MessagesRefused
from .postgres_url import Server

_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # as in a channel's name

# Seconds that `start` may take.
CONNECT_TIMEOUT = 5.0

# Bytes of PostgreSQL's NAMEDATALEN and NOTIFY_PAYLOAD_MAX_LENGTH, without the NUL at the end.
MAX_NAME = 63
MAX_NOTIFY = 7999

# Begins a name that is a hash. Names that begin with it by themselves are hashed too.
HASHED = "sha256:"

# A piece of a message: a number that is different for each message of a transaction, which of how
# many pieces this is, and its bytes in base64. ASCII, so that it fits every database's encoding.
MARK = "\x10"  # data link escape
_PIECE = re.compile(MARK + r"([0-9]{1,9})\.([0-9]{1,4})/([0-9]{1,4}):")
PIECE_SIZE = 5952  # bytes; they become 7,936 of base64
MAX_PAYLOAD = 16 * 1024 * 1024
MAX_PIECES = -(-MAX_PAYLOAD // PIECE_SIZE)

# Bytes that go into one transaction, unless a single message has more.
MAX_BATCH = 1024 * 1024

# A role's or a database's time limit for idle sessions (since version 14) is not meant for us.
_SETUP = """
    SELECT set_config('idle_session_timeout', '0', false)
    WHERE current_setting('idle_session_timeout', true) IS NOT NULL
"""

# `unnest` gives the elements in their order, and `count` makes one row of them.
_NOTIFY_ONE = "SELECT pg_catalog.pg_notify($1, $2)"
_NOTIFY = "SELECT count(pg_catalog.pg_notify(c, p)) FROM unnest($1::text[], $2::text[]) AS m(c, p)"


class _Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no type hints
    """A connection that hands over every notification.

    asyncpg's own `add_listener` sends one LISTEN at a time, in two round trips. For many channels
    that takes long after an outage, so ours go together, and asyncpg does not know of them.
    """

    receive: Any = None
    heard_at = 0.0  # when a notification arrived last, in `time.monotonic()`
    asked_at = math.inf  # when the NOTIFY was sent that is not answered yet

    def _process_notification(self, pid: int, name: str, text: str) -> None:
        self.heard_at = time.monotonic()
        self.receive(pid, name, text)


class PostgresBackend:
    """`Broadcast("postgresql://user:password@host:5432/database")`: PostgreSQL's LISTEN and NOTIFY.

    It has two connections, one that listens and one that publishes. LISTEN belongs to a session, so
    through pgbouncer it works with session pooling only. All processes and other programs must use
    the same database, and a URL that names several hosts leads to the primary. Nothing is written
    to tables, and nothing is kept for those who do not listen. All see all messages in one order.
    PostgreSQL has no rights for NOTIFY channels: whoever may connect to the database can listen to
    all of them.

    **Channels.** A channel is the NOTIFY channel of the prefix, the hub's name, a colon and the
    channel: `SELECT pg_notify('starcast:default:room', 'hello')` reaches the clients on "room" of a
    hub without a name of its own. A name of more than 63 bytes, one that begins with "sha256:", and
    in a database whose encoding is not UTF8 one that is not ASCII, is hashed: it becomes "sha256:"
    and the first 56 hexadecimal digits of the SHA-256 of its UTF-8 form, with everything that
    stands before the channel. In SQL, for a UTF8 database and the hub "default":
    `'sha256:' || left(encode(sha256(convert_to('starcast:default:' || channel, 'UTF8')), 'hex'),
    56)`.

    **Messages.** Text is the payload as it is. Only this is sent in pieces: what is not text or
    contains NUL, has more than 7,999 bytes (16 MiB at most), begins with U+0010, is in one batch a
    second time (PostgreSQL would drop it), or is not ASCII in a database whose encoding is not
    UTF8. A piece is U+0010, `number.piece/pieces:` and up to 5,952 bytes in base64. The pieces of a
    message are sent in one transaction, so nothing comes between them.

    Args:
        url: As libpq and asyncpg have it. What it leaves out is taken from PGHOST, PGPORT, PGUSER,
            PGPASSWORD, PGDATABASE, PGSSLMODE and the password file. Characters that mean something
            in a URL must be percent-encoded in a user or password: `@` is `%40`. A `str`, or
            anything whose `str()` is one. An option that neither asyncpg nor the server knows is
            refused; the server's refusal comes when the hub opens.
        prefix: Put before each channel's name; may be empty.
        options: Further arguments of `asyncpg.connect`, which go before what the URL says, such as
            `ssl` (an `ssl.SSLContext`) or `server_settings`. `password` may be a function without
            arguments, plain or `async`, that is called for each connection: for passwords that
            expire. It is called on the event loop and has five seconds.

    Attributes:
        address: Where its channels are; see `Backend`.

    Raises:
        ConfigurationError: The URL, the prefix or an option makes no sense. The message repeats
            none of their values.
    """

    if_silent = (
        "behind a pooler such as pgbouncer, LISTEN needs session pooling or a direct connection"
    )

    def __init__(self, url: object, *, prefix: str = "starcast:", **options: Any) -> None:
        if _FORBIDDEN.search(prefix):
            raise ConfigurationError("a prefix must not contain control characters")
        self._server = Server(str(url), options)
        self._where = self._server.where
        self.address = f"{self._server.address}, prefix {prefix!r}"
        self.endpoints = self._server.endpoints
        self._prefix = prefix
        self._utf8 = True  # the encoding of the database
        self._listener: Any = None
        self._publisher: Any = None
        self._lost: Lost | None = None
        self._channels: dict[str, str] = {}  # by their names in PostgreSQL
        # Statements for the listener, which can run one at a time: those that wait go together.
        self._statements: list[tuple[str, asyncio.Future[None]]] = []
        self._worker: asyncio.Task[None] | None = None
        # The message whose pieces are arriving. PostgreSQL keeps a transaction's notifications
        # together, so there is only ever one.
        self._source: tuple[object, ...] = ()
        self._pieces: list[bytes] = []
        self.max_payload = MAX_PAYLOAD

    async def connect(self, deliver: Deliver, lost: Lost) -> PostgresBackend:
        """Connect, and return this object, which is its own connection: one at a time."""
        await self.start(deliver, lost)
        return self

    async def close(self) -> None:
        """Close the connection. See `BrokerConnection`."""
        await self.stop()

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        """Open both connections, within 5 seconds."""
        failed: Exception | None = None
        try:
            async with Deadline(CONNECT_TIMEOUT):
                self._publisher = await self._connect(deliver)
                self._listener = await self._connect(deliver)
            if self._publisher.is_closed():
                raise ConnectionError("a connection was closed at once")
        except BaseException as error:
            self._disconnect()
            if not isinstance(error, Exception):
                raise
            refused = isinstance(error, asyncpg.InvalidAuthorizationSpecificationError)
            kind = LoginRefused if refused else BackendUnavailable
            failed = self._server.refused(error) or kind(
                f"no connection to {self._where}: {_reason(error)}"
            )
        if failed is not None:
            raise failed  # not above: the error might hold what the URL holds, as its context
        settings = self._publisher.get_settings()
        self._utf8 = getattr(settings, "server_encoding", "UTF8") == "UTF8"
        self._lost = lost

    async def stop(self) -> None:
        """Drop both connections without a word to the server, which may not be listening."""
        self._disconnect()
        if self._worker is not None and self._worker.get_loop() is asyncio.get_running_loop():
            await asyncio.wait([self._worker])
        await asyncio.sleep(0)  # the sockets are closed in the event loop's next turn

    async def subscribe(self, channel: str) -> None:
        name = self._name(channel)
        self._channels[name] = channel
        try:
            await self._run(f"LISTEN {_quoted(name)}")
        except BaseException as error:
            self._channels.pop(name, None)
            if isinstance(error, asyncio.CancelledError) and self._listener is not None:
                self._run(f"UNLISTEN {_quoted(name)}").cancel()  # nobody waits for it
            raise

    async def unsubscribe(self, channel: str) -> None:
        name = self._name(channel)
        self._channels.pop(name, None)
        await self._run(f"UNLISTEN {_quoted(name)}")

    async def publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        for _, payload in messages:
            if len(payload) > MAX_PAYLOAD:
                raise PayloadTooLarge(
                    f"a message has {len(payload)} bytes, and {MAX_PAYLOAD} are possible"
                )
        for first, rows in self._transactions(messages):
            try:
                await self._notify(rows)
            except BackendUnavailable as error:
                if not first:
                    raise
                reasons = dict.fromkeys(range(first, len(messages)), str(error))
                raise MessagesRefused(str(error), reasons) from error

    @property
    def heard_at(self) -> float:
        """See `Backend`. A large message comes in many notifications."""
        listener, publisher = self._listener, self._publisher
        closed = listener is None or publisher is None
        return 0.0 if closed else float(min(listener.heard_at, publisher.asked_at))

    # Inside

    def _transactions(
        self, messages: Sequence[tuple[str, bytes]]
    ) -> Iterator[tuple[int, dict[tuple[str, str], None]]]:
        """Yield what goes into each transaction, and the position of its first message."""
        first = size = 0
        rows: dict[tuple[str, str], None] = {}  # in this order, no two of them equal
        for number, (channel, payload) in enumerate(messages):
            size += len(payload)
            if rows and size > MAX_BATCH:
                yield first, rows
                first, rows, size = number, {}, len(payload)
            name = self._name(channel)
            text = self._bare(payload)
            if text is None or (name, text) in rows:
                rows |= dict.fromkeys((name, piece) for piece in _cut(number, payload))
            else:
                rows[name, text] = None
        if rows:
            yield first, rows

    async def _connect(self, deliver: Deliver) -> Any:
        # A standby server runs neither LISTEN nor NOTIFY.
        connection = await asyncpg.connect(
            self._server.url,
            connection_class=_Connection,
            target_session_attrs="primary",
            **self._server.options,
        )
        try:
            await connection.execute(_SETUP)
        except BaseException:
            connection.terminate()
            raise
        connection.receive = functools.partial(self._receive, deliver)
        connection.add_termination_listener(self._ended)
        return connection

    def _disconnect(self) -> None:
        connections = [self._listener, self._publisher]
        self._listener = self._publisher = self._lost = None
        for connection in connections:
            if connection is not None:
                connection.terminate()  # makes calls that wait raise
        self._channels.clear()
        self._source, self._pieces = (), []

    def _ended(self, connection: Any) -> None:
        if self._lost is not None and connection in (self._listener, self._publisher):
            lost, self._lost = self._lost, None
            lost(BackendUnavailable(f"{self._where} closed the connection"))

    def _name(self, channel: str) -> str:
        name = self._prefix + channel
        encoded = name.encode()
        fits = len(encoded) <= MAX_NAME and (self._utf8 or encoded.isascii())
        if fits and not name.startswith(HASHED):
            return name
        return HASHED + hashlib.sha256(encoded).hexdigest()[: MAX_NAME - len(HASHED)]

    def _bare(self, payload: bytes) -> str | None:
        """Return the text that a payload is, or None if it can't travel as text."""
        if len(payload) > MAX_NOTIFY or b"\0" in payload or payload.startswith(MARK.encode()):
            return None
        try:
            return payload.decode("utf-8" if self._utf8 else "ascii")
        except UnicodeDecodeError:
            return None

    async def _notify(self, rows: dict[tuple[str, str], None]) -> None:
        publisher = self._publisher
        if publisher is None:
            raise BackendUnavailable(f"not connected to {self._where}")
        publisher.asked_at = time.monotonic()
        try:
            if len(rows) == 1:
                await publisher.execute(_NOTIFY_ONE, *next(iter(rows)))
            else:
                await publisher.execute(_NOTIFY, *zip(*rows, strict=True))
        except Exception as error:
            raise BackendUnavailable(f"{self._where}: {_reason(error)}") from error
        finally:
            publisher.asked_at = math.inf

    def _run(self, statement: str) -> asyncio.Future[None]:
        """Have the listener run a statement."""
        if self._listener is None:
            raise BackendUnavailable(f"not connected to {self._where}")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._statements.append((statement, done))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(self._listener))
        return done

    async def _work(self, listener: Any) -> None:
        # A task of its own, so that a caller who waits for a statement can be cancelled. asyncpg
        # would interrupt the statement, and with it those of others.
        while self._statements:
            statements, self._statements = self._statements, []
            failure = None
            try:
                await listener.execute(";".join(statement for statement, _ in statements))
            except asyncio.CancelledError:  # the event loop ends; what comes next fails at once
                listener.terminate()
                failure = "cancelled"
            except Exception as error:
                failure = _reason(error)
            for _, done in statements:
                if done.done():
                    continue  # who waited for it was cancelled
                if failure is None:
                    done.set_result(None)
                else:
                    done.set_exception(BackendUnavailable(f"{self._where}: {failure}"))

    def _receive(self, deliver: Deliver, pid: int, name: str, text: str) -> None:
        channel = self._channels.get(name)
        if channel is None:
            return  # it was left meanwhile
        if found := _PIECE.match(text):
            number, piece, pieces = map(int, found.groups())
            try:
                part = binascii.a2b_base64(text[found.end() :], strict_mode=True)
            except ValueError:
                pieces = 0
            if 1 <= piece <= pieces <= MAX_PIECES:
                payload = self._join((pid, name, number, pieces), piece, pieces, part)
                if payload is not None:
                    deliver(channel, payload)
                return
        deliver(channel, text.encode())  # whatever else it may be, it is somebody's text

    def _join(
        self, source: tuple[object, ...], piece: int, pieces: int, part: bytes
    ) -> bytes | None:
        """Return the message of which this is the last piece."""
        if piece == 1:
            self._source, self._pieces = source, []
        if source != self._source or piece != len(self._pieces) + 1:
            return None  # of a message whose beginning was not heard
        self._pieces.append(part)
        if piece < pieces:
            return None
        payload = b"".join(self._pieces)
        self._source, self._pieces = (), []
        return payload


# Errors whose messages are known not to repeat what is in a URL.
_SAYS = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.TargetServerAttributeNotMatched,
)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _cut(number: int, payload: bytes) -> Iterator[str]:
    pieces = -(-len(payload) // PIECE_SIZE) or 1
    for piece in range(pieces):
        part = payload[piece * PIECE_SIZE : (piece + 1) * PIECE_SIZE]
        encoded = binascii.b2a_base64(part, newline=False).decode()
        yield f"{MARK}{number}.{piece + 1}/{pieces}:{encoded}"


def _reason(error: Exception) -> str:
    """Say what went wrong, in words that can't contain a password."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, _SAYS):
        return str(error)
    return type(error).__name__
