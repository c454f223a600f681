"""Served: which server and which task serve a client, as far as that can be seen from inside.

ASGI gives an app no such thing. uvicorn hands it a bound method of the protocol object of the
client; and a task that runs an ASGI app has the arguments of the app on its stack.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import sys
from contextvars import ContextVar
from types import CellType, FrameType, FunctionType
from typing import Any

from starlette.types import Scope, Send
from starlette.websockets import WebSocket

# Connections that a task may be known to serve: a handler has one, a load generator more.
MAX_SERVED = 64

# The connections that this task, or one that started it, has registered. Tasks inherit it.
_served: ContextVar[tuple[int, ...]] = ContextVar("starcast_served", default=())


def add_served(connection_id: int) -> None:
    """Note that this task serves the connection."""
    _served.set((*_served.get(), connection_id)[-MAX_SERVED:])


def is_served_here(connection_id: int | None, websocket: WebSocket) -> bool:
    """Whether this task, or one that started it, serves the client."""
    return connection_id in _served.get() or app_task(websocket) is not None


def app_task(websocket: WebSocket) -> asyncio.Task[Any] | None:
    """Return this task, if it runs the ASGI app of this client.

    A helper task that registers a client for somebody else must not be taken for it: it ends, and
    the client goes on living. So a call with the arguments of an ASGI app and this very scope has
    to be on the stack of the task itself.
    """
    task = asyncio.current_task()
    root = root_frame(task)
    frame = None if root is None else sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_varnames[: code.co_argcount][-3:] == ("scope", "receive", "send") and is_same(
            frame.f_locals.get("scope"), websocket.scope
        ):
            return task
        # Not beyond the root: a task that was started eagerly runs on the stack of another one.
        frame = None if frame is root else frame.f_back
    return None


def root_frame(task: asyncio.Task[Any] | None) -> FrameType | None:
    return None if task is None else getattr(task.get_coro(), "cr_frame", None)


def is_same(scope: object, other: Scope) -> bool:
    """Whether both are the scope of one client: middleware may have made a shallow copy."""
    if scope is other:
        return True
    return isinstance(scope, dict) and scope.get("headers") is other.get("headers", scope)


# Modules of Starlette whose functions wrap `send` and look at nothing that follows the handshake:
# one for each level of routing, and the one that sets the cookie of a session.
_WRAPPERS = ("starlette._exception_handler", "starlette.middleware.sessions")


def unwrap(websocket: WebSocket) -> tuple[Any, FunctionType | None]:
    """Return the `send` behind Starlette's own wrappers, and the wrapper that calls it, if any.

    It is the server's, unless other middleware wraps it.
    """
    send: Any = getattr(websocket, "_send", None)
    wrapper = None
    while isinstance(send, FunctionType) and send.__module__ in _WRAPPERS:
        wrapper = send
        send = _wrapped(wrapper).cell_contents
    return send, wrapper


def rewrap(wrapper: FunctionType, send: Send) -> None:
    """Have a wrapper call this `send`."""
    _wrapped(wrapper).cell_contents = send


def _wrapped(wrapper: FunctionType) -> CellType:
    assert wrapper.__closure__ is not None  # it has a variable of that name
    return wrapper.__closure__[wrapper.__code__.co_freevars.index("send")]


def server_send(websocket: WebSocket) -> Any:
    """Return the `send` that the server gave to the app; another one if middleware wraps it."""
    return unwrap(websocket)[0]


def find_protocol(websocket: WebSocket) -> Any:
    """Return uvicorn's protocol object of this client; None on another server.

    uvicorn hands the app a bound method of it. In front of that stand the closures of Starlette's
    routing and maybe middleware; past middleware, the task that uvicorn started has it.
    """
    protocol = getattr(server_send(websocket), "__self__", None)
    if _is_uvicorns(protocol):
        return protocol
    protocol = served_protocol()
    return protocol if is_same(getattr(protocol, "scope", None), websocket.scope) else None


def served_protocol() -> Any:
    """Return uvicorn's protocol object of the WebSocket client that this very task serves."""
    root = root_frame(asyncio.current_task())
    if root is not None and root.f_code.co_name == "run_asgi":
        protocol = root.f_locals["self"]
        if _is_uvicorns(protocol):
            return protocol
    return None


def task_of(protocol: Any) -> asyncio.Task[Any] | None:
    """Return the task that runs the app of one of uvicorn's clients, if there is one."""
    current = asyncio.current_task()
    tasks: list[asyncio.Task[Any]] = list(protocol.tasks)
    for task in itertools.chain([] if current is None else [current], tasks):
        root = root_frame(task)
        if root is not None and root.f_locals.get("self") is protocol:
            return task
    return None


def _is_uvicorns(protocol: Any) -> bool:
    return comes_from(protocol.__class__, "uvicorn.protocols.websockets.")


@functools.lru_cache(maxsize=16)
def comes_from(cls: type, package: str) -> bool:
    """Whether a class or one of its bases, such as BroadcastProtocol's, is of that package."""
    return any(base.__module__.startswith(package) for base in cls.__mro__)


def check_loop(protocol: Any) -> None:
    """Refuse a client of uvicorn that belongs to another event loop.

    Raises:
        RuntimeError: It does.
    """
    if protocol is not None and protocol.loop is not asyncio.get_running_loop():
        raise RuntimeError(
            "connect(websocket) was called on another event loop than the client's: call it in"
            " the WebSocket handler itself, or on that loop with asyncio.run_coroutine_threadsafe"
        )
