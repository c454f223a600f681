"""ChannelsEndpoint: a Starlette WebSocketEndpoint whose clients are on many channels."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, overload

from starlette.endpoints import WebSocketEndpoint
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from . import attributes, inbound
from .admission import refusals
from .admission.hooks import Refuse, check_refuse
from .attributes import OwnHub
from .broadcast import Broadcast
from .channels.hooks import Hooks
from .channels.model import Client, Limits, Subscription
from .channels.serve import check_limits, serve
from .exceptions import CommandError

if TYPE_CHECKING:

    class _Endpoint:
        """A WebSocketEndpoint whose `on_connect` takes more than Starlette's does."""

        def __init__(self, scope: Scope, receive: Receive, send: Send) -> None: ...

        def __await__(self) -> Generator[Any, None, None]: ...

else:
    _Endpoint = WebSocketEndpoint


class ChannelsEndpoint(_Endpoint):
    """Serves clients that speak Centrifugo's protocol: many channels over one connection.

        class Live(ChannelsEndpoint):
            broadcast = hub

            async def on_connect(self, websocket, token, data):
                user = await find_user(token)
                return Client(user=user.id, info={"name": user.name})

            async def on_subscribe(self, websocket, channel, token, data):
                if not channel.startswith("room:"):
                    raise PermissionError
                return Subscription(presence=True)

        routes = [WebSocketRoute("/connection/websocket", Live)]

    Its clients are Centrifugo's official ones, such as `centrifuge` from npm, and `starcast.js`. A
    client may do nothing but connect unless a hook allows it. There is one instance for each
    client.

    Those for Flutter, Swift and Java speak the protocol in Protobuf, and others may choose it. That
    needs `pip install 'starcast[protobuf]'`. Hooks get the same data, and clients the same
    messages, in either form: JSON data, and in base64 what the app publishes as bytes.

    A hook may be a plain function, which runs in a thread. It refuses by raising `PermissionError`
    (error 103), or `CommandError` for an error of its own, and closes the client by raising
    `DisconnectClient`. What it returns allows what was asked for; None refuses it, and a log line
    says that a `return` may be missing. Any other exception is error 100, after which clients try
    again, and goes to the log.

    The parameter `data` of `on_publish` and `on_rpc` may have a type that pydantic knows, such as a
    model: what does not fit is error 107, with pydantic's words.

    FastAPI accepts the class where it expects a function: put `@app.websocket("/live")` on the
    class, with `dependencies=` if you like.

    Attributes:
        broadcast: The hub. By default each class gets its own hub in memory.
        limits: Bounds and timings: a `Limits`.
        models: For methods of `on_rpc` whose data has a type of its own: the type by the method.
        max_message: Bytes that one message of a client may have; None, the default, stands for the
            hub's setting. A longer one closes the client with 1009.
        refuse: How a client is turned away before it is accepted, `"http"` or `"close"`; None, the
            default, stands for the hub's setting. See `Broadcast`.

    A class with an attribute that looks like one of these misspelt is told so, with one log line.

    Raises:
        ConfigurationError: Another attribute than `broadcast` is not valid. Raised where the class
            is defined.
        TypeError: `broadcast` is not a `Broadcast`. Raised there too.
    """

    broadcast: Broadcast = OwnHub()  # type: ignore[assignment]  # a descriptor that returns one
    limits: Limits = Limits()
    models: Mapping[str, Any] = {}
    max_message: int | None = None
    refuse: Refuse | None = None

    # FastAPI reads this to know what to call the class with.
    __signature__ = inspect.Signature(
        [
            inspect.Parameter(
                "websocket", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=WebSocket
            )
        ]
    )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        attributes.check(cls, ChannelsEndpoint)
        check_limits(cls.limits)
        inbound.check(cls.max_message)
        check_refuse(cls.refuse)

    @overload
    def __init__(self, websocket: WebSocket) -> None: ...

    @overload
    def __init__(self, websocket: Scope, receive: Receive, send: Send) -> None: ...

    def __init__(
        self,
        websocket: WebSocket | Scope,
        receive: Receive | None = None,
        send: Send | None = None,
    ) -> None:
        """Starlette calls it as an ASGI app, FastAPI with a websocket; either way, await it."""
        if not isinstance(websocket, WebSocket):
            assert receive is not None
            assert send is not None
            websocket = WebSocket(websocket, receive, send)
        super().__init__(websocket.scope, websocket._receive, websocket._send)
        self._websocket = websocket

    async def on_connect(self, websocket: WebSocket, token: str, data: Any) -> Client:
        """Return who a client is. By default everybody may connect, and is nobody in particular.

        Called once for each connection, when its first command has arrived.

        Args:
            token: What the client names as its token; empty if it names none.
            data: What else it sends: JSON data, or None.

        Raises:
            PermissionError: The client may not connect. It does not come back.
            CommandError: 109 if its token has expired: it gets another one and comes back.
        """
        return Client()

    async def on_subscribe(
        self, websocket: WebSocket, channel: str, token: str, data: Any
    ) -> Subscription:
        """Return what a client may do on a channel. By default it may not subscribe.

        Called again, with another token, for a subscription with `expires_at` that is renewed.

        Args:
            channel: 1 to 200 characters without control characters.
            token: The client's token for this channel; empty if it names none.
            data: What else it sends: JSON data, or None.
        """
        raise PermissionError

    async def on_publish(self, websocket: WebSocket, channel: str, data: Any) -> Any:
        """Return what is published when a client publishes `data`. By default it may not.

        The client need not be subscribed to the channel. What is published says who has published
        it: the client's user, its id and its info.
        """
        raise PermissionError

    async def on_rpc(self, websocket: WebSocket, method: str, data: Any) -> Any:
        """Return the result of a method that a client calls: JSON data. By default there are none.

        Up to `Limits.max_calls` of these run at the same time for one client.

        Raises:
            CommandError: 104 if there is no such method.
        """
        raise CommandError(104, "method not found")

    async def on_refresh(self, websocket: WebSocket, token: str) -> float:
        """Return until when a client may stay, in seconds since 1970, that has another token.

        Called in time before a connection with `expires_at` ends. By default it may not.
        """
        raise PermissionError

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        """Called once for every client that `on_connect` has let in, when it has left.

        `close_code` is the code that the client or the server closed with; 1006 if there was no
        closing handshake.
        """

    async def dispatch(self) -> None:
        """Serve the client until it leaves. Starlette calls this."""
        websocket = self._websocket
        refusals.note(websocket, self.refuse)
        hooks = Hooks(
            self.on_connect,
            self.on_subscribe,
            self.on_publish,
            self.on_rpc,
            self.on_refresh,
            self.on_disconnect,
            self.models,
        )
        await serve(self.broadcast._hub, websocket, hooks, self.limits, self.max_message)
