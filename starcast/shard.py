"""Shard: the channels and the clients of one event loop, and how messages are delivered to them.

`add` may be called from any thread, with the hub's lock held. Everything else happens on the
shard's own loop and needs no lock.

Deliveries are synchronous. A generator, `_deliveries`, writes frames to the clients on the fast
path and offers the items to all others. The clock is checked after every step, and what takes
longer than a time slice continues in the next iteration of the loop. A client that was offered
something while it was idle is in `to_drain`: a task sends to one such client after another. As long
as no send has to wait, a single task serves all clients. A task that has to wait for a client stays
with it, and another task continues with the rest.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeGuard

from .connection import Connection
from .event import Command, Event
from .frames import WireFormat
from .group import Done, Entry, Group, Member, Snapshot, grouped
from .outbox import Item, Send
from .servers.watch import Watch
from .stats import Counters
from .subscriber import Drainable
from .sync.bounded import BoundedQueue
from .sync.waiter import running_loop
from .tuning import Tuning

logger = logging.getLogger("starcast")

# Members that are written to or offered an item before the clock is checked.
STEP = 128

# Members that are few enough to be written to without a check in between.
SMALL = 16

# Whether a task can take its first step where it is made (Python 3.12).
EAGER = sys.version_info >= (3, 12)

END = object()


class Shard:
    """One event loop's members, and what is on its way to them.

    Args:
        loop: The event loop.
        lock: The hub's.
        tuning: The hub's timings and bounds.
        forget: Called with a client that has ended, to take it off the hub.
        on_command: Called with a command and the members that it is about. It does not raise.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        lock: AbstractContextManager[object],
        tuning: Tuning,
        forget: Callable[[Connection], object],
        on_command: Callable[[Command, Sequence[Member]], None],
    ) -> None:
        self.loop = loop
        self.tuning = tuning
        self.counters = Counters()
        self.watch = Watch(loop, tuning.watch_interval)
        self.forget = forget
        self.on_command = on_command
        self.awake = False  # a delivery is scheduled or under way
        self.version = 0  # changes when a member may, or may no longer, be written to at once
        self.queue = BoundedQueue[Entry](lock, tuning.max_pending)
        self.channels: dict[str, dict[Member, None]] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._lock = lock
        self.to_drain: deque[Drainable] = deque()  # at most `STEP`, and the handlers' own sends
        self._work: Iterator[None] | None = None  # deliveries that are under way

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
        """Return the members of the channel now. A later message does not reach those that left."""
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
        """Queue an item; `done` is called when it has been written or offered to all members.

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

    def may_be_behind(self, channel: str) -> Sequence[Member]:
        """Return the members that may be behind: on the fast path, nothing is buffered."""
        snapshot = self._snapshots.get(channel)
        if snapshot is not None and snapshot.version == self.version:
            return snapshot.others
        with self._lock:
            return self.members(channel)

    def post(self, item: Send, connection: Connection) -> None:
        """Offer an item after everything that is still to be delivered. Only while awake."""
        with self._lock:
            self.add(item, (connection,))

    # On the loop

    def _begin(self) -> None:
        if self.awake:
            self.flush()

    def flush(self) -> bool:
        """Deliver now, and return whether everything has been delivered.

        It has not if that takes longer than a time slice, or has been started before and is not
        finished. It then continues in the next iterations of the loop.
        """
        if self._work is not None:
            return False
        self._work = self._deliveries()
        return self._deliver_for_a_while()

    def _deliver_for_a_while(self) -> bool:
        work = self._work
        assert work is not None
        deadline = time.monotonic() + self.tuning.time_slice
        while self._drain_some(deadline):
            if next(work, END) is END:
                self._work = None
                return True
            if time.monotonic() > deadline:
                break
        self.loop.call_soon(self._deliver_for_a_while)
        return False

    def drain_all(self) -> None:
        """Let a task send to each client in `to_drain`."""
        while self.to_drain:
            self._start(self.to_drain.popleft().drain())

    def _drain_some(self, deadline: float) -> bool:
        """Let tasks send to those in `to_drain`; False if some are left for the next iteration.

        If a task has to wait for one of them, another task continues with the rest.
        """
        while self.to_drain:
            self._start(self._drain_one_after_another(deadline))
            # Before Python 3.12, the task starts in the next iteration.
            if (
                not EAGER or time.monotonic() > deadline
            ):  # pragma: no branch  # on 3.11 it is always true
                return False
        return True

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        # No reference is kept here: the connection has one while the task waits for it.
        if sys.version_info >= (3, 12):  # pragma: no cover  # coverage is taken on 3.11
            asyncio.Task(coroutine, loop=self.loop, eager_start=True)
        else:
            self.loop.create_task(coroutine)

    async def _drain_one_after_another(self, deadline: float) -> None:
        to_drain, task = self.to_drain, asyncio.current_task()
        while to_drain:
            await to_drain.popleft().drain(task)
            if time.monotonic() > deadline:
                return

    def _deliveries(self) -> Iterator[None]:
        """Offer everything to its members, in steps: after each, send to those in `to_drain`."""
        batch: deque[Entry] = deque()
        try:
            while True:
                with self._lock:
                    if not self.queue.entries:
                        self.awake = False
                        return
                    batch = self.queue.take_all()
                written = 0  # members since the clock was checked
                for group in grouped(batch):
                    if self._write_small(group):
                        written += len(group.members)
                    else:
                        yield from self._deliver(group)
                        written = STEP
                    for arrived in group.done:
                        arrived()
                    if written >= STEP:
                        written = 0
                        yield
        except Exception:
            # This is a bug, and later messages must still be delivered.
            logger.exception("messages were lost")
            for _, _, done in batch:
                if done is not None:
                    done()
            self.loop.call_soon(self._begin)

    def _write_small(self, group: Group) -> bool:
        """Write to all members at once, if they are few and all on the fast path.

        It does what `_deliver` does, which takes three times as long for a member or two.
        """
        snapshot = group.members
        if group.exclude or not group.has_events or not self._is_small(snapshot):
            return False
        for wire_format, (writes, _) in snapshot.writers.items():
            joined = group.joined(wire_format)
            for write in writes:
                write(joined)
        self.counters.delivered += len(group.items) * len(snapshot)
        return True

    def _is_small(self, members: tuple[Member, ...]) -> TypeGuard[Snapshot]:
        """Whether they are few, and all may be written to at once."""
        if not 0 < len(members) <= SMALL or not isinstance(members, Snapshot):
            return False
        if members.version != self.version:
            members.reset(self.version)
            members.add(members)
        return not members.others

    def small(self, channel: str) -> Snapshot | None:
        """Return the members of a channel if they are few and all may be written to at once.

        Call it with the lock held, on the loop.
        """
        members: tuple[Member, ...] | None = self._snapshots.get(channel)
        if members is None:
            members = self.members(channel)
        return members if self._is_small(members) else None

    def write(self, event: Event, members: Snapshot) -> None:
        """Write an event to what `small` returned, while the shard is not awake."""
        try:
            for wire_format, (writes, _) in members.writers.items():
                frame = event.frame(wire_format)
                for write in writes:
                    write(frame)
            self.counters.delivered += len(members)
        except Exception:
            logger.exception("messages were lost")  # a bug, but none of whoever publishes

    def _deliver(self, group: Group) -> Iterator[None]:
        members: Sequence[Member] = group.members
        if group.items and isinstance(command := group.items[0], Command):
            self.on_command(command, members)
            return
        if group.exclude:
            members = [member for member in members if member.id not in group.exclude]
        if group.has_events:
            if isinstance(members, Snapshot):
                members = yield from self._write(group, members)
            else:
                members = yield from self._write_each(group, members)
        for start in range(0, len(members), STEP):
            for member in members[start : start + STEP]:
                member.offer(group.items)
            yield

    def _write_each(
        self, group: Group, members: Sequence[Member]
    ) -> Generator[None, None, list[Member]]:
        """Write to the members on the fast path, and return the others."""
        others: list[Member] = []
        wire_format: WireFormat | None = None
        joined = b""  # in this wire format
        for start in range(0, len(members), STEP):
            if start:
                yield
            step = members[start : start + STEP]
            before = len(others)
            for member in step:
                frames = member.frames
                if frames is None or frames.direct is None:
                    others.append(member)
                    continue
                if frames.wire_format != wire_format:
                    wire_format = frames.wire_format
                    joined = group.joined(wire_format)
                frames.direct(joined)
            self.counters.delivered += len(group.items) * (len(step) - len(others) + before)
        return others

    def _write(self, group: Group, snapshot: Snapshot) -> Generator[None, None, Sequence[Member]]:
        """Write to the members on the fast path, and return those that are not on it now."""
        version = self.version
        if snapshot.version != version:
            snapshot.reset(version)
            for start in range(0, len(snapshot), STEP):
                if start:
                    yield None
                if self.version != version:
                    snapshot.version = -1
                    return snapshot
                snapshot.add(snapshot[start : start + STEP])
        others = snapshot.others
        for wire_format, (writes, members) in snapshot.writers.items():
            joined = group.joined(wire_format)
            for start in range(0, len(writes), STEP):
                if start:
                    yield None
                if self.version != version:
                    others = others + members[start:]
                    break
                for write in writes[start : start + STEP]:
                    write(joined)
                self.counters.delivered += len(group.items) * len(writes[start : start + STEP])
        return others
