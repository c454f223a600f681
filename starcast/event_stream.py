"""Event stream: the wire format of server-sent events (HTML Living Standard, section 9.2).

A stream consists of blocks, each with lines of fields and an empty line at its end.
"""

from __future__ import annotations

import base64

# A comment, which clients skip: it keeps proxies from closing a connection that says nothing.
HEARTBEAT = b": heartbeat\n\n"

# The name of the event that carries bytes, in Base64.
BYTES = b"event: bytes\n"


def fields(name: bytes, value: bytes) -> bytes:
    """Return a field, in as many lines as its value has.

    A line may end with CR LF, LF or CR, and a client puts LF between the values.
    """
    if b"\r" in value:
        value = value.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if b"\n" in value:
        value = value.replace(b"\n", b"\n%b: " % name)
    return b"%b: %b\n" % (name, value)


def position(id: str) -> bytes:
    """Return the line that a client repeats as `Last-Event-ID` when it reconnects."""
    return b"id: %b\n" % id.encode()


def make(payload: bytes, id: str | None, is_binary: bool) -> bytes:
    """Return the block of a message.

    Args:
        payload: The message as bytes.
        id: That of the event; None on a channel without a history.
        is_binary: Whether the message is bytes, for which a stream has no form of its own.
    """
    head = b"" if id is None else position(id)
    if is_binary:
        return b"%b%bdata: %b\n\n" % (head, BYTES, base64.b64encode(payload))
    return b"%b%b\n" % (head, fields(b"data", payload))


def named(name: bytes, payload: bytes) -> bytes:
    """Return the block of an event that a page gets by its name."""
    return b"event: %b\n%b\n" % (name, fields(b"data", payload))


def retry(milliseconds: int) -> bytes:
    """Return the block that says how long a client waits before it reconnects."""
    return b"retry: %d\n\n" % milliseconds
