"""Dispatcher: hands each message to the link, and waits if the caller has to wait.

That is for space in a queue, for the broker's confirmation, or in memory until the message is in
the sockets or outboxes of this event loop's clients.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import time
from collections.abc import Callable
from typing import TypeVar

from . import forks, logs
from .broker.link import Link
from .broker.local import LocalLink
from .broker.sender import Ack, OnLost
from .event import Command, Event
from .exceptions import BackendUnavailable, ConfigurationError, PublishQueueFull
from .history import Histories
from .registry import Registry
from .shard import Shard
from .sync.bounded import Full
from .sync.waiter import Waiter

# Awaited messages after which other tasks may run, if a time slice has not passed before.
YIELD_AFTER = 64

NOT_OPEN = (
    "the hub is not open; open it with the app, as in FastAPI(lifespan=hub.lifespan), "
    "or with await hub.connect()"
)

# What the log says at DEBUG of each message.
LOCAL = "published %d bytes to %r"
REMOTE = "published %d bytes to %r through the broker"

HandedOver = TypeVar("HandedOver")


class State(enum.Enum):
    """Whether a hub accepts messages."""

    NEW = enum.auto()  # it was never open; in memory, its first client or message opens it
    OPEN = enum.auto()
    CLOSED = enum.auto()
    INHERITED = enum.auto()  # it is in a child process, and was open in the parent


class Dispatcher:
    """Publishes messages. Made on any thread.

    Attributes:
        state: The hub's; the `Lifecycle` sets it when it closes.
        published: How many messages were handed to the link.
        failed: How many messages were not.
    """

    def __init__(self, registry: Registry, link: Link | LocalLink, histories: Histories) -> None:
        self.state = State.NEW
        self._histories = histories
        self._registry = registry
        self._link = link
        self._lock = registry.lock
        self._timeout = registry.tuning.publish_timeout
        # Guarded by the lock:
        self.published = 0
        self.failed = 0
        self._opener: asyncio.AbstractEventLoop | None = None  # where the hub was opened
        forks.watch(self)
        # On whichever loop publishes:
        self._unyielded = 0  # messages since other tasks had a turn
        self._unyielded_since = 0.0  # when the first of them was published

    def open_here(self) -> None:
        """Accept messages from now on. On the event loop on which the hub is opened."""
        self.state, self._opener = State.OPEN, asyncio.get_running_loop()

    def after_fork(self) -> None:
        """Belong to the parent, if the hub is open there on an event loop that still exists."""
        loop_exists = self._opener is not None and not self._opener.is_closed()
        if self.state is State.OPEN and loop_exists:
            self.state = State.INHERITED

    def check_fork(self) -> None:
        """Raise `ConfigurationError` if the hub is the parent's."""
        if self.state is State.INHERITED:
            raise ConfigurationError(forks.INHERITED)

    def publish_nowait(self, event: Event, counts: bool = True) -> None:
        """Hand an event over, or raise at once. What the hub tells other hubs does not count."""
        not_open = not self._link.is_local and self.state in (State.NEW, State.CLOSED)
        if not_open and counts and not self.published:
            # A route answers the error with 503, and the reason would be seen nowhere.
            logs.once(("not open",), "publish_nowait failed: %s", NOT_OPEN)
        try:
            self.publish(event, counts=counts)
        except PublishQueueFull:
            with self._lock:
                self.failed += 1
            raise

    def publish(
        self,
        event: Event,
        wait: bool = False,
        on_lost: OnLost | None = None,
        key: str | None = None,
        counts: bool = True,
    ) -> Ack | None:
        """Publish an event, unless one was published with this idempotency key.

        With `wait`, return an `Ack` to wait for the broker's confirmation; None in memory. Without
        `wait`, `on_lost` is called if the broker does not get it: see `Link.publish`.
        """
        link = self._link
        # A hub in memory that is new has no clients yet that could miss anything.
        if self.state is not State.OPEN and not (link.is_local and self.state is State.NEW):
            self.check_fork()
            raise BackendUnavailable(NOT_OPEN)
        ack = link.publish(event, wait, on_lost, key)
        if counts:
            with self._lock:
                self.published += 1
        self._registry.journal.message(LOCAL if link.is_local else REMOTE, event)
        return ack

    def write_now(self, event: Event, shard: Shard, max_queued: int) -> bool:
        """Write an event at once, in memory, to members that are few.

        If something is on its way to clients of this loop, the event is queued behind that.

        Args:
            event: The event.
            shard: That of this event loop.
            max_queued: How much may be queued then, in bytes.

        Returns:
            Whether it was written or queued. If not, publish it in another way.
        """
        if self.state is not State.OPEN or event.exclude or not self._link.is_local:
            return False
        if isinstance(event, Command):
            return False
        if self._histories.find(event.channel) is not None:
            return False
        if shard.awake:
            shard.flush()
        registry, channel = self._registry, event.channel
        with self._lock:
            members = shard.small(channel)
            if members is None or (
                len(registry.shards) > 1 and registry.is_elsewhere(channel, shard)
            ):
                return False
            if queued := shard.awake:
                if shard.queue.size + event.cost > max_queued:
                    return False
                shard.add(event, members)
            self.published += 1
        if not queued:
            shard.write(event, members)
        registry.journal.message(LOCAL, event)
        return True

    async def publish_soon(self, event: Event, on_lost: OnLost | None = None) -> None:
        """Hand an event over, and wait only as long as there is no space for it.

        If it is lost later, `on_lost` is called: see `Link.publish`.
        """
        try:
            self.publish(event, on_lost=on_lost)
        except Full as exc:
            await self.retry(functools.partial(self.publish, event, on_lost=on_lost), exc)

    async def publish_and_wait(self, event: Event, key: str | None = None) -> None:
        """Hand an event over, and wait until the broker, or in memory this loop, has it.

        The event has its position then, if its channel has a history. It is not published if one
        was with this idempotency key.
        """
        deadline = None
        shard = self._registry.shards.get(asyncio.get_running_loop())
        # What is queued already goes with the event in one write.
        if shard is not None and not shard.awake and self.write_now(event, shard, 0):
            await self.settle()
            return
        try:
            ack = self.publish(event, wait=True, key=key)
        except Full as exc:
            deadline = asyncio.get_running_loop().time() + self._timeout
            again = functools.partial(self.publish, event, wait=True, key=key)
            ack = await self.retry(again, exc, deadline)
        if ack is None:
            await self.settle()
            return
        try:
            await ack.wait(deadline)
        except BackendUnavailable:
            with self._lock:
                self.failed += 1
            raise
        event.position = ack.position

    async def retry(
        self,
        hand_over: Callable[[], HandedOver],
        full: Full,
        deadline: float | None = None,
    ) -> HandedOver:
        """Call it again whenever there is space, for two seconds or until the deadline."""
        loop = asyncio.get_running_loop()
        if deadline is None:
            deadline = loop.time() + self._timeout
        while loop.time() < deadline:
            self._registry.count_waiting(1)
            try:
                await full.queue.wait_for_space(deadline - loop.time())
            finally:
                self._registry.count_waiting(-1)
            try:
                return hand_over()
            except Full as exc:
                full = exc
        with self._lock:
            self.failed += 1
        raise full

    async def settle(self) -> None:
        """Bring everything published so far to the sockets or outboxes of this loop."""
        shard = self._registry.shards.get(asyncio.get_running_loop())
        late = False
        if shard is not None and shard.awake:
            if not self._unyielded:
                self._unyielded_since = time.monotonic()
            if not shard.flush():
                sent = Waiter()
                with self._lock:
                    shard.add(None, done=sent.set)  # it is awake, so there is no need to wake it
                await sent
                self._unyielded = 0
                return
            late = time.monotonic() - self._unyielded_since > self._registry.tuning.time_slice
        # A publisher that never has to wait gives other tasks a turn now and then.
        self._unyielded += 1
        if late or self._unyielded >= YIELD_AFTER:
            self._unyielded = 0
            await asyncio.sleep(0)
