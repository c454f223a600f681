"""Mount: the hub as an ASGI app, for `app.mount("/live", hub)`."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, Router, WebSocketRoute
from starlette.types import Scope
from starlette.websockets import WebSocket

from . import assets, codec, inbound, sse
from . import heartbeats as _heartbeats
from .admission import hooks as admission
from .admission import refusals
from .admission import subprotocols as _subprotocols
from .admission.hooks import Refuse, check_refuse
from .arguments import check_channel
from .codec import Encoding
from .exceptions import ConfigurationError
from .frames import PLAIN, WITH_ID
from .heartbeats import Heartbeats
from .history import check_count
from .hub import Hub
from .serving import answer
from .sse import SSE, EventStreamResponse

Authorize = Callable[[HTTPConnection, str], Awaitable[bool] | bool]
Serve = Callable[..., Awaitable[object]]


def make_app(
    hub: Hub,
    serve: Serve,
    authorize: Authorize | None,
    refuse: Refuse | None,
    *,
    encoding: Encoding | None,
    publish: bool,
    heartbeats: Heartbeats | None,
    subprotocols: Sequence[str],
    history: int,
    ids: bool,
    max_message: int | None,
    streams: SSE | None,
) -> Router:
    """Return an ASGI app that serves `/{channel}` with `serve`, after `authorize`.

    With `streams`, it answers GET with server-sent events. It always answers GET of `starcast.js`
    and `starcast.d.ts`, which are everybody's, with these files.
    """
    check_refuse(refuse)
    serve = functools.partial(
        serve,
        encoding=codec.check_encoding(encoding),
        publish=publish,
        heartbeats=_heartbeats.check(heartbeats),
        subprotocols=_subprotocols.check(subprotocols),
        history=check_count("history", history),
        ids=ids,
        max_message=inbound.check(max_message),
    )
    if authorize is not None and not callable(authorize):
        raise ConfigurationError(f"authorize must be a function, not {authorize!r}")

    async def admit(client: HTTPConnection, channel: str) -> None:
        if authorize is not None and not await admission.ask(
            "authorize",
            *(authorize, client, channel),
            client=client,
            about=f"the channel {channel!r}",
        ):
            raise admission.Refused

    async def endpoint(websocket: WebSocket) -> None:
        channel = check_channel(websocket, _channel(websocket.scope))
        websocket.path_params["channel"] = channel
        await hub.settings.origins.check(websocket)
        await admit(websocket, channel)
        await serve(websocket, channel)

    async def guarded(websocket: WebSocket) -> None:
        refusals.note(websocket, refuse)
        try:
            await endpoint(websocket)
        except Exception as exc:
            if not await answer(hub, websocket, exc, subprotocols):
                raise

    async def events(request: Request) -> Response:
        named = request.query_params.getlist("channel")
        path = request.path_params["channel"] = _channel(request.scope)
        return EventStreamResponse(
            hub,
            request,
            [*([path] if path else []), *named] if named else path,
            hub.settings.outbox(form=WITH_ID if ids else PLAIN),
            last=history,
            sse=streams or SSE(),
            authorize=functools.partial(admit, request),
        )

    async def get(request: Request) -> Response:
        name = _channel(request.scope)
        if name in assets.TYPES:
            return assets.respond(request, name)
        if streams is None:
            return PlainTextResponse("Not Found", status_code=404)
        return await events(request)

    if streams is not None:
        sse.check(streams)
    route = Route("/{channel:path}", get)
    route.methods = {"GET"}  # Starlette adds HEAD
    routes: list[BaseRoute] = [WebSocketRoute("/{channel:path}", guarded), route]
    return Router(routes, lifespan=hub.lifecycle.lifespan)


def _channel(scope: Scope) -> str:
    """Return what stands in the path after the mount; empty if it does not lie below the mount.

    `root_path` is the path of the mount as the outside sees it: a prefix that the server or
    `FastAPI(root_path=)` was told, and what the mounts in between have matched. `path` begins with
    all of it. But where a proxy has stripped the prefix and only the app knows, the path begins
    with what the mounts have matched, and Starlette, which looks for all of it, would take
    the mount for a part of the channel.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if path.startswith(f"{root}/"):
        return path[len(root) + 1 :]
    # What the root path was before the mounts. A FastAPI app has put its own in place of that.
    prefix: str = getattr(scope.get("app"), "root_path", "") or scope.get("app_root_path", root)
    mount = root.removeprefix(prefix.rstrip("/")).lstrip("/")
    start = f"/{mount}/" if mount else "/"
    return path[len(start) :] if path.startswith(start) else ""
