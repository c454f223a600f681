"""Origins: which web pages may connect to a hub (RFC 6454, RFC 6455 section 10.2)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterable

from starlette.requests import HTTPConnection

from .. import logs
from ..exceptions import ConfigurationError, OriginRefused
from . import hooks

Hook = Callable[[str, HTTPConnection], Awaitable[bool] | bool]
Allowed = Iterable[str] | str | Hook | None

# Scheme, host and port as a browser sends them (RFC 6454 section 6.2): a name in its ASCII form or
# an IPv6 address in brackets, without path or user. Anything else does not come from a browser, and
# a lenient URL parser could read it differently from what the rule of the app means.
_HOST = re.compile(
    r"(?P<host>[a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?",
    re.IGNORECASE | re.ASCII,
)
_ORIGIN = re.compile(rf"[a-z][a-z0-9+.-]{{0,63}}://{_HOST.pattern}", re.IGNORECASE | re.ASCII)
_LABELS = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.ASCII)

# The origin of a page without a host: a sandboxed frame or a data: URL, and a file in Chromium.
_HOSTLESS = ("null", "file://")

_LOOPBACK = ipaddress.IPv4Network("127.0.0.0/8")


def _host(pattern: re.Pattern[str], text: str) -> str | None:
    """Return the host in an origin or a Host header, or None if it is malformed."""
    match = pattern.fullmatch(text)
    if match is None or int(match["port"] or 0) > 65535:
        return None
    return match["host"].lower()


def _is_origin(text: str) -> bool:
    return text in _HOSTLESS or _host(_ORIGIN, text) is not None


def _is_loopback(host: str) -> bool:
    """Return whether a browser resolves this host to its own machine (RFC 6761 section 6.3).

    Browsers turn all other spellings of an IPv4 address into 127.0.0.1 before they send it.
    """
    if host in ("localhost", "[::1]"):
        return True
    if host.endswith(".localhost"):
        return _LABELS.fullmatch(host) is not None
    try:
        return ipaddress.IPv4Address(host) in _LOOPBACK
    except ValueError:
        return False


class Origins:
    """The origins from which pages may connect to a hub.

    `None` admits pages of the same host name, whatever their port or scheme; a list admits exactly
    these origins; a function decides for each client; `"*"` admits every page. A client that sends
    no Origin header is not a browser and is always admitted.

    Raises:
        ConfigurationError: `allowed` is not one of these, or an entry of the list is not an origin.
    """

    def __init__(self, allowed: Allowed) -> None:
        self._any = allowed == "*"
        self._hook: Hook | None = None
        self._listed: set[str] | None = None
        self._patterns: list[tuple[str, str]] = []  # the text before and after the subdomain
        if allowed is None or self._any:
            return
        if callable(allowed):
            self._hook = allowed
            return
        if isinstance(allowed, str) or not isinstance(allowed, Iterable):
            raise ConfigurationError(
                f'origins must be a list of origins, a function or "*", not {allowed!r}'
            )
        self._listed = set()
        for entry in allowed:
            self._add(entry)

    def _add(self, entry: str) -> None:
        origin = entry.lower() if isinstance(entry, str) else ""
        assert self._listed is not None
        if _is_origin(origin):
            self._listed.add(origin)
            return
        scheme, wildcard, rest = origin.partition("://*.")
        host = _host(_ORIGIN, f"{scheme}://{rest}")
        if wildcard and host is not None and _LABELS.fullmatch(host):
            self._patterns.append((f"{scheme}://", f".{rest}"))
            return
        advice = '; to let every page connect, write origins="*"' if origin == "*" else ""
        raise ConfigurationError(
            "an origin looks like https://example.com, http://localhost:8000 or "
            f"https://*.example.com, not {entry!r}{advice}"
        )

    async def check(self, client: HTTPConnection) -> None:
        """Raise `OriginRefused` if the client is a page that may not connect."""
        sent = client.headers.getlist("origin")
        if self._any or not sent:
            return
        # A mount checks before `authorize`, and `connect` checks again. A hook is called once.
        if client.scope.get("starcast.origin") is self:
            return
        origin, host = sent[0], client.headers.get("host", "")
        if len(sent) > 1 or not _is_origin(origin.lower()):
            logs.once(
                ("origin", "malformed"),
                "refused %s: its Origin header %.200r is not one origin",
                logs.client(client.scope),
                ", ".join(sent),
            )
        elif await self._admits(origin.lower(), host, client):
            client.scope["starcast.origin"] = self
            return
        elif self._hook is None:
            logs.once(
                ("origin", origin),
                "refused %s from a page of %r to the host %.200r%s; "
                'to let that page in, write origins=[%s"%s"]',
                logs.client(client.scope),
                origin,
                host,
                "" if self._listed is None else ", because it is not in origins=",
                "" if self._listed is None else "..., ",
                origin,
            )
        raise OriginRefused(f"the origin {origin!r} may not connect to the host {host!r}")

    async def _admits(self, origin: str, host: str, client: HTTPConnection) -> bool:
        if self._hook is not None:
            about = f"a page of {origin!r}"
            return await hooks.ask(
                "origins", self._hook, origin, client, client=client, about=about
            )
        if self._listed is not None:
            return origin in self._listed or any(
                origin.startswith(start)
                and origin.endswith(end)
                and _LABELS.fullmatch(origin[len(start) : -len(end)])
                for start, end in self._patterns
            )
        page, server = _host(_ORIGIN, origin), _host(_HOST, host)
        if page is None or server is None:
            return False
        return page == server or (_is_loopback(page) and _is_loopback(server))
