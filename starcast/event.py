"""Event: one message on its way to the clients of a channel."""

from __future__ import annotations

import json
from typing import Any

from . import frames

# What an event weighs in a buffer besides its own bytes, so that a flood of empty messages has a
# bound too. An estimate of the object, its strings' headers and its place in a queue.
OVERHEAD = 64


class Event:
    """A message and the channel it was published to.

    You get events from a `Subscriber`; do not change them, everybody shares the same object. For a
    test, make one as `Event(channel, message)`. Events are equal if their channel and their message
    are, and `str` never equals bytes.

    Attributes:
        channel: The name of the channel; empty for a message to one client.
        message: What was published: `str` for a text frame, `bytes` for a binary frame.
        payload: The same as bytes, as they go over the wire.
        exclude: The ids of the connections that do not get it.
        cost: What it counts for in a buffer, in bytes.
        kind: The kind of its frame: `"text"` or `"bytes"`.
    """

    __slots__ = ("_frames", "channel", "cost", "exclude", "kind", "message", "payload")

    def __init__(
        self,
        channel: str,
        message: str | bytes,
        payload: bytes | None = None,
        exclude: frozenset[int] = frozenset(),
    ) -> None:
        if payload is None:
            if not isinstance(message, (str, bytes)):
                raise TypeError(f"an Event has a str or bytes, not {type(message).__name__}")
            payload = message.encode() if isinstance(message, str) else message
        self.channel = channel
        self.message = message
        self.payload = payload
        self.exclude = exclude
        self.cost = len(payload) + OVERHEAD
        self.kind = "text" if isinstance(message, str) else "bytes"
        self._frames: dict[frames.Setting, bytes] = {}

    def frame(self, setting: frames.Setting) -> bytes:
        """Return the message's frame for a wire setting: made once, if anybody needs it."""
        frame = self._frames.get(setting)
        if frame is None:
            opcode = frames.TEXT if self.kind == "text" else frames.BINARY
            frame = self._frames[setting] = frames.make(opcode, self.payload, setting)
        return frame

    def json(self) -> Any:
        """Return the message parsed as JSON.

        Raises:
            ValueError: The message is not JSON, or nested too deeply to be read.
        """
        try:
            return json.loads(self.message)
        except RecursionError:
            raise ValueError("the message is nested too deeply") from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        # The kind first: to compare a str with bytes is an error under `python -bb`.
        return (self.channel, self.kind) == (other.channel, other.kind) and (
            self.message == other.message
        )

    def __hash__(self) -> int:
        return hash((self.channel, self.message))

    def __repr__(self) -> str:
        return f"Event(channel={self.channel!r}, message={self.message!r})"
