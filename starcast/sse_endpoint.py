"""SSEEndpoint: a Starlette HTTPEndpoint that answers GET with a stream of server-sent events."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from . import attributes, sse
from .attributes import OwnHub
from .broadcast import Broadcast
from .codec import DEFAULT_CHANNEL, Channel
from .history import check_count
from .sse import SSE, EventStreamResponse


class SSEEndpoint(HTTPEndpoint):
    """Streams the messages of a channel: registers a client on connect, cleans up on disconnect.

        class Orders(SSEEndpoint):
            broadcast = hub

            def get_channel(self, request):
                return f"order:{request.path_params['number']}"

        routes = [Route("/orders/{number}/events", Orders)]

    Override any hook and call `super()`. There is one instance for each request. HEAD gets 405, and
    so do the other methods unless the class has a method of their name, as in Starlette: `post` may
    publish. In FastAPI, use `app.add_route("/orders/{number}/events", Orders)`.

    A client that is not let in gets 403: the page's origin is not allowed, or the name of a channel
    is not valid. If the broker is away, it gets 503 with `Retry-After`. A hook may raise an
    `HTTPException`, for which the client gets its status.

    Attributes:
        broadcast: The hub. By default each class gets its own hub in memory.
        history: On a channel that has a history, how many of its newest messages a client gets
            first, 0 by default. A client that reconnects gets what it has missed instead.
        ids: Whether clients get each message as a JSON object with its id and its channel. See
            `Broadcast.stream`.
        sse: The heartbeats and the time until a client reconnects: an `SSE`.

    A class with an attribute that looks like one of these misspelt is told so, with one log line.

    Raises:
        ConfigurationError: Another attribute than `broadcast` is not valid. Raised where the class
            is defined.
        TypeError: `broadcast` is not a `Broadcast`. Raised there too.
    """

    broadcast: Broadcast = OwnHub()  # type: ignore[assignment]  # a descriptor that returns one
    history: int = 0
    ids: bool = False
    sse: SSE = SSE()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        attributes.check(cls, SSEEndpoint)
        check_count("history", cls.history)
        sse.check(cls.sse)

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(scope, receive, send)
        self._response: EventStreamResponse | None = None
        self._allowed_methods = [name for name in self._allowed_methods if name != "HEAD"]

    def get_channel(self, request: Request) -> Channel | Sequence[Channel]:
        """Return the client's channel: the path parameter `channel`, or else `"default"`.

        Override it to return a `str`, an `int` or a `UUID`, or a list of them. With a list, however
        short, clients get each message in an object that names its channel.
        """
        return str(request.path_params.get("channel", DEFAULT_CHANNEL))

    async def on_connect(self, request: Request) -> None:
        """Let the client in, and register it. The response begins when this returns."""
        self._response = self.broadcast.stream(
            request,
            self.get_channel(request),
            history=self.history,
            ids=self.ids,
            sse=self.sse,
        )
        await self._response.open()

    async def on_disconnect(self, request: Request) -> None:
        """Called exactly once for every client that was registered, when it no longer is."""

    async def get(self, request: Request) -> ASGIApp:
        """Return the response. Starlette calls this; override the hooks instead."""
        return functools.partial(self._serve, request)

    async def _serve(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            try:
                await self.on_connect(request)
            except Exception as exc:
                await sse.refuse(request, exc, receive, send)
                return
            if self._response is None:
                raise RuntimeError("on_connect has to call super().on_connect(request)")
            await self._response(scope, receive, send)
        finally:
            if self._response is not None and self._response.joined:
                self._response.close()
                await self.on_disconnect(request)
