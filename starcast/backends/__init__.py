"""Backends carry events between hubs; `from_url` picks one by the scheme of its URL."""

from __future__ import annotations

from ..exceptions import ConfigurationError
from .base import Backend
from .memory import MemoryBackend

SCHEMES = {"memory": MemoryBackend}


def from_url(url: str) -> Backend:
    """Return a backend for the URL.

    Raises:
        ConfigurationError: There is none for its scheme. The message does not repeat the URL,
            which may hold a password.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        given = f"{scheme}://" if separator else "nothing of the kind"
        raise ConfigurationError(f"a hub's URL starts with {known}, not with {given}")
    return SCHEMES[scheme]()


__all__ = ["Backend", "MemoryBackend", "from_url"]
