"""BroadcastEndpoint: a Starlette WebSocketEndpoint that broadcasts what its clients send."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import MethodType
from typing import Any, Literal, overload

from starlette.endpoints import WebSocketEndpoint
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketState

from . import attributes, codec, heartbeats, inbound, serving
from .admission import refusals, subprotocols
from .admission.hooks import Refuse, check_refuse
from .attributes import OwnHub
from .broadcast import Broadcast
from .close_codes import ABNORMAL
from .codec import DEFAULT_CHANNEL, Channel
from .exceptions import BackendUnavailable, PublishQueueFull
from .heartbeats import Heartbeats
from .history import check_count
from .members import Member
from .relay import Relay
from .shortcut import Shortcut


class BroadcastEndpoint(WebSocketEndpoint):
    """Registers a client on connect, broadcasts on receive, cleans up on disconnect.

        class Chat(BroadcastEndpoint):
            broadcast = Broadcast("memory://")

            def get_channel(self, websocket):
                return websocket.path_params["room"]

        routes = [WebSocketRoute("/ws/{room}", Chat)]

    Override any hook and call `super()`. There is one instance for each client.

    A hook that raises a `WebSocketException` closes that client with its code, or refuses the
    client if it has not been accepted yet. Any other exception closes it with 1011 and goes to the
    server's log. A client that sends what the encoding does not allow is closed with 1003 (wrong
    type of frame) or 1007 (invalid content), with one log line. A pydantic `ValidationError` in
    `on_receive` or `decode` counts as invalid content.

    FastAPI accepts the class where it expects a function: put `@app.websocket("/ws")` on the class,
    with `dependencies=` if you like.

    Attributes:
        broadcast: The hub. By default each class gets its own hub in memory.
        encoding: `"text"`, the default, `"bytes"` or `"json"`, both ways; `None` accepts text and
            binary frames as they come. It applies to what clients send and to what `on_receive`
            publishes. For what the server publishes itself, the type of the message or
            `publish(encoding=)` decides.
        heartbeats: Messages that clients send to check that the server is there, with their
            answers: `{"ping": "pong"}`, or None for no answer. `on_receive` does not get them. See
            `Broadcast.serve`.
        subprotocols: Names of subprotocols. The server answers with the first of them that the
            client offers, or with none.
        max_message: Bytes that one message of a client may have; None, the default, stands for the
            hub's setting. A longer one closes the client with 1009, and no hook gets it.
        history: On a channel that has a history, how many of its newest messages a client gets
            first, 0 by default. A client that adds `?last_event_id=` to its URL gets what it has
            missed instead, if all of that is still kept.
        ids: Whether clients get each message as a JSON object with its id. See
            `Broadcast.connect`.
        join_leave: Whether clients are told who joins and leaves their channel. See
            `Broadcast.connect`, and `get_member`.
        refuse: How a client is turned away before it is accepted, `"http"` or `"close"`; None, the
            default, stands for the hub's setting. See `Broadcast`.

    A class with an attribute that looks like one of these misspelt is told so, with one log line.

    Raises:
        ConfigurationError: Another attribute than `broadcast` is not valid. Raised where the class
            is defined.
        TypeError: `broadcast` is not a `Broadcast`. Raised there too.
    """

    broadcast: Broadcast = OwnHub()  # type: ignore[assignment]  # a descriptor that returns one
    encoding: Literal["text", "bytes", "json"] | None = "text"
    heartbeats: Heartbeats | None = None
    subprotocols: Sequence[str] = ()
    max_message: int | None = None
    history: int = 0
    ids: bool = False
    join_leave: bool = False
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
        attributes.check(cls, BroadcastEndpoint)
        heartbeats.check(cls.heartbeats)
        subprotocols.check(cls.subprotocols)
        inbound.check(cls.max_message)
        check_count("history", cls.history)
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

    def get_channel(self, websocket: WebSocket) -> Channel:
        """Return the client's channel: the path parameter `channel`, or else `"default"`.

        Override it to return a `str`, an `int` or a `UUID`. The latter two name the channel of
        their `str()`.
        """
        return str(websocket.path_params.get("channel", DEFAULT_CHANNEL))

    def get_member(self, websocket: WebSocket) -> Member | None:
        """Return who the client is on its channel, for `Broadcast.members`; None: no member.

        Override it to return a `Member`. By default, nobody is one.
        """
        return None

    async def on_connect(self, websocket: WebSocket) -> None:
        """Accept and register the client."""
        subprotocol = subprotocols.choose(websocket, self.subprotocols)
        channel = self.get_channel(websocket)
        wish = self.broadcast._hub.past.asked(websocket, channel, self.history)
        await self.broadcast.connect(
            websocket,
            channel,
            subprotocol=subprotocol,
            since=wish.since,
            history=wish.last,
            ids=self.ids,
            member=self.get_member(websocket),
            join_leave=self.join_leave,
        )

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        """Broadcast what the client sent to its channel, and so to the client itself too.

        It does not wait until every client has the message, so a burst is sent in a few writes. A
        client with 256 unsent messages is not read from until these have been sent.

        Nor is it read from while another client of the channel, on the same event loop and with the
        policy `disconnect`, has half of its buffer full: until that is empty, so that a client that
        reads as fast as it can is not cut off. A client that takes nothing for 2 seconds, or has
        not caught up after 10, is no longer waited for, and its policy applies.
        """
        await self._relay.publish(self._shortcut.channel(websocket), data, self.encoding)

    async def on_publish_error(
        self, websocket: WebSocket, data: Any, exc: BackendUnavailable | PublishQueueFull
    ) -> None:
        """Called when a message of the client could not be published.

        By default it raises `exc`, which closes the client with 1013 (try again later), so that the
        client does not believe that the message was delivered. Override it to tell the client, or
        to keep the message, and let the client stay. It is called for what
        `BroadcastEndpoint.on_receive` was given, in order, and before `on_disconnect`; nothing more
        is read from the client meanwhile. It is not called for a message that is lost after the
        client has left; the log and `stats()` report that one.

        Args:
            data: What `on_receive` was given.
            exc: The reason. If the connection to the broker was lost while the message was being
                sent, it may have been published all the same.
        """
        raise exc

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        """Unregister the client.

        Called exactly once for every client that was registered, and for every client that
        `on_connect` accepted without `super()`, unless `on_connect` then raised, as in Starlette.
        `close_code` is the code that the client or the server closed with; 1006 if there was no
        closing handshake.
        """
        await self.broadcast.disconnect(websocket)

    async def decode(self, websocket: WebSocket, message: Message) -> Any:
        """Return what `on_receive` gets for an ASGI message of type `websocket.receive`."""
        return codec.decode(message, self.encoding)

    async def dispatch(self) -> None:
        """Serve the client until it leaves. Starlette calls this."""
        websocket = self._websocket
        hub = self.broadcast._hub
        refusals.note(websocket, self.refuse)
        self._relay = Relay(hub, websocket, self.on_publish_error)
        self._shortcut = Shortcut(self._relay, self, self._is_plain)
        code = ABNORMAL  # what on_disconnect is told if this task is cancelled
        was_accepted = False
        try:
            await self.on_connect(websocket)
            # A client that is refused by a close has not even received the handshake.
            was_accepted = websocket.client_state is not WebSocketState.CONNECTING
            code = await serving.converse(
                hub,
                websocket,
                self._on_message,
                self.heartbeats,
                self.max_message,
                self._shortcut,
            )
        except Exception as exc:
            code = serving.code_for(hub, websocket, exc)
            if not await serving.answer(hub, websocket, exc, self.subprotocols):
                raise
        finally:
            try:
                await self._relay.end()
                if was_accepted or hub.find(websocket) is not None:
                    await self.on_disconnect(websocket, code)
            finally:
                hub.leave(websocket)

    def _is_plain(self) -> bool:
        """Whether a message is published as it comes: nobody has replaced what is in between."""
        on_receive, decode = self.on_receive, self.decode
        return (
            type(on_receive) is MethodType  # a proxy may claim to be what it wraps
            and on_receive.__func__ is _ON_RECEIVE
            and type(decode) is MethodType
            and decode.__func__ is _DECODE
        )

    async def _on_message(self, message: Message) -> None:
        websocket = self._websocket
        try:
            await self.on_receive(websocket, await self.decode(websocket, message))
        except serving.validation_errors() as exc:
            if serving.has_handler(websocket, exc):
                raise
            raise serving.invalid(exc) from None


# As they are here: a tracing library may replace them in the class.
_ON_RECEIVE = BroadcastEndpoint.on_receive
_DECODE = BroadcastEndpoint.decode
