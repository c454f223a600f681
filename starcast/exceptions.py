"""The errors that starcast raises.

    StarcastError
    ├── ConfigurationError   (ValueError)            a setting of the hub makes no sense
    ├── InvalidChannel       (ValueError, 422, 1008) a channel's name is not allowed
    ├── EncodingError        (ValueError)            a message cannot become a frame
    ├── InvalidMessage       (1003, 1007 or 1009)    a client sent what cannot be taken
    ├── OriginRefused        (1008)                  a page from another host asked to connect
    ├── ClientGone           (WebSocketDisconnect)   the client that one serves has left
    ├── NotConnected                                 `send(to=)` for a client that is not registered
    ├── PublishQueueFull     (503, 1013)             more is waiting to be sent than may wait
    ├── BackendUnavailable   (503, 1013)             there is no connection to the broker
    ├── PayloadTooLarge      (ValueError, 413, 1009) a message is larger than the broker takes
    └── SubscriberLagged                             a subscriber fell behind its buffer

A number from 1000 on is a WebSocket close code of RFC 6455, section 7.4, the other one an HTTP
status. They are what the client gets if nobody catches the error, in Starlette and in FastAPI:

- **An HTTP route**, a dependency or anything that they await answers with the status. 503 comes
  with `Retry-After`, and the body does not repeat the message. A `def` route does so too.
- **A WebSocket route** closes the client with the code. If the client was not accepted yet, it is
  answered with HTTP 503 instead of 1013 where the server can do that, and with 403 otherwise.
- **Where nothing can be answered any more** it is an error like any other, and the server's log has
  its traceback: in a background task, in a stream that has begun, after the client has left, in a
  task that no route awaits, and in middleware, which is outside of Starlette's error handling.

`except BackendUnavailable` and `@app.exception_handler(BackendUnavailable)` work in all of them. A
handler of the app's is called instead of the answers above, but not for an accepted client of
`BroadcastEndpoint`, `serve` or a mount, which is closed with the code. For an error with two
numbers, both answers are attributes: `status_code`, `detail` and `headers`, and `code` and
`reason`. An error with a close code only is a `starlette.exceptions.WebSocketException`.
"""

from __future__ import annotations

from typing import ClassVar

from starlette.exceptions import WebSocketException
from starlette.websockets import WebSocketDisconnect

from .answers import Answered
from .close_codes import POLICY_VIOLATION, TOO_BIG, TRY_AGAIN_LATER

# Seconds after which a client may try again what could not be published: about as long as the link
# waits before it tries to connect again.
RETRY_AFTER = 2


class StarcastError(Exception):
    """The base of every error that starcast raises on its own account."""


class ConfigurationError(StarcastError, ValueError):
    """A setting makes no sense: an unknown URL scheme, overflow policy or origin."""


class InvalidChannel(StarcastError, Answered, ValueError):
    """A channel's name is not 1 to 200 characters without control characters."""

    status_code = 422
    detail = "invalid channel"
    code = POLICY_VIOLATION
    reason = "invalid channel"


class EncodingError(StarcastError, ValueError):
    """A message cannot become a frame: not serialisable, not text, or of the wrong type."""


class InvalidMessage(StarcastError, WebSocketException):
    """A client sent something that cannot be taken.

    `code` is 1003 for a frame of the wrong type, 1007 for content that is not valid, and 1009 for a
    message that is larger than the broker takes. The endpoint, `serve` and the mount close the
    client with it; handlers do not see this error.
    """

    def __init__(self, code: int, reason: str) -> None:
        WebSocketException.__init__(self, code=code, reason=reason)

    def __str__(self) -> str:
        return f"{self.reason} ({self.code})"


class OriginRefused(StarcastError, WebSocketException):
    """A web page of another host asked to connect, and `origins=` does not allow it.

    It is raised before the handshake is answered, so the browser sees HTTP 403.
    """

    def __init__(self, message: str) -> None:
        WebSocketException.__init__(self, code=POLICY_VIOLATION, reason="origin not allowed")
        self.message = message

    def __str__(self) -> str:
        return self.message


class ClientGone(StarcastError, WebSocketDisconnect):
    """The client had left when `connect` was called for it, or a message was addressed to it.

    Of messages, only whoever serves the client is told so: see `Broadcast.send`. It is a
    `WebSocketDisconnect`, so a handler that is ready for one needs nothing more. `code` is 1006
    (closed abnormally), unless the hub knows another.
    """


class NotConnected(StarcastError):
    """`send(to=websocket)` was called for a living client that is not registered with the hub."""


class PublishQueueFull(StarcastError, Answered):
    """An event loop has more messages waiting than may wait, and nothing of this one was sent.

    `publish_nowait` raises it at once, `publish` and `send` after waiting two seconds for space.
    """

    status_code = 503
    detail = "try again later"
    headers: ClassVar[dict[str, str] | None] = {"Retry-After": str(RETRY_AFTER)}
    code = TRY_AGAIN_LATER
    reason = "try again later"


class BackendUnavailable(StarcastError, Answered):
    """There is no connection to the broker, or it did not answer in time.

    The message names the broker's host and never a password. It goes to the log, not to clients.
    """

    status_code = 503
    detail = "try again later"
    headers: ClassVar[dict[str, str] | None] = {"Retry-After": str(RETRY_AFTER)}
    code = TRY_AGAIN_LATER
    reason = "try again later"


class PayloadTooLarge(StarcastError, Answered, ValueError):
    """A message is larger than the broker takes. Nothing of it was sent."""

    status_code = 413
    detail = "message too large"
    code = TOO_BIG
    reason = "message too large"


class SubscriberLagged(StarcastError):
    """A subscriber did not keep up: what was buffered has been handed out, what followed is lost.

    Subscribe again to go on.
    """
