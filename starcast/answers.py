"""Answers: what Starlette makes of an error that nobody catches, wherever it was raised.

Starlette chooses the answer by the type of the error: an `HTTPException` becomes a response, a
`WebSocketException` a close code. Neither fits everywhere. A request cannot be closed with a code,
a websocket that was accepted cannot get a response, and where the response has started already, as
in a background task, Starlette raises a second error for any type that it has a handler for.

`publish` is called in all of these places, and also in threads and in tasks of their own, from
where the error only later reaches a route. So an `Answered` error is raised as what it is, and
takes a type that fits at the moment when Starlette asks for it: the first thing that Starlette's
`wrap_app_handling_exceptions` does with an error is `isinstance(exc, HTTPException)`, and there
everything is known that decides. That is what `Adaptable` is for.

A handler's last words to the others, when its client has left, cannot be answered to anybody. If
they fail because the broker is away, that is one line in the log, and not a traceback for each
client that leaves during an outage. That the client has left, as such, is not even that line:
clients leave at any time, in the middle of a handshake too, and could fill the log.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, ClassVar

from starlette.exceptions import HTTPException, WebSocketException
from starlette.websockets import WebSocket, WebSocketState

from . import logs
from .close_codes import TRY_AGAIN_LATER

# Seconds after which a client may try again: about as long as the link waits before it tries to
# connect to the broker again.
RETRY_AFTER = 2

_set_class = vars(object)["__class__"].__set__


class Adaptable(Exception):
    """An error that takes the type that fits when Starlette looks for the answer to it."""

    # Those of HTTPException and WebSocketException show the answer and hide the message.
    __str__ = Exception.__str__
    __repr__ = Exception.__repr__

    @property  # type: ignore[misc]  # a property that Python itself asks for, see `isinstance`
    def __class__(self) -> type[Any]:
        asking = sys._getframe().f_back
        if (
            asking is not None
            and asking.f_code.co_name == "wrapped_app"
            and asking.f_globals.get("__name__") == "starlette._exception_handler"
            and (base := _fitting(self, asking.f_locals)) is not None
        ):
            _set_class(self, _answer(type(self), base))
            return base
        return type(self)

    def __reduce__(self) -> tuple[Any, ...]:
        cls = type(self)
        return vars(cls).get("_public", cls), self.args, vars(self)


class Answered(Adaptable):
    """An error that has an answer for HTTP and one for WebSocket.

    Attributes:
        status_code, detail, headers: Of the HTTP response. None of them tells strangers what the
            message of the error tells the log.
        code, reason: Of the close frame.
    """

    status_code: ClassVar[int]
    detail: ClassVar[str]
    headers: ClassVar[dict[str, str] | None] = None
    code: ClassVar[int]
    reason: ClassVar[str]


class TryAgainLater(Answered):
    """An error that may be gone in a moment."""

    status_code = 503
    detail = "try again later"
    headers: ClassVar[dict[str, str] | None] = {"Retry-After": str(RETRY_AFTER)}
    code = TRY_AGAIN_LATER
    reason = "try again later"


def _answer(cls: type[Adaptable], base: type[Exception]) -> type[Adaptable]:
    """Return the class that is also a `base`. It looks like the one that people know."""
    public = vars(cls).get("_public", cls)
    members = {
        "_public": public,
        "__doc__": public.__doc__,
        "__module__": public.__module__,
        "__qualname__": public.__qualname__,
    }
    return type(public.__name__, (public, base), members)


def _fitting(exc: Adaptable, place: dict[str, Any]) -> type[Exception] | None:
    """Return the type that Starlette can answer here; None if there is nothing to be answered."""
    if not isinstance(place.get("conn"), WebSocket):
        answerable = isinstance(exc, Answered) and place.get("response_started") is False
        return HTTPException if answerable else None
    if not isinstance(exc, Answered):  # it says that there is nobody
        place["conn"].close = _close_nobody
        return WebSocketException
    websocket = _in_use(place["conn"], exc.__traceback__)
    if websocket.application_state is WebSocketState.CONNECTING:
        return HTTPException if may_be_denied(websocket, exc) else WebSocketException
    states = (websocket.application_state, websocket.client_state)
    if states == (WebSocketState.CONNECTED,) * 2:
        return WebSocketException
    if exc.code != TRY_AGAIN_LATER:
        return None
    logs.seldom(
        "goodbye", "what was published when a client had left is lost: %s", logs.escape(str(exc))
    )
    place["conn"].close = _close_nobody
    return WebSocketException


async def _close_nobody(code: int = TRY_AGAIN_LATER, reason: str | None = None) -> None:
    """Stands for the `close` of a websocket that is closed, which Starlette calls to answer."""


def _in_use(websocket: WebSocket, traceback: TracebackType | None) -> WebSocket:
    """Return the object that was accepted or closed, for a class-based endpoint has its own.

    The error came through the frame that made it, and so it is among the variables there.
    """
    while traceback is not None:
        for value in list(traceback.tb_frame.f_locals.values()):
            # Not isinstance: a proxy of somebody's would be looked into.
            if issubclass(type(value), WebSocket) and _is_same(value, websocket):
                websocket = value
        traceback = traceback.tb_next
    return websocket


def _is_same(one: WebSocket, other: WebSocket) -> bool:
    # A middleware may have copied the scope, but not what is in it.
    return one.scope.get("headers") is other.scope.get("headers")


def may_be_denied(websocket: WebSocket, exc: Exception) -> bool:
    """Whether the handshake can and shall be answered with the HTTP status of an error.

    Clients take 403, the answer of a server to a close before accept, for the final word. That is
    right for what they cannot change by trying again.
    """
    return (
        isinstance(exc, Answered)
        and exc.code == TRY_AGAIN_LATER
        and "websocket.http.response" in (websocket.scope.get("extensions") or {})
    )
