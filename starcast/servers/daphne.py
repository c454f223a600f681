"""Daphne: close codes that it takes, in place of those that it does not.

Daphne sends a close frame with 1000 or a code from 3000 to 4999, as a page may. For any other code
it raises an error and leaves the connection open, so the client would hear nothing and stay. It
gets the code plus 3000 instead: 4013 where other servers send 1013. 4000 to 4999 are for private
use (RFC 6455 section 7.4.2), and the last digits say what is meant.
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
    """Have the closes of this websocket sent with codes that Daphne takes, if Daphne serves it."""
    send = getattr(websocket, "_send", None)
    if send is not None and not isinstance(send, _Send) and _is_served(websocket):
        websocket._send = _Send(send)  # which all of its sends end in, the handler's too


class _Send:
    """The ASGI `send` of a client of Daphne's."""

    __slots__ = ("_send",)

    def __init__(self, send: Send) -> None:
        self._send = send

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "websocket.close" and 1000 < message.get("code", 1000) < 2000:
            message = {**message, "code": message["code"] + OFFSET}
        return self._send(message)


def _is_served(websocket: WebSocket) -> bool:
    """Whether Daphne serves this client. Past middleware, the task that Daphne started knows."""
    if _is_daphnes(server_send(websocket)):
        return True
    root = root_frame(asyncio.current_task())
    variables = {} if root is None else root.f_locals
    return is_same(variables.get("scope"), websocket.scope) and _is_daphnes(variables.get("send"))


def _is_daphnes(send: Any) -> bool:
    server: Any = getattr(getattr(send, "func", None), "__self__", None)
    return isinstance(send, functools.partial) and comes_from(server.__class__, "daphne.")
