"""Patterns: the channels of a hub whose names match, for the command line.

The command subscribes to all channels of the hub at once, under the name `ALL`, and drops messages
of channels that do not match: the wildcards of NATS match whole tokens only. Reconnecting and gaps
work as for any other channel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from ..backends import Backend
from ..backends.base import Deliver, Lost
from ..broker import envelope
from ..broker.probe import PROBE_CHANNEL
from ..event import Event, Gap
from ..exceptions import ConfigurationError

ALL = "*"


class AllChannels:
    """A backend, and its connection, whose channel `ALL` carries all messages of a hub.

    Each of these is a binary message that contains the name of its channel: see `reader`.
    Attributes that are not defined here are those of the wrapped backend.

    Args:
        backend: The backend to wrap.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._connection: Any = None
        self._names: set[str] = set()  # the channels subscribed to by name
        self._all = ""  # the full name of `ALL`, once it is subscribed to

    async def connect(self, deliver: Deliver, lost: Lost) -> AllChannels:
        """Connect.

        Raises:
            ConfigurationError: The broker has no patterns: the connection has no `subscribe_all`.
        """
        self._names.clear()
        self._all = ""

        def deliver_named(channel: str, payload: bytes, *position: object) -> None:
            if channel in self._names:
                deliver(channel, payload)
            else:
                deliver(self._all, _wrap(channel.partition(":")[2], payload))

        self._connection = await self._backend.connect(deliver_named, lost)
        if not hasattr(self._connection, "subscribe_all"):
            await self._connection.close()
            raise ConfigurationError(
                "a * stands for any characters, and this broker has no patterns: name the channels"
            )
        return self

    async def subscribe(self, channel: str) -> None:
        hub, _, name = channel.partition(":")
        if name == ALL:
            self._all = channel
            await self._connection.subscribe_all(hub)
        else:
            self._names.add(channel)
            await self._connection.subscribe(channel)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection or self._backend, name)


def _wrap(channel: str, payload: bytes) -> bytes:
    content = json.dumps(channel).encode() + b"\n" + payload  # JSON has no line break of its own
    return envelope.pack(Event(ALL, content, content), b"")


def reader(channels: Sequence[str]) -> Callable[[Event | Gap], list[tuple[str, Event | Gap]]]:
    """Return a function that turns an item of `ALL` into pairs of a channel and its item.

    Args:
        channels: The names that are wanted; a `*` stands for any characters.
    """
    wanted = re.compile(
        "|".join(".*".join(map(re.escape, channel.split("*"))) for channel in channels), re.DOTALL
    )

    def read(item: Event | Gap) -> list[tuple[str, Event | Gap]]:
        if isinstance(item, Gap):
            return [(channel, item) for channel in channels]
        event = _unwrap(item)
        if event is None or not wanted.fullmatch(event.channel):
            return []
        return [(event.channel, event)]

    return read


def _unwrap(event: Event) -> Event | None:
    """Return the event in one of `ALL`; None if it is a hub's probe or cannot be read."""
    assert isinstance(event.message, bytes)
    name, _, payload = event.message.partition(b"\n")
    channel = json.loads(name)
    if channel.startswith(PROBE_CHANNEL):
        return None
    try:
        return envelope.unpack(channel, payload, b"")
    except envelope.Malformed:
        return None
