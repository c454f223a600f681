"""Backends carry messages between hubs; `from_url` picks one by the scheme of its URL.

`memory://` has none: there is no broker.
"""

from __future__ import annotations

import importlib

from ..exceptions import ConfigurationError
from .base import Backend

# The scheme of a URL: the module here, the class in it, and the extra that brings what it needs.
SCHEMES: dict[str, tuple[str, str, str] | None] = {
    "memory": None,
    "redis": ("redis", "RedisBackend", "redis"),
    "rediss": ("redis", "RedisBackend", "redis"),
    "unix": ("redis", "RedisBackend", "redis"),
    "nats": ("nats", "NatsBackend", "nats"),
    "tls": ("nats", "NatsBackend", "nats"),
    "postgresql": ("postgres", "PostgresBackend", "postgres"),
    "postgres": ("postgres", "PostgresBackend", "postgres"),
}


def from_url(url: str) -> Backend | None:
    """Return a backend for the URL; None for `memory://`.

    Raises:
        ConfigurationError: There is none for its scheme, or what it needs is not installed. The
            message does not repeat the URL, which may hold a password.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        given = f"{scheme}://" if separator else "nothing of the kind"
        raise ConfigurationError(f"a hub's URL starts with {known}, not with {given}")
    found = SCHEMES[scheme]
    if found is None:
        return None
    module, name, extra = found
    try:
        made: Backend = getattr(importlib.import_module(f".{module}", __name__), name)(url)
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"{scheme}:// needs the package {exc.name}: pip install 'starcast[{extra}]'"
        ) from None
    return made


__all__ = ["Backend", "from_url"]
