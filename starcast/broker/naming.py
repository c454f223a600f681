"""The name of a hub is part of what its broker sees: the channel `news` is `staff:news` there."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, cast

from ..backends.base import (
    Backend,
    BrokerConnection,
    Deliver,
    HistoryConnection,
    Kept,
    Lost,
    Stored,
    SubscriptionRevoked,
)
from ..exceptions import ConfigurationError
from ..history import History, Position

DEFAULT_NAME = "default"

# There is no colon in it, so the first colon of a name on the broker ends the name of the hub. All
# brokers and their ACLs accept these characters unchanged, and the length leaves enough of a NATS
# subject for the channel.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_name(name: object) -> str:
    """Return the name of a hub, if it is one.

    Raises:
        ConfigurationError: It is not.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"the name of a hub is 1 to 64 ASCII letters, digits, '-' and '_', not {name!r}"
        )
    return name


class NamedBackend:
    """A backend whose connections only see the channels of one hub. See `Backend`."""

    def __init__(self, backend: Backend, name: str) -> None:
        self._backend = backend
        self._prefix = f"{name}:"
        self.if_silent = getattr(backend, "if_silent", "")
        self.address = getattr(backend, "address", None)

    async def connect(self, deliver: Deliver, lost: Lost) -> NamedConnection:
        prefix = self._prefix
        length = len(prefix)

        def deliver_own(
            channel: str,
            payload: bytes,
            position: Position | None = None,
            previous: int | None = None,
        ) -> None:
            if channel.startswith(prefix):
                deliver(channel[length:], payload, position, previous)

        def lost_own(error: Exception) -> None:
            if isinstance(error, SubscriptionRevoked):
                error = SubscriptionRevoked(str(error), error.channel.removeprefix(prefix))
            lost(error)

        return NamedConnection(await self._backend.connect(deliver_own, lost_own), prefix)


class NamedConnection:
    """A connection of a `NamedBackend`. See `BrokerConnection`."""

    def __init__(self, connection: BrokerConnection, prefix: str) -> None:
        self.max_payload = connection.max_payload
        self._connection = connection
        self._prefix = prefix

    @property
    def heard_at(self) -> float | None:
        heard_at: float | None = getattr(self._connection, "heard_at", None)
        return heard_at

    def subscribe(self, channel: str) -> Coroutine[Any, Any, None]:
        return self._connection.subscribe(self._prefix + channel)

    def unsubscribe(self, channel: str) -> Coroutine[Any, Any, None]:
        return self._connection.unsubscribe(self._prefix + channel)

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> Awaitable[None]:
        prefix = self._prefix
        return self._connection.publish([(prefix + channel, data) for channel, data in messages])

    def publish_kept(self, messages: Sequence[Kept]) -> Awaitable[Sequence[Position]]:
        own = [it._replace(channel=self._prefix + it.channel) for it in messages]
        return cast(HistoryConnection, self._connection).publish_kept(own)

    def read_kept(
        self,
        channel: str,
        history: History,
        since: int | None,
        limit: int,
        reverse: bool,
        known: Position | None = None,
    ) -> Awaitable[Stored]:
        connection = cast(HistoryConnection, self._connection)
        return connection.read_kept(self._prefix + channel, history, since, limit, reverse, known)

    def close(self) -> Coroutine[Any, Any, None]:
        return self._connection.close()
