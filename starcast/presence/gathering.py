"""Gathering: the presence of one hub, with a node for each of its event loops."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any, Protocol

from ..connection import Connection
from ..internal import announcements
from ..listener import Listener
from ..members import Member, MemberCounts, Presence
from ..registry import Registry
from ..settings import Settings
from ..shard import Shard
from ..sync.waiter import running_loop
from ..watching import MemberWatch
from .announcer import Announcement, Announcer
from .node import CHANNEL, Clients, Node


class Hub(Protocol):
    """What presence needs of its hub."""

    settings: Settings
    registry: Registry
    link: Any
    lifecycle: Any

    @property
    def lock(self) -> Any:
        """The hub's."""

    async def join(self, subscriber: Any) -> None:
        """Put a subscriber of this loop on its channels."""

    def _publish_nowait(self, event: Any) -> None:
        """Publish an event, or raise a `StarcastError`."""


class Place:
    """One event loop: its node, its announcer and what they listen to."""

    def __init__(
        self,
        hub: Hub,
        settings: Presence,
        on_close: Callable[[], None],
        drop_ended: Callable[[], None],
    ) -> None:
        self._hub = hub
        self.shard: Shard = hub.registry.here()
        self.announcer = Announcer(settings, self._clients, self._announce, self._is_wanted)
        patience = hub.settings.tuning.publish_timeout
        self.node = Node(
            settings, patience, hub._publish_nowait, self.announcer.changed, drop_ended
        )
        self.listener = Listener([CHANNEL], self.node.on_event, self.node.on_gap, on_close)
        # By connection: the channels of which it is a member, and its name there.
        self.memberships: dict[Connection, dict[str, str]] = {}

    def _clients(self, channel: str) -> Clients:
        return self.node.clients(channel)

    def _is_wanted(self, channel: str) -> bool:
        return announcements(channel) in self.shard.channels

    def _announce(self, announcement: Announcement) -> None:
        shard, registry = self.shard, self._hub.registry
        with self._hub.lock:
            members = shard.members(announcement.channel)
            wake = [shard] if members and shard.add(announcement, members) else []
        registry.wake(wake)


class Gathering:
    """See the module. Each call is about the event loop that it is made on."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._settings = hub.settings.presence or Presence()
        self._places: dict[asyncio.AbstractEventLoop, Place] = {}
        self._opening: dict[asyncio.AbstractEventLoop, asyncio.Task[Place]] = {}
        hub.lifecycle.before_close = self._say_bye

    def _say_bye(self) -> None:
        """Tell the others that the members here are gone, while the hub is still open."""
        for place in [*self._places.values()]:
            place.node.say_bye()

    async def _here(self) -> Place:
        """Return this loop's place, which is opened when it is needed first."""
        loop = asyncio.get_running_loop()
        if (place := self._places.get(loop)) is not None:
            return place
        opening = self._opening.get(loop)
        if opening is None:
            # Not in the context of the client that needs it first, which its timers would keep.
            opening = loop.create_task(self._open(loop), context=contextvars.Context())
            self._opening[loop] = opening
            # Nobody may be waiting any more for what it raises.
            opening.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(opening)

    async def _open(self, loop: asyncio.AbstractEventLoop) -> Place:
        try:
            close = functools.partial(self._close, loop)
            place = Place(self._hub, self._settings, close, self._drop_ended)
            await self._hub.join(place.listener)
            self._places[loop] = place
            place.node.begin()
            return place
        finally:
            del self._opening[loop]

    def _close(self, loop: asyncio.AbstractEventLoop) -> None:
        """The hub is closed."""
        place = self._places.pop(loop, None)
        if place is not None:  # pragma: no branch  # or it was being opened
            self._hub.registry.unsubscribe(place.listener)
            place.node.end()
            place.announcer.end()

    def _drop_ended(self) -> None:
        """Forget the members of event loops that are closed."""
        for loop, ended in [*self._places.items()]:
            if loop.is_closed() and self._places.pop(loop, None) is not None:
                ended.node.say_bye()
                self._places[asyncio.get_running_loop()].node.forget(ended.node.id, left=False)

    async def enter(
        self, connection: Connection, channel: str, client: str | None, member: Member
    ) -> None:
        """Let a client that is on a channel be one of its members.

        Args:
            connection: The client, on this event loop.
            channel: The channel.
            client: The name of the client, which no other one of any worker has; None for one that
                is made here.
            member: Who it is.

        Raises:
            BackendUnavailable: The broker is away.
        """
        place = await self._here()
        if connection.ended or channel not in connection.channels:
            return  # it has left meanwhile
        if connection not in place.memberships:
            place.memberships[connection] = {}
            connection.on_end.append(functools.partial(self._lost, place, connection))
        if client is None:
            # The connection's id is unique in this process only.
            client = f"{place.node.id}-{connection.id}"
        place.memberships[connection][channel] = client
        place.node.put(channel, client, member)

    def leave(self, connection: Connection, channel: str, *, now: bool) -> None:
        """Let a client be no member of a channel any more, which it leaves. On any loop.

        Args:
            connection, channel: The client and the channel.
            now: Whether it leaves of its own will, and is not just gone.
        """
        loop = connection.shard.loop
        place = self._places.get(loop)
        if place is None:
            return
        if running_loop() is loop:
            self._leave(place, connection, channel, now)
        else:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(self._leave, place, connection, channel, now)

    def _leave(self, place: Place, connection: Connection, channel: str, now: bool) -> None:
        client = place.memberships.get(connection, {}).pop(channel, None)
        if client is not None:
            place.node.take(channel, client, left=now)

    def _lost(self, place: Place, connection: Connection) -> None:
        for channel, client in place.memberships.pop(connection, {}).items():
            place.node.take(channel, client, left=False)

    async def announce(self, connection: Connection, channel: str) -> None:
        """Tell a client of this loop from now on who joins and leaves a channel."""
        place = await self._settled()
        registry = self._hub.registry
        with self._hub.lock:
            if connection in registry.connections and channel in connection.channels:
                place.announcer.follow(channel)
                registry.join(connection, announcements(channel))

    async def watch(self, watch: MemberWatch) -> None:
        """Let code on this loop know from now on who joins and leaves a channel.

        Raises:
            BackendUnavailable: The broker is away.
        """
        place = await self._settled()
        await self._hub.join(watch)
        watch.members = place.announcer.follow(watch.channel)

    async def clients(self, channel: str) -> dict[str, Member]:
        """Return the clients that are members of a channel, on all workers.

        Raises:
            BackendUnavailable: The broker is away.
        """
        place = await self._settled()
        return place.node.clients(channel)

    async def _settled(self) -> Place:
        """Return this loop's place, once it knows what the others know."""
        place = await self._here()
        self._drop_ended()
        if len(self._places) > 1 or not self._hub.link.is_local:
            await asyncio.shield(place.node.settled)
        return place

    async def counts(self, channel: str) -> MemberCounts:
        """Return how many clients and how many members a channel has."""
        clients = await self.clients(channel)
        return MemberCounts(len(clients), len({member.id for member in clients.values()}))
