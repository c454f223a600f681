"""Codes of the client protocol, as Centrifugo's documentation lists them.

A client comes back after a disconnect code from 3000 to 3499 or from 4000 to 4499, and stays away
after others from 3500 on. It subscribes again after an unsubscribe code from 2500 on.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Code(NamedTuple):
    """A code, what it says, and for an error whether trying again may help."""

    number: int
    reason: str
    temporary: bool = False


# Errors, in replies
INTERNAL: Final = Code(100, "internal server error", True)
UNAUTHORIZED: Final = Code(101, "unauthorized")
PERMISSION_DENIED: Final = Code(103, "permission denied")
METHOD_NOT_FOUND: Final = Code(104, "method not found")
ALREADY_SUBSCRIBED: Final = Code(105, "already subscribed")
LIMIT_EXCEEDED: Final = Code(106, "limit exceeded")
BAD_REQUEST: Final = Code(107, "bad request")
NOT_AVAILABLE: Final = Code(108, "not available")
TOKEN_EXPIRED: Final = Code(109, "token expired")
TOO_MANY_REQUESTS: Final = Code(111, "too many requests", True)
UNRECOVERABLE: Final = Code(112, "unrecoverable position")

# Disconnects after which the client comes back
SERVER_ERROR: Final = Code(3004, "internal server error")
EXPIRED: Final = Code(3005, "connection expired")
FORCE_RECONNECT: Final = Code(3011, "force reconnect")
NO_PONG: Final = Code(3012, "no pong")

# Disconnects after which it does not
INVALID_TOKEN: Final = Code(3500, "invalid token")
BAD_COMMAND: Final = Code(3501, "bad request")
STALE: Final = Code(3502, "stale")
FORCE_DISCONNECT: Final = Code(3503, "force disconnect")
SEND_NOT_AVAILABLE: Final = Code(3508, "not available")
PROTOBUF_NOT_AVAILABLE: Final = Code(3508, "protobuf is not available")

# Unsubscribes
UNSUBSCRIBED: Final = Code(2000, "server unsubscribe")
INSUFFICIENT: Final = Code(2500, "insufficient state")
SUBSCRIPTION_EXPIRED: Final = Code(2501, "subscription expired")
