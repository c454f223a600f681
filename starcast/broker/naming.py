"""The name of a hub is part of what its broker sees: the channel `news` is `staff:news` there."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any

from ..backends.base import Backend, Deliver, Lost, SubscriptionRevoked
from ..exceptions import ConfigurationError

DEFAULT_NAME = "default"

# No colon, so the first colon of a name on the broker ends the name of the hub. What every broker
# and every ACL takes as it is; the length leaves room for a channel in a subject of NATS.
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
    """A backend as one hub sees it: with channels that others do not have. See `Backend`."""

    def __init__(self, backend: Backend, name: str) -> None:
        self._backend = backend
        self._prefix = f"{name}:"
        self.max_payload = backend.max_payload
        self.if_silent = getattr(backend, "if_silent", "")
        self.address = getattr(backend, "address", None)

    @property
    def heard_at(self) -> float | None:
        heard_at: float | None = getattr(self._backend, "heard_at", None)
        return heard_at

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        prefix = self._prefix
        length = len(prefix)

        def deliver_ours(channel: str, payload: bytes) -> None:
            if channel.startswith(prefix):
                deliver(channel[length:], payload)

        def lost_ours(error: Exception) -> None:
            if isinstance(error, SubscriptionRevoked):
                error = SubscriptionRevoked(str(error), error.channel.removeprefix(prefix))
            lost(error)

        await self._backend.start(deliver_ours, lost_ours)
        self.max_payload = self._backend.max_payload

    def stop(self) -> Coroutine[Any, Any, None]:
        return self._backend.stop()

    def subscribe(self, channel: str) -> Coroutine[Any, Any, None]:
        return self._backend.subscribe(self._prefix + channel)

    def unsubscribe(self, channel: str) -> Coroutine[Any, Any, None]:
        return self._backend.unsubscribe(self._prefix + channel)

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> Awaitable[None]:
        prefix = self._prefix
        return self._backend.publish([(prefix + channel, data) for channel, data in messages])
