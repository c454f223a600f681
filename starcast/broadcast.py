"""Broadcast: the hub that people hold.

The way of a message: `publish` makes an `Event`, the link brings it to the broker and back from
there, the registry adds it to the shard of each event loop that has somebody on the channel, and
the shard brings it to them. In memory there is no broker, and no link.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import WebSocketException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.routing import Router, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from . import backends, codec, personal, watch
from .backends import Backend
from .codec import Dumps, Encoding
from .connection import (
    ABNORMAL,
    CLOSE_TIMEOUT,
    GOING_AWAY,
    NORMAL,
    POLICY_VIOLATION,
    SERVICE_RESTART,
    Connection,
    is_gone,
)
from .event import Event
from .exceptions import (
    BackendUnavailable,
    ClientGone,
    ConfigurationError,
    EncodingError,
    InvalidChannel,
    InvalidMessage,
    OriginRefused,
    PayloadTooLarge,
    PublishQueueFull,
)
from .gap import Gap
from .link import Link
from .origins import Origins
from .outbox import MAX_BUFFER, Close, OnOverflow, Outbox, Overflow
from .registry import Registry
from .sender import Taken
from .shard import SLICE, Shard
from .stats import Counters, Stats
from .subscriber import GapSubscriber, Subscriber, Subscription
from .waiter import Full, Lock, Place, Waiter

logger = logging.getLogger("starcast")

DEFAULT_CHANNEL = "default"

# Awaited messages after which other tasks get a turn; or sooner, after `shard.SLICE`.
YIELD_AFTER = 64

# Seconds that `publish` waits for room before it raises PublishQueueFull.
PUBLISH_TIMEOUT = 2.0

# Seconds after which each event loop sees whether the connection to the broker is looked after.
GUARD_EVERY = 0.5

# Messages of one client that may be handed over before its next one waits for them.
MAX_UNCONFIRMED = 256

# The same in bytes: 256 clients that all send as much as they can just fill what may wait for a
# loop (`shard.MAX_PENDING`).
MAX_UNCONFIRMED_COST = 64 * 1024

# Seconds without a failure after which the next one is logged again.
OUTAGE_OVER = 10.0

AfterGap = Literal["carry_on", "close"]
HandedOver = TypeVar("HandedOver")

# Of connections, unique in the process: a task notes which ones it serves, of any hub.
_ids = itertools.count(1)
Authorize = Callable[[WebSocket, str], Awaitable[object] | object]
Headers = Iterable[tuple[bytes, bytes]]


def _check_close(code: int, reason: str) -> None:
    # RFC 6455 section 7.4: 1004 is reserved, 1005, 1006 and 1015 never go over the wire; section
    # 5.5: a control frame holds 125 bytes, two of which are the code.
    if not ((1000 <= code <= 1014 and code not in (1004, 1005, 1006)) or 3000 <= code <= 4999):
        raise ConfigurationError(f"{code!r} is not a close code that may be sent")
    if len(reason.encode()) > 123:
        raise ConfigurationError("a close reason has at most 123 bytes")


def has_handler(websocket: WebSocket, exc: Exception) -> bool:
    """Whether the app brings an exception handler for this error, which shall answer the client.

    Starlette's own for WebSocketException does not count: it closes at once, on a websocket object
    of its own, and so before what the client still has to get.
    """
    handlers, _ = websocket.scope.get("starlette.exception_handlers", ({}, {}))
    handler = next((handlers[cls] for cls in type(exc).__mro__ if cls in handlers), None)
    starlettes = ExceptionMiddleware.websocket_exception
    return handler is not None and getattr(handler, "__func__", None) is not starlettes


class Broadcast:
    """A hub: what is published to a channel reaches every client and subscriber of the channel.

    Make one for the app, on any thread; it needs no event loop yet. Clients may live on several
    event loops. Unless said otherwise, methods are called on an event loop, whichever.

    Args:
        url: Where messages travel. `memory://`, the default, is this process; `redis://`,
            `nats://` and `postgresql://` with their variants join any number of processes.
        backend: A backend of your own instead of a URL.
        dumps: Writes JSON for messages that are neither `str` nor bytes, and for
            `encoding="json"`; returns `str`, or `bytes` in UTF-8. Default: `starcast.codec.dumps`,
            which is `json.dumps` and knows dates, UUID, Enum, dataclasses and pydantic models.
        origins: Which web pages may connect. `None`, the default: those of the same host name,
            whatever their port. A list: exactly these, such as `["https://example.com"]`. `"*"`:
            all. Clients that send no Origin are not browsers and are always let in. Nothing is
            checked for a websocket that the app has accepted itself.
        max_buffer: Bytes that may wait for one client or subscriber, 1 MiB by default. A message
            counts its bytes and 64 more.
        overflow: What happens when that is too little. `"disconnect"`, the default: the client is
            closed with 1013. `"drop_oldest"`, `"drop_newest"`: messages are dropped.
            `"latest"`: of each channel only the newest message waits.
        on_overflow: A plain function that is called with an `Overflowed` whenever a client or a
            subscriber did not keep up, on its event loop. It must not block.
        ready_frames: Whether messages may be written as ready-made frames where the server takes
            them (`starcast.uvicorn`), which passes by ASGI middleware that wraps `send`.
        on_gap: A plain function that is called with a `Gap` when the broker was away and is back,
            on the event loop that the hub was opened on. It must not block.
        after_gap: What becomes of the clients then. `"carry_on"`, the default: nothing. `"close"`:
            they are closed with 1012 (service restart), so that they connect again.

    Raises:
        ConfigurationError: One of these makes no sense.
    """

    def __init__(
        self,
        url: str = "memory://",
        *,
        backend: Backend | None = None,
        dumps: Dumps | None = None,
        origins: Iterable[str] | str | None = None,
        max_buffer: int = MAX_BUFFER,
        overflow: Overflow = "disconnect",
        on_overflow: OnOverflow | None = None,
        ready_frames: bool = True,
        on_gap: Callable[[Gap], None] | None = None,
        after_gap: AfterGap = "carry_on",
    ) -> None:
        backend = backends.from_url(url) if backend is None else backend
        self._registry = Registry(self._release)
        self._link = None
        if backend is not None:
            registry = self._registry
            self._link = Link(backend, registry.lock, registry.bring, self._tell_gap)
        if after_gap not in ("carry_on", "close"):
            raise ConfigurationError(f"after_gap must be carry_on or close, not {after_gap!r}")
        self._on_gap = on_gap
        self._after_gap = after_gap
        self._dumps: Dumps = codec.dumps if dumps is None else dumps
        self._origins = Origins(origins)
        self._outbox = functools.partial(Outbox, max_buffer, overflow)
        self._outbox()  # refuses settings that make no sense
        self._max_buffer = max_buffer
        self._overflow: Overflow = overflow
        self._on_overflow = on_overflow
        self._ready_frames = ready_frames
        self._open = False
        self._closed = False
        self._switching = Lock()  # held while the backend starts or stops
        self._failures = 0
        self._failure: Exception | None = None  # why it did not start last
        self._closings = 0
        self._lock = self._registry.lock
        # Guarded by the lock:
        self._published = 0
        self._failed = 0
        self._unyielded = 0  # messages since a turn was given to the loop, and since when
        self._unyielded_since = 0.0
        self._failed_last = -OUTAGE_OVER  # when a client's message was lost last
        self._mount = self.app()

    # Open and close

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.disconnect()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """Open the hub for as long as an app runs: `FastAPI(lifespan=broadcast.lifespan)`.

        An app does not start without its broker; once started, it waits for it for ever.
        """
        async with self:
            yield

    @overload
    async def connect(self) -> None: ...

    @overload
    async def connect(
        self,
        websocket: WebSocket,
        channel: str = DEFAULT_CHANNEL,
        *,
        subprotocol: str | None = None,
        headers: Headers | None = None,
        max_buffer: int | None = None,
        overflow: Overflow | None = None,
    ) -> None: ...

    async def connect(
        self,
        websocket: WebSocket | None = None,
        channel: str = DEFAULT_CHANNEL,
        *,
        subprotocol: str | None = None,
        headers: Headers | None = None,
        max_buffer: int | None = None,
        overflow: Overflow | None = None,
    ) -> None:
        """Register a client on a channel; without a websocket, open the hub.

        Opening is optional and may happen on another event loop than the clients': the hub opens on
        first use. Without its broker it does not open; once open, it waits for it for ever. A
        websocket that nobody has accepted yet is accepted, after the check of its
        Origin. A client that is registered already joins a further channel.

        From then on until `disconnect` the handler's own sends take their turn behind what the hub
        has for this client, so that nothing overtakes. Call it on the client's own event loop, and
        before another task starts to receive from the client.

        Args:
            websocket: The client.
            channel: 1 to 200 characters without control characters.
            subprotocol: For `accept`; unused if the websocket was accepted before.
            headers: For `accept`, as pairs of bytes; unused if the websocket was accepted before.
            max_buffer: For this client instead of the hub's, in bytes. It and `overflow` count at
                the first `connect` of a client.
            overflow: For this client instead of the hub's.

        Raises:
            OriginRefused: The page may not connect; the app answers 403.
            InvalidChannel: The name is not valid; the app answers 403, or closes with 1008 if the
                websocket was accepted before.
            ClientGone: The client has left already. A `WebSocketDisconnect`.
            BackendUnavailable: The hub was not open and there is no connection to its broker; or
                the broker has not confirmed within two seconds that it will send the channel's
                messages. The app answers 403, or closes with 1013 if the websocket
                was accepted before.
            ConfigurationError: `max_buffer` or `overflow` makes no sense.
            RuntimeError: It was called on another event loop than the client's. This is known
                under uvicorn; on other servers it is undefined what happens.
        """
        if websocket is None:
            await self._ensure_open()
            if self._link is not None:
                await self._link.ready()
            return
        codec.check_channel(channel)
        outbox = Outbox(
            self._max_buffer if max_buffer is None else max_buffer,
            self._overflow if overflow is None else overflow,
        )
        protocol = watch.find_protocol(websocket)
        if self._find(websocket) is None:
            watch.check_loop(protocol)
        if websocket.application_state is WebSocketState.CONNECTING:
            self._origins.check(websocket)
        await self._ensure_open()
        closings = self._closings
        registered = False
        if self._link is not None:
            if self._is_on(websocket, channel):
                self._link.want(channel)
            else:
                await self._link.hold(channel)
        try:
            if websocket.application_state is WebSocketState.CONNECTING:
                try:
                    await websocket.accept(subprotocol=subprotocol, headers=headers)
                except OSError:
                    raise ClientGone(ABNORMAL) from None
            if is_gone(websocket) or websocket.application_state is not WebSocketState.CONNECTED:
                raise ClientGone(ABNORMAL)
            with self._lock:
                closed = self._closings != closings
                if not closed:
                    registered = self._register(websocket, channel, outbox, protocol)
            self._guard()
            if closed:  # while the websocket was being accepted
                await websocket.close(GOING_AWAY)
                raise ClientGone(GOING_AWAY)
        finally:
            if not registered:
                self._release(channel)

    @overload
    async def disconnect(self) -> None: ...

    @overload
    async def disconnect(self, websocket: WebSocket, channel: str | None = None) -> None: ...

    async def disconnect(
        self, websocket: WebSocket | None = None, channel: str | None = None
    ) -> None:
        """Take a client off one channel, or off all; without a websocket, close the hub.

        A client that leaves its last channel gets what was published before and keeps its socket:
        closing that is up to the handler, or to `close`. On the client's own event loop it comes
        back when the client has everything, or after 10 seconds without what is left. Harmless
        twice and for a stranger, from any event loop.

        Closing the hub ends every subscriber, sends every client what it still has to get and then
        1001 (going away), and waits for that up to 10 seconds. The hub may be opened again.
        """
        if websocket is None:
            await self._close()
        elif left := self._leave(websocket, channel):
            await left

    async def close(self, websocket: WebSocket, code: int = NORMAL, reason: str = "") -> None:
        """Close a client, after what it still has to get, and unregister it.

        It comes back when the close frame is on its way, or after 10 seconds, when a client that
        does not read is given up. Harmless when it is closed already, and for a client of nobody,
        which is closed plainly. From any event loop for a registered client.

        Args:
            websocket: The client.
            code: A close code of RFC 6455 section 7.4 that may be sent, or 3000 to 4999.
            reason: At most 123 bytes in UTF-8.

        Raises:
            ConfigurationError: The code or the reason may not be sent.
        """
        _check_close(code, reason)
        connection = self._find(websocket)
        if connection is None or not self._registry.end(connection, Close(code, reason)):
            if not is_gone(websocket):
                with contextlib.suppress(WebSocketDisconnect, OSError, TimeoutError):
                    async with asyncio.timeout(CLOSE_TIMEOUT):
                        await websocket.close(code, reason)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT + 1):
                await connection.wait_ended()

    # Send

    async def send(
        self,
        data: Any,
        *,
        to: WebSocket | None = None,
        channel: str = DEFAULT_CHANNEL,
        exclude: WebSocket | Iterable[WebSocket] = (),
        encoding: Encoding | None = None,
    ) -> bool:
        """Send to everybody on the default channel, whoever sent it included, or to one client.

        Unlike `publish`, a send to one client waits for it: messages addressed to a client fill at
        most half of its buffer, and then each waits until the client has taken some of them. A
        client that takes nothing for 10 seconds is treated as its overflow policy says.

        Args:
            data: The message; see `publish`.
            to: One client, which gets it in order with everything else it gets.
            channel: Another channel than the default one.
            exclude: A websocket or several that do not get it.
            encoding: See `publish`.

        Returns:
            Whether the message was handed over. False for `to` means that the client has left.

        Raises:
            ClientGone: `to` has left, and the caller serves it: it is the task that has called
                `connect` for it or runs its handler, or a task that one of these has started. A
                `WebSocketDisconnect`, so a loop that only sends ends with its client.
            NotConnected: `to` is alive and not registered with this hub.
            EncodingError, InvalidChannel, PublishQueueFull: See `publish`.
        """
        if to is None:
            await self.publish(channel, data, exclude=exclude, encoding=encoding)
            return True
        event = self._event("", data, (), encoding)
        connection = await personal.claim(self._registry, to, self._find(to), event.cost)
        if connection is None:
            return False
        post = functools.partial(self._registry.post, event, connection)
        try:
            handed_over = post()
        except PublishQueueFull as exc:
            handed_over = await self._retry(post, exc)
        if not handed_over:  # it has left in this moment
            personal.refuse(to, connection)
        await self._settled()
        return handed_over

    async def publish(
        self,
        channel: str,
        message: Any,
        *,
        exclude: WebSocket | Iterable[WebSocket] = (),
        encoding: Encoding | None = None,
    ) -> None:
        """Publish a message to a channel.

        In memory it comes back when every client of this event loop has the message in its socket
        or its outbox, and when the other loops have been told. With a broker it comes back when the
        broker has it. It does not wait for slow clients.

        Args:
            channel: 1 to 200 characters without control characters.
            message: `str` goes out as a text frame, bytes as a binary frame, anything else as JSON
                in a text frame. It is encoded once, however many clients there are.
            exclude: A websocket or several that do not get it. Strangers are ignored.
            encoding: `"json"` makes JSON of a `str` too; `"text"` and `"bytes"` insist on theirs.

        Raises:
            EncodingError: The message does not fit the encoding or cannot be written as JSON.
            InvalidChannel: The name is not valid.
            PublishQueueFull: An event loop that has clients on the channel did not make room within
                two seconds, or more than 16 MiB wait for the broker. Nobody got the message.
            BackendUnavailable: The broker was away for two seconds, or did not answer. It may have
                the message all the same if the connection was lost in this moment.
            PayloadTooLarge: The broker takes no message of this size.
        """
        event = self._event(codec.check_channel(channel), message, exclude, encoding)
        if not (self._running or self._closed):
            await self._ensure_open()
        await self._publish_and_wait(event)

    def publish_nowait(
        self,
        channel: str,
        message: Any,
        *,
        exclude: WebSocket | Iterable[WebSocket] = (),
        encoding: Encoding | None = None,
    ) -> None:
        """Publish a message and come back at once: a plain function, for any thread and any loop.

        Messages of one thread keep their order. Arguments as for `publish`. A message that a broker
        could not be given, because it was away, is counted in `stats().backend.lost`.

        Raises:
            EncodingError, InvalidChannel, PayloadTooLarge: See `publish`.
            PublishQueueFull: An event loop that has clients on the channel, or the broker, has more
                than 16 MiB waiting. Nobody got the message.
            BackendUnavailable: The hub has a broker and is not open.
        """
        event = self._event(codec.check_channel(channel), message, exclude, encoding)
        try:
            self._publish(event)
        except PublishQueueFull:
            with self._lock:
                self._failed += 1
            raise

    @overload
    def subscribe(
        self,
        channel: str = DEFAULT_CHANNEL,
        *,
        max_buffer: int | None = None,
        overflow: Overflow = "disconnect",
        gaps: Literal[False] = False,
    ) -> Subscriber: ...

    @overload
    def subscribe(
        self,
        channel: str = DEFAULT_CHANNEL,
        *,
        max_buffer: int | None = None,
        overflow: Overflow = "disconnect",
        gaps: Literal[True],
    ) -> GapSubscriber: ...

    def subscribe(
        self,
        channel: str = DEFAULT_CHANNEL,
        *,
        max_buffer: int | None = None,
        overflow: Overflow = "disconnect",
        gaps: bool = False,
    ) -> Subscriber | GapSubscriber:
        """Return a channel's messages for code on the server.

            async with broadcast.subscribe("room") as subscriber:
                async for event in subscriber:
                    print(event.message)

        Args:
            channel: 1 to 200 characters without control characters.
            max_buffer: Bytes that may wait to be iterated over; the hub's by default.
            overflow: What happens when that is too little. `"disconnect"`, whatever the hub's is:
                iteration hands out what is buffered and then raises `SubscriberLagged`.
            gaps: Whether to get a `Gap` among the events, in its place, when the broker was away.

        Raises:
            InvalidChannel, ConfigurationError: An argument is not valid. On entering the block,
                BackendUnavailable: the broker has not confirmed it within two seconds.
        """
        return (GapSubscriber if gaps else Subscriber)(
            codec.check_channel(channel),
            Outbox(self._max_buffer if max_buffer is None else max_buffer, overflow),
            join=self._join,
            leave=self._registry.unsubscribe,
            on_overflow=self._on_overflow,
        )

    # Serve

    async def serve(
        self,
        websocket: WebSocket,
        channel: str = DEFAULT_CHANNEL,
        *,
        encoding: Encoding | None = "text",
        publish: bool = True,
        subprotocol: str | None = None,
        headers: Headers | None = None,
        max_buffer: int | None = None,
        overflow: Overflow | None = None,
    ) -> int:
        """Live a client's whole life: register it, publish what it sends, unregister it.

        For the functions of `@app.websocket`. It ends when the client has left or was closed;
        closing the socket any other way is up to the caller.

        Args:
            websocket, channel, subprotocol, headers, max_buffer, overflow: See `connect`.
            encoding: `"text"`, `"bytes"` or `"json"` both ways; `None` takes frames as they come.
            publish: Whether the client may publish. If not, it only listens.

        Returns:
            The close code. A client that sends something else than the encoding allows is closed
            with 1003 (wrong type of frame) or 1007 (content not valid), and one that may not
            publish with 1008; one log line says so.

        Raises:
            OriginRefused, InvalidChannel, ConfigurationError: See `connect`.
        """
        codec.check_encoding(encoding)
        decode = functools.partial(codec.decode, encoding=encoding)
        try:
            await self.connect(
                websocket,
                channel,
                subprotocol=subprotocol,
                headers=headers,
                max_buffer=max_buffer,
                overflow=overflow,
            )
            while True:
                message = await websocket.receive()
                if message["type"] == "websocket.disconnect":
                    return int(message.get("code") or NORMAL)
                if not publish:
                    raise WebSocketException(POLICY_VIOLATION, "listen only")
                await self._relay(websocket, channel, decode(message), encoding)
        except (OriginRefused, InvalidChannel):
            raise
        except WebSocketException as exc:
            await self._reject(websocket, exc)
            return exc.code
        except WebSocketDisconnect as exc:
            return exc.code
        finally:
            self._leave(websocket)

    def app(
        self,
        *,
        publish: bool = False,
        authorize: Authorize | None = None,
        encoding: Encoding | None = "text",
    ) -> ASGIApp:
        """Return an ASGI app that serves `/{channel}`: `app.mount("/live", broadcast.app())`.

        The hub itself is the same app with the defaults: `app.mount("/live", broadcast)`.

        Whoever connects may ask for any channel of the hub, also for one that an endpoint guards
        elsewhere: say with `authorize` who may have what, or mount a hub that holds nothing secret.

        Args:
            publish: Whether clients may publish to the channel. By default they only listen, and
                one that sends anything is closed with 1008.
            authorize: Called as `authorize(websocket, channel)` before the websocket is accepted;
                a plain function runs in a thread. It refuses with 403 by raising `PermissionError`
                or returning False; other exceptions take their way through the app. It lets in by
                returning None or True; anything else is a mistake and raises `ConfigurationError`.
                Write `bool(users.get(name))`, not `users.get(name)`: None lets in.
            encoding: See `serve`; without `publish` it is unused.
        """
        codec.check_encoding(encoding)

        async def endpoint(websocket: WebSocket) -> None:
            channel = codec.check_channel(websocket.path_params["channel"])
            self._origins.check(websocket)
            if authorize is not None and not await self._authorized(authorize, websocket, channel):
                raise WebSocketException(POLICY_VIOLATION, "not authorized")
            await self.serve(websocket, channel, encoding=encoding, publish=publish)

        async def guarded(websocket: WebSocket) -> None:
            try:
                await endpoint(websocket)
            except WebSocketException as exc:
                if has_handler(websocket, exc):
                    raise
                await self.close(websocket, exc.code, exc.reason)

        return Router([WebSocketRoute("/{channel:path}", guarded)], lifespan=self.lifespan)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._mount(scope, receive, send)

    # Look

    def __len__(self) -> int:
        """Return how many clients are connected to this process."""
        return len(self._registry.clients())

    def __bool__(self) -> bool:
        return True

    @property
    def channels(self) -> dict[str, int]:
        """Channel name to number of clients, for the channels that have any: a fresh copy."""
        return self._registry.channels()

    def stats(self) -> Stats:
        """Return a snapshot of counters and health. From any thread."""
        registry = self._registry
        channels = registry.channels()
        with self._lock:
            counters = registry.counters()
            return Stats(
                open=self._open,
                clients=len(registry.connections),
                subscribers=len(registry.subscribers),
                channels=channels,
                published=self._published,
                failed=self._failed,
                delivered=counters.delivered,
                dropped=counters.dropped,
                cut_off=counters.cut_off,
                pending=registry.pending,
                buffered=registry.buffered,
                backend=None if self._link is None else self._link.stats(),
            )

    async def healthy(self) -> bool:
        """Whether the hub is open and its broker answers, for a readiness check. From any loop.

        With a broker it sends itself a message by way of it, and waits two seconds at most. A hub
        that nobody has opened is not healthy: give the app `lifespan=hub.lifespan`.
        """
        return self._open and (self._link is None or await self._link.healthy())

    # Who is there

    def _register(self, websocket: WebSocket, channel: str, outbox: Outbox, protocol: Any) -> bool:
        """Put it on the channel; False if it was there already."""
        connection = self._find(websocket)
        if connection is not None and connection.code is not None:
            raise ClientGone(connection.code)
        if connection is None or connection.ended:
            connection = Connection(
                websocket,
                self._registry.here(),
                outbox,
                id=next(_ids),
                on_end=self._registry.remove,
                on_overflow=self._on_overflow,
                ready_frames=self._ready_frames,
                protocol=protocol,
            )
            websocket.scope.setdefault("starcast", {})[self] = connection
            watch.add_served(connection.id)
        connection.leaving = None
        return self._registry.join(connection, channel)

    def _is_on(self, websocket: WebSocket, channel: str) -> bool:
        connection = self._find(websocket)
        return connection is not None and channel in connection.channels

    def _find(self, websocket: WebSocket) -> Connection | None:
        """Return what was registered for this websocket last, even if it is no more."""
        found: Connection | None = websocket.scope.get("starcast", {}).get(self)
        return found

    def _clients(self) -> list[WebSocket]:
        return [connection.websocket for connection in self._registry.clients()]

    def _leave(self, websocket: WebSocket, channel: str | None = None) -> Waiter | None:
        connection = self._find(websocket)
        return None if connection is None else self._registry.leave(connection, channel)

    async def _join(self, subscriber: Subscription[Any]) -> Counters:
        await self._ensure_open()
        closings = self._closings
        if self._link is not None:
            await self._link.hold(subscriber.channel)
        with self._lock:
            if self._link is not None and self._closings != closings:
                self._release(subscriber.channel)
                raise BackendUnavailable("the hub was closed")
            counters = self._registry.subscribe(subscriber)
        self._guard()
        return counters

    def _release(self, channel: str) -> None:
        if self._link is not None:
            self._link.release(channel)

    # The way of a message

    @property
    def _running(self) -> bool:
        return self._open and (self._link is None or self._link.alive)

    async def _ensure_open(self) -> None:
        if self._running:
            return
        failures = self._failures
        async with self._switching:
            if self._running:
                return
            if self._failure is not None and self._failures > failures:
                raise self._failure.with_traceback(None)  # of the attempt that this one waited for
            try:
                if self._link is not None:
                    await self._link.start()
            except Exception as exc:
                self._failures += 1
                self._failure = exc
                raise
            self._open, self._closed, self._failure = True, False, None

    def _guard(self) -> None:
        """Look after the link from this loop, now and then as long as it has somebody.

        If the link's own loop has ended, it lives on here: else who only listens would never hear
        anything again.
        """
        if self._link is not None:
            shard = self._registry.here()
            if not shard.guarded:
                shard.guarded = True
                self._look(shard)

    def _look(self, shard: Shard) -> None:
        assert self._link is not None
        if not (self._open and shard.channels):
            shard.guarded = False
            return
        if not (self._link.alive or self._link.resting) and (
            shard.moving is None or shard.moving.done()
        ):
            shard.moving = shard.loop.create_task(self._move())
        shard.loop.call_later(GUARD_EVERY, self._look, shard)

    async def _move(self) -> None:
        assert self._link is not None
        async with self._switching:
            if self._open and not self._link.alive:
                await self._link.start()

    async def _close(self) -> None:
        connections: list[Connection] = []
        try:
            async with self._switching:
                self._open, self._closed = False, True
                self._closings += 1
                connections = self._registry.dismiss(Close(GOING_AWAY, "going away"))
                if self._link is not None:
                    await self._link.stop()
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT + 1):
                    for connection in connections:
                        await connection.wait_ended()

    def _event(
        self,
        channel: str,
        message: Any,
        exclude: WebSocket | Iterable[WebSocket],
        encoding: Encoding | None,
    ) -> Event:
        if encoding is not None:
            codec.check_encoding(encoding)
        content, payload = codec.encode(message, encoding, self._dumps)
        if exclude == ():
            return Event(channel, content, payload)
        excluded = (exclude,) if isinstance(exclude, WebSocket) else exclude
        found = [self._find(websocket) for websocket in excluded]
        ids = frozenset(connection.id for connection in found if connection is not None)
        return Event(channel, content, payload, ids)

    def _publish(self, event: Event, wait: bool = False) -> Taken | None:
        """Hand an event over; what comes back is set when the broker has it."""
        taken = None
        if self._link is not None:
            if not self._open:
                raise BackendUnavailable("the hub is not open")
            taken = self._link.publish(event, wait)
        elif self._open:
            self._registry.deliver(event)
        with self._lock:
            self._published += 1
        return taken

    async def _publish_and_wait(self, event: Event) -> None:
        deadline = None
        try:
            taken = self._publish(event, wait=True)
        except PublishQueueFull as exc:
            deadline = asyncio.get_running_loop().time() + PUBLISH_TIMEOUT
            again = functools.partial(self._publish, event, wait=True)
            taken = await self._retry(again, exc, deadline)
        if taken is None:
            await self._settled()
            return
        try:
            await taken.wait(deadline)
        except BackendUnavailable:
            with self._lock:
                self._failed += 1
            raise

    def _tell_gap(self, gap: Gap) -> None:
        """Tell everybody who wants to know. The link calls this."""
        close = None
        if self._after_gap == "close":
            close = Close(SERVICE_RESTART, "messages may be missing")
        self._registry.tell_gap(gap, close)
        if self._on_gap is not None:
            try:
                self._on_gap(gap)
            except Exception:
                logger.exception("on_gap raised")

    async def _retry(
        self,
        hand_over: Callable[[], HandedOver],
        full: PublishQueueFull,
        deadline: float | None = None,
    ) -> HandedOver:
        """Call it again whenever there is room, for two seconds or until the deadline."""
        loop = asyncio.get_running_loop()
        if deadline is None:
            deadline = loop.time() + PUBLISH_TIMEOUT
        while loop.time() < deadline and isinstance(full, Full):
            await self._room(full.place, deadline)
            try:
                return hand_over()
            except PublishQueueFull as exc:
                full = exc
        with self._lock:
            self._failed += 1
        raise full

    async def _room(self, place: Place, deadline: float) -> None:
        room = Waiter()
        with self._lock:
            place.tell_room(room)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await room
        finally:
            with self._lock:
                place.forget_room(room)

    async def _settled(self) -> None:
        """Bring everything published so far to the sockets or outboxes of this loop."""
        shard = self._registry.shards.get(asyncio.get_running_loop())
        late = False
        if shard is not None and shard.awake:
            if not self._unyielded:
                self._unyielded_since = time.monotonic()
            if not shard.flush():
                sent = Waiter()
                with self._lock:
                    shard.add(None, done=sent.set)  # it is awake: nobody needs to wake it
                await sent
                self._unyielded = 0
                return
            late = time.monotonic() - self._unyielded_since > SLICE
        # What ends without waiting must leave time to other tasks now and then.
        self._unyielded += 1
        if late or self._unyielded >= YIELD_AFTER:
            self._unyielded = 0
            await asyncio.sleep(0)

    # The life of a client

    async def _relay(
        self, websocket: WebSocket, channel: str, data: Any, encoding: Encoding | None
    ) -> None:
        """Publish what a client sent, without waiting unless too much of it is unconfirmed."""
        try:
            event = self._event(codec.check_channel(channel), data, (), encoding)
        except EncodingError as exc:
            # It could be read and cannot be written: a number too large for `dumps=`, say.
            raise InvalidMessage(1007, "cannot be sent on") from exc
        if not (self._running or self._closed):
            await self._ensure_open()
        connection = self._find(websocket)
        wait = connection is None or self._is_enough(connection, event)
        try:
            if wait:
                await self._publish_and_wait(event)
                return
            try:
                self._publish(event)
            except PublishQueueFull as exc:
                await self._retry(functools.partial(self._publish, event), exc)
        except (PublishQueueFull, PayloadTooLarge, BackendUnavailable) as exc:
            if (now := time.monotonic()) > self._failed_last + OUTAGE_OVER:
                logger.error("messages of clients are being lost: %s", exc)
            self._failed_last = now

    @staticmethod
    def _is_enough(connection: Connection, event: Event) -> bool:
        connection.unconfirmed += 1
        connection.unconfirmed_cost += event.cost
        if (
            connection.unconfirmed < MAX_UNCONFIRMED
            and connection.unconfirmed_cost < MAX_UNCONFIRMED_COST
        ):
            return False
        connection.unconfirmed = connection.unconfirmed_cost = 0
        return True

    async def _reject(self, websocket: WebSocket, exc: WebSocketException) -> None:
        """Close a client for what it sent, with one line in the log."""
        address = websocket.client
        logger.warning(
            "closed the client %s with %d: %s",
            "?" if address is None else f"{address.host}:{address.port}",
            exc.code,
            exc.reason,
        )
        await self.close(websocket, exc.code, exc.reason)

    @staticmethod
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
