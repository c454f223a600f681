"""Handler: the sends and receives of a client's own handler while the client is registered.

Starlette's `accept`, `send_text`, `close` and the like all call `websocket.send`, and
`receive_text` and the like call `websocket.receive`. Attributes of the instance replace both, so
that a send waits for the messages that the hub has queued for the client, and a receive ends when
the hub has given up the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import FunctionType, MethodType
from typing import Any, Protocol, TypeGuard

from starlette.types import Message, Receive, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from .close_codes import ABNORMAL

CONNECTED = WebSocketState.CONNECTED


def is_gone(websocket: WebSocket) -> bool:
    """Whether either side has closed it, as far as the app was told."""
    gone = WebSocketState.DISCONNECTED
    return gone in (websocket.client_state, websocket.application_state)


class Client(Protocol):
    """What a handler needs of its connection."""

    websocket: WebSocket
    code: int | None

    @property
    def ended(self) -> bool:
        """Whether the hub is done with the client."""

    async def send(self, message: Message) -> bool:
        """Send a message of the handler's; False if the hub is done with the client."""

    def lose(self, code: int) -> None:
        """Forget a client that has gone away."""

    def call_after_close_timeout(self, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Call it when the client has had time for a close frame."""


# Handles a message where it is read, in place of the task that waits for it and as if by that task.
# Called with the message, as the app gets it and as bytes; returns whether it has handled it.
Take = Callable[[str | bytes, bytes], bool]

# Returns the next message that is not handled in this way.
DirectReceive = Callable[[Take | None], Awaitable[Message]]


class Reader(Protocol):
    """What reads from the client on the fast path."""

    @property
    def receive(self) -> DirectReceive:
        """The server's `receive` for this client."""

    def stop_receiving(self, code: int) -> None:
        """Let the app, which is waiting in `receive`, receive a disconnect."""


class Handler:
    """See the module. It belongs to the event loop of the websocket."""

    __slots__ = (
        "_client",
        "_direct",
        "_installed",
        "_interrupted",
        "_reader",
        "_receive",
        "_receiving",
        "_timer",
        "_told",
        "_websocket",
        "over",
        "send",
        "send_event",
    )

    def __init__(self, client: Client, reader: Reader | None) -> None:
        self._client = client
        self._websocket = websocket = client.websocket
        self.over = False  # do not wait for the server to report the disconnect
        self._told = False  # `receive` has returned the disconnect
        self._receiving: asyncio.Task[Any] | bool | None = None  # True in `direct_receive`
        self._interrupted = False  # whether we have cancelled that
        self._timer: asyncio.TimerHandle | None = None
        # If another hub has replaced them already, this handler sends through that hub.
        self.send, self._receive = websocket.send, websocket.receive
        # What `WebSocket.send` calls after its checks. The connection checks the same, and skipping
        # the method saves a coroutine for each message.
        self.send_event = self.send
        if has_plain_send(websocket):
            self.send_event = getattr(websocket, "_send", self.send)
        self._reader = reader
        self._direct: DirectReceive | None = None
        receive = self._guarded_receive
        if reader is not None and has_plain_receive(websocket, reader.receive):
            self._direct, receive = reader.receive, self.direct_receive
        self._installed = receive
        self._set(self._guarded_send, receive)

    def _set(self, send: Send, receive: Receive) -> None:
        for name, call in (("send", send), ("receive", receive)):
            setattr(self._websocket, name, call)

    def uninstall(self) -> None:
        """Restore Starlette's own methods."""
        above = owner(self._websocket.send)
        if above is self and owner(self.send) is self._websocket:
            del self._websocket.send, self._websocket.receive
        elif above is self:
            self._set(self.send, self._receive)
        while isinstance(above, Handler):
            if owner(above.send) is self:
                above.send, above._receive = self.send, self._receive
            above = owner(above.send)

    # Send

    async def _guarded_send(self, message: Message) -> None:
        client = self._client
        if await client.send(message):
            return
        if client.code is None:
            await self.send(message)  # the client has left the hub
        elif message["type"] != "websocket.close":
            raise WebSocketDisconnect(client.code)

    # Receive

    @property
    def is_direct(self) -> bool:
        """Whether `websocket.receive` is still the handler's own, on the fast path."""
        return self._websocket.receive is self._installed and self._direct is not None

    async def direct_receive(self, take: Take | None = None) -> Message:
        """Do what `_guarded_receive` does, on the fast path, unless `take` handles the message.

        Neither Starlette's method nor a task that could be cancelled is needed there: what reports
        a disconnect is a message of the server's.
        """
        client, websocket = self._client, self._websocket
        if self.over or client.code is not None or websocket.client_state is not CONNECTED:
            return await self._guarded_receive()
        assert self._direct is not None
        self._receiving = True
        try:
            message = await self._direct(take)
        finally:
            self._receiving = None
        if client.code is not None:  # it was closed meanwhile
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if message["type"] == "websocket.receive" and not self.over:
                # While it is being closed, what it still sends is ignored.
                return message if client.ended else await self._guarded_receive()
        elif message["type"] == "websocket.receive":
            return message
        websocket.client_state = WebSocketState.DISCONNECTED
        self._told = True
        if self.over:
            return {"type": "websocket.disconnect", "code": client.code, "reason": ""}
        client.lose(message.get("code") or ABNORMAL)
        return message

    async def _guarded_receive(self) -> Message:
        """Like `websocket.receive`, but report a client that was closed or given up as gone.

        If the client does not read, the server may report nothing for as long as the TCP connection
        lasts, and the handler would wait.
        """
        client = self._client
        if self._told or not self.over:  # after a disconnect, let Starlette raise
            # What `asyncio.timeout` does, which would take twice as long for each message.
            task = self._receiving = asyncio.current_task()
            assert task is not None  # Starlette's own receive needs one too
            cancelled = task.cancelling()
            if client.code is not None:
                self.limit()
            try:
                message = await self._receive()
                while (
                    client.code is not None
                    and not client.ended
                    and message["type"] == "websocket.receive"
                ):  # it is being closed, so what it still sends is ignored
                    message = await self._receive()
                if message["type"] == "websocket.disconnect":
                    self._told = True
                    client.lose(message.get("code") or ABNORMAL)
                return message
            except asyncio.CancelledError:
                if not self._interrupted or task.cancelling() > cancelled + 1:
                    raise
            finally:
                self._received(task)
        self._websocket.client_state = WebSocketState.DISCONNECTED
        self._told = True
        return {"type": "websocket.disconnect", "code": client.code, "reason": ""}

    def _received(self, task: asyncio.Task[Any]) -> None:
        self._receiving = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            if self._interrupted:
                self._interrupted = False
                task.uncancel()

    def limit(self) -> None:
        """Give the server time to hand over what the client has sent, then stop receiving."""
        if self._receiving is not None and self._timer is None:
            self._timer = self._client.call_after_close_timeout(self.interrupt)

    def interrupt(self) -> None:
        """Let `receive` report now that the client has left."""
        if self._receiving is True:
            assert self._reader is not None
            self._reader.stop_receiving(self._client.code or ABNORMAL)
        elif self._receiving and not self._interrupted:
            self._interrupted = True
            self._receiving.cancel()


def owner(method: object) -> object:
    """Return what a bound method is bound to; None if it is no method, but a proxy for one."""
    return method.__self__ if type(method) is MethodType else None


def is_defined_in(modules: tuple[str, ...], function: object) -> TypeGuard[FunctionType]:
    """Whether it is a function whose code is in one of these modules.

    A proxy has the attributes of the function that it wraps, including its class. A function to
    which `functools.wraps` was applied has the other one's `__module__`.
    """
    return type(function) is FunctionType and function.__globals__.get("__name__") in modules


def has_plain_receive(websocket: WebSocket, receive: object) -> bool:
    """Whether `websocket.receive` is Starlette's, and calls that of the server."""
    own: Any = websocket.receive
    is_plain = owner(own) is websocket and is_defined_in(("starlette.websockets",), own.__func__)
    return is_plain and getattr(websocket, "_receive", None) == receive


def has_plain_send(websocket: WebSocket) -> bool:
    """Whether `websocket.send` is Starlette's: no hub, subclass or patch has replaced it."""
    send: Any = websocket.send
    return owner(send) is websocket and is_defined_in(("starlette.websockets",), send.__func__)
