"""Event and Gap: a message on its way to clients, and a place where some may be missing."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

from . import event_stream, frames
from .history import Position

# Bytes that an event counts for in a buffer besides its payload, so that empty messages are bounded
# too. An estimate of the object, the headers of its strings and its slot in a queue.
OVERHEAD = 64


class Event:
    """A message and the channel it was published to.

    A `Subscriber` yields events. Do not modify them: all subscribers share the same object. In a
    test, create one with `Event(channel, message)`. Two events are equal if their channels and
    their messages are equal; a `str` never equals bytes.

    Args:
        channel: The name of the channel.
        message: The content, a `str` or bytes.
        payload: The content as bytes. Default: `message`, in UTF-8 if it is a `str`.
        exclude: The ids of the connections that do not receive it. Default: none.

    Raises:
        TypeError: The message is neither a `str` nor bytes.

    Attributes:
        channel: The name of the channel; empty for a message to one client.
        message: What was published: `str` for a text frame, `bytes` for a binary frame.
        payload: The same as bytes, as they are sent.
        exclude: The ids of the connections that do not receive it.
        cost: What it counts for in a buffer, in bytes.
        kind: The type of its frame: `"text"` or `"bytes"`.
        position: Its place in the history of its channel; None if the channel has none.
    """

    __slots__ = (
        *("_frames", "_with_id", "channel", "cost", "exclude", "kind", "message", "payload"),
        "position",
    )

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
        self.position: Position | None = None
        self._frames: dict[frames.WireFormat, bytes] = {}
        self._with_id: Event | None = None

    @property
    def id(self) -> str | None:
        """What names it in the history of its channel: for `since=`. None if there is none."""
        return None if self.position is None else str(self.position)

    def frame(self, wire_format: frames.WireFormat) -> bytes:
        """Return the message's frame in a wire format. It is made on first use, and kept."""
        frame = self._frames.get(wire_format)
        if frame is None:
            if wire_format & frames.WITH_ID:
                return self.with_id.frame(wire_format ^ frames.WITH_ID)
            frame = self._frames[wire_format] = self._make_frame(wire_format)
        return frame

    def _make_frame(self, wire_format: frames.WireFormat) -> bytes:
        if wire_format == frames.EVENT_STREAM:
            return event_stream.make(self.payload, self.id, self.kind == "bytes")
        opcode = frames.TEXT if self.kind == "text" else frames.BINARY
        return frames.make(opcode, self.payload, wire_format)

    @property
    def with_id(self) -> Event:
        """What clients get that want ids: an object with the message and its id, made once."""
        if self._with_id is None:
            content: dict[str, Any] = {"id": self.id, "channel": self.channel}
            if isinstance(self.message, str):
                content["data"] = self.message
            else:
                content |= {
                    "data": base64.b64encode(self.message).decode(),
                    "encoding": "base64",
                }
            self._with_id = Event(self.channel, json.dumps(content, ensure_ascii=False))
        return self._with_id

    def json(self) -> Any:
        """Return the message parsed as JSON.

        Raises:
            ValueError: The message is not JSON, or is nested too deeply.
        """
        try:
            return json.loads(self.message)
        except RecursionError:
            raise ValueError("the message is nested too deeply") from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        # Compare the kinds first: comparing a str with bytes raises under `python -bb`.
        return (self.channel, self.kind) == (other.channel, other.kind) and (
            self.message == other.message
        )

    def __hash__(self) -> int:
        return hash((self.channel, self.message))

    def __repr__(self) -> str:
        return f"Event(channel={self.channel!r}, message={self.message!r})"


class Notice(Event):
    """An object for one client that wants ids: what became of its `since`, say."""

    __slots__ = ()

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__("", json.dumps(content, ensure_ascii=False))

    @property
    def with_id(self) -> Event:
        """Itself, but not as a reference to itself: that would be a cycle."""
        return self


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """Messages before this point may be missing.

    The broker was away or did not answer; or it refused a channel for a time; or an event loop of
    this process was blocked for so long that more arrived than can wait for it: 16 MiB. Then those
    are told who are on that loop and on a channel of which messages are missing.

    Attributes:
        since: When the broker was last known to be there, in seconds since 1970: nothing is missing
            of what was published before.
        seconds: The time from then until all channels were subscribed again, or until the loop went
            on. Messages of this time may be missing. The outage itself may have been up to three
            seconds shorter, because the broker is asked that often; or by more, where its answer
            came late.
        error: What went wrong.
        channel: The only channel that it is about: the broker refused it for a time. None if it is
            about all of them.
    """

    since: float
    seconds: float
    error: str
    channel: str | None = None
