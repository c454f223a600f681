"""Which web pages may connect: the check of the Origin header (RFC 6454, RFC 6455 section 10.2)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.websockets import WebSocket

from .exceptions import ConfigurationError, OriginRefused

logger = logging.getLogger("starcast")

# Refusals that were logged already. Past this many nothing more is logged: a stranger who sends
# ever new values must not be able to fill a disk.
MAX_LOGGED = 100


# scheme, host and port as a browser sends them (RFC 6454 section 6.2): a name in its ASCII form or
# an IPv6 address in brackets, no path, no user, no pattern.
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:(?P<port>[0-9]{1,5}))?", re.I
)


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # an address in brackets that is none
        return None


class Origins:
    """The rule of one hub.

    `None` lets in a page of the same host name, whatever its port or scheme; a list lets in those
    origins exactly; `"*"` lets in everybody. A client that sends no Origin is not a browser and is
    let in by every rule.
    """

    def __init__(self, allowed: Iterable[str] | str | None) -> None:
        if isinstance(allowed, str) and allowed != "*":
            raise ConfigurationError(f'origins must be a list of origins or "*", not {allowed!r}')
        self._everybody = allowed == "*"
        self._allowed: frozenset[str] | None = None
        self._logged: set[tuple[str, str]] = set()
        if allowed is not None and not self._everybody:
            if not isinstance(allowed, Iterable):
                raise ConfigurationError(
                    f'origins must be a list of origins or "*", not {allowed!r}'
                )
            self._allowed = frozenset(map(self._checked, allowed))

    @staticmethod
    def _checked(origin: str) -> str:
        found = _ORIGIN.fullmatch(origin) if isinstance(origin, str) else None
        if found is None or int(found["port"] or 0) > 65535:
            raise ConfigurationError(
                f"an origin looks like https://example.com or http://localhost:8000, not {origin!r}"
            )
        return origin.lower()

    def check(self, websocket: WebSocket) -> None:
        """Raise `OriginRefused` if the page that asks may not connect."""
        given = websocket.headers.getlist("origin")
        if self._everybody or not given:
            return
        origin = given[0]
        host = websocket.headers.get("host", "")
        if len(given) == 1:
            if self._allowed is not None:
                if origin.lower() in self._allowed:
                    return
            elif (name := _hostname(origin)) and name == _hostname(f"//{host}"):
                return
        refused = (origin, host)
        if refused not in self._logged and len(self._logged) < MAX_LOGGED:
            self._logged.add(refused)
            logger.warning(
                "refused a WebSocket from the page %r on the host %r; allow it with origins=[...]",
                *refused,
            )
        raise OriginRefused(f"the origin {origin!r} may not connect to the host {host!r}")
