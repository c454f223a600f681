"""Event and Gap: a message on its way to clients, and a place where some may be missing."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import event_stream, frames
from .history import Position

# Bytes that an event counts for in a buffer besides its payload, so that empty messages are bounded
# too. An estimate of the object, the headers of its strings and its slot in a queue.
OVERHEAD = 64


class Unless(NamedTuple):
    """Who does not get an event, wherever it is delivered.

    Attributes:
        user: The connections of this user; None for nobody's.
        channels: Those that are on one of these channels, and get it there.
    """

    user: str | None = None
    channels: tuple[str, ...] = ()


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
        is_json: Whether a `str` is JSON that was written for the publisher, and not a `str` that
            was published; None if that is not known.

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
        info: Who published it, as JSON, if that is a client whose messages say so; otherwise None.
        unless: Who else does not receive it: see `Unless`. They are added to `exclude` where it is
            delivered.
    """

    __slots__ = (
        *("_forms", "_frames", "_is_json", "channel", "cost", "exclude", "info", "kind"),
        *("message", "payload", "position", "unless"),
    )

    def __init__(
        self,
        channel: str,
        message: str | bytes,
        payload: bytes | None = None,
        exclude: frozenset[int] = frozenset(),
        is_json: bool | None = None,
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
        self.info: str | None = None
        self.unless: Unless | None = None
        self._is_json = is_json
        self._frames: dict[frames.WireFormat, bytes] = {}
        self._forms: dict[frames.WireFormat, Event] | None = None

    @property
    def id(self) -> str | None:
        """What names it in the history of its channel: for `since=`. None if there is none."""
        return None if self.position is None else str(self.position)

    def frame(self, wire_format: frames.WireFormat) -> bytes:
        """Return the message's frame in a wire format. It is made on first use, and kept."""
        frame = self._frames.get(wire_format)
        if frame is None:
            if form := wire_format & frames.FORMS:
                return self.in_form(form).frame(wire_format ^ form)
            frame = self._frames[wire_format] = self._make_frame(wire_format)
        return frame

    def _make_frame(self, wire_format: frames.WireFormat) -> bytes:
        if wire_format == frames.EVENT_STREAM:
            return event_stream.make(self.payload, self.id, self.kind == "bytes")
        opcode = frames.TEXT if self.kind == "text" else frames.BINARY
        return frames.make(opcode, self.payload, wire_format)

    def in_form(self, form: frames.WireFormat) -> Event:
        """Return the event whose message is what clients with this form get. It is made once."""
        if not form:
            return self
        if self._forms is None:
            self._forms = {}
        made = self._forms.get(form)
        if made is None:
            made = self._forms[form] = MAKERS[form](self)
        return made

    @property
    def is_json(self) -> bool:
        """Whether the message is JSON and was not published as a `str`.

        A text that another program has given to the broker counts as JSON if it is an object or an
        array.
        """
        if self._is_json is None:
            self._is_json = looks_like_json(self.payload) and is_json(self.message)
        return self._is_json

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


class Ready(Event):
    """A message that is in its client's form already."""

    __slots__ = ()

    def in_form(self, form: frames.WireFormat) -> Event:
        """Return itself."""
        return self


class Command(Event):
    """What every hub is to do with its clients on a channel, as JSON: see `orders`."""

    __slots__ = ()


class Notice(Ready):
    """An object for one client that wants ids: what became of its `since`, say."""

    __slots__ = ()

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__("", json.dumps(content, ensure_ascii=False))


def with_id(event: Event) -> Event:
    """Return what clients get that want ids: an object with the message and its id."""
    content: dict[str, Any] = {"id": event.id, "channel": event.channel}
    if isinstance(event.message, str):
        content["data"] = event.message
    else:
        content |= {
            "data": base64.b64encode(event.message).decode(),
            "encoding": "base64",
        }
    return Event(event.channel, json.dumps(content, ensure_ascii=False))


# What makes the event for a form; a module that knows another form adds it.
MAKERS: dict[frames.WireFormat, Callable[[Event], Event]] = {frames.WITH_ID: with_id}


def part(event: Event, wire_format: frames.WireFormat) -> bytes:
    """Return what `join` takes of an event."""
    form = wire_format & frames.FORMS
    if form in frames.SEPARATORS:
        return event.in_form(form).payload
    return event.frame(wire_format)


def join(parts: Sequence[bytes], wire_format: frames.WireFormat) -> bytes:
    """Return the frames of several events, or one frame of them all in a form that allows that."""
    form = wire_format & frames.FORMS
    separator = frames.SEPARATORS.get(form)
    if separator is None:
        return b"".join(parts)
    opcode = frames.TEXT if form == frames.PROTOCOL_JSON else frames.BINARY
    return frames.make(opcode, separator.join(parts), wire_format ^ form)


def looks_like_json(payload: bytes) -> bool:
    """Whether it begins as a JSON object or array does."""
    return payload[:1] in (b"{", b"[")


def is_json(text: str | bytes) -> bool:
    """Whether it is JSON that every parser reads, as Python's also reads `NaN`."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(name)


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
