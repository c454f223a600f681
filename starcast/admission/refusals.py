"""Refusals: a client that is turned away before its handshake is answered, and the line about it.

A browser shows nothing of an HTTP response to anybody, so the log has to. With `refuse="close"` the
client is accepted first, and a page sees the close code and the reason.
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
from ..connection import is_gone
from ..exceptions import ClientGone, InvalidChannel, OriginRefused
from ..servers import daphne, served, watch
from .hooks import Refuse, Refused

# Seconds that a client has to take the answer.
CLOSE_TIMEOUT = 10.0

# Where a mount or an endpoint that refuses in another way than its hub notes that in the scope.
REFUSE = "starcast.refuse"


def is_new(websocket: WebSocket) -> bool:
    """Whether nobody has answered the handshake yet."""
    return websocket.application_state is WebSocketState.CONNECTING


def note(websocket: WebSocket, refuse: Refuse | None) -> None:
    """Let this client be refused in this way, if one is given, instead of the hub's."""
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


def _log(websocket: WebSocket, exc: WebSocketException | Answered, closes: bool) -> None:
    """Say why clients are refused, once for each kind of reason."""
    if isinstance(exc, OriginRefused | InvalidChannel | Refused):
        return  # the check has logged what would let the client in
    if closes:
        answer = f"closed with {exc.code}"
    elif isinstance(exc, Answered) and may_be_denied(websocket, exc):
        answer = f"HTTP {exc.status_code}"
    else:
        answer = "HTTP 403"
    # The app may have put something of the client's into it.
    _log_once(exc, exc.code, answer, logs.escape(str(exc)))


def log_http(websocket: WebSocket, exc: Exception) -> None:
    """Say why a client is refused if the app has raised an `HTTPException` before it accepted it.

    The exception takes its way to the app, which answers it.
    """
    if isinstance(exc, HTTPException) and is_new(websocket):
        _log_once(exc, exc.status_code, f"HTTP {exc.status_code}", f"{exc.detail!r:.200}")


async def prepare(
    websocket: WebSocket,
    exc: WebSocketException | Answered,
    refuse: Refuse,
    subprotocol: str | None,
) -> bool:
    """Say why a new client is refused, and accept it if a close frame is to tell it.

    Args:
        websocket, exc: The client, and what it is refused for.
        refuse: What the hub was told.
        subprotocol: For `accept`: a browser fails a connection whose subprotocols nobody takes.

    Returns:
        Whether it can still be answered: False if it was to be accepted and has left.
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
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await websocket.accept(subprotocol=subprotocol)
        except (WebSocketDisconnect, OSError, TimeoutError):
            return False
        _abort_later(websocket)
    return True


@contextlib.asynccontextmanager
async def prepared(
    websocket: WebSocket, refuse: Refuse, subprotocol: str | None
) -> AsyncIterator[None]:
    """Prepare the answer if an error gets out of the block. Whoever catches it answers."""
    try:
        yield
    except (OriginRefused, Answered) as exc:
        if not await prepare(websocket, exc, refuse, subprotocol):
            raise ClientGone(ABNORMAL) from exc
        raise


async def answer(websocket: WebSocket, exc: WebSocketException | Answered) -> None:
    """Answer the handshake, within 10 seconds: 503 if trying again may help, 403 otherwise.

    A client that `prepare` has accepted is closed.
    """
    if is_gone(websocket):
        return
    with contextlib.suppress(WebSocketDisconnect, OSError, TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT):
            if is_new(websocket) and isinstance(exc, Answered) and may_be_denied(websocket, exc):
                await websocket.send_denial_response(
                    PlainTextResponse(exc.detail, exc.status_code, exc.headers)
                )
            else:
                await websocket.close(exc.code, exc.reason)


def _abort_later(websocket: WebSocket) -> None:
    """Drop a client that is to be closed and keeps the server from that by reading nothing."""
    protocol = served.find_protocol(websocket)
    if protocol is not None:
        asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, _abort, weakref.ref(protocol))


def _abort(reference: weakref.ref[Any]) -> None:
    protocol = reference()  # most often gone by now, and not kept for this
    if protocol is not None and watch.is_there(protocol.transport):
        protocol.transport.abort()
