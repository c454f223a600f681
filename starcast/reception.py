"""Reception: how a `Broadcast` serves clients from their handshake to their end."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from . import serving
from .admission import subprotocols as _subprotocols
from .admission.hooks import Refuse
from .arguments import check_client
from .codec import DEFAULT_CHANNEL, Channel, Encoding
from .frames import PLAIN, WITH_ID
from .heartbeats import Heartbeats
from .history import check_count
from .hub import Hub
from .joining import Headers
from .members import Member
from .mount import Authorize, make_app
from .outbox import Overflow
from .relay import OnPublishError
from .sse import SSE, EventStreamResponse

if TYPE_CHECKING:
    from .channels.model import Limits


class Reception(abc.ABC):
    """The part of `Broadcast` that serves clients. On any event loop."""

    _hub: Hub
    _mount: ASGIApp

    @abc.abstractmethod
    async def connect(self, websocket: WebSocket, *args: Any, **options: Any) -> Any:
        """See `Broadcast`."""

    async def serve(
        self,
        websocket: WebSocket,
        channel: Channel = DEFAULT_CHANNEL,
        *,
        encoding: Encoding | None = "text",
        publish: bool = True,
        heartbeats: Heartbeats | None = None,
        subprotocol: str | None = None,
        subprotocols: Sequence[str] = (),
        headers: Headers | None = None,
        max_buffer: int | None = None,
        overflow: Overflow | None = None,
        history: int = 0,
        ids: bool = False,
        member: Member | None = None,
        join_leave: bool = False,
        max_message: int | None = None,
        on_publish_error: OnPublishError | None = None,
    ) -> int:
        """Serve a client until it leaves: register it, publish what it sends, unregister it.

        For the functions of `@app.websocket`. It returns when the client has left or was closed;
        closing the socket in any other case is up to the caller. Nothing more is read from a client
        whose channel cannot take what it says: see `BroadcastEndpoint.on_receive`.

        Args:
            websocket, channel, subprotocol, headers, max_buffer, overflow: See `connect`.
            encoding: `"text"`, `"bytes"` or `"json"`, both ways; `None` accepts text and binary
                frames as they come.
            publish: Whether the client may publish. If not, it only listens.
            heartbeats: Messages that client libraries send to check that the server is there, and
                their answers: `{"ping": "pong"}`, or None for no answer. A `str` matches a text
                frame, bytes a binary one, exactly as sent, before any JSON is decoded. Only this
                client gets the answer, in order with its other messages. A heartbeat is not
                published, and listen-only clients may send it.
            subprotocols: Instead of `subprotocol`: the server answers with the first of these names
                that the client offers, or with none.
            history, ids: See `connect`. On a channel that has a history, a client that adds
                `?last_event_id=` to its URL gets what it has missed, as with `since`.
            member, join_leave: See `connect`.
            max_message: For this client instead of the hub's, in bytes.
            on_publish_error: Called as `on_publish_error(websocket, data, exc)` when a message of
                the client could not be published; `exc` is a `BackendUnavailable` or a
                `PublishQueueFull`. An async function, or a plain one that does not block. The
                client then stays connected, unless the function raises. By default the client is
                closed with 1013, so that it does not believe that the message was delivered.

        Returns:
            The close code. A client that sends what the encoding does not allow is closed with 1003
            (wrong type of frame) or 1007 (invalid content), one that may not publish with 1008, and
            one whose message is longer than `max_message` or too large for the broker with 1009,
            each with one log line. If the broker is away when the client connects, the handshake is
            answered with HTTP 503, or 403 if the server does not support that, and the code is
            1013.

        Raises:
            OriginRefused, InvalidChannel, ConfigurationError, TypeError: See `connect`.
        """
        check_client(websocket, "serve(...)")
        wish = self._hub.past.asked(websocket, channel, check_count("history", history))
        connect = functools.partial(
            self.connect,
            websocket,
            channel,
            subprotocol=_subprotocols.choose(websocket, subprotocols, subprotocol),
            headers=headers,
            max_buffer=max_buffer,
            overflow=overflow,
            since=wish.since,
            history=wish.last,
            ids=ids,
            member=member,
            join_leave=join_leave,
        )
        return await serving.serve(
            self._hub,
            websocket,
            channel,
            encoding=encoding,
            publish=publish,
            heartbeats=heartbeats,
            max_message=max_message,
            connect=connect,
            on_publish_error=on_publish_error,
        )

    async def serve_channels(
        self,
        websocket: WebSocket,
        *,
        on_connect: Callable[..., Any] | None = None,
        on_subscribe: Callable[..., Any] | None = None,
        on_publish: Callable[..., Any] | None = None,
        on_rpc: Callable[..., Any] | None = None,
        on_refresh: Callable[..., Any] | None = None,
        on_disconnect: Callable[..., Any] | None = None,
        models: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        max_message: int | None = None,
    ) -> int:
        """Serve a client that speaks Centrifugo's protocol, until it leaves.

        For the functions of `@app.websocket`, whose own parameters may be what `Depends` returns:

            @app.websocket("/live")
            async def live(websocket: WebSocket, user: Annotated[User, Depends(current_user)]):
                async def on_subscribe(websocket, channel, token, data):
                    if not user.may_read(channel):
                        raise PermissionError
                    return Subscription()

                await hub.serve_channels(websocket, on_subscribe=on_subscribe)

        Args:
            websocket: The client, which is accepted here.
            on_connect, on_subscribe, on_publish, on_rpc, on_refresh, on_disconnect: The methods of
                `ChannelsEndpoint`, as functions. Without one, what it decides is refused, but
                everybody may connect.
            models, limits, max_message: See `ChannelsEndpoint`.

        Returns:
            The close code.

        Raises:
            OriginRefused, ConfigurationError: See `connect`.
        """
        from .channels import serve as protocol  # not for those who do not use it
        from .channels.hooks import Hooks

        hooks = Hooks(
            on_connect, on_subscribe, on_publish, on_rpc, on_refresh, on_disconnect, models or {}
        )
        bounds = protocol.check_limits(limits) if limits else protocol.LIMITS
        return await protocol.serve(self._hub, websocket, hooks, bounds, max_message)

    def stream(
        self,
        request: Request,
        channel: Channel | Sequence[Channel] = DEFAULT_CHANNEL,
        *,
        max_buffer: int | None = None,
        overflow: Overflow | None = None,
        history: int = 0,
        ids: bool = False,
        sse: SSE | None = None,
    ) -> EventStreamResponse:
        """Return a response that streams a channel as server-sent events, for a GET route.

            @app.get("/orders/{number}/events")
            async def events(request: Request, number: int):
                return hub.stream(request, f"order:{number}")

        A message is an event without a name, with the message as its data. Its lines may end in any
        way, and arrive with LF between them. Bytes are in Base64, in an event named `bytes`. On a
        channel that has a history, events have ids. A client that reconnects, or names the last id
        in the header `Last-Event-ID` or with `?last_event_id=`, first gets what it has missed. If
        not all of that is kept any more, it gets an event named `reset` instead, whose data is
        `{"channel": ..., "id": ..., "recovered": false}`.

        The client is registered once the response begins, and is one of `len(hub)`, `channels` and
        `stats().clients`, but not of `clients()`, which are websockets. If the buffer is full and
        the policy is `"disconnect"`, the response ends, and a browser comes back. It also ends when
        the hub is closed, when the server begins to shut down, and after a gap with
        `after_gap="close"`. What middleware adds to responses applies.

        Args:
            request: The client's request.
            channel: One channel, or a list of them, for one stream of them all. With a list,
                however short, the data of each event is a JSON object with the id, the channel and
                the message, as with `ids`, and the id of an event names the position on all
                channels in the order of the list.
            max_buffer, overflow: See `connect`.
            history: On a channel that has a history, how many of its newest events a client gets
                first that names no id, or whose id is not recovered.
            ids: Whether the data of each event is a JSON object: see `connect`.
            sse: The heartbeats and the time until a client reconnects; `SSE()` by default.

        Returns:
            A Starlette response. A client that is not let in gets 403 instead: `origins` does not
            allow its page, or the name of a channel is not valid. If the broker is away, it gets
            503 with `Retry-After`.

        Raises:
            ConfigurationError: An argument is not valid.
            TypeError: `request` is not a request.
        """
        outbox = self._hub.settings.outbox(max_buffer, overflow, WITH_ID if ids else PLAIN)
        settings = SSE() if sse is None else sse
        return EventStreamResponse(self._hub, request, channel, outbox, last=history, sse=settings)

    def app(
        self,
        *,
        publish: bool = False,
        authorize: Authorize | None = None,
        encoding: Encoding | None = "text",
        heartbeats: Heartbeats | None = None,
        subprotocols: Sequence[str] = (),
        history: int = 0,
        ids: bool = False,
        max_message: int | None = None,
        refuse: Refuse | None = None,
        sse: SSE | None = SSE(),  # noqa: B008  # it does not change
    ) -> ASGIApp:
        """Return an ASGI app that serves `/{channel}`: `app.mount("/live", broadcast.app())`.

        The hub itself is the same app with the defaults: `app.mount("/live", broadcast)`.

        It serves WebSockets, and answers GET with server-sent events: see `stream`. A stream may be
        on several channels, which are added to that of the path, if there is one:
        `/live/?channel=a&channel=b`. Its events are then JSON objects that name their channel.

        It also answers GET of `starcast.js`, the client for the pages of a `ChannelsEndpoint`, and
        of its types, `starcast.d.ts`, without asking `authorize`.

        Clients may ask for any channel of the hub, including those that an endpoint guards
        elsewhere. Decide with `authorize` who may join which, or mount a hub that has no secrets.

        Args:
            publish: Whether clients may publish to the channel. By default they only listen, and a
                client that sends anything but a heartbeat is closed with 1008.
            authorize: Called as `authorize(client, channel)` before the client is accepted, with a
                `WebSocket`, or with the `Request` of a stream, which are both an `HTTPConnection`;
                a plain function runs in a thread. For a stream on several channels it is called
                with each, and all have to be allowed. Only True lets the client in. False or a
                `PermissionError` refuses it with 403. None refuses it too, and a log line says that
                a `return` may be missing. Any other value raises `ConfigurationError`, so write
                `return user is not None`, not `return user`. Other exceptions go through the app as
                usual.
            encoding: See `serve`; ignored without `publish`.
            heartbeats, subprotocols, history, ids, max_message: See `serve`.
            refuse: Instead of the hub's, see there. A stream is always refused with a response.
            sse: How streams behave; None for an app that serves WebSockets only.

        Raises:
            ConfigurationError: An argument is not valid.
        """
        return make_app(
            self._hub,
            self.serve,
            authorize,
            refuse,
            encoding=encoding,
            publish=publish,
            heartbeats=heartbeats,
            subprotocols=subprotocols,
            history=history,
            ids=ids,
            max_message=max_message,
            streams=sse,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._mount(scope, receive, send)
