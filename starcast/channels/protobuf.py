"""Protobuf: the client protocol in binary frames, as clients for Flutter, Swift and Java speak it.

A frame has one or more messages, each behind its length, which is a varint. They have the names and
the structure of those in JSON, so two functions turn any message into a dict such as `JsonFormat`
reads, and back. What differs is that data of the app's is JSON in `bytes`. It is JSON in this form
too, and bytes that the app publishes are in base64 in it, so that a message means the same to every
client of a channel, whichever form it has chosen.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Record
from starlette.types import Message

from .. import codec, event, frames
from ..event import Ready
from ..exceptions import InvalidMessage
from .formats import MAX_COMMANDS, PROTOBUF_SUBPROTOCOL, Malformed, Raw, published, write
from .schema import CLASSES, MESSAGES, Field

Convert = Callable[[Any], Any]
ConvertMessage = Callable[[str, Any], Any]

# Bytes of the varint in front of a message. Five are enough for the longest that Protobuf allows.
MAX_VARINT = 5

# Numbers in data that is parsed to be written again stay as they are.
_parse = json.JSONDecoder(parse_int=Raw, parse_float=Raw).decode


def _load(content: bytes) -> Any:
    """Return the JSON that a client has put into a field."""
    try:
        return codec.decode({"bytes": content}, "json")
    except InvalidMessage as exc:
        raise Malformed(f"data: {exc.reason}") from None


def _dump(value: Any) -> bytes:
    """Return the JSON that goes into a field."""
    return write(value).encode()


def _read(kind: str, record: Record) -> dict[str, Any]:
    """Return what a message has that differs from the defaults."""
    convert = _READERS[kind]
    return {field.name: convert[field.name](value) for field, value in record.ListFields()}


def _write(kind: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the class of a message takes. A newer hub may say more than that of a client."""
    if isinstance(content, Raw):  # who has published something
        content = _parse(content)
    convert = _WRITERS[kind]
    return {name: convert[name](value) for name, value in content.items() if name in convert}


def _make(kind: str, content: Mapping[str, Any]) -> Record:
    """Return a message."""
    return CLASSES[kind](**_write(kind, content))


def _converter(field: Field, data: Convert, inner: ConvertMessage, item: ConvertMessage) -> Convert:
    """Return what converts the value of a field.

    Args:
        data: Converts data of the app's.
        inner: Converts a message in the message.
        item: Converts a message in a dict of them.
    """
    one: Convert = _keep
    if field.type == "bytes":
        one = data
    elif field.type in MESSAGES:
        one = functools.partial(item if field.of == "dict" else inner, field.type)
    if field.of == "list":
        return lambda values: [one(value) for value in values]
    if field.of == "dict":
        return lambda values: {key: one(value) for key, value in values.items()}
    return one


def _keep(value: Any) -> Any:
    return value


_READERS, _WRITERS = (
    {
        kind: {name: _converter(field, *converters) for name, field in fields.items()}
        for kind, fields in MESSAGES.items()
    }
    # Protobuf 5 takes no dict of dicts.
    for converters in ((_load, _read, _read), (_dump, _write, _make))
)


def _split(frame: bytes) -> Iterator[bytes]:
    """Yield the messages of a frame."""
    start = count = 0
    while start < len(frame):
        count += 1
        if count > MAX_COMMANDS:
            raise Malformed("too many commands")
        length = 0
        for place, byte in enumerate(frame[start : start + MAX_VARINT]):
            length |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                break
        else:
            raise Malformed("no length")
        start += place + 1
        if length > len(frame) - start:
            raise Malformed("a command is cut off")
        yield frame[start : start + length]
        start += length


def _with_length(content: bytes) -> bytes:
    """Return a message as it goes into a frame."""
    length, prefix = len(content), bytearray()
    while length >= 0x80:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + content


class ProtobufFormat:
    """The protocol in Protobuf: binary frames."""

    form = frames.PROTOCOL_PROTOBUF
    subprotocol: str | None = PROTOBUF_SUBPROTOCOL
    ping = Ready("", _with_length(b""))

    def read(self, message: Message) -> list[dict[str, Any]]:
        """See `Format`. A command that is not known has nothing but its id."""
        frame = message.get("bytes")
        if frame is None:
            raise Malformed("binary frames only")
        return [self._command(content) if content else {} for content in _split(frame)]

    def _command(self, content: bytes) -> dict[str, Any]:
        try:
            command = CLASSES["Command"].FromString(content)
        # Without its extension in C, Protobuf lets these errors through, too.
        except (DecodeError, ValueError, RecursionError):
            raise Malformed("a command is no Protobuf") from None
        return _read("Command", command)

    def reply(self, id: int, method: str, result: Mapping[str, Any]) -> Ready:
        """See `Format`."""
        return self._ready({"id": id, method: result})

    def push(self, channel: str, kind: str, content: Mapping[str, Any]) -> Ready:
        """See `Format`."""
        return self._ready({"push": {"channel": channel, kind: content}})

    def _ready(self, reply: Mapping[str, Any]) -> Ready:
        return Ready("", _with_length(_make("Reply", reply).SerializeToString()))


PROTOBUF = ProtobufFormat()

event.MAKERS[PROTOBUF.form] = lambda source: published(source, PROTOBUF)
