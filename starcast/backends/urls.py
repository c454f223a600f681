"""What the URLs of all brokers have in common: hosts that are one, and options to be refused."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import parse_qsl

from ..exceptions import ConfigurationError

# Where a server is: a host and a port, or the path of a socket.
Endpoint = tuple[str, int | str] | str

_OPTION = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,62}")


def same_host(host: str) -> str:
    """Return a host's name in the one form that stands for all its spellings.

    This machine is 127.0.0.1, be it given as `localhost`, by an address or not at all. Names are
    not looked up.
    """
    host = host.strip("[]").rstrip(".").lower()
    if host in ("", "localhost"):
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        address = mapped
    return "127.0.0.1" if address.is_loopback or address.is_unspecified else str(address)


def options_of(query: str) -> list[tuple[str, str]]:
    """Return the names and values of a URL's options, as far as the names look like names.

    What does not may be a piece of a password, which no message may repeat.
    """
    pairs = parse_qsl(query, keep_blank_values=True)
    return [(name, value) for name, value in pairs if _OPTION.fullmatch(name)]


def refuse_option(broker: str, name: str, advice: str) -> ConfigurationError:
    """Return an error for an option of a URL. Values stay out of it: they may be secret."""
    return ConfigurationError(f"the option {name!r} in the URL of {broker}: {advice}")


def first_of(names: Iterable[str], text: str) -> str | None:
    """Return the first of the names that a driver or a server has put in quotation marks."""
    return next((name for name in names if f"'{name}'" in text or f'"{name}"' in text), None)
