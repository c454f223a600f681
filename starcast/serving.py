"""Serving: the life of a client, from `connect` to the close code that an error stands for.

`BroadcastEndpoint`, `Broadcast.serve` and the mount all receive with `converse`, and answer an
error with `answer`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable, Sequence

from starlette.exceptions import WebSocketException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketState

from . import codec, inbound, logs
from . import heartbeats as _heartbeats
from .admission import refusals
from .admission import subprotocols as _subprotocols
from .answers import Answered
from .close_codes import INTERNAL_ERROR, INVALID_DATA, NORMAL, POLICY_VIOLATION
from .codec import Channel, Encoding
from .exceptions import InvalidChannel, InvalidMessage, OriginRefused
from .heartbeats import Heartbeats
from .hub import Hub
from .relay import OnPublishError, Relay, close_sender
from .shortcut import Shortcut

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


class _Fixed:
    """The channel and the encoding of a client that `serve` serves."""

    def __init__(self, channel: Channel, encoding: Encoding | None) -> None:
        self._channel = channel
        self.encoding = encoding

    def get_channel(self, websocket: WebSocket) -> Channel:
        return self._channel


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
    """Call `connect`, publish what the client sends until it leaves, and return its close code."""
    codec.check_encoding(encoding)
    beats = _heartbeats.check(heartbeats)
    bound = inbound.check(max_message)
    relay = Relay(hub, websocket, on_publish_error or close_sender)
    shortcut = Shortcut(relay, _Fixed(channel, encoding), lambda: True) if publish else None

    async def on_message(message: Message) -> None:
        if not publish:
            raise InvalidMessage(POLICY_VIOLATION, "listen only")
        await relay.publish(channel, codec.decode(message, encoding), encoding)

    try:
        await connect()
        return await converse(hub, websocket, on_message, beats, bound, shortcut)
    except (OriginRefused, InvalidChannel):
        raise
    except Exception as exc:
        if not await answer(hub, websocket, exc):
            raise
        return code_for(hub, websocket, exc)
    finally:
        try:
            await relay.end()
        finally:
            hub.leave(websocket)


async def converse(
    hub: Hub,
    websocket: WebSocket,
    on_message: Callable[[Message], Awaitable[None]],
    heartbeats: Heartbeats | None,
    max_message: int | None,
    shortcut: Shortcut | None,
) -> int:
    """Receive a client's messages until it leaves, and return its close code.

    Args:
        hub, websocket: The hub and the client.
        on_message: Awaited for each `websocket.receive` message that is not a heartbeat.
        heartbeats: The heartbeats and their answers.
        max_message: The size of the longest message, in bytes; None for the hub's setting.
        shortcut: Publishes messages that need not be received; None if there is none.
    """
    bound = max_message or hub.settings.max_message
    if shortcut is not None:
        shortcut.set_bounds(bound, heartbeats)
    while True:
        message = await (websocket if shortcut is None else shortcut).receive()
        if message["type"] == "websocket.disconnect":
            return int(message.get("code") or NORMAL)
        if message["type"] != "websocket.receive":
            continue  # the handshake of a client that `on_connect` has refused
        inbound.check_size(message, bound)
        if heartbeats and await _heartbeats.answer(hub, websocket, message, heartbeats):
            continue
        await on_message(message)


def code_for(hub: Hub, websocket: WebSocket, exc: Exception) -> int:
    """Return the close code that an error in the code that serves a client stands for."""
    if isinstance(exc, WebSocketException | Answered) or hub.means_client_left(exc, websocket):
        code: int = exc.code  # type: ignore[attr-defined]  # a WebSocketDisconnect has it too
        return code
    return INTERNAL_ERROR


async def answer(
    hub: Hub, websocket: WebSocket, exc: Exception, subprotocols: Sequence[str] = ()
) -> bool:
    """Answer a client for an error in the code that serves it.

    Args:
        hub, websocket, exc: The hub, the client and the error.
        subprotocols: One of these is selected if a new client is accepted to be closed.

    Returns:
        Whether that is all. If not, raise the error: the app has a handler for it, or it is a bug,
        for which the client has been closed with 1011 and which belongs in the server's log.
    """
    if isinstance(exc, InvalidMessage):
        await reject(hub, websocket, exc)
        return True
    if hub.means_client_left(exc, websocket):
        return True
    if isinstance(exc, WebSocketException | Answered):
        if has_handler(websocket, exc):
            return False
        if not refusals.is_new(websocket):
            await hub.close_client(websocket, exc.code, exc.reason)
            return True
        subprotocol = _subprotocols.choose(websocket, subprotocols)
        timeout = hub.settings.tuning.close_timeout
        if await refusals.prepare(websocket, exc, hub.settings.refuse, subprotocol, timeout):
            await refusals.answer(websocket, exc, timeout)
        return True
    refusals.log_http(websocket, exc)
    accepted = websocket.application_state is WebSocketState.CONNECTED
    if accepted and not has_handler(websocket, exc):
        await hub.close_client(websocket, INTERNAL_ERROR, "")
    return False


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
