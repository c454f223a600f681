"""The backend over PostgreSQL: LISTEN and NOTIFY, through asyncpg."""

from __future__ import annotations

import re
from typing import Any

import asyncpg

from ..exceptions import BackendUnavailable, ConfigurationError
from ..sync.deadline import Deadline
from ..tuning import check_positive
from .base import Deliver, LoginRefused, Lost
from .postgres_connection import PostgresConnection
from .postgres_session import Session, reason
from .postgres_url import Server

_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # as in a channel's name

# A role or a database may have a time limit for idle sessions (since version 14), and transactions
# by default that end with an error, or are lost with the server, where a history must rely on them.
# Its statements are planned once, and the plan is still good when the tables have grown.
_SETUP = """
    SELECT set_config(name, value, false)
    FROM (VALUES
        ('idle_session_timeout', '0'),
        ('default_transaction_isolation', 'read committed'),
        (
            'synchronous_commit',
            coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'local')
        ),
        ('plan_cache_mode', 'force_generic_plan'),
        ('enable_seqscan', 'off')
    ) AS setting (name, value)
    WHERE current_setting(name, true) IS NOT NULL
"""


class PostgresBackend:
    """`Broadcast("postgresql://user:password@host:5432/database")`: PostgreSQL's LISTEN and NOTIFY.

    It uses two sessions, one that listens and one that publishes. LISTEN belongs to a session, so
    through pgbouncer it works with session pooling only. All processes and other programs must use
    the same database, and a URL that names several hosts leads to the primary. Without a history,
    nothing is written to tables, and nothing is kept for clients that do not listen. All of them
    see all messages in one order.
    PostgreSQL has no rights for NOTIFY channels: anybody who may connect to the database can
    listen to all of them.

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
    message are sent in one transaction, so nothing comes between them. A message that is kept is
    U+0010, its id, a colon and the text, or pieces that have its id in place of the number.

    **History.** It is in two tables, which are made on first use in the first schema of the search
    path: `starcast_positions` has a row for each channel, with the position of its newest message,
    and one for each idempotency key; `starcast_messages` has the messages, up to 100 of each
    channel more than are to be kept. What has expired is removed when something is published. A
    third session reads, and is opened for the first read.
    A user who may not make tables needs SELECT, INSERT, UPDATE and DELETE on these two, and
    `python -c "from starcast.backends.postgres_tables import TABLES; print(TABLES)"` prints the SQL
    that makes them.
    A history survives a server that is killed: `synchronous_commit` is at least `local` in these
    sessions, so that each batch waits for the disk. After a failover to a standby server that was
    behind, there is a new epoch if a process that had got further is back before as much was
    published again.

    Args:
        url: As libpq and asyncpg have it. What it leaves out is taken from PGHOST, PGPORT, PGUSER,
            PGPASSWORD, PGDATABASE, PGSSLMODE and the password file. Characters that mean something
            in a URL must be percent-encoded in a user or password: `@` is `%40`. A `str`, or
            anything whose `str()` is one. An option that neither asyncpg nor the server knows is
            refused; the server's refusal comes when the hub opens.
        prefix: Put before each channel's name; may be empty.
        connect_timeout: How long both sessions may take to be open, together, in seconds.
        options: Further arguments of `asyncpg.connect`, which go before what the URL says, such as
            `ssl` (an `ssl.SSLContext`) or `server_settings`. `password` may be a function without
            arguments, plain or `async`, that is called for each connection: for passwords that
            expire. It is called on the event loop, and its time counts.

    Attributes:
        address: Where its channels are; see `Backend`.

    Raises:
        ConfigurationError: The URL, the prefix, the timeout or an option makes no sense. The
            message repeats no value of the URL or an option.
    """

    keeps_history = True
    if_silent = (
        "behind a pooler such as pgbouncer, LISTEN needs session pooling or a direct connection"
    )

    def __init__(
        self,
        url: object,
        *,
        prefix: str = "starcast:",
        connect_timeout: float = 5.0,
        **options: Any,
    ) -> None:
        if _FORBIDDEN.search(prefix):
            raise ConfigurationError("a prefix must not contain control characters")
        self._server = Server(str(url), options)
        self.address = f"{self._server.address}, prefix {prefix!r}"
        self.endpoints = self._server.endpoints
        self._prefix = prefix
        self._connect_timeout = check_positive("connect_timeout", connect_timeout)

    async def connect(self, deliver: Deliver, lost: Lost) -> PostgresConnection:
        """Connect. See `Backend`."""
        listener, publisher = await self._open_sessions(2)
        return PostgresConnection(
            self._server.where,
            self._prefix,
            listener,
            publisher,
            self._open_reader,
            deliver,
            lost,
        )

    async def _open_reader(self) -> Session:
        (session,) = await self._open_sessions(1)
        return session

    async def _open_sessions(self, count: int) -> list[Session]:
        sessions: list[Session] = []
        failed: Exception | None = None
        try:
            async with Deadline(self._connect_timeout):
                for _ in range(count):
                    sessions.append(await self._open_session())
            if any(session.is_closed() for session in sessions):
                raise ConnectionError("a session was closed at once")
        except BaseException as error:
            for session in sessions:
                session.terminate()
            if not isinstance(error, Exception):
                raise
            refused = isinstance(error, asyncpg.InvalidAuthorizationSpecificationError)
            kind = LoginRefused if refused else BackendUnavailable
            failed = self._server.refused(error) or kind(
                f"no connection to {self._server.where}: {reason(error)}"
            )
        if failed is not None:
            raise failed  # not above: the error might hold what the URL holds, as its context
        return sessions

    async def _open_session(self) -> Session:
        # A standby server runs neither LISTEN nor NOTIFY.
        session: Session = await asyncpg.connect(
            self._server.url,
            connection_class=Session,
            target_session_attrs="primary",
            **self._server.options,
        )
        try:
            await session.execute(_SETUP)
        except BaseException:
            session.terminate()
            raise
        return session
