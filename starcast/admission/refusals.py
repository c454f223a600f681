"""Refusals: refuse a client before it is accepted, and log the reason.

Browsers do not show the HTTP response of a failed handshake, so the reason has to be in the log.
With `refuse="close"` the client is accepted first and then closed, and the page sees the close code
and its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator
from typing import Any

from starlette.exceptions import HTTPException, WebSocketException
from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from .. import logs
from ..answers import Answered, may_be_denied
from ..close_codes import ABNORMAL
from ..exceptions import ClientGone, InvalidChannel, OriginRefused
from ..handler import is_gone
from ..servers import daphne, served, watch
from .hooks import Refuse, Refused

# The key in the scope under which a mount or an endpoint overrides the hub's `refuse`.
REFUSE = "starcast.refuse"


def is_new(websocket: WebSocket) -> bool:
    """Return whether the handshake has not been answered yet."""
    return websocket.application_state is WebSocketState.CONNECTING


def note(websocket: WebSocket, refuse: Refuse | None) -> None:
    """Override the hub's `refuse` for this client, unless `refuse` is None."""
    if refuse is not None:
        websocket.scope[REFUSE] = refuse


def _log_once(exc: Exception, code: int, answer: str, why: str) -> None:
    logs.once(
        ("refused", type(exc).__name__, str(code)),
        "refused a client before it was accepted (%s): %s; "
        "further refusals of this kind are not logged",
        answer,
        why,
    )


def log(exc: Exception, code: int, answer: str) -> None:
    """Log why a client is refused, once for each kind of reason.

    Args:
        exc: Why it is refused.
        code: The close code or the status that stands for this.
        answer: What the client gets.
    """
    if isinstance(exc, OriginRefused | InvalidChannel | Refused):
        return  # the check has logged the reason, and what would admit the client
    # The app may have put text from the client into the message.
    _log_once(exc, code, answer, logs.escape(str(exc)))


def _log(websocket: WebSocket, exc: WebSocketException | Answered, closes: bool) -> None:
    if closes:
        answer = f"closed with {exc.code}"
    elif isinstance(exc, Answered) and may_be_denied(websocket, exc):
        answer = f"HTTP {exc.status_code}"
    else:
        answer = "HTTP 403"
    log(exc, exc.code, answer)


def log_http(websocket: WebSocket, exc: Exception) -> None:
    """Log why a client is refused if the app raised an `HTTPException` before accepting it.

    The caller re-raises the exception, so that the app answers it.
    """
    if isinstance(exc, HTTPException) and is_new(websocket):
        _log_once(exc, exc.status_code, f"HTTP {exc.status_code}", f"{exc.detail!r:.200}")


async def prepare(
    websocket: WebSocket,
    exc: WebSocketException | Answered,
    refuse: Refuse,
    subprotocol: str | None,
    close_timeout: float,
) -> bool:
    """Log why a new client is refused, and accept it if it is to be refused by a close frame.

    Args:
        websocket: The client.
        exc: Why it is refused.
        refuse: The hub's `refuse`, which a mount or an endpoint may have overridden.
        subprotocol: Passed to `accept`. Browsers fail a connection if they have offered
            subprotocols and the server selects none.
        close_timeout: How long the client has to take the handshake and the close, in seconds.

    Returns:
        Whether the client can still be answered. False if it left before it was accepted.
    """
    if not is_new(websocket):
        return True
    closes = websocket.scope.get(REFUSE, refuse) == "close"
    _log(websocket, exc, closes)
    if closes:
        if is_gone(websocket):
            return False
        daphne.adapt(websocket)
        try:
            async with asyncio.timeout(close_timeout):
                await websocket.accept(subprotocol=subprotocol)
        except (WebSocketDisconnect, OSError, TimeoutError):
            return False
        _abort_later(websocket, close_timeout)
    return True


@contextlib.asynccontextmanager
async def prepared(
    websocket: WebSocket, refuse: Refuse, subprotocol: str | None, close_timeout: float
) -> AsyncIterator[None]:
    """Call `prepare` if the block raises. The code that catches the error answers the client."""
    try:
        yield
    except (OriginRefused, Answered) as exc:
        if not await prepare(websocket, exc, refuse, subprotocol, close_timeout):
            raise ClientGone(ABNORMAL) from exc
        raise


async def answer(
    websocket: WebSocket, exc: WebSocketException | Answered, close_timeout: float
) -> None:
    """Answer the handshake with 503 if trying again may help, else with 403.

    A client that `prepare` has accepted is closed with the error's code instead. Gives up after
    `close_timeout`.
    """
    if is_gone(websocket):
        return
    with contextlib.suppress(WebSocketDisconnect, OSError, TimeoutError):
        async with asyncio.timeout(close_timeout):
            if is_new(websocket) and isinstance(exc, Answered) and may_be_denied(websocket, exc):
                await websocket.send_denial_response(
                    PlainTextResponse(exc.detail, exc.status_code, exc.headers)
                )
            else:
                await websocket.close(exc.code, exc.reason)


def _abort_later(websocket: WebSocket, seconds: float) -> None:
    """Abort the connection if the client, by reading nothing, prevents it from closing in time."""
    protocol = served.find_protocol(websocket)
    if protocol is not None:
        asyncio.get_running_loop().call_later(seconds, _abort, weakref.ref(protocol))


def _abort(reference: weakref.ref[Any]) -> None:
    protocol = reference()  # None if the connection has ended, which is the usual case
    if protocol is not None and watch.can_abort(protocol.transport):
        protocol.transport.abort()
