"""The errors that starcast raises.

    StarcastError
    ├── ConfigurationError   (ValueError)          a setting of the hub makes no sense
    ├── InvalidChannel       (ValueError, 1008)    a channel's name is not allowed
    ├── EncodingError        (ValueError)          a message cannot become a frame
    ├── InvalidMessage       (1007 or 1003)        a client sent what its encoding does not allow
    ├── OriginRefused        (1008)                a page from another host asked to connect
    ├── ClientGone           (WebSocketDisconnect) the client that one serves has left
    ├── NotConnected                               `send(to=)` for a client that is not registered
    ├── PublishQueueFull                           more is waiting to be sent than may wait
    ├── BackendUnavailable   (1013)                there is no connection to the broker
    ├── PayloadTooLarge      (ValueError)          a message is larger than the broker takes
    └── SubscriberLagged                           a subscriber fell behind its buffer

A number in brackets is a WebSocket close code of RFC 6455, section 7.4. An error with a number is
a `starlette.exceptions.WebSocketException` too: raised in a WebSocket route it closes that client
with the code (before the handshake is answered: with HTTP 403) and leaves no traceback in the log.
"""

from __future__ import annotations

from starlette.exceptions import WebSocketException
from starlette.websockets import WebSocketDisconnect


class StarcastError(Exception):
    """The base of every error that starcast raises on its own account."""


class ConfigurationError(StarcastError, ValueError):
    """A setting makes no sense: an unknown URL scheme, overflow policy or origin."""


class InvalidChannel(StarcastError, WebSocketException, ValueError):
    """A channel's name is not 1 to 200 characters without control characters.

    In a WebSocket route it refuses or closes the client with 1008 (policy violation).
    """

    def __init__(self, message: str) -> None:
        WebSocketException.__init__(self, code=1008, reason="invalid channel")
        self.message = message

    def __str__(self) -> str:
        return self.message


class EncodingError(StarcastError, ValueError):
    """A message cannot become a frame: not serialisable, not text, or of the wrong type."""


class InvalidMessage(StarcastError, WebSocketException):
    """A client sent something that its endpoint's encoding does not allow.

    `code` is 1003 for a frame of the wrong type and 1007 for content that is not valid. The
    endpoint, `serve` and the mount close the client with it; handlers do not see this error.
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
        WebSocketException.__init__(self, code=1008, reason="origin not allowed")
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


class PublishQueueFull(StarcastError):
    """An event loop has more messages waiting than may wait, and nothing of this one was sent.

    `publish_nowait` raises it at once, `publish` and `send` after waiting two seconds for room.
    """


class BackendUnavailable(StarcastError, WebSocketException):
    """There is no connection to the broker, or it did not answer in time.

    In a WebSocket route it refuses or closes the client with 1013 (try again later). The message
    names the broker's host and never a password.
    """

    def __init__(self, message: str) -> None:
        WebSocketException.__init__(self, code=1013, reason="try again later")
        self.message = message

    def __str__(self) -> str:
        return self.message


class PayloadTooLarge(StarcastError, ValueError):
    """A message is larger than the broker takes. Nothing of it was sent."""


class SubscriberLagged(StarcastError):
    """A subscriber did not keep up: what was buffered has been handed out, what followed is lost.

    Subscribe again to go on.
    """
