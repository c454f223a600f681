"""Subprotocols: which of those that a client offers is answered (RFC 6455, section 4.2.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.websockets import WebSocket

from ..exceptions import ConfigurationError

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2


def check(ours: Sequence[str]) -> tuple[str, ...]:
    """Return the names of subprotocols if they can be some, or raise `ConfigurationError`."""
    if isinstance(ours, str) or not isinstance(ours, Sequence):
        raise ConfigurationError(f'subprotocols must be a list such as ["bearer"], not {ours!r}')
    names = tuple(ours)
    for name in names:
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise ConfigurationError(f"{name!r} is not the name of a subprotocol")
    return names


def choose(websocket: WebSocket, ours: Sequence[str], fixed: str | None = None) -> str | None:
    """Return the first of ours that the client has offered; `fixed` if there are none of ours.

    Never anything else of the client's: a browser offers a token there, which is not to be sent
    back.
    """
    names = check(ours)
    if not names:
        return fixed
    if fixed is not None:
        raise ConfigurationError("either subprotocol= or subprotocols=, not both")
    offered = websocket.scope.get("subprotocols") or ()
    return next((name for name in names if name in offered), None)
