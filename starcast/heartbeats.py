"""Heartbeats: answer the messages by which clients check whether the server is still there.

Web pages cannot send the pings of RFC 6455, so client libraries send a message instead, most often
the text `ping`, and some close the connection if no `pong` arrives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from .exceptions import ConfigurationError, PublishQueueFull
from .handler import is_gone
from .hub import Hub

# The keys are `str` or bytes. A mapping is invariant in its keys, so `Mapping[str | bytes, ...]`
# would not accept a `dict[str, str]`.
Heartbeats = Mapping[Any, str | bytes | None]


def check(heartbeats: Heartbeats | None) -> Heartbeats | None:
    """Return a copy of the heartbeats if they are valid, or raise `ConfigurationError`."""
    if heartbeats is None:
        return None
    if not isinstance(heartbeats, Mapping):
        raise ConfigurationError(
            f'heartbeats must be a dict such as {{"ping": "pong"}}, not {heartbeats!r}'
        )
    for ping, pong in heartbeats.items():
        if not isinstance(ping, (str, bytes)) or not isinstance(pong, (str, bytes, type(None))):
            raise ConfigurationError(
                "heartbeats map what a client sends, a str or bytes, to its answer, a str, bytes "
                f"or None for no answer, not {ping!r}: {pong!r}"
            )
        if isinstance(pong, str):
            try:
                pong.encode()
            except UnicodeEncodeError:
                raise ConfigurationError(
                    f"the heartbeat {pong!r} cannot be encoded in UTF-8"
                ) from None
    return dict(heartbeats)


async def answer(hub: Hub, websocket: WebSocket, message: Message, heartbeats: Heartbeats) -> bool:
    """Answer a client's message if it is a heartbeat, and return whether it was one.

    The answer goes through the client's outbox like any other message and counts there. A client
    that floods the server with heartbeats and reads nothing is subject to `overflow=`.
    """
    ping = message.get("text")
    if ping is None:
        ping = message.get("bytes") or b""
    if ping not in heartbeats:
        return False
    if (pong := heartbeats[ping]) is not None:
        event = hub.event("", pong, None, None)
        connection = hub.find(websocket)
        if connection is not None and connection.leaving is None and not connection.ended:
            with contextlib.suppress(PublishQueueFull):  # the client will try again
                hub.registry.post(event, connection)
        elif not is_gone(websocket):  # the handler has accepted the client but not registered it
            with contextlib.suppress(WebSocketDisconnect):  # the next `receive` reports it
                await websocket.send({"type": "websocket.send", event.kind: event.message})
    await hub.dispatcher.settle()  # this also gives other tasks a turn from time to time
    return True
