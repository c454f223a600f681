"""How channels and messages travel as notifications of PostgreSQL. `PostgresBackend` describes it.

A notification has a name of up to 63 bytes and a text of up to 7,999. Messages that do not fit are
split into pieces. ASCII is all that a piece consists of, so it fits every database's encoding.
"""

from __future__ import annotations

import binascii
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

from ..history import Position, parse_id
from .base import Kept

# PostgreSQL's NAMEDATALEN and NOTIFY_PAYLOAD_MAX_LENGTH in bytes, without the NUL at the end.
MAX_NAME = 63
MAX_NOTIFY = 7999

# A name that begins with this is a hash. Names that really begin with it are hashed too.
HASHED = "sha256:"

# A piece begins with a mark, a number that is different for each message of a transaction, the
# number of the piece and the number of pieces. A message that is kept has its id in place of the
# first number, and if it is text that fits, it is not in pieces, and the text follows.
MARK = "\x10"  # data link escape
_HEAD = re.compile(
    MARK + r"(?:([A-Za-z0-9]{1,32}-[0-9]{1,18})|[0-9]{1,9}(?=\.))(?:\.([0-9]{1,4})/([0-9]{1,4}))?:"
)
MAX_HEAD = len(f"{MARK}{'e' * 12}-{10**18 - 1}:")  # of a text
PIECE_SIZE = 5952  # in bytes; they become 7,936 characters of base64
MAX_PAYLOAD = 16 * 1024 * 1024
MAX_PIECES = -(-MAX_PAYLOAD // PIECE_SIZE)

# The size of the messages in one transaction, in bytes, unless a single message is larger.
MAX_BATCH = 1024 * 1024

Rows = dict[tuple[str, str], None]  # names and texts, in order, all of them different


def encode_name(name: str, is_utf8: bool) -> str:
    """Return the name of a notification for the name of a channel, or its hash.

    Args:
        name: The channel, with the prefix.
        is_utf8: Whether the encoding of the database is UTF-8.
    """
    encoded = name.encode()
    fits = len(encoded) <= MAX_NAME and (is_utf8 or encoded.isascii())
    if fits and not name.startswith(HASHED):
        return name
    return HASHED + hashlib.sha256(encoded).hexdigest()[: MAX_NAME - len(HASHED)]


def transactions(
    messages: Iterable[tuple[str, bytes]], is_utf8: bool
) -> Iterator[tuple[int, Rows]]:
    """Yield the notifications of each transaction, and the position of its first message.

    Args:
        messages: Encoded names and payloads.
        is_utf8: Whether the encoding of the database is UTF-8.
    """
    first = size = 0
    rows: Rows = {}
    for number, (name, payload) in enumerate(messages):
        size += len(payload)
        if rows and size > MAX_BATCH:
            yield first, rows
            first, rows, size = number, {}, len(payload)
        text = None if payload.startswith(MARK.encode()) else _as_text(payload, is_utf8, MAX_NOTIFY)
        if text is None or (name, text) in rows:  # PostgreSQL would drop the second one
            pieces = (f"{MARK}{number}{piece}" for piece in _split(payload))
            rows |= dict.fromkeys((name, piece) for piece in pieces)
        else:
            rows[name, text] = None
    if rows:
        yield first, rows


def transactions_of_kept(messages: Sequence[Kept]) -> Iterator[tuple[int, int]]:
    """Yield where the messages of each transaction begin and end."""
    first = size = 0
    for number, message in enumerate(messages):
        size += len(message.payload)
        if number > first and size > MAX_BATCH:
            yield first, number
            first, size = number, len(message.payload)
    if messages:
        yield first, len(messages)


def kept_texts(payload: bytes, is_utf8: bool) -> list[str]:
    """Return what follows the mark and the id in the notifications of a message that is kept."""
    text = _as_text(payload, is_utf8, MAX_NOTIFY - MAX_HEAD)
    return list(_split(payload)) if text is None else [f":{text}"]


def _as_text(payload: bytes, is_utf8: bool, limit: int) -> str | None:
    """Return the payload as text that PostgreSQL accepts, or None if that is not possible."""
    if len(payload) > limit or b"\0" in payload:
        return None
    try:
        return payload.decode("utf-8" if is_utf8 else "ascii")
    except UnicodeDecodeError:
        return None


def _split(payload: bytes) -> Iterator[str]:
    pieces = -(-len(payload) // PIECE_SIZE) or 1
    for piece in range(pieces):
        part = payload[piece * PIECE_SIZE : (piece + 1) * PIECE_SIZE]
        encoded = binascii.b2a_base64(part, newline=False).decode()
        yield f".{piece + 1}/{pieces}:{encoded}"


class Joiner:
    """Joins the pieces of messages.

    PostgreSQL keeps the notifications of a transaction together, so the pieces of one message
    arrive one after another. If the first one is missing, the others are dropped.
    """

    def __init__(self) -> None:
        self._source: tuple[object, ...] = ()  # of the pieces so far: sender, name and numbers
        self._pieces: list[bytes] = []

    def receive(self, pid: int, name: str, text: str) -> tuple[bytes, Position | None] | None:
        """Return the message that a notification completes and its position, or None.

        Args:
            pid: The process of the server whose client sent it.
            name: The name of the notification.
            text: The text of the notification. If it only looks like a piece, it is a message.
        """
        found = _HEAD.match(text)
        if found is None:
            return text.encode(), None
        position = parse_id(found[1])
        if found[1] is not None and position is None:
            return text.encode(), None
        if found[2] is None:
            return text[found.end() :].encode(), position
        piece, pieces = int(found[2]), int(found[3])
        try:
            part = binascii.a2b_base64(text[found.end() :], strict_mode=True)
        except ValueError:
            return text.encode(), None
        if not 1 <= piece <= pieces <= MAX_PIECES:
            return text.encode(), None
        source = (pid, name, text[: found.start(2)], pieces)
        if piece == 1:
            self._source, self._pieces = source, []
        if source != self._source or piece != len(self._pieces) + 1:
            return None
        self._pieces.append(part)
        if piece < pieces:
            return None
        payload = b"".join(self._pieces)
        self._source, self._pieces = (), []
        return payload, position
