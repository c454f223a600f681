"""Arguments: check the clients, channels and close codes that are passed to the hub.

Programs look up a client and pass on the result, so None stands for a client that was not found. It
is an error, and never means every client. Only an omitted argument has its documented default.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable
from typing import Any, Final

from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket, WebSocketState

from . import codec, logs
from .exceptions import ConfigurationError, InvalidChannel

Exclude = WebSocket | Iterable[WebSocket | None] | None


# Characters of a user's name, so that the name of its channel is one that brokers take.
MAX_USER = 150

# Bytes of what an app may say about a client, as JSON: others get it with each message.
MAX_INFO = 2048


class Omitted(enum.Enum):
    """The type of an omitted argument, which is not the same as None."""

    OMITTED = enum.auto()


OMITTED: Final = Omitted.OMITTED

# Arguments of `check_client` for calls that would mean something else without a client.
CONNECT = (
    "connect(...)",
    "would have opened the hub and registered nobody",
    "call connect() to open the hub",
)
DISCONNECT = (
    "disconnect(...)",
    "would have closed the hub",
    "call disconnect() to close the hub",
)
SEND_TO = (
    "send(to=...)",
    "would have sent the message to everybody",
    "leave to= out if everybody is meant",
)


def check_client(
    value: object, call: str, meaning: str = "names no client", instead: str = ""
) -> WebSocket:
    """Return the client, or raise a TypeError that explains what was passed instead.

    Args:
        value: The argument.
        call: The call, with `...` for the client.
        meaning: What the call would have done if None were the same as an omitted argument.
        instead: How to write a call that does that.
    """
    if isinstance(value, WebSocket):
        return value
    if value is None:
        call = call.replace("...", "None")
        instead = f", or {instead}" if instead else ""
        raise TypeError(f"{call} {meaning}; check whether your look-up found a client{instead}")
    raise TypeError(f"{call} needs a WebSocket, not {type(value).__name__}")


def check_excluded(exclude: WebSocket | Iterable[WebSocket | None]) -> list[WebSocket]:
    """Return the excluded clients. A None in the iterable is skipped."""
    if isinstance(exclude, (str, bytes, HTTPConnection)) or not isinstance(exclude, Iterable):
        return [check_client(exclude, "exclude=...")]
    return [check_client(each, "exclude=[...]") for each in exclude if each is not None]


def check_channel(client: HTTPConnection, channel: object) -> str:
    """Return the name of a client's channel. A refusal before accept is logged, once per kind.

    Raises:
        InvalidChannel: See `codec.check_channel`.
    """
    try:
        return codec.check_channel(channel)
    except InvalidChannel as exc:
        accepted = isinstance(client, WebSocket) and (
            client.application_state is not WebSocketState.CONNECTING
        )
        if not accepted:
            hint, what = "; check get_channel(), or what you pass as the channel", "type"
            if isinstance(channel, str):
                fits = 1 <= len(channel) <= codec.MAX_CHANNEL
                hint, what = "", "characters" if fits else "length"
            kind = ("channel", type(channel).__name__, what)
            logs.once(kind, "refused %s: %s%s", logs.client(client.scope), exc, hint)
        raise


def check_close(code: int, reason: str) -> None:
    """Check that a close frame may contain this code and reason.

    Raises:
        ConfigurationError: The code must not be sent, or the reason is too long.
    """
    # RFC 6455 section 7.4: 1004 is reserved, and 1005, 1006 and 1015 are never sent. Section 5.5: a
    # control frame holds 125 bytes, two of which are the code.
    if not ((1000 <= code <= 1014 and code not in (1004, 1005, 1006)) or 3000 <= code <= 4999):
        raise ConfigurationError(f"{code!r} is not a close code that may be sent")
    if len(reason.encode()) > 123:
        raise ConfigurationError("a close reason has at most 123 bytes")


def check_user(user: object) -> str:
    """Return the name of a user, which is what a channel's may be, but shorter.

    Raises:
        ConfigurationError: It is none.
        TypeError: It is None: programs look up a user, and pass on that they found none.
    """
    if user is None:
        raise TypeError("None is no user; check whether your look-up found one")
    try:
        name = codec.check_channel(user)
    except InvalidChannel as exc:
        raise ConfigurationError(str(exc).replace("channel's name", "user")) from None
    if len(name) > MAX_USER:
        raise ConfigurationError(f"a user must have 1 to {MAX_USER} characters, not {len(name)}")
    return name


def check_info(info: Any) -> Any:
    """Return what an app says about a client as plain JSON data, if it is of a moderate size.

    It may be what `publish` takes, such as a datetime: others get what that is written as. It is a
    copy, so that whoever writes it down later finds what was checked.

    Raises:
        ConfigurationError: It is not.
    """
    if info is None:
        return None
    try:
        text = codec.dumps(info)
        size = len(text.encode())
    except Exception as exc:
        raise ConfigurationError(f"info must be JSON data: {exc}") from None
    if size > MAX_INFO:
        raise ConfigurationError(f"info may have {MAX_INFO} bytes as JSON, not {size}")
    return json.loads(text)
