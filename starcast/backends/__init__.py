"""Backends carry messages between hubs; `from_url` picks one by the scheme of its URL.

`memory://` has none: there is no broker.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from ..exceptions import ConfigurationError
from .base import Backend, BrokerConnection

# The scheme of a URL: the module here, the class in it, and the extra that brings what it needs.
SCHEMES: dict[str, tuple[str, str, str] | None] = {
    "memory": None,
    "redis": ("redis", "RedisBackend", "redis"),
    "rediss": ("redis", "RedisBackend", "redis"),
    "valkey": ("redis", "RedisBackend", "redis"),
    "valkeys": ("redis", "RedisBackend", "redis"),
    "unix": ("redis", "RedisBackend", "redis"),
    "nats": ("nats", "NatsBackend", "nats"),
    "tls": ("nats", "NatsBackend", "nats"),
    "postgresql": ("postgres", "PostgresBackend", "postgres"),
    "postgres": ("postgres", "PostgresBackend", "postgres"),
}

# What is shown of a URL that is not understood.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,31}")


def from_url(url: object, **options: Any) -> Backend | None:
    """Return a backend for the URL; None for `memory://`.

    Args:
        url: A `str`, or anything whose `str()` is a URL, such as pydantic's `RedisDsn`.
        options: Further arguments of the backend, such as `prefix`.

    Raises:
        ConfigurationError: There is none for its scheme, what it needs is not installed, or it is
            None or empty. The message does not repeat the URL, which may hold a password.
    """
    text = "" if url is None else str(url).strip()
    if not text:
        raise ConfigurationError(
            f"the hub's URL is {'None' if url is None else 'empty'}: the environment variable or "
            "setting that it comes from is not set. Without a broker write memory://, for example "
            'os.environ.get("REDIS_URL", "memory://")'
        )
    scheme, separator, _ = text.partition("://")
    if not separator or scheme not in SCHEMES:
        if hasattr(url, "get_secret_value"):  # pydantic's SecretStr, whose str() is asterisks
            raise ConfigurationError("the hub's URL is a secret: pass url.get_secret_value()")
        if callable(getattr(url, "connect", None)):
            raise ConfigurationError("a backend is not a URL: write Broadcast(backend=...)")
        known = ", ".join(f"{name}://" for name in SCHEMES)
        given = "; this one starts with none of them"
        if separator and (_SCHEME.fullmatch(scheme) or not scheme):
            given = f", not with {scheme}://"
        raise ConfigurationError(f"a hub's URL starts with {known}{given}")
    found = SCHEMES[scheme]
    if found is None:
        return None
    module, name, extra = found
    try:
        backend = getattr(importlib.import_module(f".{module}", __name__), name)
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"{scheme}:// needs the package {exc.name}: pip install 'starcast[{extra}]'"
        ) from None
    made: Backend = backend(text, **options)
    return made


def check(backend: object) -> None:
    """Raise `ConfigurationError` if this is obviously not a backend."""
    if isinstance(backend, type):
        wrong = f"{backend.__name__} is a class; pass an instance of it"
    elif not callable(getattr(backend, "connect", None)):
        wrong = f"{type(backend).__name__} has none"
    elif hasattr(backend, "next_published"):
        wrong = (
            f"{type(backend).__name__} is made for encode/broadcaster; pass its URL to Broadcast "
            "instead"
        )
    else:
        return
    raise ConfigurationError(
        f"a backend has a method connect(deliver, lost) that returns a connection: {wrong}"
    )


def check_history(backend: Backend) -> None:
    """Raise `ConfigurationError` if this keeps no history."""
    if not getattr(backend, "keeps_history", False):
        raise ConfigurationError(
            f"{type(backend).__name__} keeps no history: leave out history=, or use memory://, "
            "redis://, nats:// or postgresql://"
        )


__all__ = ["Backend", "BrokerConnection", "check", "check_history", "from_url"]
