"""Serving: the life of a client, from its `connect` to what an error of its own becomes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable

from starlette.exceptions import WebSocketException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from . import codec, inbound, logs
from . import heartbeats as _heartbeats
from .admission import refusals
from .answers import Answered
from .close_codes import INVALID_DATA, NORMAL, POLICY_VIOLATION
from .codec import Channel, Encoding
from .exceptions import InvalidChannel, InvalidMessage, OriginRefused
from .heartbeats import Heartbeats
from .hub import Hub
from .relay import OnPublishError, Relay, close_sender

logger = logging.getLogger("starcast")


def has_handler(websocket: WebSocket, exc: Exception) -> bool:
    """Whether the app has an exception handler for this error, which is to answer the client.

    Starlette's own for WebSocketException does not count: it closes at once, on a websocket object
    of its own, and so before what the client still has to get. Nor does one for an error that has
    answers for HTTP and for WebSocket, once the client is accepted: it is most likely written for
    HTTP routes, and would send a response to a websocket that is open.
    """
    if isinstance(exc, Answered) and websocket.application_state is not WebSocketState.CONNECTING:
        return False
    handlers, _ = websocket.scope.get("starlette.exception_handlers", ({}, {}))
    classes = type(exc).__mro__ + ((WebSocketException,) if isinstance(exc, Answered) else ())
    handler = next((handlers[cls] for cls in classes if cls in handlers), None)
    starlettes = ExceptionMiddleware.websocket_exception
    return handler is not None and getattr(handler, "__func__", None) is not starlettes


async def serve(
    hub: Hub,
    websocket: WebSocket,
    channel: Channel,
    *,
    encoding: Encoding | None,
    publish: bool,
    heartbeats: Heartbeats | None,
    max_message: int | None,
    connect: Callable[[], Awaitable[None]],
    on_publish_error: OnPublishError | None,
) -> int:
    """Live a client's life, which `connect` begins, and return its close code."""
    codec.check_encoding(encoding)
    beats = _heartbeats.check(heartbeats)
    bound = inbound.check(max_message) or hub.settings.max_message
    relay = Relay(hub, websocket, on_publish_error or close_sender)
    try:
        await connect()
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return disconnect_code(message)
            inbound.check_size(message, bound)
            if beats and await _heartbeats.answer(hub, websocket, message, beats):
                continue
            if not publish:
                raise WebSocketException(POLICY_VIOLATION, "listen only")
            await relay.publish(channel, codec.decode(message, encoding), encoding)
    except (OriginRefused, InvalidChannel):
        raise
    except WebSocketException as exc:
        await reject(hub, websocket, exc)
        return exc.code
    except Answered as exc:
        await close_for(hub, websocket, exc)
        return exc.code
    except WebSocketDisconnect as exc:
        return exc.code
    finally:
        try:
            await relay.end()
        finally:
            hub.leave(websocket)


def disconnect_code(message: Message) -> int:
    """Return the close code of a `websocket.disconnect` message."""
    return int(message.get("code") or NORMAL)


def validation_errors() -> tuple[type[Exception], ...]:
    """Return pydantic's error for data that does not fit a model, if pydantic is loaded."""
    core = sys.modules.get("pydantic_core")
    return () if core is None else (core.ValidationError,)


def invalid(exc: Exception) -> InvalidMessage:
    """Return what such an error means for the client. It says nothing of what the client sent."""
    title = str(getattr(exc, "title", "message"))  # the name of the model
    # A close frame has room for a reason of 123 bytes.
    reason = f"not a valid {title}".encode()[:123].decode(errors="ignore")
    return InvalidMessage(INVALID_DATA, reason)


async def close_for(
    hub: Hub,
    websocket: WebSocket,
    exc: WebSocketException | Answered,
    subprotocol: str | None = None,
) -> None:
    """Close a client for an error, or refuse it if it was not accepted yet.

    Args:
        hub, websocket, exc: The hub, the client and the error.
        subprotocol: What the client is to be accepted with if it is refused by a close.
    """
    if refusals.is_new(websocket):
        if await refusals.prepare(websocket, exc, hub.settings.refuse, subprotocol):
            await refusals.answer(websocket, exc)
    else:
        await hub.close_client(websocket, exc.code, exc.reason)


async def reject(hub: Hub, websocket: WebSocket, exc: WebSocketException) -> None:
    """Close a client for what it sent, with one line in the log."""
    address = websocket.client
    logger.warning(
        "closed the client %s with %d: %s",
        # Behind a proxy that is trusted too much, the host is whatever the client has said it is.
        "?" if address is None else f"{logs.escape(address.host)}:{address.port}",
        exc.code,
        logs.escape(exc.reason + getattr(exc, "hint", "")),
    )
    await hub.close_client(websocket, exc.code, exc.reason)
