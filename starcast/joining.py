"""Joining: how a client or a subscriber gets on its channels, and what it gets of their past.

It joins first, and gets what is published from then on. What it gets of the past goes before that:
a `Replay` holds its place in the outbox of a client until it is read.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from starlette.websockets import WebSocket, WebSocketState

from .broker.link import Link
from .broker.local import LocalLink
from .close_codes import ABNORMAL, GOING_AWAY
from .connection import Connection
from .event import Event
from .exceptions import BackendUnavailable, ClientGone
from .handler import is_gone
from .history import Position, Resumed, Wish
from .internal import LOCAL
from .lifecycle import Lifecycle
from .orders import user_channel
from .outbox import Item, Outbox, Replay
from .people import Identity, People
from .registry import Registry
from .resume import Reader, notice
from .servers import daphne, served
from .settings import Settings
from .shard import Shard
from .subscriber import Subscription

Headers = Iterable[tuple[bytes, bytes]]

# Makes what a client gets first on a channel: of where it begins, which is None on a channel
# without a history, and of the past that it gets.
Compose = Callable[[Resumed | None, list[Event]], Sequence[Event]]

# The ids of connections. They are unique in the process, because a task notes the ids that it
# serves, of any hub.
_ids = itertools.count(1)


class Joining:
    """The part of a `Hub` that is described above. On the event loop of whoever joins."""

    settings: Settings
    registry: Registry
    lock: AbstractContextManager[object]
    link: Link | LocalLink
    past: Reader
    people: People
    lifecycle: Lifecycle

    def find(self, websocket: WebSocket) -> Connection | None:
        """Return what was registered for this websocket last, even if it has left since."""
        found: Connection | None = websocket.scope.get("starcast", {}).get(self)
        return found

    def is_registered(self, websocket: WebSocket) -> bool:
        """Whether the client is on any channel of this hub."""
        return self.find(websocket) in self.registry.connections

    async def _acquire(self, channel: str) -> None:
        if not channel.startswith(LOCAL):
            await self.link.acquire(channel)

    def _acquire_again(self, channel: str) -> None:
        if not channel.startswith(LOCAL):
            self.link.acquire_again(channel)

    def _release(self, channel: str) -> None:
        if not channel.startswith(LOCAL):
            self.link.release(channel)

    async def connect(
        self,
        websocket: WebSocket,
        channel: str,
        outbox: Outbox,
        subprotocol: str | None,
        headers: Headers | None,
        wish: Wish,
        identity: Identity | None = None,
    ) -> Resumed | None:
        """Accept a client, unless that was done, and put it on a channel.

        `identity` says whose it is; None leaves that as it was.

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
        if (known := self.find(websocket)) and channel in known.channels:
            self._acquire_again(channel)  # it need not be waited for
        else:
            await self._acquire(channel)
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
                if identity is not None and connection is not None:
                    self.people.identify(connection, identity)
                replay = None
                if here is not None and connection and (connection.outbox.ids or not wish.is_empty):
                    replay = Replay(asyncio.get_running_loop())
                    connection.outbox.replayed = replay.taken
                    wake = self.registry.queue(replay, (connection,))
            self.registry.wake(wake)
            self.link.take_over()  # if the loop that it was on has ended
            if closed:  # while the websocket was being accepted
                await websocket.close(GOING_AWAY)
                raise ClientGone(GOING_AWAY)
        finally:
            if not registered:
                self._release(channel)
        if identity is not None and identity.user is not None:
            await self.connect(websocket, user_channel(identity.user), outbox, None, None, Wish())
        if here is None:
            return None
        if replay is None:
            return Resumed(str(here))
        return await self._replay(websocket, channel, wish, here, replay)

    async def _replay(
        self, websocket: WebSocket, channel: str, wish: Wish, here: Position, replay: Replay
    ) -> Resumed:
        """Let a client that has joined at this position have what it wants of the past."""
        connection = self.find(websocket)
        assert connection is not None  # it has joined

        def compose(resumed: Resumed | None, everything: list[Event]) -> list[Event]:
            excluded = self.people.is_excluded
            events = [event for event in everything if not excluded(connection, event)]
            if resumed is not None and connection.outbox.ids:
                events.insert(0, notice(channel, wish, resumed, everything, len(events)))
            return events

        return await self._read(connection, channel, wish, here, replay, compose)

    async def _read(
        self,
        connection: Connection,
        channel: str,
        wish: Wish,
        here: Position,
        replay: Replay,
        compose: Compose,
    ) -> Resumed:
        """Read the past, and let what is made of it be sent. If that fails, leave the channel."""
        first: Sequence[Event] = ()
        try:
            events, resumed = await self.past.read(channel, wish, here)
            first = compose(resumed, events)
        except BaseException:
            self.registry.leave(connection, channel)
            raise
        finally:
            replay.begin(first)
        return resumed

    async def add_channel(
        self, client: tuple[Connection, ...], channel: str, wish: Wish, compose: Compose
    ) -> None:
        """Put a client that is registered on one more channel.

        Args:
            client: The client, on this event loop, in a tuple.
            channel: The channel. The client must not be on it.
            wish: What the client wants of its past.
            compose: Makes what the client gets first.

        Raises:
            ClientGone: The client has left.
            BackendUnavailable: The broker did not confirm it. The client gets nothing then.
        """
        (connection,) = client
        await self.lifecycle.ensure_open()
        closings = self.lifecycle.closings
        kept = self.settings.histories.find(channel) is not None
        first = [] if kept else compose(None, [])
        await self._acquire(channel)
        registered = False
        try:
            await self.past.catch_up(channel, wish)
            with self.lock:
                gone = connection not in self.registry.connections or not connection.is_here
                if gone or self.lifecycle.closings != closings:
                    raise ClientGone(connection.code or ABNORMAL)
                registered = self.registry.join(connection, channel)
                here = self.link.position(channel)
                replay = Replay(asyncio.get_running_loop()) if kept else None
                items: Sequence[Item] = first if replay is None else [replay]
                wake = [it for item in items for it in self.registry.queue(item, client)]
        finally:
            if not registered:
                self._release(channel)
        self.registry.wake(wake)
        self.link.take_over()
        if here is not None and replay is not None:
            await self._read(connection, channel, wish, here, replay, compose)

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

    async def join(self, subscriber: Subscription) -> None:
        """Put a subscriber of this loop on its channels."""
        await self.lifecycle.ensure_open()
        closings = self.lifecycle.closings
        acquired: list[str] = []
        registered = False
        try:
            for channel, wish in subscriber.wishes.items():
                await self._acquire(channel)
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
