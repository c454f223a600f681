"""Mount: the hub as an ASGI app, for `app.mount("/live", hub)`."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import WebSocketException
from starlette.routing import Router, WebSocketRoute
from starlette.websockets import WebSocket

from . import codec
from .connection import POLICY_VIOLATION
from .exceptions import ConfigurationError
from .hub import Hub
from .serving import has_handler

Authorize = Callable[[WebSocket, str], Awaitable[object] | object]
Serve = Callable[[WebSocket, str], Awaitable[object]]


def make_app(hub: Hub, serve: Serve, authorize: Authorize | None) -> Router:
    """Return an ASGI app that serves `/{channel}` with `serve`, after `authorize`."""

    async def endpoint(websocket: WebSocket) -> None:
        channel = codec.check_channel(websocket.path_params["channel"])
        hub.settings.origins.check(websocket)
        if authorize is not None and not await _authorized(authorize, websocket, channel):
            raise WebSocketException(POLICY_VIOLATION, "not authorized")
        await serve(websocket, channel)

    async def guarded(websocket: WebSocket) -> None:
        try:
            await endpoint(websocket)
        except WebSocketException as exc:
            if has_handler(websocket, exc):
                raise
            await hub.close_client(websocket, exc.code, exc.reason)

    return Router([WebSocketRoute("/{channel:path}", guarded)], lifespan=hub.lifespan)


async def _authorized(authorize: Authorize, websocket: WebSocket, channel: str) -> bool:
    is_async = inspect.iscoroutinefunction(authorize) or inspect.iscoroutinefunction(
        getattr(authorize, "__call__", None)  # noqa: B004  # an object with an async __call__
    )
    try:
        if is_async:
            answer = authorize(websocket, channel)
        else:
            answer = await run_in_threadpool(authorize, websocket, channel)
        if inspect.isawaitable(answer):
            answer = await answer
    except PermissionError:
        return False
    if answer is None or answer is True:
        return True
    if answer is False:
        return False
    raise ConfigurationError(f"authorize returned {answer!r}, not None, True or False")
