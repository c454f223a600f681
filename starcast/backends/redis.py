"""The backend over Redis or Valkey."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from ..exceptions import BackendUnavailable, ConfigurationError
from ..sync.deadline import Deadline
from ..tuning import check_positive
from .base import Deliver, LoginRefused, Lost
from .redis_connection import RedisConnection
from .redis_stream import abort, reason
from .redis_url import pool_of
from .urls import Endpoint, same_host

# Bytes of one message, at most. Redis allows 512 MB by default.
MAX_PAYLOAD = 8 * 1024 * 1024

# What a URL or a client may have set differently.
_SETTINGS: dict[str, Any] = {
    # A message is an array like any other. In version 3 it is a push, of which redis-py makes a
    # text for a debug log, message by message.
    "protocol": 2,
    "decode_responses": False,
    # redis-py would reconnect and subscribe again, and the gap would go unnoticed.
    "retry": None,
    "retry_on_error": [],
    "retry_on_timeout": False,
    # A channel may be silent for hours. The hub itself probes whether the broker is alive.
    "socket_timeout": None,
    # `connect` has a deadline, which is extended if the event loop is blocked.
    "socket_connect_timeout": None,
    "health_check_interval": 0,
}


class RedisBackend:
    """Connects to one Redis or Valkey server.

    A channel's name there is the prefix, the hub's name, a colon and the channel, in UTF-8:
    `PUBLISH starcast:default:news hello` reaches the channel `news` of a hub without a name of its
    own. Nothing in a name is special, for it is never a pattern. The number of a database in the
    URL makes no difference, because Redis has the same channels in all of them: apps and stages
    that share a server need different names for their hubs, or different prefixes.

    Redis forgets a message once it has handed it to its subscribers, and drops the connection of
    a subscriber that is behind by more than `client-output-buffer-limit pubsub`, which is 32 MB (or
    8 MB for a minute) by default. Messages are therefore limited to 8 MiB, or to the server's
    `proto-max-bulk-len` if it is less and may be asked for. A user with few rights needs
    `+ping +publish +subscribe +unsubscribe` and `&starcast:*`, or `&starcast:staff:*` for one hub
    only; `+config|get` lets it ask, and `+hello` lets it notice that the server is a replica, which
    tells only its own subscribers.

    A history is in two keys for each channel, `starcast:history:{default:news}` and the same with
    `:position`, and in one for each idempotency key. They expire. A history needs `+evalsha +eval
    +info +time +hmget +hget +hset +hincrby +pttl +pexpire +xadd +xrange +xrevrange +xdel +del +get
    +set` and `~starcast:history:*`. It survives a server that is killed if that has an append-only
    file (`appendonly yes`), but for what it had not written yet: with `appendfsync everysec`, the
    default, that is up to two seconds, and whoever has got it already is told of a gap. Without
    such a file, each start of the server is a new epoch, as if the history was lost.

    Args:
        url: `redis://user:password@host:6379`, `rediss://` for TLS, `unix:///path/redis.sock`;
            `valkey://` and `valkeys://` mean the same. A `str`, or anything whose `str()` is one.
            What is special in a URL is escaped in a password (`%40` for `@`). Options of
            `redis.asyncio.Connection` may follow: `rediss://host?ssl_ca_certs=/path/ca.pem`.
        client: In place of the URL, a `redis.asyncio.Redis` that the app has already. Two more
            connections are made with its settings. The client itself is neither used nor closed.
            Its `credential_provider` is asked anew for each connection: this is the way for
            passwords that expire. One that `Sentinel.master_for` returned finds the master anew
            after a failover.
        prefix: What the names of the channels begin with on the server. May be empty.
        connect_timeout: How long both connections may take to be open, together, in seconds.

    Attributes:
        address: Where its channels are; see `Backend`.

    Raises:
        ConfigurationError: The URL, one of its options or the timeout makes no sense, or there is
            not one of URL and client.
    """

    keeps_history = True
    if_silent = "is there a proxy in between that does not carry SUBSCRIBE and PUBLISH?"

    def __init__(
        self,
        url: object = None,
        *,
        client: Redis | None = None,
        prefix: str = "starcast:",
        connect_timeout: float = 5.0,
    ) -> None:
        if url is not None and client is None:
            pool = pool_of(str(url))
        elif isinstance(client, Redis) and url is None:
            pool = client.connection_pool
        else:
            raise ConfigurationError("RedisBackend takes a URL or a redis.asyncio.Redis")
        self._class: Callable[..., AbstractConnection] = pool.connection_class
        self._settings = {**pool.connection_kwargs, **_SETTINGS}
        # It needs version 3, and names another address to connect to; the hub does that.
        self._settings.pop("maint_notifications_config", None)
        host, port = self._settings.get("host", "localhost"), self._settings.get("port", 6379)
        path = self._settings.get("path")  # of a socket, instead of host and port
        self._name = f"Redis at {path or f'{host}:{port}'}"
        where = f"Redis at {path or f'{same_host(host)}:{port}'}"
        self.endpoints: list[Endpoint] = [path or (host, port)]
        if service := getattr(pool, "service_name", None):  # Sentinel names the server
            self._name = where = f"the Redis that Sentinel calls {service!r}"
            self.endpoints = []
            self._pool = pool  # its connections ask it, and do not keep it
        self.address = f"{where}, prefix {prefix!r}"
        self._prefix = prefix
        self._connect_timeout = check_positive("connect_timeout", connect_timeout)

    async def connect(self, deliver: Deliver, lost: Lost) -> RedisConnection:
        """Connect. See `Backend`."""
        subscriber, publisher = sockets = [self._class(**self._settings) for _ in range(2)]
        failed: BackendUnavailable | None = None
        try:
            async with Deadline(self._connect_timeout):
                for socket in sockets:
                    await socket.connect()  # type: ignore[no-untyped-call]  # redis-py leaves it out
                    # A server that wants a password may say so only now.
                    await socket.send_command("PING")
                    await socket.read_response()
                if await _is_replica(publisher):
                    raise _ReplicaError
                max_payload = min(MAX_PAYLOAD, await _max_bulk_length(publisher))
        except BaseException as error:
            for socket in sockets:
                await abort(socket)
            if not isinstance(error, Exception):
                raise
            # On a unix socket redis-py logs in while it connects, and wraps the refusal.
            refused = isinstance(error.__cause__ or error, AuthenticationError)
            kind = LoginRefused if refused else BackendUnavailable
            in_time = not isinstance(error, TimeoutError)
            late = f"no answer within {self._connect_timeout:g} seconds"
            failed = kind(f"no connection to {self._name}: {reason(error) if in_time else late}")
        if failed is not None:
            raise failed  # not above: the error may hold the password, and would be its context
        return RedisConnection(
            self._name,
            self._prefix,
            max_payload,
            subscriber,
            publisher,
            self._open_node,
            deliver,
            lost,
        )

    async def _open_node(self, host: str, port: int) -> AbstractConnection:
        """Connect to another node of the cluster."""
        settings = {**self._settings, "port": port}
        if host:  # pragma: no branch  # a node that does not know its own address names none
            settings["host"] = host
        socket = self._class(**settings)
        try:
            async with Deadline(self._connect_timeout):
                await socket.connect()  # type: ignore[no-untyped-call]  # redis-py leaves it out
        except BaseException as error:
            await abort(socket)
            if not isinstance(error, Exception):  # pragma: no cover  # as in `connect`
                raise
            why = reason(error)
        else:
            return socket
        raise BackendUnavailable(f"no connection to the node {host}:{port} of {self._name}: {why}")


async def _max_bulk_length(connection: AbstractConnection) -> int:
    """Ask, if the user may, for the longest string. Longer ones end the connection."""
    await connection.send_command("CONFIG", "GET", "proto-max-bulk-len")
    try:
        _, value = await connection.read_response()
        return int(value)
    except (ResponseError, ValueError):  # the user may not ask, or there is no such setting
        return MAX_PAYLOAD


class _ReplicaError(RedisError):
    def __str__(self) -> str:
        return (
            "this is a replica, and what is published there reaches only its own subscribers; "
            "use the address of the primary"
        )


async def _is_replica(connection: AbstractConnection) -> bool:
    """Ask, if the user may. In a cluster, replicas too pass on what is published."""
    await connection.send_command("HELLO", "2")
    try:
        answer = await connection.read_response(disable_decoding=True)
    except ResponseError:  # the user may not ask, or the server is older than Redis 6
        return False
    fields = dict(zip(answer[::2], answer[1::2], strict=False))
    return fields.get(b"role") in (b"replica", b"slave") and fields.get(b"mode") != b"cluster"
