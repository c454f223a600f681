"""Shard: the channels and the clients of one event loop, and the way of a message to them.

`add` may be called from any thread, with the hub's lock held. Everything else happens on the
shard's own loop and needs no lock.

What is added is delivered by runners: real tasks that share one generator, `_deliveries`, and await
one write after another. While the sockets take what they are given, nothing suspends, and a single
runner serves everybody in one step. When a write does suspend, because a client is behind, its
runner stays with that client, and `_look`, which the loop calls next, lets another one carry on
with the rest.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager

from .connection import AFTER_CANCEL, IDLE, Connection
from .event import Event
from .frames import Setting
from .group import Done, Entry, Group, Member, Snapshot, grouped
from .outbox import Item, Turn
from .servers.watch import Watch
from .stats import Counters
from .sync.bounded import BoundedQueue
from .sync.waiter import running_loop
from .tuning import Tuning

logger = logging.getLogger("starcast")

Work = Iterator[tuple[Connection, Item] | None]

# Members that get an item in their outbox, or are excluded, before the time is looked at.
LOOKED_AT = 128

# Runners that are started at once when all before them are waiting for their clients. Their number
# doubles up to here, so that a server whose every send suspends costs few turns of the loop.
MAX_CREW = 64


class Shard:
    """See the module. `lock` is the hub's."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        lock: AbstractContextManager[object],
        tuning: Tuning,
    ) -> None:
        self.loop = loop
        self.tuning = tuning
        self.counters = Counters()
        self.watch = Watch(loop, tuning.watch_interval)
        self.awake = False  # there is something to deliver
        self.version = 0
        self.queue = BoundedQueue[Entry](lock, tuning.max_pending)
        self.channels: dict[str, dict[Member, None]] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._lock = lock
        self._work: Work | None = None  # what is being delivered
        self._first: tuple[Connection, Item] | None = None  # what the next runner begins with
        self._turn = 0
        self._paused = False
        self._halted = False
        self._runners: set[asyncio.Task[None]] = set()

    # With the hub's lock held

    def join(self, member: Member, channel: str) -> None:
        self.channels.setdefault(channel, {})[member] = None
        self._snapshots.pop(channel, None)

    def leave(self, member: Member, channel: str) -> None:
        members = self.channels[channel]
        del members[member]
        self._snapshots.pop(channel, None)
        if not members:
            del self.channels[channel]

    def members(self, channel: str) -> tuple[Member, ...]:
        """Who is on the channel now. What is published later does not reach who left before."""
        snapshot = self._snapshots.get(channel)
        if snapshot is None:
            members = self.channels.get(channel)
            if not members:
                return ()
            snapshot = self._snapshots[channel] = Snapshot(members)
        return snapshot

    def add(
        self, item: Item | None, members: tuple[Member, ...] = (), done: Done | None = None
    ) -> bool:
        """Queue an item; `done` is called when it has reached all of them.

        If this returns True, the caller must call `wake`, after releasing the lock.
        """
        self.queue.append((item, members, done), item.cost if isinstance(item, Event) else 0)
        wake, self.awake = not self.awake, True
        return wake

    # From any thread, without the lock

    def wake(self) -> None:
        """Let the loop deliver.

        Raises:
            RuntimeError: The loop is closed.
        """
        if running_loop() is self.loop:
            self.loop.call_soon(self._begin)
        else:
            self.loop.call_soon_threadsafe(self._begin)

    def not_ready(self, channel: str) -> Sequence[Member]:
        """Those of the channel who may be behind: nothing waits where frames go out at once."""
        snapshot = self._snapshots.get(channel)
        if snapshot is not None and snapshot.version == self.version:
            return snapshot.others
        with self._lock:
            return self.members(channel)

    def post(self, item: Turn, connection: Connection) -> None:
        with self._lock:
            wake = self.add(item, (connection,))
        if wake:
            self.wake()

    # On the loop

    def _begin(self) -> None:
        if self.awake:
            self.flush()

    def flush(self) -> bool:
        """Deliver here and now, if nobody does so already; False if it does not end here.

        That costs no task. What would have to wait for a client, and what takes longer than a
        slice, is left to runners.
        """
        if self._work is not None:
            return False
        work = self._work = self._deliveries()
        deadline = time.monotonic() + self.tuning.time_slice
        for delivery in work:
            if delivery is not None:
                self._first = delivery
                self._start(work, 1)
                return False
            if time.monotonic() > deadline:
                self._start(work, 1)
                return False
        return True

    def _start(self, work: Work, size: int) -> None:
        if not self.awake or work is not self._work:
            return
        crew = [self.loop.create_task(self._run(work)) for _ in range(size)]
        for runner in crew:
            self._runners.add(runner)
            runner.add_done_callback(self._runners.discard)
        # After the first steps of the runners: whoever is still on its way then has suspended.
        self.loop.call_soon(self._look, work, crew)

    def _look(self, work: Work, crew: list[asyncio.Task[None]]) -> None:
        self._turn += 1
        size = 1 if self._paused else min(2 * len(crew), MAX_CREW)
        self._paused = False
        if self._halted or any(runner.cancelled() for runner in crew):
            # Somebody cancels tasks that are not theirs. That may be the end of the loop, which
            # would not wait for new tasks; if it is not, this goes on in a moment.
            self._halted = False
            self.loop.call_later(AFTER_CANCEL, self._start, work, 1)
        else:
            self._start(work, size)

    async def _run(self, work: Work) -> None:
        if self._paused:
            return  # another one of this crew has used up the time
        task = asyncio.current_task()
        turn = self._turn
        deadline = time.monotonic() + self.tuning.time_slice
        if self._first is not None:
            work, self._first = itertools.chain([self._first], work), None
        for delivery in work:
            if delivery is not None:
                connection, item = delivery
                try:
                    await connection.write(item, task)
                except asyncio.CancelledError:
                    self._halted = True
                    raise
            if self._turn != turn:
                return  # this one has suspended, and others carry on
            if time.monotonic() > deadline:
                self._paused = True
                return

    def _deliveries(self) -> Work:
        """Yield what has to be written, and None now and then, to be asked for the time."""
        batch: deque[Entry] = deque()
        try:
            while True:
                with self._lock:
                    if not self.queue.entries:
                        self.awake = False
                        self._work = None
                        return
                    batch = self.queue.take_all()
                for group in grouped(batch):
                    yield from self._deliver(group)
                    for done in group.done:
                        done()
                    yield None
        except Exception:
            # A mistake of ours. It must not be the end of everything that is still to come.
            logger.exception("messages were lost")
            for entry in batch:
                if (told := entry[2]) is not None:
                    told()
            self._work = None
            self.loop.call_soon(self._begin)

    def _deliver(self, group: Group) -> Work:
        members: Sequence[Member] = group.members
        if group.exclude:
            members = [member for member in members if member.id not in group.exclude]
        elif group.exclude is not None and isinstance(members, Snapshot):
            members = yield from self._write(group, members)
        count = len(group.items)
        takes_more = group.exclude is not None  # they are events
        single = takes_more and count == 1
        setting: Setting | None = None
        joined = b""  # for this setting
        for start in range(0, len(members), LOOKED_AT):
            delivered = looked = 0
            for member in members[start : start + LOOKED_AT]:
                frames = member.frames
                if frames is not None and frames.direct is not None and takes_more:
                    if frames.setting != setting:
                        setting = frames.setting
                        joined = group.joined(setting)
                    frames.direct(joined)
                    delivered += count
                    continue
                looked += count
                if single and member.state is IDLE:
                    assert isinstance(member, Connection)  # a Subscriber is never idle
                    member.work()
                    yield member, group.items[0]
                    continue
                for item in group.items:
                    if member.put(item):
                        assert isinstance(member, Connection)  # a Subscriber writes nothing
                        yield member, item
                if looked >= LOOKED_AT:
                    looked = 0
                    yield None
            self.counters.delivered += delivered
            if start:
                yield None

    def _write(self, group: Group, snapshot: Snapshot) -> Generator[None, None, Sequence[Member]]:
        """Write to all who take frames; return the others, and those who may not take them now."""
        version = self.version
        if snapshot.version != version:
            snapshot.look(version)
            for start in range(0, len(snapshot), LOOKED_AT):
                if start:
                    yield None
                if self.version != version:
                    snapshot.version = -1
                    return snapshot
                snapshot.add(snapshot[start : start + LOOKED_AT])
        others = snapshot.others
        for setting, (writes, members) in snapshot.writers.items():
            joined = group.joined(setting)
            for start in range(0, len(writes), LOOKED_AT):
                if self.version != version:
                    others = others + members[start:]
                    break
                for write in writes[start : start + LOOKED_AT]:
                    write(joined)
                self.counters.delivered += len(group.items) * len(writes[start : start + LOOKED_AT])
                if start:
                    yield None
        return others
