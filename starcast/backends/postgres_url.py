"""The URL of a PostgreSQL database: where it leads, and which of its options make no sense."""

from __future__ import annotations

import getpass
import inspect
import os
import re
from typing import Any
from urllib.parse import unquote

import asyncpg

from ..exceptions import ConfigurationError
from .urls import Endpoint, first_of, options_of, refuse_option, same_host

# One "@" at most: no part of a password shall be taken for a host or a database, and be told.
_URL = re.compile(
    r"""postgres(?:ql)?://
    (?:(?P<user>[^@/?\#\[\]:]*)(?::[^@/?\#\[\]]*)?@)?
    (?P<hosts>(?:\[[^@/?\#\[\],]+\]|[^@/?\#\[\],:]*)(?::[0-9]{0,5})?
        (?:,(?:\[[^@/?\#\[\],]+\]|[^@/?\#\[\],:]+)(?::[0-9]{0,5})?)*)
    (?:/(?P<database>[^@?\#]*))?
    (?:\?(?P<query>[^@\#&=]+=[^@\#&]*(?:&[^@\#&=]+=[^@\#&]*)*)?)?""",
    re.VERBOSE,
)

# What `asyncpg.connect` is given by this module; no option of the user's.
_FIXED = {"dsn", "connection_class", "target_session_attrs", "loop"}

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

# What to do about options that hosters and other libraries put into a URL. What stands neither here
# nor among asyncpg's is for the server, such as `application_name`, and it says if it is not.
_TAKE_OUT = "neither asyncpg nor the server knows it; take it out"
_POOLER = (
    "it is for Prisma and says that this is a pooler; LISTEN does not work through a pooler in "
    "transaction mode: take the URL of the database itself"
)
_ADVICE = {
    "channel_binding": "asyncpg does not know it; take it out and leave sslmode=require",
    "pgbouncer": _POOLER,
    "supa": _POOLER.replace("Prisma", "Vercel"),
    "ssl": "write sslmode=require in its place",
    "sslaccept": "it is for Prisma; write sslmode=verify-full or sslmode=require in its place",
    "uselibpqcompat": "it is for node-postgres; take it out and leave sslmode",
    "sslmode": f"it is one of {', '.join(_SSL_MODES)}; for no-verify write require",
    "sslrootcert": (
        "asyncpg takes the path of a file; for the system's certificates give "
        "PostgresBackend(url, ssl=ssl.create_default_context())"
    ),
    **dict.fromkeys(
        ["connect_timeout", "gssencmode", "keepalives", "keepalives_idle", "keepalives_interval"]
        + ["keepalives_count", "tcp_user_timeout", "fallback_application_name", "hostaddr"]
        + ["load_balance_hosts", "require_auth", "requiressl", "sslcompression", "sslsni"],
        "it is for libpq, and asyncpg does not know it; take it out",
    ),
    **dict.fromkeys(
        ["connection_limit", "pool_timeout", "schema", "socket_timeout", "statement_cache_size"],
        "it is for Prisma; take it out",
    ),
    **dict.fromkeys(
        ["async_fallback", "max_overflow", "pool_size", "prepared_statement_cache_size"],
        "it is for SQLAlchemy; take it out",
    ),
}


class Server:
    """A database, from a URL and further arguments of `asyncpg.connect`.

    Attributes:
        url, options: For `asyncpg.connect`.
        where: For people.
        address: The same for every spelling.
        endpoints: Hosts and ports, or paths of sockets; none if asyncpg looks for them.

    Raises:
        ConfigurationError: One of them makes no sense.
    """

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        parts = _URL.fullmatch(url)
        if parts is None:
            raise ConfigurationError(
                "a PostgreSQL URL looks like postgresql://user:password@host:5432/database?a=b; in "
                "its parts, characters that mean something in a URL are percent-encoded, @ as %40"
            )
        if taken := options.keys() & _FIXED:
            raise ConfigurationError(f"the backend sets these options: {', '.join(sorted(taken))}")
        if unknown := options.keys() - inspect.signature(asyncpg.connect).parameters:
            raise ConfigurationError(f"asyncpg.connect does not know: {', '.join(sorted(unknown))}")
        query = dict(options_of(parts["query"] or ""))
        _check(query)
        self.url = url
        self.options = options
        self._in_url = list(query)
        database = options.get("database") or parts["database"] or "(default)"
        host = options.get("host") or parts["hosts"] or query.get("host") or "its default host"
        self.where = f"PostgreSQL at {host}, database {database}"
        hosts = _hosts(parts, query, options)
        self.endpoints = [_endpoint(*each) for each in hosts if each[0]]
        self.address = (
            f"PostgreSQL at {', '.join(sorted(_same(*each) for each in hosts))}, "
            f"database {_database(parts, query, options)!r}"
        )

    def refused(self, error: BaseException) -> ConfigurationError | None:
        """Return what to say if the server refuses an option of the URL."""
        if isinstance(error, asyncpg.UndefinedObjectError):
            advice = _TAKE_OUT
        elif isinstance(error, asyncpg.InvalidParameterValueError):
            advice = "the server says that its value is not valid"
        elif isinstance(
            error, asyncpg.CantChangeRuntimeParamError | asyncpg.InsufficientPrivilegeError
        ):
            advice = "the server does not let this user set it; take it out"
        else:
            return None
        name = first_of(self._in_url, str(error))
        return None if name is None else refuse_option("PostgreSQL", name, advice)


def _check(query: dict[str, str]) -> None:
    for name, value in query.items():
        if name == "sslmode":
            wrong = value not in _SSL_MODES
        elif name == "sslrootcert":
            wrong = value == "system"  # a word of libpq's
        else:
            wrong = name in _ADVICE
        if wrong:
            raise refuse_option("PostgreSQL", name, _ADVICE[name])


# asyncpg takes the first of these that says something: arguments, URL, its options, environment.


def _hosts(
    parts: re.Match[str], query: dict[str, str], options: dict[str, Any]
) -> list[tuple[str, str]]:
    given = options.get("host") or parts["hosts"] or query.get("host") or os.getenv("PGHOST") or ""
    hosts = given.split(",") if isinstance(given, str) else list(given)
    port = options.get("port") or query.get("port") or os.getenv("PGPORT") or "5432"
    ports = str(port).split(",") if isinstance(port, str | int) else list(map(str, port))
    return [
        _split(unquote(host), ports[index] if len(ports) == len(hosts) else ports[0])
        for index, host in enumerate(hosts)
    ]


def _split(host: str, port: str) -> tuple[str, str]:
    if host.startswith("/"):  # the folder of a socket
        return host.rstrip("/"), port
    found = re.fullmatch(r"(\[.*\]|[^:]*)(?::([0-9]*))?", host)
    name, own_port = found.groups() if found else (host, "")  # an address of IPv6 alone
    return name.strip("[]"), own_port or port


def _same(host: str, port: str) -> str:
    return f"{host if host.startswith('/') else same_host(host)}:{port}"


def _endpoint(host: str, port: str) -> Endpoint:
    return f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)


def _database(parts: re.Match[str], query: dict[str, str], options: dict[str, Any]) -> str:
    found = (
        options.get("database")
        or unquote(parts["database"] or "")
        or query.get("dbname")
        or query.get("database")
        or os.getenv("PGDATABASE")
        or options.get("user")
        or unquote(parts["user"] or "")
        or query.get("user")
        or os.getenv("PGUSER")
        or getpass.getuser()
    )
    return str(found)
