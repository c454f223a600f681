"""Codec: encode published messages, decode received ones, and check the names of channels."""

from __future__ import annotations

import functools
import json
import math
import re
import uuid
from collections.abc import Callable
from typing import Any, Literal

from starlette.types import Message

from .close_codes import INVALID_DATA, UNSUPPORTED_DATA
from .exceptions import ConfigurationError, EncodingError, InvalidChannel, InvalidMessage
from .serializer import dumps as dumps
from .serializer import refuse_constant

Encoding = Literal["text", "bytes", "json"]
Dumps = Callable[[Any], str | bytes]
Channel = str | int | uuid.UUID

DEFAULT_CHANNEL = "default"

MAX_CHANNEL = 200  # characters
# Bits of an int that names a channel. They make more than MAX_CHANNEL digits, but fewer than the
# 4,300 from which Python refuses to convert an int to a str.
MAX_BITS = 1000

# C0 and C1 control characters, and halves of surrogate pairs, which UTF-8 cannot encode.
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def check_channel(channel: object) -> str:
    """Return the name of a valid channel, or raise `InvalidChannel`.

    An int or a UUID, such as a path parameter or the id of a row, names the channel of its `str()`.
    The rule is the same for every backend, so a name that works in memory works everywhere.
    """
    return _check_name(channel if type(channel) is str else _name(channel))


def _name(channel: object) -> str:
    if isinstance(channel, str):
        return str.__str__(channel)  # the value of a `str` that is an Enum too
    if isinstance(channel, uuid.UUID):
        return str(channel)
    if isinstance(channel, int) and not isinstance(channel, bool):
        if channel.bit_length() > MAX_BITS:
            raise InvalidChannel(f"a channel's name must have 1 to {MAX_CHANNEL} characters")
        return int.__repr__(channel)  # the value of an `int` that is an Enum too
    kind = type(channel).__name__
    raise InvalidChannel(f"a channel's name must be a str, an int or a UUID, not {kind}")


@functools.lru_cache(maxsize=1024)  # most messages use the same few names
def _check_name(channel: str) -> str:
    if not 1 <= len(channel) <= MAX_CHANNEL:
        raise InvalidChannel(
            f"a channel's name must have 1 to {MAX_CHANNEL} characters, not {len(channel)}"
        )
    if found := _FORBIDDEN.search(channel):
        raise InvalidChannel(
            f"a channel's name must not contain the character {found.group()!r}: {channel!r}"
        )
    return channel


def check_encoding(encoding: Encoding | None) -> Encoding | None:
    """Return the encoding if it is valid, or raise `ConfigurationError`."""
    if encoding not in ("text", "bytes", "json", None):
        raise ConfigurationError(f"encoding must be text, bytes, json or None, not {encoding!r}")
    return encoding


def is_json(data: Any, encoding: Encoding | None) -> bool:
    """Whether `encode` writes it as JSON."""
    return encoding == "json" or (
        encoding is None and not isinstance(data, (str, bytes, bytearray, memoryview))
    )


def encode(data: Any, encoding: Encoding | None, dumps: Dumps) -> tuple[str | bytes, bytes]:
    """Return the content of a frame, `str` (text) or `bytes` (binary), and the same as bytes.

    Raises:
        EncodingError: The data does not fit the encoding or cannot be serialised.
    """
    if is_json(data, encoding):
        encoding = "json"
    elif encoding is None and not isinstance(data, str):
        encoding = "bytes"
    if encoding == "bytes":
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise EncodingError(f'encoding="bytes" needs bytes, not {type(data).__name__}')
        payload = bytes(data)
        return payload, payload
    if encoding == "json":
        try:
            data = dumps(data)
        except UnicodeEncodeError as exc:
            raise EncodingError(f"the message has no UTF-8 form: {exc}") from exc
        except Exception as exc:  # a serialiser may raise anything
            why = "bytes that are not UTF-8" if isinstance(exc, UnicodeDecodeError) else exc
            raise EncodingError(f"the message cannot be written as JSON: {why}") from exc
        if isinstance(data, bytes):  # orjson and msgspec return bytes
            try:
                return data.decode(), data
            except UnicodeDecodeError as exc:
                raise EncodingError(f"dumps= returned bytes that are not UTF-8: {exc}") from exc
    if not isinstance(data, str):
        raise EncodingError(f"a text message needs a str, not {type(data).__name__}")
    data = str.__str__(data)  # the value of a `str` that is an Enum too
    try:
        return data, data.encode()
    except UnicodeEncodeError as exc:
        raise EncodingError(f"the message has no UTF-8 form: {exc}") from exc


def _parse_float(literal: str) -> float:
    if math.isinf(value := float(literal)):  # such as 1e999
        raise ValueError(f"{literal} is too large")
    return value


def decode(message: Message, encoding: Encoding | None) -> Any:
    """Return the content of a client's `websocket.receive` message.

    `encoding=None` accepts either type of frame. `"json"` parses text and binary frames.

    Raises:
        InvalidMessage: 1003 for a frame of the wrong type, 1007 for content that is not valid.
    """
    text: str | None = message.get("text")
    content: bytes | None = message.get("bytes")
    if encoding == "bytes" and content is None:
        raise InvalidMessage(UNSUPPORTED_DATA, "binary frames only")
    if encoding == "text" and text is None:
        raise InvalidMessage(UNSUPPORTED_DATA, "text frames only")
    try:
        if text is None:
            if encoding != "json":
                return content
            text = (content or b"").decode()
        text.encode()  # a lone surrogate can be received, but not sent to others
        if encoding != "json":
            return text
        value = json.loads(text, parse_constant=refuse_constant, parse_float=_parse_float)
        if "\\ud" in text.lower():  # perhaps a lone surrogate, written as an escape
            dumps(value).encode()
        return value
    except UnicodeError:
        raise InvalidMessage(INVALID_DATA, "not valid UTF-8") from None
    except (ValueError, RecursionError):
        raise InvalidMessage(INVALID_DATA, "not valid JSON") from None
