"""Shortcut: publishes what a client sends where it is read, if nothing has to wait for that.

On the fast path a message does not need the task of its sender, and in memory, if it is for a few
members, not even another iteration of the event loop. Without both it takes half as long. Whatever
is not as simple is left to the task. That includes errors, which occur there once more.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

from starlette.websockets import WebSocket

from . import codec
from .codec import Channel, Encoding
from .event import Event
from .heartbeats import Heartbeats
from .relay import Relay


class Shortcut:
    """See the module. Made on the client's event loop.

    Args:
        relay: That of the client, which publishes everything else.
        get_channel: Returns the client's channel. It is called in the context that the client's
            task has now.
        encoding: How the client's messages are decoded and encoded.
    """

    __slots__ = (
        *("_bound", "_connection", "_dumps", "_get_channel", "_heartbeats", "_kind"),
        *("_max_unchecked", "_relay", "_run", "_shard", "_websocket", "_write_now"),
    )

    def __init__(
        self,
        relay: Relay,
        get_channel: Callable[[WebSocket], Channel],
        encoding: Encoding | None,
    ) -> None:
        hub = relay.hub
        self._relay = relay
        self._websocket = relay.websocket
        self._shard = relay.shard
        self._max_unchecked = relay.max_unchecked
        self._write_now = hub.dispatcher.write_now
        self._get_channel = get_channel
        self._kind: type = bytes if encoding == "bytes" else object if encoding is None else str
        self._dumps = hub.settings.dumps if encoding == "json" else None

    def open(self, bound: int, heartbeats: Heartbeats) -> None:
        """Take the client's messages from now on, whenever its handler waits for one.

        Args:
            bound: Longer messages are left to the handler, in bytes.
            heartbeats: So are these.
        """
        hub = self._relay.hub
        connection = hub.find(self._websocket)
        if connection is not None:
            self._bound = bound
            self._heartbeats = heartbeats
            self._run = contextvars.copy_context().run
            self._connection = connection
            connection.hand_to(self.take)

    def take(self, content: str | bytes, payload: bytes) -> bool:
        """Publish a message, or return False.

        Args:
            content: The message.
            payload: The same as bytes.
        """
        if (
            len(payload) > self._bound
            or not isinstance(content, self._kind)
            or (self._heartbeats and content in self._heartbeats)
            or not self._connection.channels  # it has left or is closed
        ):
            return False
        try:
            channel = self._run(self._get_channel, self._websocket)
            data: Any = content
            if self._dumps is not None:
                data = codec.decode({"text": content}, "json")
                content, payload = codec.encode(data, "json", self._dumps)
            event = Event(codec.check_channel(channel), content, payload)
        except Exception:
            return False
        if self._write_now(event, self._shard, self._max_unchecked):
            return True
        return self._relay.publish_now(event, data)
