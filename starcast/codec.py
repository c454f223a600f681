"""What people publish becomes a frame's content; a client's frame becomes what a handler gets."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import ipaddress
import json
import math
import operator
import pathlib
import re
import sys
import types
import uuid
from collections.abc import Callable
from typing import Any, Literal, NoReturn

from starlette.requests import HTTPConnection
from starlette.types import Message

from .exceptions import ConfigurationError, EncodingError, InvalidChannel, InvalidMessage

Encoding = Literal["text", "bytes", "json"]
Dumps = Callable[[Any], str | bytes]
Channel = str | int | uuid.UUID

MAX_CHANNEL = 200
MAX_BITS = 1000  # of an int: more digits than that, and fewer than Python refuses to write

# C0 and C1 control characters, and halves of surrogate pairs, which have no UTF-8 form.
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def check_channel(channel: object) -> str:
    """Return the name of a valid channel, or raise `InvalidChannel`.

    An int or a UUID, such as a path parameter or the id of a row, is the channel of its `str()`.
    Every backend has the same rule, so a name that works in memory works everywhere.
    """
    return _checked(channel if type(channel) is str else _name(channel))


def _name(channel: object) -> str:
    if isinstance(channel, str):
        return str.__str__(channel)  # of an Enum that is a str, its value
    if isinstance(channel, uuid.UUID):
        return str(channel)
    if isinstance(channel, int) and not isinstance(channel, bool):
        if channel.bit_length() > MAX_BITS:
            raise InvalidChannel(f"a channel's name must have 1 to {MAX_CHANNEL} characters")
        return int.__repr__(channel)  # of an Enum that is an int, its value
    kind = type(channel).__name__
    raise InvalidChannel(f"a channel's name must be a str, an int or a UUID, not {kind}")


@functools.lru_cache(maxsize=1024)  # the same few names come with every message
def _checked(channel: str) -> str:
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
    """Return the encoding if it is one, or raise `ConfigurationError`."""
    if encoding not in ("text", "bytes", "json", None):
        raise ConfigurationError(f"encoding must be text, bytes, json or None, not {encoding!r}")
    return encoding


def _duration(value: datetime.timedelta) -> str:
    """Write an ISO 8601 duration as pydantic does, in whose years there are 365 days."""
    span = abs(value)
    years, days = divmod(span.days, 365)
    minutes, seconds = divmod(span.seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{span.microseconds:06}".rstrip(".0")
    whole = [(years, "Y"), (days, "D")]
    date = "".join(f"{number}{unit}" for number, unit in whole if number)
    parts = [(hours, "H"), (minutes, "M"), (f"{seconds or 0}{fraction}", "S")]
    if parts[-1][0] == "0" and (date or hours or minutes):
        parts.pop()
    time = "".join(f"{number}{unit}" for number, unit in parts if number)
    return f"{'-' if value.days < 0 else ''}P{date}{'T' if time else ''}{time}"


def _timestamp(value: datetime.datetime | datetime.time) -> str:
    return value.isoformat().replace("+00:00", "Z")


def _unknown(value: Any) -> Any:
    """Write what pydantic does not know and FastAPI does, or name the type that nobody knows."""
    kind = type(value)
    if isinstance(value, pathlib.PurePath):
        return str(value)
    # The rows of several database drivers are such mappings. So are requests and websockets, but
    # nobody means to publish somebody's headers and cookies.
    is_mapping = hasattr(kind, "keys") and hasattr(kind, "__getitem__")
    if is_mapping and not isinstance(value, HTTPConnection):
        return dict(value)
    raise TypeError(f"{kind.__name__} cannot be written as JSON")


# What `json` does not know, in the form that pydantic gives it, so that a message does not change
# its form when some module imports pydantic.
_FORMS: dict[type, Callable[[Any], Any]] = {
    datetime.datetime: _timestamp,
    datetime.time: _timestamp,
    datetime.date: datetime.date.isoformat,
    datetime.timedelta: _duration,
    enum.Enum: operator.attrgetter("value"),
    bytes: bytes.decode,
    bytearray: bytearray.decode,
    re.Pattern: operator.attrgetter("pattern"),
    types.GeneratorType: list,
    **dict.fromkeys((set, frozenset, collections.deque), list),
    **dict.fromkeys((decimal.Decimal, pathlib.PurePath, uuid.UUID), str),
    **dict.fromkeys((ipaddress.IPv4Address, ipaddress.IPv6Address), str),
    **dict.fromkeys((ipaddress.IPv4Network, ipaddress.IPv6Network), str),
}


def _default(value: Any) -> Any:
    for kind in type(value).__mro__:
        if kind in _FORMS:
            return _FORMS[kind](value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return _unknown(value)


_encoder = functools.partial(
    json.JSONEncoder, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)
_encode = _encoder().encode
_encode_forms = _encoder(default=_default).encode


def _check(core: Any, value: Any) -> str:
    """Write a value on the long road, which refuses every NaN and names the type it fails at."""
    return _encode(core.to_jsonable_python(value, by_alias=True, fallback=_unknown))


def dumps(value: Any) -> str:
    """Write a value as JSON: compact, in UTF-8, without NaN and infinities.

    What `json` does not know is written by pydantic's own serialiser, if the process has loaded
    pydantic. The result is what a FastAPI route with a return annotation sends, key for key:
    pydantic models, at any depth and in any container, have their aliases, computed fields and
    custom serialisers. Dataclasses, Enum (its value), UUID, date, time and datetime (ISO 8601, UTC
    as `Z`), timedelta (ISO 8601: `"PT1M30S"`), Decimal (a string, which loses nothing), set,
    frozenset, deque, generators, paths, IP addresses and networks, `bytes` in UTF-8 and mappings
    need no model around them.

    A route without a return annotation writes some of these in another form outside of a model:
    Decimal and timedelta as numbers, the time zone UTC as `+00:00`, a pydantic dataclass without
    its aliases. Here a value has one form, wherever it stands. Unlike an annotated route, `publish`
    filters nothing: of an object of a subclass all fields go out. What FastAPI would take apart by
    its `__dict__` is refused, and so are requests and websockets.

    Without pydantic in the process the same types are written in the same form by `json`, except
    that the keys of a dict must be `str`, numbers, `bool` or `None`.

    Raises:
        TypeError, ValueError: It cannot be written. The hub makes an `EncodingError` of it.
    """
    core = sys.modules.get("pydantic_core")
    to_json = getattr(core, "to_json", None)  # None while another thread is importing it
    if to_json is None:
        return _encode_forms(value)
    try:
        return _encode(value)  # what is plain, and with it every NaN in such values
    except TypeError:
        pass
    try:
        written: bytes = to_json(value, by_alias=True, fallback=_unknown)
    except Exception:
        # Raise the same in the words of whoever refused it. What is written here has no value: a
        # generator has handed out some of its items before.
        _check(core, value).encode()
        raise
    if b"NaN" in written or b"Infinity" in written:  # perhaps outside of a string
        json.loads(written, parse_constant=_no_constant)
    if b"null" in written:  # which pydantic makes of a NaN in a model
        _check(core, value)
    return written.decode()


def encode(data: Any, encoding: Encoding | None, dumps: Dumps) -> tuple[str | bytes, bytes]:
    """Return a frame's content as `str` (a text frame) or `bytes` (binary), and as bytes.

    Raises:
        EncodingError: The data does not fit the encoding or cannot be serialised.
    """
    if encoding is None and not isinstance(data, str):
        encoding = "bytes" if isinstance(data, (bytes, bytearray, memoryview)) else "json"
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
        except Exception as exc:  # whatever a serialiser raises: it cannot write this
            why = "bytes that are not UTF-8" if isinstance(exc, UnicodeDecodeError) else exc
            raise EncodingError(f"the message cannot be written as JSON: {why}") from exc
        if isinstance(data, bytes):  # orjson and msgspec return bytes
            try:
                return data.decode(), data
            except UnicodeDecodeError as exc:
                raise EncodingError(f"dumps= returned something else than UTF-8: {exc}") from exc
    if not isinstance(data, str):
        raise EncodingError(f"a text message needs a str, not {type(data).__name__}")
    data = str.__str__(data)  # of an Enum that is a str, its value
    try:
        return data, data.encode()
    except UnicodeEncodeError as exc:
        raise EncodingError(f"the message has no UTF-8 form: {exc}") from exc


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(literal: str) -> float:
    if math.isinf(value := float(literal)):  # 1e999
        raise ValueError(f"{literal} is too large")
    return value


def decode(message: Message, encoding: Encoding | None) -> Any:
    """Return what a client's `websocket.receive` message holds.

    `encoding=None` takes a frame as it is. `"json"` reads text and binary frames.

    Raises:
        InvalidMessage: 1003 for a frame of the wrong type, 1007 for content that is not valid.
    """
    text: str | None = message.get("text")
    content: bytes | None = message.get("bytes")
    if encoding == "bytes" and content is None:
        raise InvalidMessage(1003, "binary frames only")
    if encoding == "text" and text is None:
        raise InvalidMessage(1003, "text frames only")
    try:
        if text is None:
            if encoding != "json":
                return content
            text = (content or b"").decode()
        text.encode()  # a lone surrogate can be received and could not be sent on
        if encoding != "json":
            return text
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        if "\\ud" in text.lower():  # perhaps half of a surrogate pair, written as an escape
            dumps(value).encode()
        return value
    except UnicodeError:
        raise InvalidMessage(1007, "not valid UTF-8") from None
    except (ValueError, RecursionError):
        raise InvalidMessage(1007, "not valid JSON") from None
