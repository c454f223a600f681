"""Answers: have Starlette answer an uncaught error correctly, wherever it was raised.

Starlette chooses the answer by the type of the error: an `HTTPException` becomes a response, a
`WebSocketException` a close code. Neither is always right. A request cannot be closed with a code,
and a websocket that has been accepted cannot get a response. Once a response has started, as in a
background task, Starlette raises a second error for any type that it has a handler for.

`publish` is called in all of these places, and also in threads and separate tasks, whose errors
only reach a route later. So the type of an `Answered` error is decided when Starlette asks for it:
`wrap_app_handling_exceptions` starts with `isinstance(exc, HTTPException)`, and at that point
everything that matters is known. This is what `Adaptable` is for.

If a handler publishes after its client has left, there is no client to answer. A failure because of
an unreachable broker is then logged as one line, instead of a traceback for each client that leaves
during an outage. An error that only says that the client has left is not logged at all: clients
leave at any time, even during the handshake, and could fill the log.
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
    """An error that changes its type to one that Starlette can answer when Starlette checks it."""

    # HTTPException and WebSocketException show the answer here, and hide the message.
    __str__ = Exception.__str__
    __repr__ = Exception.__repr__

    @property  # type: ignore[misc]  # `isinstance` reads this property
    def __class__(self) -> type[Any]:
        caller = sys._getframe().f_back
        if (
            caller is not None
            and caller.f_code.co_name == "wrapped_app"
            and caller.f_globals.get("__name__") == "starlette._exception_handler"
            and (base := _choose_base(self, caller.f_locals)) is not None
        ):
            _set_class(self, _make_class(type(self), base))
            return base
        return type(self)

    def __reduce__(self) -> tuple[Any, ...]:
        cls = type(self)
        return vars(cls).get("_public", cls), self.args, vars(self)


class Answered(Adaptable):
    """An error with an answer for HTTP and one for WebSocket.

    The message of the error is for the log. The answers go to clients and must not disclose it.

    Attributes:
        status_code: The status of the HTTP response.
        detail: The body of the HTTP response.
        headers: The headers of the HTTP response; None for no more than the usual ones.
        code: The close code.
        reason: The reason in the close frame.
    """

    status_code: ClassVar[int]
    detail: ClassVar[str]
    headers: ClassVar[dict[str, str] | None] = None
    code: ClassVar[int]
    reason: ClassVar[str]


class TryAgainLater(Answered):
    """An error that may soon be over."""

    status_code = 503
    detail = "try again later"
    headers: ClassVar[dict[str, str] | None] = {"Retry-After": str(RETRY_AFTER)}
    code = TRY_AGAIN_LATER
    reason = "try again later"


def _make_class(cls: type[Adaptable], base: type[Exception]) -> type[Adaptable]:
    """Return a class that also inherits from `base`, under the name of the public class."""
    public = vars(cls).get("_public", cls)
    members = {
        "_public": public,
        "__doc__": public.__doc__,
        "__module__": public.__module__,
        "__qualname__": public.__qualname__,
    }
    return type(public.__name__, (public, base), members)


def _choose_base(exc: Adaptable, variables: dict[str, Any]) -> type[Exception] | None:
    """Return the type that Starlette can answer; None if there is no answer.

    Args:
        exc: The error.
        variables: The local variables of the function in Starlette that handles it.
    """
    if not isinstance(variables.get("conn"), WebSocket):
        answerable = isinstance(exc, Answered) and variables.get("response_started") is False
        return HTTPException if answerable else None
    if not isinstance(exc, Answered):  # the error says that the client has left
        variables["conn"].close = _do_not_close
        return WebSocketException
    websocket = _find_in_use(variables["conn"], exc.__traceback__)
    if websocket.application_state is WebSocketState.CONNECTING:
        return HTTPException if may_be_denied(websocket, exc) else WebSocketException
    states = (websocket.application_state, websocket.client_state)
    if states == (WebSocketState.CONNECTED,) * 2:
        return WebSocketException
    if exc.code != TRY_AGAIN_LATER:
        return None
    logs.seldom(
        "goodbye",
        "a message published after its client had left is lost: %s",
        logs.escape(str(exc)),
    )
    variables["conn"].close = _do_not_close
    return WebSocketException


async def _do_not_close(code: int = TRY_AGAIN_LATER, reason: str | None = None) -> None:
    """Replaces `close` of a websocket that is closed already; Starlette calls it to answer."""


def _find_in_use(websocket: WebSocket, traceback: TracebackType | None) -> WebSocket:
    """Return the object that was accepted or closed: a class-based endpoint makes its own.

    The frame that made it is in the traceback of the error, and has it as a local variable.
    """
    while traceback is not None:
        for value in list(traceback.tb_frame.f_locals.values()):
            # Not isinstance, which would resolve a proxy object of the app.
            if issubclass(type(value), WebSocket) and _is_same(value, websocket):
                websocket = value
        traceback = traceback.tb_next
    return websocket


def _is_same(one: WebSocket, other: WebSocket) -> bool:
    # A middleware may have copied the scope, but not the values in it.
    return one.scope.get("headers") is other.scope.get("headers")


def may_be_denied(websocket: WebSocket, exc: Exception) -> bool:
    """Return whether the handshake can and should be answered with the HTTP status of an error.

    It is not if trying again cannot help. The server then answers the close before accept with 403,
    which clients understand as final.
    """
    return (
        isinstance(exc, Answered)
        and exc.code == TRY_AGAIN_LATER
        and "websocket.http.response" in (websocket.scope.get("extensions") or {})
    )
