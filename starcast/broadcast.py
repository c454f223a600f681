"""Broadcast: the hub that people hold.

How a message travels: `publish` makes an `Event`, the link takes it to the broker and back, the
registry adds it to the shard of each event loop that has a client on the channel, and the shard
delivers it. In memory there is no broker and no link.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, overload

from starlette.websockets import WebSocket

from . import arguments, backends, codec
from .admission import refusals
from .admission.hooks import Refuse
from .admission.origins import Allowed, Origins
from .arguments import (
    OMITTED,
    Exclude,
    Omitted,
    check_channel,
    check_client,
    check_close,
    check_info,
    check_user,
)
from .backends import Backend
from .broker.opening import OPEN_TIMEOUT, PROBE_INTERVAL
from .close_codes import NORMAL
from .codec import DEFAULT_CHANNEL, Channel, Dumps, Encoding
from .event import Gap
from .frames import PLAIN, WITH_ID
from .history import Histories, History, Resumed
from .hub import Hub
from .inbound import MAX_MESSAGE
from .inspection import Inspection
from .joining import Headers
from .lifespan import with_handlers
from .listening import Listening
from .members import Member, Presence, check_member
from .membership import Membership
from .outbox import MAX_BUFFER, OnOverflow, Overflow
from .people import Identity
from .reception import Reception
from .settings import AfterGap, Settings
from .tuning import Tuning
from .users import Users


class Broadcast(Reception, Users, Membership, Listening, Inspection):
    """A hub: what is published to a channel reaches every client and subscriber of the channel.

    Create one for the app, on any thread; it does not need an event loop yet. Clients may live on
    several event loops. Unless stated otherwise, methods may be called on any event loop.

    A hub that was open when the process was forked is the parent's: in the child, whatever opens,
    joins or publishes raises `ConfigurationError`.

    Args:
        url: Where messages travel. `memory://`, the default, stays within this process; `redis://`,
            `nats://`, `postgresql://` and their variants connect any number of processes. A `str`,
            or anything whose `str()` is a URL, such as pydantic's `RedisDsn`.
        backend: A backend of your own instead of a URL.
        name: The name of this hub on the broker: 1 to 64 ASCII letters, digits, `-` and `_`;
            "default" by default. Hubs with the same name on the same broker share their channels,
            in any process or app; other hubs are separate. If two hubs of one process would share
            their channels without both having been given the name, the second one does not open.
            Hubs in memory are always separate.
        dumps: Writes JSON for messages that are neither `str` nor bytes, and for
            `encoding="json"`; returns `str`, or `bytes` in UTF-8. Default: `starcast.codec.dumps`,
            which writes the JSON that a FastAPI route returns, pydantic models included.
        origins: Which web pages may connect. `None`, the default: those of the same host name,
            whatever their port, and on a server of this machine (`localhost`, `*.localhost`,
            127.0.0.0/8, `[::1]`) all pages of this machine. A list: exactly these, such as
            `["https://example.com", "capacitor://localhost", "null"]`;
            `"https://*.example.com"` stands for all subdomains at any depth, but not for
            `example.com`. A function: called as `origins(origin, websocket)`; only True lets the
            client in, as with `authorize` (see `app`). `"*"`: all. Clients that send no Origin are
            not browsers and are always let in. A websocket that the app accepted itself is not
            checked.
        max_buffer: Bytes that may wait for one client or subscriber, 1 MiB by default. A message
            counts as its size plus 64 bytes.
        overflow: What happens when the buffer is full. `"disconnect"`, the default: the client is
            closed with 1013. `"drop_oldest"`, `"drop_newest"`: messages are dropped. `"latest"`:
            only the newest message of each channel is kept.
        max_message: Bytes that one message of a client may have when it comes in through
            `BroadcastEndpoint`, `serve` or a mount, 256 KiB by default. A text has the bytes of its
            UTF-8 form. The client is closed with 1009, with one log line, before anything is
            decoded. None: no bound but that of the server.
        refuse: How a client is turned away before it is accepted. `"http"`, the default: with a
            response, 403 or 503, whose reason a page's JavaScript does not see. `"close"`: the
            client is accepted and then closed, so that the page sees the close code and the reason:
            1008 for an origin, an `authorize` or the name of a channel that does not let it in,
            1013 if the broker is away, or the code of the `WebSocketException` that was raised.
            What a FastAPI dependency raises never reaches the hub, and is answered with 403.
        on_overflow: A plain function that is called with an `Overflowed` each time a client or a
            subscriber does not keep up, on its event loop. It must not block.
        ready_frames: Whether messages may be written as ready-made frames if the server supports
            them (`starcast.uvicorn`). This bypasses ASGI middleware that wraps `send`.
        on_gap: A plain function that is called with a `Gap` when the broker is back after an
            outage, or a channel that it refused, and when an event loop goes on that was blocked
            and has missed messages, on the event loop that opened the hub. It must not block.
        after_gap: What happens to the clients after a gap. `"keep"`, the default: nothing.
            `"close"`: they are closed with 1012 (service restart), so that they reconnect.
        open_timeout: How many seconds a hub that is being opened keeps trying to reach its broker,
            with a log line for each failed attempt: 10 by default, enough for a broker that starts
            together with the app. 0: it tries once. The hub counts as open when a message to itself
            has arrived. A refused login fails at once. Once opening has failed, a client that opens
            the hub by first use causes a single attempt.
        probe_interval: Seconds between the messages that the hub sends to itself through the
            broker, to notice when the broker stops answering: 3 by default, more than 0. Noticing
            may take 5 seconds longer. None are sent while no channel is in use and nothing is
            published.
        history: Whether what is published is kept for a while, so that clients that come back miss
            nothing: a `History` for all channels, or a dict by channel, such as
            `{"room:*": History(size=50), "*": None}`, where a name with a `*` at its end stands for
            all that begin so, and the longest one that fits decides. None, the default: nothing is
            kept. All programs that publish to a channel need the same setting: what is published
            without it is delivered and not kept.
        presence: How the members of channels are kept: see `members`. Nothing is done about them
            until a client is one.
        tuning: Timings and bounds that few programs have to change: see `Tuning`.

    Raises:
        ConfigurationError: An argument is not valid, or the backend keeps no history.
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
        max_message: int | None = MAX_MESSAGE,
        refuse: Refuse = "http",
        ready_frames: bool = True,
        on_gap: Callable[[Gap], None] | None = None,
        after_gap: AfterGap = "keep",
        open_timeout: float = OPEN_TIMEOUT,
        probe_interval: float = PROBE_INTERVAL,
        history: History | Mapping[str, History | None] | None = None,
        presence: Presence | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        settings = Settings(
            dumps=codec.dumps if dumps is None else dumps,
            origins=Origins(origins),
            max_buffer=max_buffer,
            overflow=overflow,
            on_overflow=on_overflow,
            max_message=max_message,
            refuse=refuse,
            ready_frames=ready_frames,
            on_gap=on_gap,
            after_gap=after_gap,
            name=name,
            open_timeout=open_timeout,
            probe_interval=probe_interval,
            tuning=Tuning() if tuning is None else tuning,
            histories=Histories(history),
            presence=presence,
        )
        self._hub = Hub(backends.from_url(url) if backend is None else backend, settings)
        scheme = str(url).strip().partition("://")[0]
        self._kind = f"{scheme}://" if backend is None else type(backend).__name__
        self._mount = self.app()

    # Open and close

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.disconnect()

    def lifespan(self, app: object = None) -> contextlib.AbstractAsyncContextManager[None]:
        """Open the hub for as long as an app runs: `FastAPI(lifespan=broadcast.lifespan)`.

        The app fails to start if its broker cannot be reached within `open_timeout` seconds. Once
        it is running, it reconnects indefinitely. Functions that were registered with `on_event`,
        `on_startup` and `on_shutdown` run while the hub is open; FastAPI by itself ignores them
        once it has a `lifespan`.
        """
        return with_handlers(app, self.lifespan, self._hub.lifecycle.lifespan())

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
        since: str | None = None,
        history: int = 0,
        ids: bool = False,
        user: object = None,
        info: Any = None,
        member: Member | None = None,
        join_leave: bool = False,
    ) -> Resumed | None: ...

    async def connect(
        self,
        websocket: WebSocket | Omitted = OMITTED,
        channel: Channel = DEFAULT_CHANNEL,
        *,
        subprotocol: str | None = None,
        headers: Headers | None = None,
        max_buffer: int | None = None,
        overflow: Overflow | None = None,
        since: str | None = None,
        history: int = 0,
        ids: bool = False,
        user: object = None,
        info: Any = None,
        member: Member | None = None,
        join_leave: bool = False,
    ) -> Resumed | None:
        """Register a client on a channel; without a websocket, open the hub.

        Opening is optional, because the hub opens on first use, and may happen on another event
        loop than the clients'. It fails if the broker cannot be reached within `open_timeout`
        seconds. Once open, the hub reconnects indefinitely. A websocket that has not been accepted
        yet is accepted, after its Origin has been checked. A client that is already registered
        joins another channel.

        From then on until `disconnect`, the handler's own sends are queued behind what the hub has
        for this client, so that nothing overtakes. Call it on the client's own event loop, before
        another task starts to receive from the client.

        Args:
            websocket: The client.
            channel: 1 to 200 characters without control characters. An int or a UUID names the
                channel of its `str()`.
            subprotocol: For `accept`; ignored if the websocket was accepted before.
            headers: For `accept`, as pairs of bytes; ignored if the websocket was accepted before.
            max_buffer: For this client instead of the hub's, in bytes. `max_buffer` and `overflow`
                only take effect on a client's first `connect`.
            overflow: For this client instead of the hub's.
            since: The id of the last event that the client has. It first gets all that were
                published after it, and then what is published from now on: nothing is missing and
                nothing comes twice. If that is not possible, because something of it is not kept
                any more or the id is none of this channel's history, it gets no part of it.
            history: How many of the newest events the client gets first if there is no `since`, or
                if it is not recovered. The past is sent as fast as the client reads, and does not
                count in its buffer.
            ids: Whether this client gets each message as a JSON object with the id, the channel and
                the message, `{"id": ..., "channel": ..., "data": ...}`, in a text frame. `data` is
                the text that other clients get, so a message in JSON is JSON in a string. Bytes are
                in Base64, and `"encoding": "base64"` says so. On a channel with a history the
                client first gets `{"channel": ..., "id": ..., "past": ..., "recovered": ...}`: the
                id after which its messages come, how many messages of the past follow and, with
                `since`, whether nothing is missing. Only takes effect on a client's first
                `connect`.
            user: Whose client it is: see `send_user`. None, the default, leaves it as it was, or
                unknown.
            info: What `clients_of` says about it: JSON data of up to 2 KiB.
            member: Who it is on this channel, for `members`; None if it is no member.
            join_leave: Whether the client is told who joins and leaves this channel, in text frames
                of `{"channel": ..., "joined": [...], "left": [...]}`, with objects that have an
                `id` and an `info`. It is told at most ten times a second.

        Returns:
            Where the client begins, and whether it has missed nothing since the event that it
            named. None on a channel that has no history, for a client that was on the channel
            before, and without a websocket.

        Raises:
            OriginRefused: The page may not connect. If nothing catches this, the client gets 403.
            InvalidChannel: The name is not valid. If nothing catches this, the client gets 403, or
                is closed with 1008 if it was accepted before.
            ClientGone: The client has already left. It is a `WebSocketDisconnect`.
            BackendUnavailable: The hub was not open and cannot reach its broker, or the broker did
                not confirm the subscription to the channel within two seconds. If nothing catches
                this, the client gets 503 (403 if the server does not support that), or is closed
                with 1013 if it was accepted before.
            ConfigurationError: `max_buffer`, `overflow`, `history`, `user` or `info` is not valid,
                or there is a `since` or a `history` and the channel has no history.
            TypeError: `websocket` is None or not a websocket, or `member` is no `Member`.
            RuntimeError: It was called on another event loop than the client's. Only uvicorn lets
                the hub notice this; on other servers the behaviour is undefined.
        """
        if websocket is OMITTED:
            await self._hub.lifecycle.ready()
            return None
        websocket = check_client(websocket, *arguments.CONNECT)
        settings = self._hub.settings
        timeout = settings.tuning.close_timeout
        async with refusals.prepared(websocket, settings.refuse, subprotocol, timeout):
            channel = check_channel(websocket, channel)
            outbox = settings.outbox(max_buffer, overflow, WITH_ID if ids else PLAIN)
            wish = self._hub.past.wish(channel, since, history)
            check_info(info)
            check_member(member)
            identity = None
            if user is not None or info is not None:
                identity = Identity(None if user is None else check_user(user), info)
            resumed = await self._hub.connect(
                websocket, channel, outbox, subprotocol, headers, wish, identity
            )
            if member is not None or join_leave:
                await self._hub.take_in(websocket, channel, member, join_leave)
            return resumed

    @overload
    async def disconnect(self) -> None: ...

    @overload
    async def disconnect(self, websocket: WebSocket, channel: Channel | None = None) -> None: ...

    async def disconnect(
        self, websocket: WebSocket | Omitted = OMITTED, channel: Channel | None = None
    ) -> None:
        """Remove a client from one channel, or from all; without a websocket, close the hub.

        A client that leaves its last channel still gets what was published before and keeps its
        socket; close that in the handler, or with `close`. On the client's own event loop this
        waits until everything has been sent, for up to 10 seconds; what is left then is dropped.
        Safe to call more than once, and for a websocket that is not registered. May be called from
        any event loop.

        Closing the hub ends every subscriber, sends every client what is still waiting for it and
        then 1001 (going away), and waits for that for up to 10 seconds. From then on, publishing
        raises `BackendUnavailable`, until the hub is opened again or another client connects.

        Raises:
            TypeError: `websocket` is None or not a websocket.
            InvalidChannel: The name is not valid.
        """
        if websocket is OMITTED:
            await self._hub.lifecycle.close()
            return
        websocket = check_client(websocket, *arguments.DISCONNECT)
        name = None if channel is None else codec.check_channel(channel)
        if left := self._hub.leave(websocket, name):
            await left

    async def close(self, websocket: WebSocket, code: int = NORMAL, reason: str = "") -> None:
        """Send a client what is still waiting for it, close it, and unregister it.

        Returns when the close frame has been sent, or after 10 seconds, when a client that does not
        read is given up. Safe to call for a client that is already closed. A websocket that is not
        registered is closed directly. For a registered client it may be called from any event loop.

        Args:
            websocket: The client.
            code: A close code of RFC 6455 section 7.4 that may be sent, or 3000 to 4999.
            reason: At most 123 bytes in UTF-8.

        Raises:
            ConfigurationError: The code or the reason is not allowed.
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
        """Send to every client on the default channel, the sender included, or to one client.

        Unlike `publish`, a send to one client waits for that client. Messages addressed to a client
        fill at most half of its buffer; after that, each waits until the client has taken some. If
        a client takes nothing for 10 seconds, its overflow policy applies.

        Args:
            data: The message; see `publish`.
            to: One client, which gets the message in order with its other messages.
            channel: A channel other than the default one.
            exclude: A websocket or several that do not get it.
            encoding: See `publish`.

        Returns:
            With `to`, whether the message was handed over. False means that the client has left.

        Raises:
            ClientGone: `to` has left, and the caller serves it: the caller is the task that called
                `connect` for it or runs its handler, or a task started by one of these. It is a
                `WebSocketDisconnect`, so a loop that only sends ends with its client.
            NotConnected: `to` is connected but not registered with this hub.
            TypeError: `to` is None or not a websocket, or `exclude` contains something that is
                neither.
            EncodingError, InvalidChannel, PublishQueueFull: See `publish`.
        """
        if misplaced:
            raise TypeError("send takes its client by name: write send(data, to=websocket)")
        if to is OMITTED:
            await self.publish(channel, data, exclude=exclude, encoding=encoding)
            return None
        to = check_client(to, *arguments.SEND_TO)
        return await self._hub.send(self._hub.event("", data, None, encoding), to)

    async def publish(
        self,
        channel: Channel | Sequence[Channel],
        message: Any,
        *,
        exclude: Exclude = None,
        exclude_user: object = None,
        encoding: Encoding | None = None,
        idempotency_key: str | None = None,
    ) -> str | None:
        """Publish a message to a channel.

        In memory it returns when the message is in the socket or the outbox of every client on this
        event loop, and other loops have been notified. With a broker it returns when the broker has
        the message. It does not wait for slow clients.

        Args:
            channel: 1 to 200 characters without control characters. An int or a UUID names the
                channel of its `str()`. A list of several: a client that is on more than one of them
                gets the message once, on the first of these. They must have no history, in which
                that client would have gaps.
            message: `str` goes out as a text frame, bytes as a binary frame, anything else as JSON
                in a text frame. It is encoded once, however many clients there are.
            exclude: A websocket or several that do not get it. None, alone or in a list,
                excludes no client. Websockets that are not registered are ignored.
            exclude_user: A user whose clients do not get it, on any worker. None: nobody.
            encoding: `"json"` sends a `str` as JSON too; `"text"` and `"bytes"` require that type.
            idempotency_key: On a channel that has a history, 1 to 200 characters that stand for
                this message. If a message was published to the channel with it within the history's
                `ttl`, and within the last 300 seconds, this one is not published again: so a
                `publish` that has raised `BackendUnavailable` can be tried again.

        Returns:
            The id of the event, that of the first one if it is tried again. None if the channel has
            no history, and for several channels.

        Raises:
            EncodingError: The message does not fit the encoding or cannot be written as JSON.
            ConfigurationError: `idempotency_key` or `exclude_user` is not valid, or there is an
                `idempotency_key` and the channel has no history, or several channels and one of
                them has a history.
            InvalidChannel: The name is not valid.
            PublishQueueFull: An event loop that has clients on the channel had no space for it
                within two seconds, or more than 16 MiB are waiting for the broker. Nobody got the
                message.
            BackendUnavailable: The hub was closed. Or the broker was away for two seconds, or did
                not answer; if the connection was lost while the message was being sent, the broker
                may still have it.
            PayloadTooLarge: The message is larger than the broker accepts.

        `starcast.exceptions` explains how HTTP routes and WebSocket routes answer if nothing
        catches these errors.
        """
        id = None
        for event in self._hub.events(channel, message, exclude, exclude_user, encoding):
            id = await self._hub.publish(event, idempotency_key)
        return id

    def publish_nowait(
        self,
        channel: Channel | Sequence[Channel],
        message: Any,
        *,
        exclude: Exclude = None,
        exclude_user: object = None,
        encoding: Encoding | None = None,
    ) -> None:
        """Publish a message and return immediately: a plain function, for any thread and any loop.

        Messages of one thread keep their order. Arguments as for `publish`. While the broker is
        away, messages wait for it for up to two seconds. A message that did not reach the broker in
        that time, or that the broker refused, is lost. It is counted in `stats().backend.lost`, and
        a warning in the log says why, at most once in ten seconds for each kind of error.

        Raises:
            EncodingError, InvalidChannel, PayloadTooLarge: See `publish`.
            PublishQueueFull: An event loop that has clients on the channel, or the broker, has more
                than 16 MiB waiting. Nobody got the message.
            BackendUnavailable: The hub was closed, or it has a broker and was never opened, see
                `lifespan`; then one log line says so too. A hub in memory that was never opened
                has no clients, so the message goes nowhere.
        """
        for event in self._hub.events(channel, message, exclude, exclude_user, encoding):
            self._hub.dispatcher.publish_nowait(event)
