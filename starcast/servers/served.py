"""Served: which server and which task serve a client, as far as an app can tell.

ASGI does not say. But uvicorn hands an app a bound method of the client's protocol object, and a
task that runs an ASGI app has that app's arguments on its stack.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from contextvars import ContextVar
from types import CellType, FrameType, FunctionType
from typing import Any

from starlette.types import Scope, Send
from starlette.websockets import WebSocket

from ..handler import is_defined_in

# How many connections one task is remembered to serve. A handler has one, a load generator more.
MAX_SERVED = 64

# The ids of the connections that this task, or a task that started it, has registered.
_served: ContextVar[tuple[int, ...]] = ContextVar("starcast_served", default=())


def add_served(connection_id: int) -> None:
    """Note that this task serves the connection."""
    _served.set((*_served.get(), connection_id)[-MAX_SERVED:])


def is_served_here(connection_id: int | None, websocket: WebSocket) -> bool:
    """Whether this task, or one that started it, serves the client."""
    return connection_id in _served.get() or app_task(websocket) is not None


def app_task(websocket: WebSocket) -> asyncio.Task[Any] | None:
    """Return this task, if it runs the ASGI app of this client.

    A helper task may register a client on behalf of the handler and end while the client stays.
    So the stack of the task itself must have a call with an ASGI app's arguments and this scope.
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
        # Stop at the root: a task that was started eagerly runs on the stack of another one.
        frame = None if frame is root else frame.f_back
    return None


def root_frame(task: asyncio.Task[Any] | None) -> FrameType | None:
    return None if task is None else getattr(task.get_coro(), "cr_frame", None)


def is_same(scope: object, other: Scope) -> bool:
    """Whether both are the same client's scope. Middleware may have made a shallow copy."""
    if scope is other:
        return True
    return isinstance(scope, dict) and scope.get("headers") is other.get("headers", scope)


# The modules of Starlette that wrap `send` and ignore what follows the handshake: one wrapper for
# each level of routing, and the one that sets the session cookie.
_WRAPPERS = ("starlette._exception_handler", "starlette.middleware.sessions")


def unwrap(websocket: WebSocket) -> tuple[Any, FunctionType | None]:
    """Return the `send` behind Starlette's own wrappers, and the wrapper that calls it, if any.

    It is the server's, unless other middleware wraps it.
    """
    send: Any = getattr(websocket, "_send", None)
    wrapper = None
    while is_defined_in(_WRAPPERS, send) and "send" in send.__code__.co_freevars:
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
    """Return the `send` that the server gave to the app, or that of middleware which wraps it."""
    return unwrap(websocket)[0]


def find_protocol(websocket: WebSocket) -> Any:
    """Return uvicorn's protocol object of this client; None on another server.

    It is the owner of the bound `send` behind Starlette's wrappers. If middleware hides that, the
    task that uvicorn started for this client still refers to the protocol object.
    """
    protocol = getattr(server_send(websocket), "__self__", None)
    if _is_uvicorns(protocol):
        return protocol
    protocol = served_protocol()
    return protocol if is_same(getattr(protocol, "scope", None), websocket.scope) else None


def served_protocol() -> Any:
    """Return uvicorn's protocol object of the client whose app this very task runs."""
    root = root_frame(asyncio.current_task())
    if root is not None and root.f_code.co_name == "run_asgi":
        protocol = root.f_locals["self"]
        if _is_uvicorns(protocol):
            return protocol
    return None


def served_transport() -> Any:
    """Return the transport of the HTTP client of uvicorn's whose app this very task runs."""
    return _http_transport(asyncio.current_task(), None)


def find_transport(scope: Scope) -> Any:
    """Return the transport of an HTTP client of uvicorn's; None on another server.

    Looks at all tasks: the one that serves the client may be behind middleware.
    """
    found = (_http_transport(task, scope) for task in asyncio.all_tasks())
    return next((transport for transport in found if transport is not None), None)


def _http_transport(task: asyncio.Task[Any] | None, scope: Scope | None) -> Any:
    """Return the transport of the client whose app a task runs, if it has the scope."""
    root = root_frame(task)
    if root is None or root.f_code.co_name != "run_asgi":
        return None
    cycle = root.f_locals["self"]
    is_http = comes_from(cycle.__class__, "uvicorn.protocols.http.")
    found = is_http and (scope is None or is_same(cycle.scope, scope))
    return cycle.transport if found else None


def task_of(protocol: Any) -> asyncio.Task[Any] | None:
    """Return the task that runs the app of one of uvicorn's clients, if there is one."""
    current = asyncio.current_task()
    if current is not None and _runs_app_of(current, protocol):
        return current
    tasks: set[asyncio.Task[Any]] = protocol.tasks  # those of all clients
    return next((task for task in list(tasks) if _runs_app_of(task, protocol)), None)


def _runs_app_of(task: asyncio.Task[Any], protocol: Any) -> bool:
    root = root_frame(task)
    return root is not None and root.f_locals.get("self") is protocol


def _is_uvicorns(protocol: Any) -> bool:
    return comes_from(protocol.__class__, "uvicorn.protocols.websockets.")


@functools.lru_cache(maxsize=16)
def comes_from(cls: type, package: str) -> bool:
    """Whether a class or one of its bases is from that package."""
    return any(base.__module__.startswith(package) for base in cls.__mro__)


def check_loop(protocol: Any) -> None:
    """Refuse a client of uvicorn that belongs to another event loop.

    Raises:
        RuntimeError: It belongs to another one.
    """
    if protocol is not None and protocol.loop is not asyncio.get_running_loop():
        raise RuntimeError(
            "connect(websocket) was called on another event loop than the client's: call it in"
            " the WebSocket handler itself, or on that loop with asyncio.run_coroutine_threadsafe"
        )
