"""Incoming: finds whole frames in what a client has sent, so that most are parsed in place."""

from __future__ import annotations

from typing import Any

try:
    from websockets.speedups import apply_mask as unmask
except ImportError:  # pragma: no cover  # there is no wheel for this platform
    from websockets.utils import apply_mask as unmask

__all__ = ["COMPRESSED", "MESSAGES", "TEXT", "find_frame", "missing", "size_of_message", "unmask"]

# The first byte of a frame that is a whole message and not compressed.
TEXT = 0x81
BINARY = 0x82
MESSAGES = (TEXT, BINARY)

# The bit of the first byte that says that it is compressed (RFC 7692 section 6).
COMPRESSED = 0x40

_OPCODES = frozenset((0, 1, 2, 8, 9, 10))


def begin_of_whole(data: bytes) -> int:
    """Return where the content begins, if the data is one whole message in one frame.

    Returns:
        0 if it is something else, or a message of 64 KiB or more.
    """
    size = len(data)
    if size < 132:
        is_whole = size >= 6 and data[1] == 0x80 | size - 6 and data[0] & ~COMPRESSED in MESSAGES
        return 6 if is_whole else 0
    is_whole = data[1] == 0xFE and data[2] << 8 | data[3] == size - 8
    return 8 if is_whole and data[0] & ~COMPRESSED in MESSAGES else 0


def find_frame(
    data: bytes | bytearray, start: int, max_size: int | None
) -> tuple[int, int, int] | None:
    """Find the frame that begins at `start`, if all of it is there.

    Returns:
        Its first byte, where its content begins and where it ends; None if some of it is still to
        come. The four bytes before the content are its mask. If it breaks the protocol, it ends
        where the data does: the rest does not matter.
    """
    size = len(data)
    if size - start < 2:
        return None
    first, length = data[start], data[start + 1]
    begin = start + 6
    if length < 0x80:  # not masked
        return 0, begin, size
    if length == 0xFE:
        if size - start < 4:
            return None
        length, begin = int.from_bytes(data[start + 2 : start + 4], "big"), start + 8
    elif length == 0xFF:
        if size - start < 10:
            return None
        length, begin = int.from_bytes(data[start + 2 : start + 10], "big"), start + 14
    else:
        length &= 0x7F
    if first & 15 not in _OPCODES or (max_size is not None and length > max_size):
        return 0, begin, size
    end = begin + length
    return (first, begin, end) if end <= size else None


def has_parsed(parser: Any) -> bool:
    """Return whether the parser of websockets, which is between two frames, has parsed any."""
    while parser.gi_yieldfrom is not None and parser.gi_yieldfrom.gi_code.co_name != "at_eof":
        parser = parser.gi_yieldfrom
    return "frame" in parser.gi_frame.f_locals


def missing(parser: Any) -> int | None:
    """Return how many bytes the parser of websockets waits for.

    Args:
        parser: The generator that parses, or a generator that it waits for, and so on.

    Returns:
        0 if it is between two frames; None if it is not known.
    """
    while parser.gi_yieldfrom is not None:
        parser = parser.gi_yieldfrom
    if parser.gi_code.co_name == "at_eof":
        return 0
    if parser.gi_code.co_name == "read_exact":
        variables = parser.gi_frame.f_locals
        wanted: int = variables["n"] - len(variables["self"].buffer)
        return wanted
    return None


def size_of_message(conn: Any) -> int:
    """Return the bytes of the message in fragments that the parser of websockets has so far."""
    # The second name is that of websockets 15.
    size: int | None = getattr(conn, "current_size", None) or getattr(conn, "cur_size", None)
    return size or 0
