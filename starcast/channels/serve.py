"""Serve: the life of a client that speaks the protocol, from the handshake to its close code."""

from __future__ import annotations

import logging

from starlette.websockets import WebSocket

from .. import logs, serving
from ..close_codes import ABNORMAL
from ..exceptions import ConfigurationError, DisconnectClient
from ..hub import Hub
from .formats import JSON
from .hooks import Hooks
from .model import Limits
from .session import Session

LIMITS = Limits()

logger = logging.getLogger("starcast")


def check_limits(limits: object) -> Limits:
    """Return limits if they are some, or raise `ConfigurationError`."""
    if isinstance(limits, Limits):
        return limits
    raise ConfigurationError(f"limits must be a Limits, not {limits!r}")


async def serve(
    hub: Hub, websocket: WebSocket, hooks: Hooks, limits: Limits, max_message: int | None
) -> int:
    """Serve a client until it leaves, and return its close code."""
    session = Session(hub, websocket, hooks, limits, JSON)
    code = ABNORMAL  # what `on_disconnect` is told if this task is cancelled
    try:
        await session.accept(None)
        code = await serving.converse(hub, websocket, session.receive, None, max_message, None)
    except DisconnectClient as exc:
        code = exc.code
        logger.info("closed %s with %d: %s", logs.client(websocket.scope), code, exc.reason)
        await hub.close_client(websocket, code, exc.reason)
    except Exception as exc:
        code = serving.code_for(hub, websocket, exc)
        if not await serving.answer(hub, websocket, exc):
            raise
    finally:
        try:
            await session.close(code)
        finally:
            hub.leave(websocket)
    return code
