"""Envelope: an event as the bytes that a broker carries, and back.

Plain text travels as it is, so other programs can read it and write it. Anything else has a header:

    byte 0      255, which no text in UTF-8 can begin with (RFC 3629 section 1)
    byte 1      the version of the header, 1
    byte 2      flags: 1 for a binary message, 2 for a list of excluded connections, 4 for JSON, 8
                for who has published it, 16 for who else is excluded, 32 for a command to hubs
    with flag 2: the hub whose connections they are (8 bytes), their number (4), their ids (8 each)
    with flag 8: the length of what says that (4 bytes), and what says it, in UTF-8
    with flag 16: the same for a JSON array of the user, or null, and of the names of channels
    the rest    the message

JSON that is an object or an array travels as it is too, so a `str` that can be read as one has a
header, without flag 4.

All numbers are unsigned, the most significant byte first.
"""

from __future__ import annotations

import json
import struct

from ..event import Command, Event, Unless, is_json, looks_like_json

_MARK = b"\xff\x01"
_BINARY = 1
_EXCLUDE = 2
_JSON = 4
_INFO = 8
_UNLESS = 16
_COMMAND = 32
_KNOWN = 63
_LIST = struct.Struct("!8sI")
_LENGTH = struct.Struct("!I")


class Malformed(ValueError):
    """Bytes on a broker's channel that are neither text nor an envelope."""


def pack(event: Event, hub: bytes) -> bytes:
    """Return what a broker carries; `hub` are the eight bytes that name the publishing hub."""
    binary = isinstance(event.message, bytes)
    unless, is_command = event.unless, isinstance(event, Command)
    if not (binary or event.exclude or event.info or unless or is_command) and (
        not _is_mistakable(event)
    ):
        return event.payload
    flags = _BINARY * binary | _EXCLUDE * bool(event.exclude) | _INFO * (event.info is not None)
    flags |= _UNLESS * (unless is not None) | _COMMAND * is_command
    if not binary and event.is_json:
        flags |= _JSON
    head = _MARK + bytes((flags,))
    if event.exclude:
        ids = event.exclude
        head += _LIST.pack(hub, len(ids)) + struct.pack(f"!{len(ids)}Q", *ids)
    if event.info is not None:
        head += _with_length(event.info)
    if unless is not None:
        head += _with_length(json.dumps(unless))
    return head + event.payload


def _with_length(text: str) -> bytes:
    data = text.encode()
    return _LENGTH.pack(len(data)) + data


def _is_mistakable(event: Event) -> bool:
    """Whether a text would not be taken for what it is."""
    if looks_like_json(event.payload):
        return not event.is_json and is_json(event.payload)
    return event.is_json


def unpack(channel: str, data: bytes, hub: bytes) -> Event:
    """Return the event. Connections are excluded only if `hub` published it.

    Raises:
        Malformed: It is neither text nor an envelope of a version that is known.
    """
    if not data.startswith(b"\xff"):
        try:
            return Event(channel, data.decode(), data)
        except UnicodeDecodeError as exc:
            raise Malformed(str(exc)) from None
    try:
        flags = data[2]
        if not data.startswith(_MARK) or flags > _KNOWN:
            raise Malformed("unknown version")
        start, exclude, info, unless = 3, frozenset[int](), None, None
        if flags & _EXCLUDE:
            origin, count = _LIST.unpack_from(data, start)
            start += _LIST.size
            if count * 8 > len(data) - start:
                raise Malformed("cut off")
            if origin == hub:
                exclude = frozenset(struct.unpack_from(f"!{count}Q", data, start))
            start += 8 * count
        if flags & _INFO:
            info, start = _read(data, start)
        if flags & _UNLESS:
            text, start = _read(data, start)
            unless = _read_unless(text)
        payload = data[start:]
        message = payload if flags & _BINARY else payload.decode()
    except (IndexError, struct.error, UnicodeDecodeError) as exc:
        raise Malformed(str(exc)) from None
    kind = Command if flags & _COMMAND else Event
    event = kind(channel, message, payload, exclude, bool(flags & _JSON) and is_json(payload))
    event.info, event.unless = info, unless
    return event


def _read(data: bytes, start: int) -> tuple[str, int]:
    """Return a text that has its length before it, and where it ends."""
    (length,) = _LENGTH.unpack_from(data, start)
    start += _LENGTH.size
    if length > len(data) - start:
        raise Malformed("cut off")
    return data[start : start + length].decode(), start + length


def _read_unless(text: str) -> Unless:
    try:
        user, channels = json.loads(text)
        if not isinstance(user, str | None) or not all(isinstance(name, str) for name in channels):
            raise Malformed("wrong types")
        return Unless(user, tuple(channels))
    except (ValueError, TypeError, RecursionError) as exc:
        raise Malformed(str(exc)) from None
