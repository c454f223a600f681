"""Registry: who is connected, on which channel and which event loop, and how messages get there.

One lock guards it, which also gives messages their order. It is held briefly, and nothing is
awaited meanwhile. It is reentrant, because a finalizer that the garbage collector runs may publish.
Methods may be called from any thread, unless they say otherwise.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from .connection import Connection
from .event import Command, Event, Gap
from .group import Done, Member
from .handler import is_gone
from .history import Position
from .journal import Journal
from .missed import Missed
from .outbox import Close, Item, Leave
from .shard import Shard
from .stats import ClientCounts, Counters
from .subscriber import Subscription
from .sync.bounded import Full
from .sync.waiter import Waiter, running_loop
from .tuning import Tuning

Target = tuple[Shard, tuple[Member, ...]]


class Registry:
    """See the module.

    Args:
        tuning: The hub's timings and bounds.
        release: Called with a channel whenever a member has left it, with the lock held.
        on_missed: Called with what an event loop has missed of what a broker sent, on that loop and
            with the lock held.
        on_command: See `Shard`.
    """

    def __init__(
        self,
        tuning: Tuning,
        release: Callable[[str], None],
        on_missed: Callable[[Missed], None],
        on_command: Callable[[Command, Sequence[Member]], None],
    ) -> None:
        self.tuning = tuning
        self.lock = threading.RLock()
        self._release = release
        self._on_missed = on_missed
        self._on_command = on_command
        self.shards: dict[asyncio.AbstractEventLoop, Shard] = {}
        self.connections: dict[Connection, Shard] = {}
        self.subscribers: dict[Subscription, Shard] = {}
        self._missed: dict[Shard, Missed] = {}  # of loops that are blocked now
        # With a broker: the place that members have reached on each channel that has a history.
        self.positions: dict[str, Position] = {}
        self.counts = ClientCounts()  # guarded by the lock
        self._retired = Counters()  # of shards whose loop has ended
        self.waiting_senders = 0
        self.journal = Journal(self.lock, self.shards)  # written once the lock is released

    # Who is there

    def here(self) -> Shard:
        """Return this event loop's shard."""
        loop = asyncio.get_running_loop()
        shard = self.shards.get(loop)
        if shard is None:  # only the loop itself adds it
            with self.lock:
                self._sweep()
                shard = Shard(loop, self.lock, self.tuning, self.forget, self._on_command)
                self.shards[loop] = shard
        return shard

    def loops(self) -> list[asyncio.AbstractEventLoop]:
        """Return the event loops that have members."""
        with self.lock:
            return [shard.loop for shard in self.shards.values() if shard.channels]

    def join(self, connection: Connection, channel: str) -> bool:
        """Put a client of this loop on a channel; False if it was there already."""
        with self.lock:
            shard = self.connections.get(connection)
            if shard is None:
                shard = self.connections[connection] = self.here()
                shard.watch.add(connection)
                self.counts.change(self.counts.by_reason, connection.asgi_reason, 1)
            if channel in connection.channels:
                return False
            connection.channels.add(channel)
            shard.join(connection, channel)
            self.counts.channel(channel, 1)
            path = f"ASGI ({connection.asgi_reason})" if connection.asgi_reason else "the fast path"
            self.journal.note(f"a client on {path} joined", channel)
            return True

    def leave(self, connection: Connection, channel: str | None = None) -> Waiter | None:
        """Take a client off one channel, or off all.

        Returns what this loop may wait for until the client has everything.
        """
        with self.lock:
            shard = self.connections.get(connection)
            if shard is None:
                return None
            if channel in connection.channels:
                connection.channels.remove(channel)
                self._leave_channel(connection, channel, shard)
            if channel is not None and connection.channels:
                return None
            self.remove(connection)
            here = running_loop() is shard.loop
            left = Waiter() if here else None
            connection.leaving = Leave(left)
            dead = here and is_gone(connection.websocket)
            wake = [shard] if not dead and shard.add(connection.leaving, (connection,)) else []
        if dead:
            connection.kill()
        self.wake(wake, [connection])
        return None if dead else left

    def remove(self, connection: Connection) -> Shard | None:
        """Forget a client, and return the shard that it was on."""
        with self.lock:
            shard = self.connections.pop(connection, None)
            if shard is not None:
                shard.watch.discard(connection)
                self.counts.change(self.counts.by_reason, connection.asgi_reason, -1)
                for channel in connection.channels:
                    self._leave_channel(connection, channel, shard)
                connection.channels.clear()
            return shard

    def _leave_channel(self, connection: Connection, channel: str, shard: Shard) -> None:
        shard.leave(connection, channel)
        self.counts.channel(channel, -1)
        self._release(channel)
        self.journal.note("a client left", channel)

    def forget(self, connection: Connection) -> None:
        """Forget a client that has ended by itself."""
        self.remove(connection)
        self.journal.write()

    def end(self, connection: Connection, close: Close) -> bool:
        """Close a client after what it still has to get, and forget it; False if it is unknown."""
        with self.lock:
            shard = self.remove(connection)
            wake = [shard] if shard is not None and shard.add(close, (connection,)) else []
        self.wake(wake, [connection])
        return shard is not None

    def subscribe(self, subscriber: Subscription) -> None:
        """Put a subscriber of this loop on its channels."""
        with self.lock:
            shard = subscriber.shard = self.subscribers[subscriber] = self.here()
            if subscriber.transport is not None:
                shard.watch.add(subscriber)
            self.counts.subscriber(subscriber.kind, subscriber.channels, 1)
            for channel in subscriber.channels:
                shard.join(subscriber, channel)
                self.journal.note(f"a {subscriber.kind or 'subscriber'} joined", channel)

    def unsubscribe(self, subscriber: Subscription) -> None:
        self._remove_subscriber(subscriber)
        self.journal.write()

    def _remove_subscriber(self, subscriber: Subscription) -> None:
        with self.lock:
            shard = self.subscribers.pop(subscriber, None)
            if shard is not None:
                shard.watch.discard(subscriber)
                self.counts.subscriber(subscriber.kind, subscriber.channels, -1)
                for channel in subscriber.channels:
                    shard.leave(subscriber, channel)
                    self._release(channel)
                    self.journal.note(f"a {subscriber.kind or 'subscriber'} left", channel)

    def close_all(self, close: Close) -> list[Connection]:
        """Close all clients and subscribers, and return the clients."""
        with self.lock:
            self._sweep()
            connections = list(self.connections)
            members: dict[Shard, list[Member]] = {}
            for member, shard in self._members():
                members.setdefault(shard, []).append(member)
            wake = [shard for shard, own in members.items() if shard.add(close, tuple(own))]
            for connection in connections:
                self.remove(connection)
        self.wake(wake, connections)
        return connections

    def _members(self, channel: str | None = None) -> Iterator[tuple[Member, Shard]]:
        """Return all members, or those of a channel, each with its shard."""
        if channel is None:
            return itertools.chain(self.connections.items(), self.subscribers.items())
        return ((m, it) for it in self.shards.values() for m in it.channels.get(channel, {}))

    def _sweep(self) -> None:
        for shard in [shard for shard in self.shards.values() if shard.loop.is_closed()]:
            self._drop(shard)

    def _drop(self, shard: Shard) -> None:
        """Forget a shard whose loop is closed, with its members."""
        if self.shards.pop(shard.loop, None) is not None:
            self._retired.add(shard.counters)
            self._missed.pop(shard, None)
            for connection in [c for c, own in self.connections.items() if own is shard]:
                self.remove(connection)
            for subscriber in [s for s, own in self.subscribers.items() if own is shard]:
                self._remove_subscriber(subscriber)

    def count_waiting(self, change: int) -> None:
        """Count a sender that begins (1) or ends (-1) to wait for space."""
        with self.lock:
            self.waiting_senders += change

    # Look

    def clients(self, channel: str | None = None) -> list[Connection]:
        """Return the clients, or those on a channel, in the order in which they joined."""
        with self.lock:
            self._sweep()
            if channel is None:
                return list(self.connections)
            members = [m for shard in self.shards.values() for m in shard.channels.get(channel, ())]
        return [member for member in members if isinstance(member, Connection)]

    def __len__(self) -> int:
        """How many clients there are."""
        with self.lock:
            self._sweep()
            return self.counts.total

    def channels(self) -> dict[str, int]:
        """Return the number of clients of each channel that has any."""
        with self.lock:
            self._sweep()
            return dict(self.counts.by_channel)

    def counters(self) -> Counters:
        counters = Counters()
        with self.lock:
            counters.add(self._retired)
            for shard in list(self.shards.values()):
                counters.add(shard.counters)
        return counters

    @property
    def pending(self) -> int:
        """Messages that wait for their event loop."""
        with self.lock:
            return sum(len(shard.queue) for shard in self.shards.values())

    @property
    def buffered(self) -> int:
        """Bytes that wait for clients and subscribers, added up without holding the lock."""
        members: list[Member] = [*list(self.connections), *list(self.subscribers)]
        return sum(member.outbox.size for member in members)

    # The way of a message

    def is_elsewhere(self, channel: str, shard: Shard) -> bool:
        """Whether a channel has members of another loop. Call it with the lock held."""
        others = (other for other in self.shards.values() if other is not shard)
        return any(channel in other.channels for other in others)

    def add(self, event: Event) -> list[Shard]:
        """Queue an event on every loop with members on its channel. With the lock held.

        Returns:
            What to pass to `wake` once the lock is released. A loop is woken once for all messages
            of one iteration, so this is empty most of the time.

        Raises:
            Full: A loop has no space. No member gets the event.
        """
        return self._add(event, self._targets(event.channel))

    def deliver_remote(self, event: Event, since: float) -> bool:
        """Queue an event from the broker on every loop that has space, and return whether all had.

        A loop without space misses what follows until its queue is empty; its members are told
        then. `since` is the time before which nothing is missing.
        """
        wake = []
        all_had_space = True
        with self.lock:
            if event.position is not None and event.channel in self.positions:
                self.positions[event.channel] = event.position
            for shard, members in self._targets(event.channel):
                if shard not in self._missed and shard.queue.has_space(event.cost):
                    if shard.add(event, members):
                        wake.append(shard)
                    continue
                all_had_space = False
                if shard not in self._missed:
                    self._missed[shard] = Missed(shard, since, self._end_missed)
                self._missed[shard].add(event.channel)
        self.wake(wake)
        self.journal.message("received %d bytes for %r from the broker", event)
        return all_had_space

    def is_behind(self) -> bool:
        """Whether a loop has half of what may wait for it to deliver, and misses nothing yet."""
        return any(it.queue.half_full for it in [*self.shards.values()] if it not in self._missed)

    def _end_missed(self, missed: Missed) -> None:
        del self._missed[missed.shard]
        self._on_missed(missed)

    def queue(self, item: Item, client: tuple[Connection, ...]) -> list[Shard]:
        """Queue an item for one client that is registered, in a tuple. With the lock held.

        Returns:
            What to pass to `wake` once the lock is released.
        """
        shard = self.connections[client[0]]
        return [shard] if shard.add(item, client) else []

    def post(self, event: Event, connection: Connection) -> bool:
        """Queue an event for one client; False if it is not registered any more.

        Raises:
            Full: Its loop has no space.
        """
        outbox = connection.outbox

        def arrived() -> None:
            with self.lock:
                outbox.promised -= event.cost
            if outbox.space is not None:
                outbox.space.wake()  # it may have been sent at once

        with self.lock:
            shard = self.connections.get(connection)
            if shard is None:
                return False
            wake = self._add(event, [(shard, (connection,))], arrived)
            outbox.promised += event.cost
        self.wake(wake)
        return True

    def tell_gap(
        self,
        gap: Gap,
        close: Close | None,
        members: dict[Member, Shard] | None = None,
        *,
        spare: Callable[[Member], bool] | None = None,
    ) -> None:
        """Queue a gap for the subscribers that want it, and close the clients if asked to.

        Args:
            gap: The gap.
            close: What closes the clients, or None.
            spare: Returns whether a member has missed nothing.
            members: The members to tell, each with its shard, in which case the caller holds the
                lock, and their loops are woken in the next iteration of this one. By default, all
                members of the gap's channel, or of the hub.
        """
        notices: list[tuple[Item, Member, Shard]] = []
        closed: list[Connection] = []
        with self.lock:
            affected = dict(self._members(gap.channel)) if members is None else members
            for member, shard in affected.items():
                if spare is not None and spare(member):
                    continue
                if isinstance(member, Connection):
                    if close is not None:
                        notices.append((close, member, shard))
                        closed.append(member)
                        self.remove(member)
                elif member.gaps:
                    notices.append((gap, member, shard))
            wake = [shard for item, member, shard in notices if shard.add(item, (member,))]
        if members is None:
            self.wake(wake, closed)
        else:
            asyncio.get_running_loop().call_soon(self.wake, wake, closed)

    def _targets(self, channel: str) -> list[Target]:
        """Return the members of a channel, for each loop that has any."""
        while True:
            targets = []
            for shard in list(self.shards.values()):
                if members := shard.members(channel):
                    if shard.loop.is_closed():
                        break
                    targets.append((shard, members))
            else:
                return targets
            self._sweep()

    def _add(self, event: Event, targets: list[Target], done: Done | None = None) -> list[Shard]:
        for shard, _ in targets:
            if not shard.queue.has_space(event.cost):
                text = f"an event loop has {len(shard.queue)} messages waiting to be sent"
                raise Full(text, shard.queue)
        wake = []
        # No comprehension, which would be one more call for each message in Python 3.11.
        for shard, members in targets:
            if shard.add(event, members, done):
                wake.append(shard)
        return wake

    def wake(self, shards: Iterable[Shard], left: Iterable[Connection] = ()) -> None:
        """Let the loops deliver, and end waits for space in the buffers of clients that left."""
        for shard in shards:
            try:
                shard.wake()
            except RuntimeError:  # its loop has just been closed
                with self.lock:
                    self._drop(shard)
        for connection in left:
            if connection.outbox.space is not None:
                connection.outbox.space.wake()
        self.journal.write()
