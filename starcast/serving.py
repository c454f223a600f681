"""Serving: the life of a client, from its `connect` to what an error of its own becomes."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import WebSocketException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from . import codec
from .codec import Encoding
from .connection import NORMAL, POLICY_VIOLATION, Connection
from .event import Event
from .exceptions import (
    BackendUnavailable,
    EncodingError,
    InvalidChannel,
    InvalidMessage,
    OriginRefused,
    PayloadTooLarge,
    PublishQueueFull,
)
from .hub import Hub

logger = logging.getLogger("starcast")

# Messages of one client that may be handed over before its next one waits for them.
MAX_UNCONFIRMED = 256

# The same in bytes: 256 clients that all send as much as they can just fill what may wait for a
# loop (`shard.MAX_PENDING`).
MAX_UNCONFIRMED_COST = 64 * 1024

# Seconds without a failure after which the next one is logged again.
OUTAGE_OVER = 10.0


def has_handler(websocket: WebSocket, exc: Exception) -> bool:
    """Whether the app brings an exception handler for this error, which shall answer the client.

    Starlette's own for WebSocketException does not count: it closes at once, on a websocket object
    of its own, and so before what the client still has to get.
    """
    handlers, _ = websocket.scope.get("starlette.exception_handlers", ({}, {}))
    handler = next((handlers[cls] for cls in type(exc).__mro__ if cls in handlers), None)
    starlettes = ExceptionMiddleware.websocket_exception
    return handler is not None and getattr(handler, "__func__", None) is not starlettes


async def serve(
    hub: Hub,
    websocket: WebSocket,
    channel: str,
    *,
    encoding: Encoding | None,
    publish: bool,
    connect: Callable[[], Awaitable[None]],
) -> int:
    """Live a client's life, which `connect` begins, and return its close code."""
    codec.check_encoding(encoding)
    try:
        await connect()
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return disconnect_code(message)
            if not publish:
                raise WebSocketException(POLICY_VIOLATION, "listen only")
            await relay(hub, websocket, channel, codec.decode(message, encoding), encoding)
    except (OriginRefused, InvalidChannel):
        raise
    except WebSocketException as exc:
        await reject(hub, websocket, exc)
        return exc.code
    except WebSocketDisconnect as exc:
        return exc.code
    finally:
        hub.leave(websocket)


def disconnect_code(message: Message) -> int:
    """Return the close code of a `websocket.disconnect` message."""
    return int(message.get("code") or NORMAL)


async def relay(
    hub: Hub, websocket: WebSocket, channel: str, data: Any, encoding: Encoding | None
) -> None:
    """Publish what a client sent, without waiting unless too much of it is unconfirmed."""
    try:
        event = hub.event(codec.check_channel(channel), data, (), encoding)
    except EncodingError as exc:
        # It could be read and cannot be written: a number too large for `dumps=`, say.
        raise InvalidMessage(1007, "cannot be sent on") from exc
    await hub.reopen()
    connection = hub.find(websocket)
    try:
        if connection is None or _must_wait(connection, event):
            await hub.dispatcher.publish_and_wait(event)
        else:
            await hub.dispatcher.publish_soon(event)
    except (PublishQueueFull, PayloadTooLarge, BackendUnavailable) as exc:
        if (now := time.monotonic()) > hub.lost_last + OUTAGE_OVER:
            logger.error("messages of clients are being lost: %s", exc)
        hub.lost_last = now


def _must_wait(connection: Connection, event: Event) -> bool:
    """Count a client's message; whether it has sent so much that it has to wait."""
    connection.unconfirmed += 1
    connection.unconfirmed_cost += event.cost
    if (
        connection.unconfirmed < MAX_UNCONFIRMED
        and connection.unconfirmed_cost < MAX_UNCONFIRMED_COST
    ):
        return False
    connection.unconfirmed = connection.unconfirmed_cost = 0
    return True


async def reject(hub: Hub, websocket: WebSocket, exc: WebSocketException) -> None:
    """Close a client for what it sent, with one line in the log."""
    address = websocket.client
    logger.warning(
        "closed the client %s with %d: %s",
        "?" if address is None else f"{address.host}:{address.port}",
        exc.code,
        exc.reason,
    )
    await hub.close_client(websocket, exc.code, exc.reason)
