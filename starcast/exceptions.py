"""The errors that starcast raises.

    StarcastError
    ├── ConfigurationError   (ValueError)            a setting of the hub is not valid
    ├── InvalidChannel       (ValueError, 422, 1008) a channel's name is not allowed
    ├── EncodingError        (ValueError)            a message cannot be made into a frame
    ├── InvalidMessage       (1003, 1007 or 1009)    a client sent what is not allowed
    ├── OriginRefused        (1008)                  a page from another host asked to connect
    ├── ClientGone           (WebSocketDisconnect)   the client has left
    ├── NotConnected                                 `send(to=)` for a client that is not registered
    ├── PublishQueueFull     (503, 1013)             too many messages are waiting to be sent
    ├── BackendUnavailable   (503, 1013)             there is no connection to the broker
    ├── PayloadTooLarge      (ValueError, 413, 1009) a message is larger than the broker accepts
    ├── CommandError                                 what a hook of `ChannelsEndpoint` answers
    ├── DisconnectClient                             a hook of `ChannelsEndpoint` closes the client
    ├── SubscriberLagged                             a subscriber fell behind its buffer
    └── Unsubscribed                                 `Subscriber.get` after the subscription's end

Numbers from 1000 on are WebSocket close codes (RFC 6455, section 7.4), the others HTTP statuses.
The client gets them if nothing catches the error, in Starlette and in FastAPI:

- **In an HTTP route**, a dependency, or anything that they await, the status is the answer. 503
  comes with `Retry-After`, and the body does not repeat the message. `def` routes are no exception.
- **In a WebSocket route**, the client is closed with the code. If it has not been accepted yet, it
  gets HTTP 403; instead of 1013 it gets HTTP 503, if the server supports that.
- **In a WebSocket route whose client has left**, there is no client to answer: `ClientGone` is
  silent, and what has 1013 is one line in the log, at most every ten seconds. Anything else is a
  mistake, and has its traceback there.
- **Where no answer is possible**, it is an ordinary exception, and the server's log has its
  traceback: in a background task, in a stream that has begun, in a task that no route awaits, and
  in middleware, which is outside Starlette's error handling.

`except BackendUnavailable` works in all of these places, and so does
`@app.exception_handler(BackendUnavailable)` where an answer is possible. The handler replaces the
answers above, except for an accepted client of `BroadcastEndpoint`, `serve` or a mount, which is
always closed with the code. Errors with two numbers have both answers as attributes: `status_code`,
`detail` and `headers`, and `code` and `reason`. An error with only a close code is a
`starlette.exceptions.WebSocketException`.
"""

from __future__ import annotations

from starlette.exceptions import WebSocketException
from starlette.websockets import WebSocketDisconnect

from .answers import Adaptable, Answered, TryAgainLater
from .close_codes import NORMAL, POLICY_VIOLATION, TOO_BIG


class StarcastError(Exception):
    """The base class of every error that starcast raises.

    All of them can be pickled and copied, and `str()` and `repr()` show the message.
    """

    # Starlette's classes show the code and the reason there, and not the message.
    __str__ = Exception.__str__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class ConfigurationError(StarcastError, ValueError):
    """A setting is not valid: an unknown URL scheme, overflow policy or origin, for example."""


class InvalidChannel(StarcastError, Answered, ValueError):
    """A channel's name is not 1 to 200 characters without control characters."""

    status_code = 422
    detail = "invalid channel"
    code = POLICY_VIOLATION
    reason = "invalid channel"


class EncodingError(StarcastError, ValueError):
    """A message cannot be made into a frame: not serialisable, not text, or of the wrong type."""


class InvalidMessage(StarcastError, WebSocketException):
    """A client sent something that is not allowed.

    `code` is 1003 for a frame of the wrong type, 1007 for invalid content, and 1009 for a message
    longer than `max_message=` or larger than the broker accepts. The endpoint, `serve` and the
    mount close the client with it; handlers do not see this error. `hint` is for the log alone.
    """

    def __init__(self, code: int, reason: str, hint: str = "") -> None:
        WebSocketException.__init__(self, code=code, reason=reason)
        self.hint = hint
        self.args = (code, reason)  # pickle calls the class with these

    def __str__(self) -> str:
        return f"{self.reason} ({self.code})"


class OriginRefused(StarcastError, WebSocketException):
    """A web page of another host asked to connect, and `origins=` does not allow it.

    It is raised before the client is accepted, so the browser gets HTTP 403.
    """

    code = POLICY_VIOLATION
    reason = "origin not allowed"

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)


class ClientGone(StarcastError, Adaptable, WebSocketDisconnect):
    """The client had left before `connect` was called for it, or a message was addressed to it.

    For a message, it is only raised in the code that serves the client: see `Broadcast.send`. It is
    a `WebSocketDisconnect`, so a handler that catches that needs nothing more. If nothing catches
    it, the handler ends, and nothing is logged. `code` is 1006 (closed abnormally), unless the hub
    knows the actual code.
    """

    def __init__(self, code: int = NORMAL, reason: str | None = None) -> None:
        WebSocketDisconnect.__init__(self, code, reason)
        self.args = (self.code, self.reason)  # pickle calls the class with these

    def __str__(self) -> str:
        # A client may have chosen the reason, which must not begin a line in a log.
        reason = f", {self.reason!r}" if self.reason else ""
        return f"the client has left ({self.code}{reason})"


class NotConnected(StarcastError):
    """`send(to=websocket)` was called for a client that is not registered with the hub."""


class PublishQueueFull(StarcastError, TryAgainLater):
    """An event loop already has too many messages waiting, and nothing of this one was sent.

    `publish_nowait` raises it at once, `publish` and `send` after waiting two seconds for space.
    """


class BackendUnavailable(StarcastError, TryAgainLater):
    """There is no connection to the broker, or it did not answer in time.

    The message names the broker's host and never a password. It goes to the log, not to clients.
    """


class PayloadTooLarge(StarcastError, Answered, ValueError):
    """A message is larger than the broker accepts. Nothing of it was sent."""

    status_code = 413
    detail = "message too large"
    code = TOO_BIG
    reason = "message too large"


class SubscriberLagged(StarcastError):
    """A subscriber did not keep up. It got what was buffered; what followed is lost.

    Subscribe again to go on.
    """


class Unsubscribed(StarcastError):
    """`Subscriber.get` was called, and no further event will come: the subscription has ended."""


class CommandError(StarcastError):
    """Raise it in a hook of `ChannelsEndpoint` to answer the client's command with an error.

    Args:
        code: 100 to 399 are the protocol's own; use 400 to 1999 for yours.
        message: What the client is told.
        temporary: Whether the client should try again.
    """

    def __init__(self, code: int, message: str, temporary: bool = False) -> None:
        super().__init__(code, message, temporary)
        self.code = code
        self.message = message
        self.temporary = temporary

    def __str__(self) -> str:
        return f"{self.message} ({self.code})"


class DisconnectClient(StarcastError):
    """Raise it in a hook of `ChannelsEndpoint` to close the client.

    Args:
        code: After 3000 to 3499 and 4000 to 4499 the client comes back, after 3500 to 3999 and 4500
            to 4999 it does not. Use 4000 to 4999 for your own.
        reason: What the client is told, up to 123 bytes.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason} ({self.code})"
