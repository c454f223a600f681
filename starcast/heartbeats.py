"""Heartbeats of applications: messages that ask whether the server is there, and their answers.

Pages cannot send the pings of RFC 6455, so client libraries send a message of their own, most often
the text `ping`, and some close when no `pong` comes back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from .connection import is_gone
from .exceptions import ConfigurationError, PublishQueueFull
from .hub import Hub

# The keys are `str` or bytes. A mapping is invariant in them, so `Mapping[str | bytes, ...]` would
# not take a dict of nothing but text.
Heartbeats = Mapping[Any, str | bytes | None]


def check(heartbeats: Heartbeats | None) -> Heartbeats | None:
    """Return a copy of the heartbeats if they can be some, or raise `ConfigurationError`."""
    if heartbeats is None:
        return None
    if not isinstance(heartbeats, Mapping):
        raise ConfigurationError(
            f'heartbeats must be a dict such as {{"ping": "pong"}}, not {heartbeats!r}'
        )
    for said, answer in heartbeats.items():
        if not isinstance(said, (str, bytes)) or not isinstance(answer, (str, bytes, type(None))):
            raise ConfigurationError(
                "heartbeats map what a client sends, a str or bytes, to its answer, a str, bytes "
                f"or None for no answer, not {said!r}: {answer!r}"
            )
        if isinstance(answer, str):
            try:
                answer.encode()
            except UnicodeEncodeError:
                raise ConfigurationError(f"{answer!r} has no UTF-8 form") from None
    return dict(heartbeats)


async def answer(hub: Hub, websocket: WebSocket, message: Message, heartbeats: Heartbeats) -> bool:
    """Answer a client's message if it is a heartbeat; False if it is none.

    The answer waits in the client's buffer behind everything else that the client gets, and counts
    there. So a client that floods heartbeats and reads nothing meets the policy of `overflow=`.
    """
    said = message.get("text")
    if said is None:
        said = message.get("bytes") or b""
    if said not in heartbeats:
        return False
    if (reply := heartbeats[said]) is not None:
        event = hub.event("", reply, None, None)
        connection = hub.find(websocket)
        if connection is not None and connection.leaving is None and not connection.ended:
            with contextlib.suppress(PublishQueueFull):  # the client will ask again
                hub.registry.post(event, connection)
        elif not is_gone(websocket):  # the handler has accepted it and not registered it
            with contextlib.suppress(WebSocketDisconnect):  # the next `receive` says so
                await websocket.send({"type": "websocket.send", event.kind: event.message})
    await hub.dispatcher.settled()  # which also gives other tasks a turn now and then
    return True
