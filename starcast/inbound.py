"""Inbound: bound the size of messages from clients where the hub receives for the app."""

from __future__ import annotations

from starlette.types import Message

from .close_codes import TOO_BIG
from .exceptions import ConfigurationError, InvalidMessage

# Bytes. A quarter of the default `max_buffer`, so that messages which several clients send at once
# fit into the buffer of a client that receives them all.
MAX_MESSAGE = 256 * 1024


def check(max_message: int | None) -> int | None:
    """Return `max_message` if it is valid, or raise `ConfigurationError`."""
    if max_message is None or (type(max_message) is int and max_message > 0):
        return max_message
    raise ConfigurationError(f"max_message must be a number of bytes above 0, not {max_message!r}")


def check_size(message: Message, bound: int | None) -> None:
    """Refuse a client's `websocket.receive` message if it is larger than `bound` bytes.

    Raises:
        InvalidMessage: 1009.
    """
    text: str | None = message.get("text")
    # A character takes at most four bytes, so the size of most texts is known without encoding.
    if bound is None or (text is not None and len(text) * 4 <= bound):
        return
    if text is None:
        too_long = len(message.get("bytes") or b"") > bound
    else:  # "surrogatepass" because it is the decoder that refuses lone surrogates
        too_long = len(text) > bound or len(text.encode(errors="surrogatepass")) > bound
    if too_long:
        raise InvalidMessage(
            TOO_BIG,
            f"longer than {bound} bytes",
            "; max_message= of the hub, serve, app or the endpoint allows more",
        )
