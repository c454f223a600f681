"""Hub: what a `Broadcast` does, behind its signatures.

It registers clients and subscribers, and makes an `Event` of what is published, which the
`Dispatcher` hands over. The `Lifecycle` opens and closes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import Iterable
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from . import backends, codec, logs, personal
from .arguments import Exclude, check_excluded
from .backends import Backend
from .broker.claims import Claim
from .broker.link import Link, Owner
from .broker.local import LocalLink
from .broker.naming import DEFAULT_NAME, NamedBackend, check_name
from .close_codes import ABNORMAL, GOING_AWAY, TRY_AGAIN_LATER
from .codec import Channel, Encoding
from .connection import Connection
from .dispatcher import Dispatcher
from .event import Event, Gap
from .exceptions import BackendUnavailable, ClientGone
from .group import Member
from .handler import is_gone
from .history import Position, Resumed, Wish
from .lifecycle import Lifecycle
from .missed import Missed
from .outbox import Close, Outbox, Replay
from .registry import Registry
from .resume import Reader, notice
from .servers import daphne, served
from .settings import Settings
from .shard import Shard
from .stats import Stats
from .subscriber import Subscription
from .sync.bounded import Full
from .sync.waiter import Waiter

Headers = Iterable[tuple[bytes, bytes]]

# The ids of connections. They are unique in the process, because a task notes the ids that it
# serves, of any hub.
_ids = itertools.count(1)


class Hub:
    """See the module. Made on any thread.

    Args:
        backend: Connects to the broker; None in memory.
        settings: What the hub was told.
    """

    def __init__(self, backend: Backend | None, settings: Settings) -> None:
        self.settings = settings
        self.registry = Registry(settings.tuning, self._release, self._tell_missed)
        self.lock = self.registry.lock
        name = DEFAULT_NAME if settings.name is None else check_name(settings.name)
        self.claim = Claim(getattr(backend, "address", None), name, settings.name is not None)
        self.link = self._make_link(backend, name)
        self.dispatcher = Dispatcher(self.registry, self.link, settings.histories)
        self.past = Reader(self.link, self.lock, settings.histories)
        self.lifecycle = Lifecycle(
            self.dispatcher, self.registry, self.link, self.claim, settings.open_timeout
        )
        self.lost_limit = logs.LogLimit()  # for the line that clients' messages are being lost

    def _make_link(self, backend: Backend | None, name: str) -> Link | LocalLink:
        registry, settings = self.registry, self.settings
        if backend is None:
            return LocalLink(registry, settings.histories)
        backends.check(backend)
        if settings.histories.any:
            backends.check_history(backend)
        owner = Owner(
            registry.deliver_remote,
            self._on_link_gap,
            registry.loops,
            self._reopen,
            settings.histories,
            registry.positions,
            registry.is_behind,
        )
        named = NamedBackend(backend, name)
        return Link(named, self.lock, owner, settings.tuning, settings.probe_interval)

    async def _reopen(self) -> None:
        await self.lifecycle.reopen()

    # Gaps

    def _on_link_gap(self, gap: Gap) -> None:
        """Tell the members of the gap's channels, and the hook. The link calls this.

        Members of channels that all have a history are spared the gap of an outage: the link fills
        their channels, and reports the gaps that are left.
        """
        spare = self._misses_nothing if gap.channel is None else None
        self.registry.tell_gap(gap, self.settings.gap_close(), spare=spare)
        self.settings.tell_gap(gap)

    def _misses_nothing(self, member: Member) -> bool:
        return all(map(self.settings.histories.find, member.channels))

    def _tell_missed(self, missed: Missed) -> None:
        """Tell the members that have missed messages because their event loop was blocked."""
        gap = missed.gap()
        # Clients with a history come back and get what they have missed. Otherwise they would name
        # an id behind it.
        kept, others = missed.members(self.settings.histories)
        self.registry.tell_gap(gap, Close(TRY_AGAIN_LATER, "messages were missed"), kept)
        self.registry.tell_gap(gap, self.settings.gap_close(), others)
        assert isinstance(self.link, Link)  # only messages from a broker are missed
        # Later, because the lock is held now.
        missed.shard.loop.call_soon(self.link.report, gap, self.settings.tell_gap)

    # Clients and subscribers

    async def connect(
        self,
        websocket: WebSocket,
        channel: str,
        outbox: Outbox,
        subprotocol: str | None,
        headers: Headers | None,
        wish: Wish,
    ) -> Resumed | None:
        """Accept a client, unless that was done, and put it on a channel.

        Returns:
            Where it begins, if the channel has a history and the client was not on it before.
        """
        protocol = served.find_protocol(websocket)
        if not self.is_registered(websocket):
            served.check_loop(protocol)
        if protocol is None:
            daphne.adapt(websocket)
        if websocket.application_state is WebSocketState.CONNECTING:
            await self.settings.origins.check(websocket)
        if (known := self.find(websocket)) and (known.outbox.ids or not wish.is_empty):
            await known.outbox.wait_replayed()
        await self.lifecycle.ensure_open()
        closings = self.lifecycle.closings
        registered = False
        if self._is_on(websocket, channel):
            self.link.acquire_again(channel)  # it need not be waited for
        else:
            await self.link.acquire(channel)
        wake: list[Shard] = []
        try:
            await self.past.catch_up(channel, wish)
            if websocket.application_state is WebSocketState.CONNECTING:
                try:
                    await websocket.accept(subprotocol=subprotocol, headers=headers)
                except OSError:
                    raise ClientGone(ABNORMAL) from None
            if is_gone(websocket) or websocket.application_state is not WebSocketState.CONNECTED:
                raise ClientGone(ABNORMAL)
            with self.lock:
                closed = self.lifecycle.closings != closings
                if not closed:
                    registered = self._register(websocket, channel, outbox, protocol)
                here = self.link.position(channel) if registered else None
                connection = self.find(websocket)
                replay = None
                if here is not None and connection and (connection.outbox.ids or not wish.is_empty):
                    replay = Replay(asyncio.get_running_loop())
                    connection.outbox.replayed = replay.taken
                    wake = self.registry.queue(replay, connection)
            self.registry.wake(wake)
            self.link.take_over()  # if the loop that it was on has ended
            if closed:  # while the websocket was being accepted
                await websocket.close(GOING_AWAY)
                raise ClientGone(GOING_AWAY)
        finally:
            if not registered:
                self._release(channel)
        if here is None:
            return None
        if replay is None:
            return Resumed(str(here))
        return await self._replay(websocket, channel, wish, here, replay)

    async def _replay(
        self, websocket: WebSocket, channel: str, wish: Wish, here: Position, replay: Replay
    ) -> Resumed:
        """Let a client that has joined at this position have what it wants of the past."""
        events: list[Event] = []
        connection = self.find(websocket)
        try:
            events, resumed = await self.past.read(channel, wish, here)
        except BaseException:
            self.leave(websocket, channel)
            raise
        else:
            assert connection is not None  # it has joined
            everything = events
            events = [event for event in events if connection.id not in event.exclude]
            if connection.outbox.ids:
                events.insert(0, notice(channel, wish, resumed, everything, len(events)))
        finally:
            replay.begin(events)
        return resumed

    def _register(self, websocket: WebSocket, channel: str, outbox: Outbox, protocol: Any) -> bool:
        """Put it on the channel; False if it was there already."""
        connection = self.find(websocket)
        if connection is not None and connection.code is not None:
            raise ClientGone(connection.code)
        if connection is None or connection.ended:
            connection = Connection(
                websocket,
                self.registry.here(),
                outbox,
                id=next(_ids),
                ready_frames=self.settings.ready_frames,
                protocol=protocol,
            )
            websocket.scope.setdefault("starcast", {})[self] = connection
            served.add_served(connection.id)
        connection.leaving = None
        return self.registry.join(connection, channel)

    def is_registered(self, websocket: WebSocket) -> bool:
        """Whether the client is on any channel of this hub."""
        return self.find(websocket) in self.registry.connections

    def _is_on(self, websocket: WebSocket, channel: str) -> bool:
        connection = self.find(websocket)
        return connection is not None and channel in connection.channels

    def find(self, websocket: WebSocket) -> Connection | None:
        """Return what was registered for this websocket last, even if it has left since."""
        found: Connection | None = websocket.scope.get("starcast", {}).get(self)
        return found

    def has_left(self, websocket: WebSocket) -> bool:
        """Whether the client has left or was closed, as far as the app or the hub was told."""
        connection = self.find(websocket)
        return is_gone(websocket) or (connection is not None and connection.code is not None)

    def means_client_left(self, exc: Exception, websocket: WebSocket) -> bool:
        """Whether an error in the code that serves a client only says that the client has left."""
        return isinstance(exc, ClientGone) or (
            isinstance(exc, WebSocketDisconnect) and self.has_left(websocket)
        )

    def clients(self, channel: Channel | None = None) -> list[WebSocket]:
        """Return the websockets that are registered, or those on a channel."""
        name = None if channel is None else codec.check_channel(channel)
        return [connection.websocket for connection in self.registry.clients(name)]

    def leave(self, websocket: WebSocket, channel: str | None = None) -> Waiter | None:
        """Take a client off one channel, or off all; return what may be waited for."""
        connection = self.find(websocket)
        return None if connection is None else self.registry.leave(connection, channel)

    async def close_client(self, websocket: WebSocket, code: int, reason: str) -> None:
        """Close a client after what it still has to get, and wait until it has closed.

        The connection itself observes `Tuning.close_timeout`. This waits a second longer, so that
        it is the connection that gives its client up.
        """
        connection = self.find(websocket)
        if connection is None or not self.registry.end(connection, Close(code, reason)):
            if not is_gone(websocket):
                daphne.adapt(websocket)
                with contextlib.suppress(WebSocketDisconnect, OSError, TimeoutError):
                    async with asyncio.timeout(self.settings.tuning.close_timeout):
                        await websocket.close(code, reason)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.tuning.close_timeout + 1):
                await connection.wait_ended()

    async def join(self, subscriber: Subscription) -> None:
        """Put a subscriber of this loop on its channels."""
        await self.lifecycle.ensure_open()
        closings = self.lifecycle.closings
        acquired: list[str] = []
        registered = False
        try:
            for channel, wish in subscriber.wishes.items():
                await self.link.acquire(channel)
                acquired.append(channel)
                await self.past.catch_up(channel, wish)
            with self.lock:
                if self.lifecycle.closings != closings:
                    raise BackendUnavailable("the hub was closed")
                self.registry.subscribe(subscriber)
                registered = True
                positions = {channel: self.link.position(channel) for channel in acquired}
        finally:
            if not registered:
                for channel in acquired:  # pragma: no branch  # it raises
                    self._release(channel)
        self.registry.journal.write()
        self.link.take_over()
        try:
            for channel, here in positions.items():
                if here is not None:
                    past = await self.past.read(channel, subscriber.wishes[channel], here)
                    subscriber.begin(channel, *past)
        except BaseException:
            self.registry.unsubscribe(subscriber)
            raise

    def _release(self, channel: str) -> None:
        self.link.release(channel)

    # Messages

    def event(
        self,
        channel: str,
        message: Any,
        exclude: Exclude,
        encoding: Encoding | None,
    ) -> Event:
        """Encode a message, once for all members."""
        if encoding is not None:
            codec.check_encoding(encoding)
        content, payload = codec.encode(message, encoding, self.settings.dumps)
        if exclude is None:
            return Event(channel, content, payload)
        found = [self.find(websocket) for websocket in check_excluded(exclude)]
        ids = frozenset(connection.id for connection in found if connection is not None)
        return Event(channel, content, payload, ids)

    async def send(self, event: Event, websocket: WebSocket) -> bool:
        """Send an event to one client, and wait for it; False if it has left."""
        self.dispatcher.check_fork()
        connection = self.find(websocket)
        connection = await personal.reserve(self.registry, websocket, connection, event.cost)
        if connection is None:
            return False
        post = functools.partial(self.registry.post, event, connection)
        try:
            handed_over = post()
        except Full as exc:
            handed_over = await self.dispatcher.retry(post, exc)
        if not handed_over:  # it has just left
            personal.refuse(websocket, connection)
        await self.dispatcher.settle()
        return handed_over

    # Look

    def stats(self) -> Stats:
        """Return a snapshot of counters and health."""
        registry = self.registry
        channels, buffered = registry.channels(), registry.buffered
        with self.lock:
            asgi = registry.counts.asgi
            counters = registry.counters()
            return Stats(
                open=self.lifecycle.open,
                clients=len(registry),
                subscribers=len(registry.connections) + len(registry.subscribers) - len(registry),
                channels=channels,
                published=self.dispatcher.published,
                failed=self.dispatcher.failed,
                delivered=counters.delivered,
                dropped=counters.dropped,
                slow_clients=counters.slow_clients,
                pending=registry.pending,
                buffered=buffered,
                fast_path=len(registry) - sum(asgi.values()),
                asgi=asgi,
                waiting_senders=registry.waiting_senders,
                backend=self.link.stats(),
            )

    async def healthy(self) -> bool:
        """Whether it is open and its broker answers within two seconds."""
        return self.lifecycle.open and await self.link.healthy()
