"""Envelope: an event as the bytes that a broker carries, and back.

Plain text travels as it is, so other programs can read it and write it. Anything else has a header:

    byte 0      255, which no text in UTF-8 can begin with (RFC 3629 section 1)
    byte 1      the version of the header, 1
    byte 2      flags: 1 for a binary message, 2 for a list of excluded connections, 4 for JSON, 8
                for who has published it
    with flag 2: the hub whose connections they are (8 bytes), their number (4), their ids (8 each)
    with flag 8: the length of what says that (4 bytes), and what says it, in UTF-8
    the rest    the message

JSON that is an object or an array travels as it is too, so a `str` that can be read as one has a
header, without flag 4.

All numbers are unsigned, the most significant byte first.
"""

from __future__ import annotations

import struct

from ..event import Event, is_json, looks_like_json

_MARK = b"\xff\x01"
_BINARY = 1
_EXCLUDE = 2
_JSON = 4
_INFO = 8
_LIST = struct.Struct("!8sI")
_LENGTH = struct.Struct("!I")


class Malformed(ValueError):
    """Bytes on a broker's channel that are neither text nor an envelope."""


def pack(event: Event, hub: bytes) -> bytes:
    """Return what a broker carries; `hub` are the eight bytes that name the publishing hub."""
    binary = isinstance(event.message, bytes)
    if not (binary or event.exclude or event.info or _is_mistakable(event)):
        return event.payload
    info = (event.info or "").encode()
    flags = _BINARY * binary | _EXCLUDE * bool(event.exclude) | _INFO * bool(info)
    if not binary and event.is_json:
        flags |= _JSON
    head = _MARK + bytes((flags,))
    if event.exclude:
        ids = event.exclude
        head += _LIST.pack(hub, len(ids)) + struct.pack(f"!{len(ids)}Q", *ids)
    if info:
        head += _LENGTH.pack(len(info)) + info
    return head + event.payload


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
        if not data.startswith(_MARK) or flags > _BINARY | _EXCLUDE | _JSON | _INFO:
            raise Malformed("unknown version")
        start, exclude, info = 3, frozenset[int](), None
        if flags & _EXCLUDE:
            origin, count = _LIST.unpack_from(data, start)
            start += _LIST.size
            if count * 8 > len(data) - start:
                raise Malformed("cut off")
            if origin == hub:
                exclude = frozenset(struct.unpack_from(f"!{count}Q", data, start))
            start += 8 * count
        if flags & _INFO:
            (length,) = _LENGTH.unpack_from(data, start)
            start += _LENGTH.size
            if length > len(data) - start:
                raise Malformed("cut off")
            info = data[start : start + length].decode()
            start += length
        payload = data[start:]
        message = payload if flags & _BINARY else payload.decode()
    except (IndexError, struct.error, UnicodeDecodeError) as exc:
        raise Malformed(str(exc)) from None
    event = Event(channel, message, payload, exclude, bool(flags & _JSON))
    event.info = info
    return event
