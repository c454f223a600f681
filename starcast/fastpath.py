"""Fast path: which clients take frames written straight to their transport, and why others don't.

uvicorn hands an app the bound `send` of its protocol object. Where nothing but Starlette's own
wrappers stands between that and the client's websocket, nothing needs to see each message, and the
protocol object becomes one of `starcast.uvicorn.BroadcastProtocol`, in the middle of its life.
Middleware that wraps `send` or `receive` keeps its client on ASGI, and so does every other server.
"""

from __future__ import annotations

import sys
from types import FunctionType, MethodType
from typing import Any

from starlette.websockets import WebSocket

from .handler import Handler, has_plain_send, owner
from .servers import served
from .servers.wire import Wire

SANSIO = "uvicorn.protocols.websockets.websockets_sansio_impl"

# Why a client is on ASGI, in `stats()` and in the log.
READY_FRAMES = "ready_frames=False"
OTHER_HUB = "another hub writes to the client"
MIDDLEWARE = "middleware wraps send or receive"
SERVER = "the server is not uvicorn with its default WebSocket protocol"
UVICORN = "this version of uvicorn is not supported"


def open_wire(websocket: WebSocket, protocol: Any) -> Wire | str:
    """Return the way to the client's transport, or why there is none.

    Call this on the client's event loop, once its handshake is complete.

    Args:
        websocket: The client's.
        protocol: uvicorn's protocol object of the client; None on another server.
    """
    if isinstance(owner(websocket.send), Handler):
        return OTHER_HUB
    if not has_plain_send(websocket):
        return MIDDLEWARE
    announced = (websocket.scope.get("extensions") or {}).get("starcast")
    if announced is not None:
        wire: Wire | None = announced.open()
        return UVICORN if wire is None else wire
    module = sys.modules.get(SANSIO)
    if protocol is None or module is None:
        return SERVER
    from . import uvicorn  # which imports uvicorn itself, and websockets

    cls = protocol.__class__
    if cls not in (module.WebSocketsSansIOProtocol, uvicorn.BroadcastProtocol):
        return SERVER
    send, wrapper = served.unwrap(websocket)
    receive = getattr(websocket, "_receive", None)
    if not (_is_method(send, cls.send, protocol) and _is_method(receive, cls.receive, protocol)):
        return MIDDLEWARE
    adopted = uvicorn.adopt(protocol)
    if adopted is None:
        return UVICORN
    # What the websocket holds are methods of the class that the protocol had until now.
    websocket._receive = protocol.receive
    if wrapper is None:
        websocket._send = protocol.send
    else:
        served.rewrap(wrapper, protocol.send)
    return adopted


def _is_method(method: Any, function: FunctionType, owner: object) -> bool:
    """Whether it is this very function, bound to this object, and no proxy for it."""
    return type(method) is MethodType and method.__func__ is function and method.__self__ is owner
