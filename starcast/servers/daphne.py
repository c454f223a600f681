"""Daphne: replace close codes that Daphne rejects by codes that it accepts.

Daphne only sends 1000 and the codes from 3000 to 4999, the ones that a web page may use. For any
other code it raises an error and leaves the connection open, and the client would never know. So
3000 is added to the code: the client gets 4013 where other servers send 1013. Codes from 4000 to
4999 are for private use (RFC 6455 section 7.4.2), and the last digits still say what is meant.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable
from typing import Any

from starlette.types import Message, Send
from starlette.websockets import WebSocket

from .served import comes_from, is_same, root_frame, server_send

OFFSET = 3000


def adapt(websocket: WebSocket) -> None:
    """If Daphne serves this websocket, have it closed with codes that Daphne accepts."""
    send = getattr(websocket, "_send", None)
    if send is not None and not isinstance(send, _Send) and _is_served(websocket):
        websocket._send = _Send(send)  # every send of this websocket ends here


class _Send:
    """An ASGI `send` that translates close codes for Daphne."""

    __slots__ = ("_send",)

    def __init__(self, send: Send) -> None:
        self._send = send

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "websocket.close" and 1000 < message.get("code", 1000) < 2000:
            message = {**message, "code": message["code"] + OFFSET}
        return self._send(message)


def _is_served(websocket: WebSocket) -> bool:
    """Return whether Daphne serves this client."""
    if _is_from_daphne(server_send(websocket)):
        return True
    # Middleware may hide Daphne's `send`, but not from the root frame of the task it started.
    root = root_frame(asyncio.current_task())
    found = {} if root is None else root.f_locals
    return is_same(found.get("scope"), websocket.scope) and _is_from_daphne(found.get("send"))


def _is_from_daphne(send: Any) -> bool:
    server: Any = getattr(getattr(send, "func", None), "__self__", None)
    return isinstance(send, functools.partial) and comes_from(server.__class__, "daphne.")
