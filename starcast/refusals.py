"""Refusals: a client that is turned away before its handshake is answered, and the line about it.

A browser shows nothing of the reason to anybody, so the log has to.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from starlette.exceptions import HTTPException, WebSocketException
from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from . import logs
from .admission import Refused
from .answers import Answered, may_be_denied
from .connection import CLOSE_TIMEOUT, is_gone
from .exceptions import InvalidChannel, OriginRefused


def log(websocket: WebSocket, exc: WebSocketException | Answered) -> None:
    """Say why clients are refused, once for each kind of reason."""
    if isinstance(exc, OriginRefused | InvalidChannel | Refused):
        return  # whoever checked that has said what would let the client in
    logs.once(
        ("refused", type(exc).__name__, str(exc.code)),
        "refused a client before it was accepted (HTTP %d): %s; "
        "further refusals of this kind are not logged",
        exc.status_code if isinstance(exc, Answered) and may_be_denied(websocket, exc) else 403,
        logs.escape(str(exc)),  # the app may have put something of the client's into it
    )


def log_http(websocket: WebSocket, exc: Exception) -> None:
    """Say why a client is refused if the app has raised an `HTTPException` before it accepted it.

    The exception takes its way to the app, which answers it.
    """
    if isinstance(exc, HTTPException) and websocket.application_state is WebSocketState.CONNECTING:
        logs.once(
            ("refused", "HTTPException", str(exc.status_code)),
            "refused a client before its handshake was answered (HTTP %d), and others of this kind "
            "without a line of their own: %.200r",
            exc.status_code,
            exc.detail,
        )


@contextlib.contextmanager
def logged(websocket: WebSocket) -> Iterator[None]:
    """Say why it was refused if an error gets out of the block. Whoever catches it answers it."""
    is_new = websocket.application_state is WebSocketState.CONNECTING
    try:
        yield
    except Answered as exc:
        if is_new:
            log(websocket, exc)
        raise


async def refuse(websocket: WebSocket, exc: WebSocketException | Answered) -> None:
    """Answer the handshake, within 10 seconds: 503 if trying again may help, 403 otherwise."""
    log(websocket, exc)
    if is_gone(websocket):
        return
    with contextlib.suppress(WebSocketDisconnect, OSError, TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT):
            if isinstance(exc, Answered) and may_be_denied(websocket, exc):
                await websocket.send_denial_response(
                    PlainTextResponse(exc.detail, exc.status_code, exc.headers)
                )
            else:
                await websocket.close(exc.code, exc.reason)
