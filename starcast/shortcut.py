"""Shortcut: publishes what a client sends where it is read, if nothing has to wait for that.

On the fast path, in memory and for a few members, a message needs neither the task of its sender
nor another iteration of the event loop. Without both it takes half as long. Whatever is not as
simple is left to the task.

It must not be noticed. What is called here is called once for each message, in the context of the
client's task, as its current task, and only if it is that task's turn to receive. A hook or a
`receive` that somebody puts in between, at any time, gets every message. The one thing that differs
is `get_channel` if it does more than to name the channel: what it starts may come before a message
that has to wait, because that is still on its way to the task.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.types import Message
from starlette.websockets import WebSocket

from . import codec
from .codec import Channel, Encoding
from .event import Event
from .heartbeats import Heartbeats
from .relay import Relay

# The type of a message that an encoding allows.
_TYPES: dict[Encoding | None, type] = {"text": str, "json": str, "bytes": bytes, None: object}


class Source(Protocol):
    """What serves a client. Both are looked up for each message."""

    encoding: Encoding | None

    def get_channel(self, websocket: WebSocket) -> Channel:
        """Return the channel of what the client sends."""


class Shortcut:
    """See the module.

    Args:
        relay: That of the client, which publishes everything else.
        source: What serves the client.
        is_plain: Returns whether a message is now published as it comes.
    """

    __slots__ = (
        *("_asked", "_bound", "_connection", "_heartbeats", "_is_plain", "_receive", "_relay"),
        *("_source", "_websocket"),
    )

    def __init__(self, relay: Relay, source: Source, is_plain: Callable[[], bool]) -> None:
        self._relay = relay
        self._websocket = relay.websocket
        self._source = source
        self._is_plain = is_plain
        # What `get_channel` returned, or what was raised, for the message that the task gets next.
        self._asked: tuple[Any, BaseException | None] | None = None

    def set_bounds(self, max_message: int | None, heartbeats: Heartbeats | None) -> None:
        """Leave longer messages, in bytes, and heartbeats to the task."""
        self._bound = max_message or sys.maxsize
        self._heartbeats = () if heartbeats is None else heartbeats

    def receive(self) -> Awaitable[Message]:
        """Receive the next message that is left to the task, which calls this."""
        relay, websocket = self._relay, self._websocket
        self._asked = None
        connection = relay.hub.find(websocket)
        receiving = None
        if (
            connection is not None
            and relay.hub.link.is_local
            and relay.hub.settings.dumps is codec.dumps  # another may tell when it is called
            and self._is_plain()
        ):
            self._connection, self._receive = connection, websocket.receive
            receiving = connection.receive(self._take)
        return websocket.receive() if receiving is None else receiving

    def channel(self, websocket: WebSocket) -> Channel:
        """Return the channel of the message that was received, or raise what was raised for it."""
        if self._asked is None:
            return self._source.get_channel(websocket)
        channel, error = self._asked
        if error is not None:
            raise error
        return channel  # type: ignore[no-any-return]  # whatever it is: it is still to be checked

    def _take(self, content: str | bytes, payload: bytes) -> bool:
        """Publish a message, or return False. What it raises is raised in the task."""
        source, relay = self._source, self._relay
        data: Any = content
        try:
            encoding = source.encoding
            if (
                len(payload) > self._bound
                or content in self._heartbeats
                or not isinstance(content, _TYPES[encoding])
                or not self._connection.channels  # it has left or is closed
                or self._websocket.receive is not self._receive
                or not self._is_plain()
            ):
                return False
            if encoding == "json":
                data = codec.decode({"text": content}, "json")
        except Exception:
            return False  # nobody has seen anything, so the task can try again
        channel = error = None
        try:
            channel = source.get_channel(self._websocket)
            if encoding == "json" or source.encoding != encoding:
                event = relay.event(channel, data, source.encoding)
            else:
                event = Event(codec.check_channel(channel), content, payload)
            if relay.hub.dispatcher.write_now(event, relay.shard, relay.max_unchecked):
                return True
        except BaseException as exc:
            error = exc
        self._asked = channel, error
        return False
