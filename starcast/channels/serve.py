"""Serve: the life of a client that speaks the protocol, from the handshake to its close code."""

from __future__ import annotations

import logging

from starlette.exceptions import WebSocketException
from starlette.websockets import WebSocket

from .. import logs, serving
from ..admission import subprotocols
from ..close_codes import ABNORMAL
from ..exceptions import ConfigurationError, DisconnectClient
from ..hub import Hub
from . import codes
from .formats import JSON, PROTOBUF_SUBPROTOCOL, Format
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


class ProtobufMissing(WebSocketException):
    """A client speaks Protobuf, and the package for it is not installed."""

    def __init__(self) -> None:
        super().__init__(*codes.PROTOBUF_NOT_AVAILABLE[:2])

    def __str__(self) -> str:
        return (
            "it speaks Protobuf, which needs the package protobuf: pip install 'starcast[protobuf]'"
        )


def choose_format(websocket: WebSocket) -> tuple[Format, str | None]:
    """Return the format that a client wants, and the subprotocol that it is accepted with.

    Raises:
        ProtobufMissing: It wants Protobuf, which is not installed.
    """
    subprotocol = subprotocols.choose(websocket, [PROTOBUF_SUBPROTOCOL])
    if subprotocol is None and websocket.query_params.get("cf_protocol") != "protobuf":
        return JSON, None
    try:
        from .protobuf import PROTOBUF
    except ImportError:
        raise ProtobufMissing from None
    return PROTOBUF, subprotocol


async def serve(
    hub: Hub, websocket: WebSocket, hooks: Hooks, limits: Limits, max_message: int | None
) -> int:
    """Serve a client until it leaves, and return its close code."""
    try:
        writer, subprotocol = choose_format(websocket)
    except ProtobufMissing as exc:
        if not await serving.answer(hub, websocket, exc, [PROTOBUF_SUBPROTOCOL]):
            raise
        return exc.code
    session = Session(hub, websocket, hooks, limits, writer)
    code = ABNORMAL  # what `on_disconnect` is told if this task is cancelled
    try:
        await session.accept(subprotocol)
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
