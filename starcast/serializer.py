"""Serializer: write the same JSON that FastAPI returns from a route."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import ipaddress
import json
import operator
import pathlib
import re
import sys
import types
import uuid
from collections.abc import Callable
from typing import Any, NoReturn

from starlette.requests import HTTPConnection


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and the infinities, which `json` parses although they are not JSON."""
    raise ValueError(f"{name} is not JSON")


def _duration(value: datetime.timedelta) -> str:
    """Write an ISO 8601 duration as pydantic does, with 365 days in a year."""
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
    """Convert what FastAPI can write and pydantic cannot, or raise a `TypeError` with the type."""
    kind = type(value)
    if isinstance(value, pathlib.PurePath):
        return str(value)
    # The rows of several database drivers are mappings of this sort. Requests and websockets are
    # mappings too, but their headers and cookies must never be published by mistake.
    is_mapping = hasattr(kind, "keys") and hasattr(kind, "__getitem__")
    if is_mapping and not isinstance(value, HTTPConnection):
        return dict(value)
    raise TypeError(f"{kind.__name__} cannot be written as JSON")


# How to convert types that `json` cannot write. The result is what pydantic makes of them, so that
# messages do not change as soon as some module imports pydantic.
_CONVERTERS: dict[type, Callable[[Any], Any]] = {
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
        if kind in _CONVERTERS:
            return _CONVERTERS[kind](value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return _unknown(value)


_encoder = functools.partial(
    json.JSONEncoder, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)
_encode = _encoder().encode
_encode_converted = _encoder(default=_default).encode


def _encode_slowly(core: Any, value: Any) -> str:
    """Write a value in two steps, which refuses every NaN and names a type that fails."""
    return _encode(core.to_jsonable_python(value, by_alias=True, fallback=_unknown))


def dumps(value: Any) -> str:
    """Write a value as JSON: compact, in UTF-8, without NaN and infinities.

    If the process has loaded pydantic, pydantic's own serialiser writes what `json` cannot. The
    result is what a FastAPI route with a return annotation sends, key for key: pydantic models, at
    any depth and in any container, have their aliases, computed fields and custom serialisers.
    Dataclasses, Enum (its value), UUID, date, time and datetime (ISO 8601, UTC as `Z`), timedelta
    (ISO 8601: `"PT1M30S"`), Decimal (a string, which keeps every digit), set, frozenset, deque,
    generators, paths, IP addresses and networks, `bytes` in UTF-8 and mappings can be written
    without a model around them.

    A route without a return annotation writes some of these differently outside of a model: Decimal
    and timedelta as numbers, the time zone UTC as `+00:00`, a pydantic dataclass without its
    aliases. Here a value is written in the same way wherever it occurs. Unlike an annotated route,
    `publish` filters nothing: an instance of a subclass is sent with all of its fields. Objects
    that FastAPI would write by their `__dict__` are refused, and so are requests and websockets.

    Without pydantic in the process, `json` writes the same types in the same way, except that the
    keys of a dict must be `str`, numbers, `bool` or `None`.

    Raises:
        TypeError, ValueError: The value cannot be written. The hub raises it as `EncodingError`.
    """
    core = sys.modules.get("pydantic_core")
    to_json = getattr(core, "to_json", None)  # None while another thread is importing it
    if to_json is None:
        return _encode_converted(value)
    try:
        return _encode(value)  # plain values; a NaN among them is refused here
    except TypeError:
        pass
    try:
        written: bytes = to_json(value, by_alias=True, fallback=_unknown)
    except Exception:
        # Raise the same error with the original message. A result would be wrong: the first attempt
        # may have used up items of a generator.
        _encode_slowly(core, value).encode()
        raise
    if b"NaN" in written or b"Infinity" in written:  # perhaps not in a string
        json.loads(written, parse_constant=refuse_constant)
    if b"null" in written:  # pydantic writes it for a NaN in a model
        _encode_slowly(core, value)
    return written.decode()
