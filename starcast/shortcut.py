"""Shortcut: publishes what a client sends where it is read, if nothing has to wait for that.

On the fast path a message does not need the task of its sender, and in memory, if it is for a few
members, not even another iteration of the event loop. Without both it takes half as long. Whatever
is not as simple is left to the task.

It must not be noticed. So `get_channel` is called once for each message, whoever publishes it, and
sees the task and the context variables of its client. A hook or a `receive` that somebody puts in
between, at any time, sees every message.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from asyncio import _enter_task, _leave_task
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.types import Message
from starlette.websockets import WebSocket

from . import codec
from .codec import Channel, Encoding
from .event import Event
from .exceptions import InvalidChannel
from .heartbeats import Heartbeats
from .relay import Relay

# The type of a message that an encoding allows.
_TYPES: dict[Encoding | None, type] = {"text": str, "json": str, "bytes": bytes, None: object}


class Source(Protocol):
    """What serves a client. All of this is looked up for each message."""

    encoding: Encoding | None

    @property
    def on_receive(self) -> Any:
        """What a message passes on its way to the relay, or None."""

    @property
    def decode(self) -> Any:
        """What it passes before that, or None."""

    def get_channel(self, websocket: WebSocket) -> Channel:
        """Return the channel of what the client sends."""


class Shortcut:
    """See the module. Made in the client's task.

    Args:
        relay: That of the client, which publishes everything else.
        source: What serves the client.
        is_plain: Returns whether the source publishes a message as it comes; None if it always
            does.
    """

    __slots__ = (
        *("_asked", "_bound", "_connection", "_decode", "_heartbeats", "_is_plain", "_on_receive"),
        *("_receive", "_relay", "_run", "_source", "_task", "_websocket"),
    )

    def __init__(
        self, relay: Relay, source: Source, is_plain: Callable[[], bool] | None = None
    ) -> None:
        self._relay = relay
        self._websocket = relay.websocket
        self._source = source
        self._is_plain = is_plain
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        # What `get_channel` returned or raised for the message that is left to the task.
        self._asked: tuple[Any, BaseException | None] | None = None

    def set_bounds(self, max_message: int | None, heartbeats: Heartbeats | None) -> None:
        """Leave longer messages, in bytes, and heartbeats to the task."""
        self._bound = max_message or sys.maxsize
        self._heartbeats = heartbeats or ()

    def receive(self) -> Awaitable[Message]:
        """Receive the next message that is left to the task. Call it there."""
        websocket, source = self._websocket, self._source
        self._asked = None
        connection = self._relay.hub.find(websocket)
        receiving = None
        if connection is not None and (self._is_plain is None or self._is_plain()):
            # A message is only taken while all of this is as it is now.
            self._connection, self._receive = connection, websocket.receive
            self._on_receive, self._decode = source.on_receive, source.decode
            self._run = contextvars.copy_context().run
            receiving = connection.receive(self._take)
        return websocket.receive() if receiving is None else receiving

    def channel(self, websocket: WebSocket) -> Channel:
        """Return the channel of the message that was received, or raise what `get_channel` did."""
        if self._asked is None:
            return self._source.get_channel(websocket)
        (channel, error), self._asked = self._asked, None
        if error is not None:
            raise error
        return channel  # type: ignore[no-any-return]  # whatever it is: it is still to be checked

    def _take(self, content: str | bytes, payload: bytes) -> bool:
        """Publish a message, or return False."""
        source, websocket = self._source, self._websocket
        data: Any = content
        try:
            if (
                len(payload) > self._bound
                or content in self._heartbeats
                or not self._connection.channels  # it has left or is closed
                or websocket.receive is not self._receive
                or source.on_receive != self._on_receive
                or source.decode != self._decode
                or not isinstance(content, _TYPES[source.encoding])
            ):
                return False
            if source.encoding == "json":
                data = codec.decode({"text": content}, "json")
                content, payload = codec.encode(data, "json", self._relay.hub.settings.dumps)
        except Exception:
            return False  # the same error occurs in the task
        channel, error, loop, task = None, None, self._relay.shard.loop, self._task
        _enter_task(loop, task)
        try:
            channel = self._run(source.get_channel, websocket)
        except BaseException as exc:
            error = exc
        _leave_task(loop, task)
        if error is None and self._publish(channel, content, payload, data):
            return True
        self._asked = channel, error
        return False

    def _publish(self, channel: Any, content: str | bytes, payload: bytes, data: Any) -> bool:
        try:
            event = Event(codec.check_channel(channel), content, payload)
        except InvalidChannel:
            return False
        relay = self._relay
        return relay.hub.dispatcher.write_now(
            event, relay.shard, relay.max_unchecked
        ) or relay.publish_now(event, data)
