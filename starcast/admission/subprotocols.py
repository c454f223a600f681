"""Subprotocols: select one of those that the client offers (RFC 6455, section 4.2.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.websockets import WebSocket

from ..exceptions import ConfigurationError

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2


def check(supported: Sequence[str]) -> tuple[str, ...]:
    """Return the names of subprotocols, or raise `ConfigurationError` if one is not valid."""
    if isinstance(supported, str) or not isinstance(supported, Sequence):
        raise ConfigurationError(
            f'subprotocols must be a list such as ["bearer"], not {supported!r}'
        )
    names = tuple(supported)
    for name in names:
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise ConfigurationError(f"{name!r} is not the name of a subprotocol")
    return names


def choose(websocket: WebSocket, supported: Sequence[str], fixed: str | None = None) -> str | None:
    """Return the first supported subprotocol that the client offers, or None.

    Without `supported` it is `fixed`. A subprotocol that is not on the list is never returned: a
    browser offers a token there, and the response would send it back.

    Raises:
        ConfigurationError: Both are given, or a name is not valid.
    """
    names = check(supported)
    if not names:
        return fixed
    if fixed is not None:
        raise ConfigurationError("pass either subprotocol= or subprotocols=, not both")
    offered = websocket.scope.get("subprotocols") or ()
    return next((name for name in names if name in offered), None)
