"""The backend over Redis or Valkey: SUBSCRIBE on one connection, PUBLISH on another."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from ..exceptions import BackendUnavailable, ConfigurationError
from ..sync.deadline import Deadline
from .base import Deliver, LoginRefused, Lost, MessagesRefused
from .redis_url import pool_of
from .urls import Endpoint, same_host

Command = tuple[str | bytes, ...]

_SUBSCRIBER, _PUBLISHER = range(2)  # the two connections

# Bytes of one message, at most. Redis allows 512 MB by default.
MAX_PAYLOAD = 8 * 1024 * 1024

# Seconds that both connections may take to be open, together.
CONNECT_TIMEOUT = 5.0

# Seconds after which a connection that nobody reads from any more is called broken.
AFTER_CANCEL = 0.1

# What a URL or a client may have set differently.
_SETTINGS: dict[str, Any] = {
    # A message is an array like any other. In version 3 it is a push, of which redis-py makes a
    # text for a debug log, message by message.
    "protocol": 2,
    "decode_responses": False,
    # redis-py would connect again and re-subscribe, and nobody would know of the gap.
    "retry": None,
    "retry_on_error": [],
    "retry_on_timeout": False,
    # A channel may be silent for hours. The hub probes by itself whether the broker is alive.
    "socket_timeout": None,
    "socket_connect_timeout": None,  # `start` has a deadline, which a blocked loop does not eat
    "health_check_interval": 0,
}


class RedisBackend:
    """A connection to one Redis or Valkey server.

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

    Args:
        url: `redis://user:password@host:6379`, `rediss://` for TLS, `unix:///path/redis.sock`;
            `valkey://` and `valkeys://` mean the same. A `str`, or anything whose `str()` is one.
            What is special in a URL is escaped in a password (`%40` for `@`). Options of
            `redis.asyncio.Connection` may follow: `rediss://host?ssl_ca_certs=/path/ca.pem`.
        client: In place of the URL, a `redis.asyncio.Redis` that the app has already. Two more
            connections are made with its settings. The client itself is neither used nor closed.
            Its `credential_provider` is asked anew for each connection: this is the way for
            passwords that expire.
        prefix: What the names of the channels begin with on the server. May be empty.

    Attributes:
        address: Where its channels are; see `Backend`.

    Raises:
        ConfigurationError: The URL or one of its options makes no sense, or there is not one of
            URL and client.
    """

    max_payload = MAX_PAYLOAD
    if_silent = "is there a proxy in between that does not carry SUBSCRIBE and PUBLISH?"

    def __init__(
        self, url: object = None, *, client: Redis | None = None, prefix: str = "starcast:"
    ) -> None:
        if url is not None and client is None:
            pool = pool_of(str(url))
        elif isinstance(client, Redis) and url is None:
            pool = client.connection_pool
        else:
            raise ConfigurationError("RedisBackend takes a URL or a redis.asyncio.Redis")
        self._class: Callable[..., AbstractConnection] = pool.connection_class
        self._settings = {**pool.connection_kwargs, **_SETTINGS}
        # It needs version 3, and tells of another address to connect to; the hub does that.
        self._settings.pop("maint_notifications_config", None)
        host, port = self._settings.get("host", "localhost"), self._settings.get("port", 6379)
        path = self._settings.get("path")  # of a socket, in place of the two
        self._where = f"Redis at {path or f'{host}:{port}'}"
        self.address = f"Redis at {path or f'{same_host(host)}:{port}'}, prefix {prefix!r}"
        self.endpoints: list[Endpoint] = [path or (host, port)]
        self._prefix = prefix
        self._pipes: list[_Pipe] = []
        self._lost: Lost | None = None  # None if stopped, or told
        self._broken = False

    async def connect(self, deliver: Deliver, lost: Lost) -> RedisBackend:
        """Connect, and return this object, which is its own connection: one at a time."""
        await self.start(deliver, lost)
        return self

    async def close(self) -> None:
        """Close the connection. See `BrokerConnection`."""
        await self.stop()

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        connections = [self._class(**self._settings) for _ in (_SUBSCRIBER, _PUBLISHER)]
        failed: BackendUnavailable | None = None
        try:
            async with Deadline(CONNECT_TIMEOUT):
                for connection in connections:
                    await connection.connect()  # type: ignore[no-untyped-call]  # redis-py leaves it out
                    # A server that wants a password may say so only now.
                    await connection.send_command("PING")
                    await connection.read_response()
                if await _is_replica(connections[_PUBLISHER]):
                    raise _ReplicaError
                self.max_payload = min(MAX_PAYLOAD, await _longest(connections[_PUBLISHER]))
        except BaseException as error:
            for connection in connections:
                await _drop(connection)
            if not isinstance(error, Exception):
                raise
            # On a unix socket redis-py logs in while it connects, and wraps the refusal.
            refused = isinstance(error.__cause__ or error, AuthenticationError)
            kind = LoginRefused if refused else BackendUnavailable
            failed = kind(f"no connection to {self._where}: {_reason(error)}")
        if failed is not None:
            raise failed  # not above: the error may hold the password, and would be its context
        cut = len(self._prefix)

        def take(name: bytes, payload: bytes) -> None:
            # Only a pattern can bring a name that we have not written.
            deliver(name.decode(errors="replace")[cut:], payload)

        self._pipes = [_Pipe(connection, take, self._break) for connection in connections]
        self._lost, self._broken = lost, False

    async def stop(self) -> None:
        self._lost = None
        pipes, self._pipes = self._pipes, []
        self._close(pipes, "was closed")
        for pipe in pipes:
            await _drop(pipe.connection)
        here = asyncio.get_running_loop()  # tasks of a loop that has ended never end
        if tasks := [pipe.task for pipe in pipes if pipe.task.get_loop() is here]:
            await asyncio.wait(tasks)

    async def subscribe(self, channel: str) -> None:
        name = self._name(channel)
        try:
            await self._ask(_SUBSCRIBER, [("SUBSCRIBE", name)])
        except asyncio.CancelledError:
            if self._lost is not None and not self._broken:
                self._ask(_SUBSCRIBER, [("UNSUBSCRIBE", name)]).cancel()  # nobody waits for that
            raise

    async def subscribe_all(self, hub: str) -> None:
        """Subscribe to all channels of the hub with this name. For the command line."""
        start = re.sub(rb"[\\*?\[\]^]", rb"\\\g<0>", self._name(f"{hub}:"))
        await self._ask(_SUBSCRIBER, [("PSUBSCRIBE", start + b"*")])

    @property
    def receivers(self) -> int | None:
        """Connections to the broker that the message published last was sent to."""
        answer = self._pipes[_PUBLISHER].answer if self._pipes else None
        return answer if isinstance(answer, int) else None

    async def unsubscribe(self, channel: str) -> None:
        await self._ask(_SUBSCRIBER, [("UNSUBSCRIBE", self._name(channel))])

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> asyncio.Future[None]:
        commands = [("PUBLISH", self._name(channel), payload) for channel, payload in messages]
        return self._ask(_PUBLISHER, commands)

    @property
    def heard_at(self) -> float:
        """See `Backend`."""
        pipes = self._pipes  # which another thread may not change meanwhile
        return min(pipes[0].message_at, pipes[1].silent_since) if pipes else 0.0

    def _name(self, channel: str) -> bytes:
        return (self._prefix + channel).encode()

    def _ask(self, pipe: int, commands: Sequence[Command]) -> asyncio.Future[None]:
        if self._lost is None or self._broken:
            raise BackendUnavailable(f"there is no connection to {self._where}")
        return self._pipes[pipe].ask(commands)

    def _break(self, error: BaseException) -> None:
        lost = self._lost
        if lost is None or self._broken:
            return
        self._broken = True
        reason = self._close(self._pipes, f"is lost: {_reason(error)}")
        if isinstance(error, asyncio.CancelledError):
            # Most likely the loop is ending. If it is not, say so in a moment.
            asyncio.get_running_loop().call_later(AFTER_CANCEL, self._tell, lost, reason)
        else:
            self._tell(lost, reason)

    def _tell(self, lost: Lost, reason: Exception) -> None:
        if self._lost is lost:  # neither told nor stopped
            self._lost = None
            lost(reason)

    def _close(self, pipes: list[_Pipe], how: str) -> Exception:
        error = BackendUnavailable(f"the connection to {self._where} {how}")
        for pipe in pipes:
            pipe.close(error)
        return error


class _Pipe:
    """One connection. Commands go out at once; a task reads the answers, which come in order.

    Nobody reads or writes but this, so a call that is cancelled leaves everything in step.
    """

    def __init__(
        self,
        connection: AbstractConnection,
        take: Callable[[bytes, bytes], None],
        broken: Callable[[BaseException], None],
    ) -> None:
        # redis-py has no public way to write without waiting, which a cancellation would turn into
        # a broken connection, nor to close without waiting for a server that does not read.
        writer, reader = connection._writer, connection._reader
        assert writer is not None
        assert reader is not None
        self.connection = connection
        # In `time.monotonic()`: when any bytes arrived last; of these, those that ended the last
        # message, and the last message or answer; and when the first open question was asked.
        self._bytes_at = self._message_at = self._read_at = self._asked_at = 0.0
        feed = reader.feed_data

        def feed_data(data: bytes) -> None:
            self._bytes_at = time.monotonic()
            feed(data)

        # Nothing else shows that a part of a message has come, so this one reader is patched.
        reader.feed_data = feed_data  # type: ignore[method-assign, assignment]  # on purpose
        self.answer: object = None  # the last one
        self._writer = writer
        self._take = take
        self._broken = broken
        # One for each answer to come. As many as there are commands in calls that wait.
        self._asked: deque[asyncio.Future[None]] = deque()
        # Of the call whose answers are arriving: how many were there, and what was refused.
        self._answers = 0
        self._refused: dict[int, str] = {}
        self.task = asyncio.create_task(self._read())

    @property
    def message_at(self) -> float:
        """When a message, or a part of one, arrived last. Complete answers do not count."""
        return self._message_at if self._read_at == self._bytes_at else self._bytes_at

    @property
    def silent_since(self) -> float:
        """Since when an answer is due and no bytes have come."""
        return max(self._bytes_at, self._asked_at) if self._asked else math.inf

    def ask(self, commands: Sequence[Command]) -> asyncio.Future[None]:
        """Write the commands; what comes back is done when the last of them is answered.

        It fails with a `MessagesRefused` if some of them were refused.
        """
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if commands:
            if not self._asked:
                self._asked_at = time.monotonic()
            self._writer.writelines(self.connection.pack_commands(commands))
            self._asked.extend([answered] * len(commands))
        else:
            answered.set_result(None)
        return answered

    def close(self, error: Exception) -> None:
        self._writer.transport.abort()
        self.task.cancel()
        for answered in self._asked:
            if not answered.done():
                answered.set_exception(error)
        self._asked.clear()

    async def _read(self) -> None:
        try:
            while True:
                try:
                    # Gives no turn to the loop as long as there is something to parse.
                    answer = await self.connection.read_response(disable_decoding=True)
                except ResponseError as error:
                    if not self._asked:
                        raise
                    self._answer(error)
                else:
                    if isinstance(answer, list) and answer[0] in (b"message", b"pmessage"):
                        self._message_at = self._read_at = self._bytes_at
                        self._take(answer[-2], answer[-1])
                    else:
                        self.answer = answer
                        self._answer()
        except asyncio.CancelledError as error:
            self._broken(error)  # unless it was `close`
            raise
        except Exception as error:
            self._broken(error)

    def _answer(self, refusal: ResponseError | None = None) -> None:
        self._read_at = self._bytes_at
        answered = self._asked.popleft()
        if refusal is not None:
            self._refused[self._answers] = f"Redis refuses: {_reason(refusal)}"
        self._answers += 1
        if self._asked and self._asked[0] is answered:
            return
        refused, self._refused, self._answers = self._refused, {}, 0
        if answered.done():
            return  # cancelled
        if refused:
            answered.set_exception(MessagesRefused(next(iter(refused.values())), refused))
        else:
            answered.set_result(None)


async def _longest(connection: AbstractConnection) -> int:
    """Ask for the longest string that the server takes, if we may: it cuts off who sends more."""
    await connection.send_command("CONFIG", "GET", "proto-max-bulk-len")
    try:
        _, value = await connection.read_response()
        return int(value)
    except (ResponseError, ValueError):  # we may not ask, or it has no such setting
        return MAX_PAYLOAD


class _ReplicaError(RedisError):
    def __str__(self) -> str:
        return (
            "this is a replica, and what is published there reaches only its own subscribers; "
            "use the address of the primary"
        )


async def _is_replica(connection: AbstractConnection) -> bool:
    """Ask, if we may. In a cluster every node hands on what is published, replicas too."""
    await connection.send_command("HELLO", "2")
    try:
        said = await connection.read_response(disable_decoding=True)
    except ResponseError:  # we may not ask, or the server is older than Redis 6
        return False
    fields = dict(zip(said[::2], said[1::2], strict=False))
    return fields.get(b"role") in (b"replica", b"slave") and fields.get(b"mode") != b"cluster"


async def _drop(connection: AbstractConnection) -> None:
    """Close at once. Does not suspend."""
    if connection._writer is not None:
        connection._writer.transport.abort()
    await connection.disconnect(nowait=True)


def _reason(error: BaseException) -> str:
    """Say what happened, without what a server repeats of a command it does not know: AUTH."""
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_TIMEOUT:g} seconds"
    text = str(error) if isinstance(error, RedisError | OSError) else type(error).__name__
    return text.partition(", with args")[0]
