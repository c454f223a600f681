"""Envelope: an event as the bytes that a broker carries, and back.

Plain text travels as it is, so other programs can read it and write it. Anything else has a header:

    byte 0      255, which no text in UTF-8 can begin with (RFC 3629 section 1)
    byte 1      the version of the header, 1
    byte 2      flags: 1 for a binary message, 2 for a list of excluded connections
    with flag 2: the hub whose connections they are (8 bytes), their number (4), their ids (8 each)
    the rest    the message

All numbers are unsigned, the most significant byte first.
"""

from __future__ import annotations

import struct

from ..event import Event

_MARK = b"\xff\x01"
_BINARY = 1
_EXCLUDE = 2
_LIST = struct.Struct("!8sI")


class Malformed(ValueError):
    """Bytes on a broker's channel that are neither text nor an envelope."""


def pack(event: Event, hub: bytes) -> bytes:
    """Return what a broker carries; `hub` are the eight bytes that name the publishing hub."""
    binary = isinstance(event.message, bytes)
    if not (binary or event.exclude):
        return event.payload
    flags = _BINARY * binary | _EXCLUDE * bool(event.exclude)
    head = _MARK + bytes((flags,))
    if event.exclude:
        ids = event.exclude
        head += _LIST.pack(hub, len(ids)) + struct.pack(f"!{len(ids)}Q", *ids)
    return head + event.payload


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
        if not data.startswith(_MARK) or flags > _BINARY | _EXCLUDE:
            raise Malformed("unknown version")
        start, exclude = 3, frozenset[int]()
        if flags & _EXCLUDE:
            origin, count = _LIST.unpack_from(data, start)
            start += _LIST.size
            if count * 8 > len(data) - start:
                raise Malformed("cut off")
            if origin == hub:
                exclude = frozenset(struct.unpack_from(f"!{count}Q", data, start))
            start += 8 * count
        payload = data[start:]
        message = payload if flags & _BINARY else payload.decode()
    except (IndexError, struct.error, UnicodeDecodeError) as exc:
        raise Malformed(str(exc)) from None
    return Event(channel, message, payload, exclude)
