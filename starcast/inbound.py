"""Inbound: how long one message of a client may be when the hub reads for the app."""

from __future__ import annotations

from starlette.types import Message

from .close_codes import TOO_BIG
from .exceptions import ConfigurationError, InvalidMessage

# Bytes: a quarter of the default `max_buffer`, so that what several clients say at once still fits
# into the buffer of one who reads it.
MAX_MESSAGE = 256 * 1024


def check(max_message: int | None) -> int | None:
    """Return a bound if it can be one, or raise `ConfigurationError`."""
    if max_message is None or (type(max_message) is int and max_message > 0):
        return max_message
    raise ConfigurationError(f"max_message is a number of bytes above 0, not {max_message!r}")


def check_size(message: Message, bound: int | None) -> None:
    """Refuse a client's `websocket.receive` message that is too long, before it is decoded.

    Raises:
        InvalidMessage: 1009.
    """
    text: str | None = message.get("text")
    # A character takes one to four bytes, so most texts need not be encoded to be measured.
    if bound is None or (text is not None and len(text) * 4 <= bound):
        return
    if text is None:
        too_long = len(message.get("bytes") or b"") > bound
    else:  # "surrogatepass": what has no UTF-8 form is for the decoder to refuse
        too_long = len(text) > bound or len(text.encode(errors="surrogatepass")) > bound
    if too_long:
        raise InvalidMessage(
            TOO_BIG,
            f"longer than {bound} bytes",
            "; max_message= of the hub, serve, app or the endpoint allows more",
        )
