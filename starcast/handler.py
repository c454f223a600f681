"""Handler: the sends and receives of a client's own handler while the client is registered.

Starlette's `accept`, `send_text`, `close` and the like all call `websocket.send`, and
`receive_text` and the like `websocket.receive`. Attributes of the instance take the place of both,
so that a send stands in line behind what the hub has for the client, and a receive ends when the
hub has given the client up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from starlette.types import Message, Receive, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from .close_codes import ABNORMAL, NORMAL


class Client(Protocol):
    """What a handler needs of its connection."""

    websocket: WebSocket
    code: int | None

    @property
    def ended(self) -> bool:
        """Whether it is let go of."""

    @property
    def departed(self) -> bool:
        """Whether the client has left or is about to be closed."""

    async def acquire(self) -> bool:
        """Wait for the handler's turn; True if the send in flight is the handler's now."""

    def go_on(self) -> None:
        """Go on with what waits: the handler's send is over."""

    def go_on_later(self) -> None:
        """The same in a moment."""

    def end(self, code: int | None = None) -> None:
        """Let go of the client."""

    def failed(self) -> None:
        """Let go of the client: a send to it has failed."""

    def lose(self, code: int) -> None:
        """Forget the client: it has left."""

    def call_after_close_timeout(self, then: Callable[[], None]) -> asyncio.TimerHandle:
        """Call it after the time that a client has for a close frame."""


class Handler:
    """See the module. It belongs to the event loop of the websocket."""

    __slots__ = (
        "_client",
        "_interrupted",
        "_loop",
        "_patience",
        "_receive",
        "_receiving",
        "_sending",
        "_told",
        "_websocket",
        "over",
        "send",
        "send_event",
    )

    def __init__(self, client: Client, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        self._websocket = websocket = client.websocket
        self.over = False  # `websocket.receive` has nothing more to say
        self._told = False  # `receive` has said that the client has left
        self._receiving: asyncio.Task[Any] | None = None
        self._interrupted = False  # whether we have cancelled that
        self._patience: asyncio.TimerHandle | None = None
        self._sending: asyncio.Timeout | None = None
        # If another hub's are there already, that hub takes us for the handler.
        self.send, self._receive = websocket.send, websocket.receive
        # What `WebSocket.send` calls after its checks. The connection makes them itself, and a
        # coroutine less for each message is worth the look behind it.
        self.send_event = self.send
        if owner(self.send) is websocket:
            self.send_event = getattr(websocket, "_send", self.send)
        self._set(self._guarded_send, self._guarded_receive)

    def _set(self, send: Send, receive: Receive) -> None:
        for name, call in (("send", send), ("receive", receive)):
            setattr(self._websocket, name, call)

    def uninstall(self) -> None:
        """Give the socket back: from now on the handler's calls are Starlette's own."""
        above = owner(self._websocket.send)
        if above is self and owner(self.send) is self._websocket:
            del self._websocket.send, self._websocket.receive  # as if nobody had been there
        elif above is self:
            self._set(self.send, self._receive)
        while isinstance(above, Handler):
            if owner(above.send) is self:
                above.send, above._receive = self.send, self._receive
            above = owner(above.send)

    # Send

    @property
    def is_sending(self) -> bool:
        """Whether a send of the handler's is in flight."""
        return self._sending is not None

    def stop_sending(self) -> None:
        """End the send that is in flight, if any: the handler gets a WebSocketDisconnect."""
        if self._sending is not None:
            self._sending.reschedule(self._loop.time())

    async def _guarded_send(self, message: Message) -> None:
        client = self._client
        held = await client.acquire()
        closing = message["type"] == "websocket.close"
        if client.departed and client.code is None:
            client.failed()
        try:
            if client.code is None:
                try:
                    async with asyncio.timeout(None) as self._sending:
                        await self.send(message)
                except TimeoutError:
                    if client.code is None:
                        raise
                    raise WebSocketDisconnect(client.code) from None
                finally:
                    self._sending = None
                if closing and not client.ended:
                    client.end(message.get("code", NORMAL))
            elif not closing:
                raise WebSocketDisconnect(client.code)
        except (WebSocketDisconnect, OSError):
            if client.code is None and not client.ended:
                client.failed()
            raise
        except (asyncio.CancelledError, GeneratorExit):
            if held:
                client.go_on_later()
                held = False
            raise
        finally:
            if held:
                client.go_on()

    # Receive

    async def _guarded_receive(self) -> Message:
        """Like `websocket.receive`, but a client that was closed or given up has left.

        A server that has nothing to say any more, because its client does not read, would let the
        handler wait for as long as the TCP connection lasts.
        """
        client = self._client
        if self._told or not self.over:  # if it was told already, Starlette says so
            # What asyncio.timeout does, without an object for each message.
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
                ):  # it is being closed: one that does not read could go on talking meanwhile
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
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
            if self._interrupted:
                self._interrupted = False
                task.uncancel()

    def limit(self) -> None:
        """Give the server time for what it still has of this client; then that is all."""
        if self._receiving is not None and self._patience is None:
            self._patience = self._client.call_after_close_timeout(self.interrupt)

    def interrupt(self) -> None:
        """Let `receive` say now that the client has left."""
        if self._receiving is not None and not self._interrupted:
            self._interrupted = True
            self._receiving.cancel()


def owner(method: object) -> object:
    """Return what a bound method is bound to."""
    return getattr(method, "__self__", None)
