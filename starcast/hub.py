"""Hub: what a `Broadcast` does, behind its signatures.

It registers clients and subscribers, and makes an `Event` of what is published, which the
`Dispatcher` hands over. The `Lifecycle` opens and closes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from . import backends, codec, logs, personal
from .arguments import Exclude, check_excluded, check_user
from .backends import Backend
from .broker.claims import Claim
from .broker.link import Link, Owner
from .broker.local import LocalLink
from .broker.naming import DEFAULT_NAME, NamedBackend, check_name
from .close_codes import TRY_AGAIN_LATER
from .codec import Channel, Encoding
from .dispatcher import Dispatcher
from .event import Command, Event, Gap, Unless
from .exceptions import ClientGone, ConfigurationError
from .group import Member
from .handler import is_gone
from .history import Wish
from .internal import LOCAL, announcements
from .joining import Joining
from .lifecycle import Lifecycle
from .members import Member as _Member
from .missed import Missed
from .outbox import Close
from .people import People
from .registry import Registry
from .resume import Reader
from .servers import daphne
from .settings import Settings
from .stats import Stats
from .sync.bounded import Full
from .sync.waiter import Waiter

if TYPE_CHECKING:
    from .presence.gathering import Gathering


class Hub(Joining):
    """See the module. Made on any thread.

    Args:
        backend: Connects to the broker; None in memory.
        settings: What the hub was told.
    """

    def __init__(self, backend: Backend | None, settings: Settings) -> None:
        self.settings = settings
        self.registry = Registry(settings.tuning, self._release, self._tell_missed, self._carry_out)
        self.people = People(self.registry, self._join_again, self._publish_nowait, self.leave)
        self.lock = self.registry.lock
        name = DEFAULT_NAME if settings.name is None else check_name(settings.name)
        self.claim = Claim(getattr(backend, "address", None), name, settings.name is not None)
        self.link = self._make_link(backend, name)
        self.dispatcher = Dispatcher(self.registry, self.link, settings.histories)
        self.past = Reader(self.link, self.lock, settings.histories)
        self.lifecycle = Lifecycle(
            self.dispatcher, self.registry, self.link, self.claim, settings.open_timeout
        )
        self._presence: Gathering | None = None
        self.lost_limit = logs.LogLimit()  # for the line that clients' messages are being lost

    def _make_link(self, backend: Backend | None, name: str) -> Link | LocalLink:
        registry, settings = self.registry, self.settings
        if backend is None:
            return LocalLink(registry, settings.histories)
        backends.check(backend)
        if settings.histories.any:
            backends.check_history(backend)
        owner = Owner(
            self._deliver_remote,
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

    # People

    def _carry_out(self, command: Command, members: Sequence[Member]) -> None:
        self.people.carry_out(command, members)

    @property
    def presence(self) -> Gathering:
        """Who is on the channels, on all workers."""
        if self._presence is None:
            from .presence.gathering import Gathering  # not for those who do not use it

            with self.lock:  # several event loops may need it first
                self._presence = self._presence or Gathering(self)
        return self._presence

    async def take_in(
        self, websocket: WebSocket, channel: str, member: _Member | None, join_leave: bool
    ) -> None:
        """Let a client that is on a channel be one of its members, and know of the others."""
        connection = self.find(websocket)
        assert connection is not None  # it has joined
        try:
            if join_leave:
                await self.presence.announce(connection, channel)
            if member is not None:
                await self.presence.enter(connection, channel, None, member)
        except BaseException:
            self.leave(websocket, channel)
            raise

    async def _join_again(self, websocket: WebSocket, channel: str) -> None:
        await self.connect(websocket, channel, self.settings.outbox(), None, None, Wish())

    def _publish_nowait(self, event: Event) -> None:
        self.dispatcher.publish_nowait(event, counts=False)

    def _deliver_remote(self, event: Event, since: float) -> bool:
        self.people.resolve(event)
        return self.registry.deliver_remote(event, since)

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
        find = self.settings.histories.find
        return all(find(channel) for channel in member.channels if not channel.startswith(LOCAL))

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
        if connection is not None and channel is not None and self._presence is not None:
            self._presence.leave(connection, channel, now=not self.has_left(websocket))
            self.registry.leave(connection, announcements(channel))
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
        ids = frozenset[int]()
        if exclude is not None:
            found = [self.find(websocket) for websocket in check_excluded(exclude)]
            ids = frozenset(connection.id for connection in found if connection is not None)
        return Event(channel, content, payload, ids, codec.is_json(message, encoding))

    def events(
        self,
        channels: Channel | Sequence[Channel],
        message: Any,
        exclude: Exclude,
        exclude_user: object,
        encoding: Encoding | None,
    ) -> list[Event]:
        """Make the events of a message to one channel or to several: see `Broadcast.publish`."""
        if isinstance(channels, (list, tuple)):
            names = list(dict.fromkeys(codec.check_channel(channel) for channel in channels))
        else:
            names = [codec.check_channel(channels)]
        if len(names) > 1 and (kept := next(filter(self.settings.histories.find, names), None)):
            raise ConfigurationError(
                f"{kept!r} has a history: publish to it alone, or its clients that are on another "
                "of the channels would have a gap in it"
            )
        user = None if exclude_user is None else check_user(exclude_user)
        events: list[Event] = []
        for number, name in enumerate(names):
            if not events:
                event = self.event(name, message, exclude, encoding)
                ids = event.exclude
            else:  # encoded once
                event = Event(name, event.message, event.payload, ids, event.is_json)
            if user is not None or number:
                event.unless = Unless(user, tuple(names[:number]))
                if self.link.is_local:  # otherwise where it is delivered
                    self.people.resolve(event)
            events.append(event)
        return events

    async def publish(self, event: Event, key: str | None = None) -> str | None:
        """Publish an event, and return its id: see `Broadcast.publish`."""
        key = self.past.key(event.channel, key)
        await self.lifecycle.reopen()
        await self.dispatcher.publish_and_wait(event, key)
        return event.id

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
                subscribers=registry.counts.subscribers,
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
