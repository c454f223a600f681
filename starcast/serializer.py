"""Serializer: writes JSON, the same as FastAPI returns from a route."""

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


def no_constant(name: str) -> NoReturn:
    """Refuse what `json` reads and JSON has not: NaN and the infinities."""
    raise ValueError(f"{name} is not JSON")


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
        json.loads(written, parse_constant=no_constant)
    if b"null" in written:  # which pydantic makes of a NaN in a model
        _check(core, value)
    return written.decode()
