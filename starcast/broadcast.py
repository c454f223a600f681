"""Broadcast: the hub that people hold.

The way of a message: `publish` makes an `Event`, the link brings it to the broker and back from
there, the registry adds it to the shard of each event loop that has somebody on the channel, and
the shard brings it to them. In memory there is no broker, and no link.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, overload

from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from . import backends, codec, refusals, serving
from . import heartbeats as _heartbeats
from . import subprotocols as _subprotocols
from .arguments import OMITTED, Exclude, Omitted, check_channel, check_client, check_close
from .backends import Backend
from .close_codes import NORMAL
from .codec import Channel, Dumps, Encoding
from .gap import Gap
from .heartbeats import Heartbeats
from .hub import Headers, Hub
from .lifespan import with_handlers
from .mount import Authorize, make_app
from .opening import OPEN_TIMEOUT, PROBE_INTERVAL
from .origins import Allowed, Origins
from .outbox import MAX_BUFFER, OnOverflow, Overflow
from .relay import OnPublishError
from .settings import AfterGap, Settings
from .stats import Stats
from .subscriber import GapSubscriber, Subscriber

DEFAULT_CHANNEL = "default"


class Broadcast:
    """A hub: what is published to a channel reaches every client and subscriber of the channel.

    Make one for the app, on any thread; it needs no event loop yet. Clients may live on several
    event loops. Unless said otherwise, methods are called on an event loop, whichever.

    Args:
        url: Where messages travel. `memory://`, the default, is this process; `redis://`,
            `nats://` and `postgresql://` with their variants join any number of processes. A `str`,
            or anything whose `str()` is a URL, such as pydantic's `RedisDsn`.
        backend: A backend of your own instead of a URL.
        name: What this hub is called on the broker: 1 to 64 ASCII letters, digits, `-` and `_`;
            "default" by default. Hubs share their channels if they have the same name on the same
            broker, in whatever process or app, and are apart otherwise. Two hubs of one process
            that would share them without having been given the same name do not open. In memory
            hubs are always apart.
        dumps: Writes JSON for messages that are neither `str` nor bytes, and for
            `encoding="json"`; returns `str`, or `bytes` in UTF-8. Default: `starcast.codec.dumps`,
            which writes the JSON that a FastAPI route returns, pydantic models included.
        origins: Which web pages may connect. `None`, the default: those of the same host name,
            whatever their port, and on a server of this machine (`localhost`, `*.localhost`,
            127.0.0.0/8, `[::1]`) all pages of this machine. A list: exactly these, such as
            `["https://example.com", "capacitor://localhost", "null"]`;
            `"https://*.example.com"` stands for all subdomains, however deep, and not for
            `example.com`. A function: called as `origins(origin, websocket)`, it lets in by
            returning True, under the rule of `authorize` (see `app`). `"*"`: all. Clients that send
            no Origin are not browsers and are always let in. Nothing is checked for a websocket
            that the app has accepted itself.
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
        open_timeout: Seconds for which a hub that is being opened tries to reach its broker, again
            and again, with a line in the log for each attempt: 10 by default, which is enough for
            a broker that starts together with the app. 0: it tries once. What the hub sends to
            itself must come back before it counts as open. A refused login is final at once, and
            after an attempt in vain a first use by a client tries once only.
        probe_interval: Seconds between two messages that the hub sends to itself by way of the
            broker, to notice when that is frozen: 3 by default, more than 0. It may take 5 seconds
            more until that is noticed. None is sent while no channel is in use.

    Raises:
        ConfigurationError: One of these makes no sense.
    """

    def __init__(
        self,
        url: object = "memory://",
        *,
        backend: Backend | None = None,
        name: str | None = None,
        dumps: Dumps | None = None,
        origins: Allowed = None,
        max_buffer: int = MAX_BUFFER,
        overflow: Overflow = "disconnect",
        on_overflow: OnOverflow | None = None,
        ready_frames: bool = True,
        on_gap: Callable[[Gap], None] | None = None,
        after_gap: AfterGap = "carry_on",
        open_timeout: float = OPEN_TIMEOUT,
        probe_interval: float = PROBE_INTERVAL,
    ) -> None:
        settings = Settings(
            dumps=codec.dumps if dumps is None else dumps,
            origins=Origins(origins),
            max_buffer=max_buffer,
            overflow=overflow,
            on_overflow=on_overflow,
            ready_frames=ready_frames,
            on_gap=on_gap,
            after_gap=after_gap,
            name=name,
            open_timeout=open_timeout,
            probe_interval=probe_interval,
        )
        self._hub = Hub(backends.from_url(url) if backend is None else backend, settings)
        scheme = str(url).strip().partition("://")[0]
        self._kind = f"{scheme}://" if backend is None else type(backend).__name__
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

    def lifespan(self, app: object = None) -> contextlib.AbstractAsyncContextManager[None]:
        """Open the hub for as long as an app runs: `FastAPI(lifespan=broadcast.lifespan)`.

        An app waits `open_timeout` seconds for its broker and does not start without it; once
        started, it waits for it without end. What FastAPI was told by `on_event`, `on_startup` and
        `on_shutdown` runs while the hub is open: FastAPI itself leaves it out once it has a
        `lifespan`.
        """
        return with_handlers(app, self.lifespan, self._hub.lifespan())

    @overload
    async def connect(self) -> None: ...

    @overload
    async def connect(
        self,
        websocket: WebSocket,
        channel: Channel = DEFAULT_CHANNEL,
        *,
        subprotocol: str | None = None,
        headers: Headers | None = None,
        max_buffer: int | None = None,
        overflow: Overflow | None = None,
    ) -> None: ...

    async def connect(
        self,
        websocket: WebSocket | Omitted = OMITTED,
        channel: Channel = DEFAULT_CHANNEL,
        *,
        subprotocol: str | None = None,
        headers: Headers | None = None,
        max_buffer: int | None = None,
        overflow: Overflow | None = None,
    ) -> None:
        """Register a client on a channel; without a websocket, open the hub.

        Opening is optional and may happen on another event loop than the clients': the hub opens on
        first use. It waits `open_timeout` seconds for its broker, and does not open without it;
        once open, it waits for it without end. A websocket that nobody has accepted yet is
        accepted, after the check of its Origin. A client that is registered already joins a further
        channel.

        From then on until `disconnect` the handler's own sends take their turn behind what the hub
        has for this client, so that nothing overtakes. Call it on the client's own event loop, and
        before another task starts to receive from the client.

        Args:
            websocket: The client.
            channel: 1 to 200 characters without control characters. An int or a UUID is the channel
                of its `str()`.
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
                messages. The app answers 503 (403 where the server can't), or closes with 1013 if
                the websocket was accepted before.
            ConfigurationError: `max_buffer` or `overflow` makes no sense.
            TypeError: `websocket` is None, which would be nobody, or no websocket.
            RuntimeError: It was called on another event loop than the client's. This is known
                under uvicorn; on other servers it is undefined what happens.
        """
        if websocket is OMITTED:
            await self._hub.ready()
            return
        websocket = check_client(
            websocket,
            "connect(...)",
            "would have opened the hub and registered nobody",
            "call connect() to open the hub",
        )
        with refusals.logged(websocket):
            channel = check_channel(websocket, channel)
            outbox = self._hub.settings.outbox(max_buffer, overflow)
            await self._hub.connect(websocket, channel, outbox, subprotocol, headers)

    @overload
    async def disconnect(self) -> None: ...

    @overload
    async def disconnect(self, websocket: WebSocket, channel: Channel | None = None) -> None: ...

    async def disconnect(
        self, websocket: WebSocket | Omitted = OMITTED, channel: Channel | None = None
    ) -> None:
        """Take a client off one channel, or off all; without a websocket, close the hub.

        A client that leaves its last channel gets what was published before and keeps its socket:
        closing that is up to the handler, or to `close`. On the client's own event loop it comes
        back when the client has everything, or after 10 seconds without what is left. Harmless
        twice and for a stranger, from any event loop.

        Closing the hub ends every subscriber, sends every client what it still has to get and then
        1001 (going away), and waits for that up to 10 seconds. The hub may be opened again.

        Raises:
            TypeError: `websocket` is None, which would be nobody, or no websocket.
            InvalidChannel: The name is not valid.
        """
        if websocket is OMITTED:
            await self._hub.close()
            return
        websocket = check_client(
            websocket,
            "disconnect(...)",
            "would have closed the hub",
            "call disconnect() to close the hub",
        )
        name = None if channel is None else codec.check_channel(channel)
        if left := self._hub.leave(websocket, name):
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
            TypeError: `websocket` is None, or no websocket.
        """
        check_client(websocket, "close(...)")
        check_close(code, reason)
        await self._hub.close_client(websocket, code, reason)

    # Send

    @overload
    async def send(
        self,
        data: Any,
        *,
        channel: Channel = DEFAULT_CHANNEL,
        exclude: Exclude = None,
        encoding: Encoding | None = None,
    ) -> None: ...

    @overload
    async def send(self, data: Any, *, to: WebSocket, encoding: Encoding | None = None) -> bool: ...

    async def send(
        self,
        data: Any,
        *misplaced: object,
        to: WebSocket | Omitted = OMITTED,
        channel: Channel = DEFAULT_CHANNEL,
        exclude: Exclude = None,
        encoding: Encoding | None = None,
    ) -> bool | None:
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
            With `to`, whether the message was handed over: False means that the client has left.

        Raises:
            ClientGone: `to` has left, and the caller serves it: it is the task that has called
                `connect` for it or runs its handler, or a task that one of these has started. A
                `WebSocketDisconnect`, so a loop that only sends ends with its client.
            NotConnected: `to` is alive and not registered with this hub.
            TypeError: `to` is None, which would be nobody, or no websocket; or something in
                `exclude` is neither.
            EncodingError, InvalidChannel, PublishQueueFull: See `publish`.
        """
        if misplaced:
            raise TypeError("send takes its client by name: write send(data, to=websocket)")
        if to is OMITTED:
            await self.publish(channel, data, exclude=exclude, encoding=encoding)
            return None
        to = check_client(
            to,
            "send(to=...)",
            "would have sent the message to everybody",
            "leave to= out if everybody is meant",
        )
        return await self._hub.send(self._hub.event("", data, None, encoding), to)

    async def publish(
        self,
        channel: Channel,
        message: Any,
        *,
        exclude: Exclude = None,
        encoding: Encoding | None = None,
    ) -> None:
        """Publish a message to a channel.

        In memory it comes back when every client of this event loop has the message in its socket
        or its outbox, and when the other loops have been told. With a broker it comes back when the
        broker has it. It does not wait for slow clients.

        Args:
            channel: 1 to 200 characters without control characters. An int or a UUID is the channel
                of its `str()`.
            message: `str` goes out as a text frame, bytes as a binary frame, anything else as JSON
                in a text frame. It is encoded once, however many clients there are.
            exclude: A websocket or several that do not get it. None is nobody, also among several.
                Strangers are ignored.
            encoding: `"json"` makes JSON of a `str` too; `"text"` and `"bytes"` insist on theirs.

        Raises:
            EncodingError: The message does not fit the encoding or cannot be written as JSON.
            InvalidChannel: The name is not valid.
            PublishQueueFull: An event loop that has clients on the channel did not make space
                within two seconds, or more than 16 MiB wait for the broker. Nobody got the message.
            BackendUnavailable: The broker was away for two seconds, or did not answer. It may have
                the message all the same if the connection was lost in this moment.
            PayloadTooLarge: The broker takes no message of this size.

        What becomes of one that nobody catches, in HTTP routes and in WebSocket routes, is told in
        `starcast.exceptions`.
        """
        event = self._hub.event(codec.check_channel(channel), message, exclude, encoding)
        await self._hub.reopen()
        await self._hub.dispatcher.publish_and_wait(event)

    def publish_nowait(
        self,
        channel: Channel,
        message: Any,
        *,
        exclude: Exclude = None,
        encoding: Encoding | None = None,
    ) -> None:
        """Publish a message and come back at once: a plain function, for any thread and any loop.

        Messages of one thread keep their order. Arguments as for `publish`. While the broker is
        away they wait for it, two seconds at most. A message that the broker could not be given in
        that time, or that it refused, is counted in `stats().backend.lost`, and a warning in the
        log says why, once in ten seconds for each kind of trouble.

        Raises:
            EncodingError, InvalidChannel, PayloadTooLarge: See `publish`.
            PublishQueueFull: An event loop that has clients on the channel, or the broker, has more
                than 16 MiB waiting. Nobody got the message.
            BackendUnavailable: The hub has a broker and is not open.
        """
        event = self._hub.event(codec.check_channel(channel), message, exclude, encoding)
        self._hub.dispatcher.publish_nowait(event)

    @overload
    def subscribe(
        self,
        channel: Channel = DEFAULT_CHANNEL,
        *,
        max_buffer: int | None = None,
        overflow: Overflow = "disconnect",
        gaps: Literal[False] = False,
    ) -> Subscriber: ...

    @overload
    def subscribe(
        self,
        channel: Channel = DEFAULT_CHANNEL,
        *,
        max_buffer: int | None = None,
        overflow: Overflow = "disconnect",
        gaps: Literal[True],
    ) -> GapSubscriber: ...

    def subscribe(
        self,
        channel: Channel = DEFAULT_CHANNEL,
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
            channel: 1 to 200 characters without control characters. An int or a UUID is the channel
                of its `str()`.
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
            self._hub.settings.outbox(max_buffer, overflow),
            join=self._hub.join,
            leave=self._hub.registry.unsubscribe,
        )

    # Serve

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
        on_publish_error: OnPublishError | None = None,
    ) -> int:
        """Live a client's whole life: register it, publish what it sends, unregister it.

        For the functions of `@app.websocket`. It ends when the client has left or was closed;
        closing the socket any other way is up to the caller.

        Args:
            websocket, channel, subprotocol, headers, max_buffer, overflow: See `connect`.
            encoding: `"text"`, `"bytes"` or `"json"` both ways; `None` takes frames as they come.
            publish: Whether the client may publish. If not, it only listens.
            heartbeats: Messages that client libraries send to see whether the server is there, and
                their answers: `{"ping": "pong"}`, or None for no answer. A `str` stands for a text
                frame, bytes for a binary one, and both are compared with what was sent, before JSON
                is read. Such a message is answered to this client alone, in order with what it
                gets. It is not published, and a client that may only listen may send it.
            subprotocols: Used in place of `subprotocol`: the client is answered with the first of
                these that it offers, or with none.
            on_publish_error: Called as `on_publish_error(websocket, data, exc)` when something that
                the client said could not be published, with a `BackendUnavailable` or
                `PublishQueueFull`: an async function, or a plain one that does not block. Then the
                client stays, unless it raises. By default the client is closed with 1013, so that
                nobody believes that it was said.

        Returns:
            The close code. A client that sends something else than the encoding allows is closed
            with 1003 (wrong type of frame) or 1007 (content not valid), one that may not publish
            with 1008, and one whose message is too large for the broker with 1009; one log line
            says so. A handshake that the broker is away for is answered with HTTP 503, or 403
            where the server cannot do that, and the code is 1013.

        Raises:
            OriginRefused, InvalidChannel, ConfigurationError, TypeError: See `connect`.
        """
        check_client(websocket, "serve(...)")
        beats = _heartbeats.check(heartbeats)
        connect = functools.partial(
            self.connect,
            websocket,
            channel,
            subprotocol=_subprotocols.choose(websocket, subprotocols, subprotocol),
            headers=headers,
            max_buffer=max_buffer,
            overflow=overflow,
        )
        return await serving.serve(
            self._hub,
            websocket,
            channel,
            encoding=encoding,
            publish=publish,
            beats=beats,
            connect=connect,
            on_publish_error=on_publish_error,
        )

    def app(
        self,
        *,
        publish: bool = False,
        authorize: Authorize | None = None,
        encoding: Encoding | None = "text",
        heartbeats: Heartbeats | None = None,
        subprotocols: Sequence[str] = (),
    ) -> ASGIApp:
        """Return an ASGI app that serves `/{channel}`: `app.mount("/live", broadcast.app())`.

        The hub itself is the same app with the defaults: `app.mount("/live", broadcast)`.

        Whoever connects may ask for any channel of the hub, also for one that an endpoint guards
        elsewhere: say with `authorize` who may have what, or mount a hub that holds nothing secret.

        Args:
            publish: Whether clients may publish to the channel. By default they only listen, and
                one that sends anything but a heartbeat is closed with 1008.
            authorize: Called as `authorize(websocket, channel)` before the websocket is accepted;
                a plain function runs in a thread. Only True lets in. It refuses with 403 by
                returning False or raising `PermissionError`; None refuses too, and one line in the
                log says that a `return` may be missing. Anything else is a mistake and raises
                `ConfigurationError`, so write `return user is not None` and not `return user`.
                Other exceptions take their way through the app.
            encoding: See `serve`; without `publish` it is unused.
            heartbeats, subprotocols: See `serve`.

        Raises:
            ConfigurationError: An argument makes no sense.
        """
        codec.check_encoding(encoding)
        serve = functools.partial(
            self.serve,
            encoding=encoding,
            publish=publish,
            heartbeats=_heartbeats.check(heartbeats),
            subprotocols=_subprotocols.check(subprotocols),
        )
        return make_app(self._hub, serve, authorize)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._mount(scope, receive, send)

    # Look

    @property
    def name(self) -> str:
        """What this hub is called on its broker."""
        return self._hub.claim.name

    def __repr__(self) -> str:
        """Return its kind of backend, its name, whether it is open and its clients; no secrets."""
        number = len(self)
        clients = "1 client" if number == 1 else f"{number} clients"
        state = "open" if self._hub.open else "closed"
        return f"<Broadcast {self._kind} {self.name!r} {state}, {clients}>"

    def __len__(self) -> int:
        """Return how many clients are connected to this process."""
        return len(self._hub.registry.clients())

    def __bool__(self) -> bool:
        return True

    @property
    def channels(self) -> dict[str, int]:
        """Channel name to number of clients, for the channels that have any: a fresh copy."""
        return self._hub.registry.channels()

    def stats(self) -> Stats:
        """Return a snapshot of counters and health. From any thread."""
        return self._hub.stats()

    async def healthy(self) -> bool:
        """Whether the hub is open and its broker answers, for a readiness check. From any loop.

        With a broker it sends itself a message by way of it, and waits two seconds at most. A hub
        that nobody has opened is not healthy: give the app `lifespan=hub.lifespan`.
        """
        return await self._hub.healthy()
