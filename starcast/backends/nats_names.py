"""How NATS is spelled: the URL of its servers, and the subject of a channel."""

from __future__ import annotations

import contextlib
import re
from urllib.parse import unquote, urlsplit

from ..exceptions import ConfigurationError
from .urls import options_of, refuse_option, same_host

_ENCODED = re.compile(rb"[^A-Za-z0-9_-]")


# What to do about options in a URL, of which NATS has none.
_ADVICE = {
    "tls": "write tls:// in place of nats://, or NatsBackend(url, tls=ssl.create_default_context())"
}
_AN_ARGUMENT = (
    "a URL of NATS has no options; give what nats.connect knows as an argument, such as "
    'NatsBackend(url, name="chat")'
)


def tokens(channel: str) -> str:
    """Return the tokens of a subject for a channel as the hub gives it, no two the same.

    The hub's name becomes a token of its own, for permissions and wildcards: the first colon is a
    dot, and no other dot is left.
    """
    name, _, rest = channel.partition(":")
    if name and rest:
        return f"{encode(name)}.{encode(rest)}"
    return encode(channel)


def encode(text: str) -> str:
    """Return one token for a text, no two the same."""
    return _ENCODED.sub(lambda match: b"%%%02X" % match[0][0], text.encode()).decode()


def untoken(subject: str) -> str:
    """Return the channel as the hub gives it, for the tokens of its subject."""
    return unquote(subject.replace(".", ":", 1))


def endpoints_of(urls: list[str]) -> list[tuple[str, int]]:
    """Return the hosts and ports of servers as `parse_url` returns them."""
    parts = [urlsplit(url) for url in urls]
    return [(each.hostname or "", each.port or 0) for each in parts]


def same_servers(urls: list[str]) -> list[str]:
    """Return hosts and ports in the one form that stands for all spellings."""
    return sorted(f"{same_host(host)}:{port}" for host, port in endpoints_of(urls))


def parse_url(url: str) -> tuple[list[str], dict[str, str]]:
    """Take the servers and the login out of a URL: nats-py does not decode a password."""
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    if query and "@" not in query:  # else it may be a piece of a password
        for name, _ in options_of(query):
            raise refuse_option("NATS", name, _ADVICE.get(name, _AN_ARGUMENT))
    servers: list[str] = []
    logins: list[dict[str, str]] = []
    with contextlib.suppress(ValueError):
        for part in rest.split(","):
            parts = urlsplit(f"{scheme}://{part.removeprefix(f'{scheme}://')}")
            host, port = parts.hostname, parts.port or 4222
            if (
                query
                or scheme not in ("nats", "tls")
                or not host
                or "".join(parts[2:]) not in ("", "/")
            ):
                raise ValueError
            servers.append(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")
            if parts.password is not None:
                logins.append(
                    {"user": unquote(parts.username or ""), "password": unquote(parts.password)}
                )
            elif parts.username:
                logins.append({"token": unquote(parts.username)})
        if all(login == logins[0] for login in logins):
            return servers, logins[0] if logins else {}
    # Neither the URL nor what `urlsplit` says of it: both may hold the password. So that error is
    # over here, and not the context of this one.
    raise ConfigurationError(
        "a URL of NATS is nats:// or tls://, then user:password@ or token@ if there is one "
        "(percent-encoded, the same for all servers), and host:port, more of them after commas"
    )
