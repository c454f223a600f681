"""SSE: the channels of a hub as a response of server-sent events.

`Broadcast.stream` returns such a response, and `SSEEndpoint` and the mount answer GET with one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence

from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from . import event_stream
from .admission import refusals
from .answers import Answered
from .arguments import check_channel
from .codec import Channel
from .exceptions import ConfigurationError, InvalidChannel
from .history import Wish, check_count
from .hub import Hub
from .outbox import Outbox
from .servers import stopping
from .stream import Stream
from .tuning import check_positive

HEADERS = {
    # Nothing in between may keep the response, or compress it, for which it would have to wait.
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx
    "X-Content-Type-Options": "nosniff",
}

# How long to wait for the server to report that a connection that was aborted has ended, in
# seconds. uvicorn logs an error if the app ends before it knows that itself.
ABORTED = 0.2


@dataclasses.dataclass(frozen=True, slots=True)
class SSE:
    """How streams of server-sent events behave: `hub.app(sse=SSE(heartbeat=5.0))`.

    Args:
        heartbeat: After how many seconds in which nothing was sent a comment is, more than 0; 15 by
            default. It keeps proxies from closing the connection, and shows servers that the client
            is gone.
        retry: How many milliseconds a client waits before it reconnects, 0 or more; 3,000 by
            default. Each client is told up to half as long again, at random, so that not all come
            back at once.
        max_channels: On how many channels one stream may be, 1 or more; 100 by default.

    Raises:
        ConfigurationError: A value is not valid.
    """

    heartbeat: float = 15.0
    retry: int = 3000
    max_channels: int = 100

    def __post_init__(self) -> None:
        check_positive("heartbeat", self.heartbeat)
        for name, least in (("retry", 0), ("max_channels", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigurationError(f"{name} is a number from {least} on, not {value!r}")


def check(sse: object) -> SSE:
    """Return the settings, or raise `ConfigurationError`."""
    if not isinstance(sse, SSE):
        raise ConfigurationError(f"sse must be an SSE, not {sse!r}")
    return sse


class EventStreamResponse(Response):
    """A response that ends when the client leaves, or the hub or the server stops.

    Args:
        hub: The hub.
        request: The client's.
        channels: Its channel, or a list: then each message goes out in an object that names its
            channel.
        outbox: What waits for the client.
        last: How many of the newest events of each channel a client gets that names none.
        sse: The settings.
        authorize: Awaited with each channel once all names and the page's origin are checked.
    """

    media_type = "text/event-stream"

    # Its base class would make a body of a known length. This one has headers only.
    def __init__(
        self,
        hub: Hub,
        request: Request,
        channels: Channel | Sequence[Channel],
        outbox: Outbox,
        *,
        last: int,
        sse: SSE,
        authorize: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        if not isinstance(request, Request):
            raise TypeError(f"stream(...) needs a Request, not {type(request).__name__}")
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self._hub = hub
        self._request = request
        self._channels = channels
        self._outbox = outbox
        self._last = check_count("history", last)
        self._sse = check(sse)
        self._authorize = authorize
        self._stream: Stream | None = None

    @property
    def joined(self) -> bool:
        """Whether the client was let in, and has joined its channels."""
        return self._stream is not None

    async def open(self) -> None:
        """Let the client in, and join its channels.

        Raises:
            OriginRefused, InvalidChannel: It may not come in.
            BackendUnavailable: The broker is away.
        """
        hub, request, channels = self._hub, self._request, self._channels
        one = not isinstance(channels, Sequence) or isinstance(channels, str)
        names = self._check_names(channels)
        await hub.settings.origins.check(request)
        if self._authorize is not None:
            for name in names:
                await self._authorize(name)
        stream = Stream(
            request,
            self._wishes(names),
            self._outbox,
            heartbeat=self._sse.heartbeat,
            objects=self._outbox.ids or not one,
            gaps=hub.settings.after_gap == "close" or all(map(hub.settings.histories.find, names)),
            join=hub.join,
            leave=hub.registry.unsubscribe,
        )
        if not stopping.is_stopping():  # a hub that is closing could not be joined
            await stream.join()
            stopping.end_with_server(stream)
        self._stream = stream

    def _check_names(self, channels: Channel | Sequence[Channel]) -> list[str]:
        if isinstance(channels, str) or not isinstance(channels, Sequence):
            channels = [channels]
        names = list(dict.fromkeys(check_channel(self._request, name) for name in channels))
        if not 1 <= len(names) <= self._sse.max_channels:
            raise InvalidChannel(
                f"a stream has 1 to {self._sse.max_channels} channels, not {len(names)}"
            )
        return names

    def _wishes(self, names: list[str]) -> dict[str, Wish]:
        """Return what the client wants of each channel.

        A browser that reconnects names its position in a header. The parameter in the URL is then
        still the one that the page has begun with.
        """
        request = self._request
        sent = request.headers.get("last-event-id") or request.query_params.get("last_event_id")
        ids: list[str | None] = [None] * len(names)
        if sent:
            parts = sent.split(",")
            # What does not fit is the id of no event, so nothing is recovered.
            ids = [part or None for part in parts] if len(parts) == len(names) else [""] * len(ids)
        find = self._hub.settings.histories.find
        pairs = zip(names, ids, strict=True)
        return {name: Wish(id, self._last) if find(name) else Wish() for name, id in pairs}

    def close(self) -> None:
        """Leave the channels. Safe to call more than once."""
        if self._stream is not None:
            stopping.forget(self._stream)
            self._stream.lose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._stream is None:
                try:
                    await self.open()
                except Exception as exc:
                    await refuse(self._request, exc, receive, send)
                    return
            assert self._stream is not None
            with contextlib.suppress(OSError):  # the client has left
                await self._respond(self._stream, receive, send)
        finally:
            self.close()
        if self.background is not None:
            await self.background()

    async def _respond(self, stream: Stream, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send(start | {"headers": self.raw_headers})
        retry = self._sse.retry
        first = event_stream.retry(random.randint(retry, retry + retry // 2))
        if stream.shard is None:
            await send({"type": "http.response.body", "body": first, "more_body": False})
            return
        watcher = asyncio.create_task(_lose_on_disconnect(stream, receive))
        try:
            stream.start(send, first)
            if not await stream.finished or not await self._end(stream, send):
                await asyncio.wait([watcher], timeout=ABORTED)
        finally:
            watcher.cancel()
            await asyncio.wait([watcher])

    async def _end(self, stream: Stream, send: Send) -> bool:
        """End the response; False if the client did not take that in time, and was given up."""
        try:
            async with asyncio.timeout(self._hub.settings.tuning.close_timeout):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            stream.lose(drop=True)
            return False
        return True


async def _lose_on_disconnect(stream: Stream, receive: Receive) -> None:
    with contextlib.suppress(Exception):  # of a server that so says that the client has left
        while (await receive())["type"] != "http.disconnect":
            pass
    stream.lose()


async def refuse(request: Request, exc: Exception, receive: Receive, send: Send) -> None:
    """Answer a client that is not let in, or raise what the app answers.

    A client that a WebSocket's handshake would answer with 403 gets 403.

    Raises:
        Exception: The app answers it, or it is a bug.
    """
    handlers: Mapping[object, object]
    handlers, _ = request.scope.get("starlette.exception_handlers", ({}, {}))
    answer: Exception = exc
    if isinstance(exc, WebSocketException | InvalidChannel):
        refusals.log(exc, exc.code, "HTTP 403")
        # Starlette's own handler for WebSocketException closes a websocket, and there is none.
        if not any(cls in handlers for cls in type(exc).__mro__ if cls is not WebSocketException):
            answer = HTTPException(403, exc.reason)
    elif isinstance(exc, HTTPException | Answered):
        refusals.log(exc, exc.status_code, f"HTTP {exc.status_code}")
    if handlers or not isinstance(answer, HTTPException | Answered):
        raise answer from (None if answer is exc else exc)
    response = PlainTextResponse(answer.detail, answer.status_code, answer.headers)
    await response(request.scope, receive, send)
