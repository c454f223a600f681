"""Sender: queues messages for the broker and publishes them in batches.

Messages that arrive while the broker has not confirmed a batch form the next one. `put` may be
called from any thread; everything else happens on the event loop of the connection.

While there is no connection, messages stay in the queue in their order, for two seconds: one that
is awaited until the caller gives up, any other until it expires and is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

from .. import logs
from ..backends.base import BrokerConnection, HistoryConnection, Kept, MessagesRefused
from ..event import OVERHEAD
from ..exceptions import BackendUnavailable
from ..history import Position
from ..sync.bounded import BoundedQueue, Full
from ..sync.deadline import Deadline, Overdue
from ..sync.waiter import Waiter, running_loop
from ..tuning import Tuning

# The shortest interval between two searches for expired messages, in seconds. Each search goes
# through the whole queue.
EXPIRE_EVERY = 0.1

NOT_OPEN = "the hub is not open"
LOST = "the connection to the broker was lost"
LATE = "the broker did not answer in time"
EXPIRED = "the broker was away for too long"

OnLost = Callable[[str], object]


class Ack(Waiter):
    """Set when the broker has a message or a subscription, or when that has failed.

    Args:
        timeout: How long `wait` waits, in seconds.

    Attributes:
        position: The place of the message in the history of its channel; None if it has none.
    """

    __slots__ = ("abandoned", "failed", "position", "timeout")

    def __init__(self, timeout: float) -> None:
        super().__init__()
        self.timeout = timeout
        self.failed: str | None = None  # the reason, if it has failed
        self.abandoned = False  # the caller no longer waits
        self.position: Position | None = None

    def fail(self, why: str) -> None:
        """Set it as failed, unless it is set already."""
        if not self._future.done():
            self.failed = why
            self.set()

    async def wait(self, deadline: float | None = None) -> None:
        """Wait until it is set, up to the timeout, or up to a time of this loop's clock.

        Raises:
            BackendUnavailable: The broker refused it, was lost, or did not answer in time.
        """
        left = self.timeout
        if deadline is not None:
            left = deadline - asyncio.get_running_loop().time()
        overdue = Overdue(left, lambda: self.fail(LATE))
        try:
            await self
        finally:
            overdue.cancel()
            self.abandoned = True
        if self.failed is not None:
            raise BackendUnavailable(self.failed)


class Entry:
    """A queued message, and its acknowledgement or what to call if it is lost."""

    __slots__ = ("ack", "channel", "cost", "data", "expires", "is_probe", "kept", "on_lost")

    def __init__(
        self,
        channel: str,
        data: bytes,
        expires: float,
        ack: Ack | None = None,
        on_lost: OnLost | None = None,
        is_probe: bool = False,
        kept: Kept | None = None,
    ) -> None:
        self.channel = channel
        self.data = data
        self.expires = expires  # unless a caller awaits it
        self.ack = ack
        self.on_lost = on_lost
        self.is_probe = is_probe
        self.kept = kept  # what the broker is given, if the channel has a history
        self.cost = len(data) + OVERHEAD

    def has_expired(self, now: float) -> bool:
        if self.ack is not None:
            return self.ack.abandoned
        return self.is_probe or self.expires <= now


def _publish(connection: BrokerConnection, batch: list[Entry]) -> Awaitable[Any]:
    """Publish entries, all of which are kept, or none."""
    if batch[0].kept is None:
        return connection.publish([(entry.channel, entry.data) for entry in batch])
    kept = [entry.kept for entry in batch if entry.kept is not None]
    return cast(HistoryConnection, connection).publish_kept(kept)


class Sender:
    """Queues messages and hands them to a connection. Made on any thread, closed at first.

    Args:
        lock: The hub's.
        tuning: The hub's.
        on_lost: Called with the reason when messages that are not awaited were lost.

    Attributes:
        queue: The messages that are waiting.
        max_payload: How large a message the last connection accepted, in bytes.
        lost: How many messages that were not awaited were lost.
        published: How many messages were ever put here.
        published_cost: What these cost together.
    """

    def __init__(self, lock: AbstractContextManager[object], tuning: Tuning, on_lost: OnLost):
        self._lock = lock
        self._tuning = tuning
        self._on_lost = on_lost
        # Guarded by the lock:
        self.queue = BoundedQueue[Entry](lock, tuning.max_queued)
        self.max_payload = 0
        self.lost = 0
        self.published = 0
        self.published_cost = 0
        self._closed = NOT_OPEN  # the reason why messages are not accepted; empty if they are
        self._connection: BrokerConnection | None = None
        # On the loop:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._batch: list[Entry] = []  # what the broker has not confirmed
        self._sending: asyncio.Future[Any] | None = None
        self._busy = False
        self._expiry: Overdue | None = None

    # From any thread

    def put(
        self,
        channel: str,
        data: bytes,
        wait: bool,
        on_lost: OnLost | None = None,
        kept: Kept | None = None,
    ) -> Ack | None:
        """Queue a message. With `wait`, return what is set when the broker has it.

        Without `wait`, `on_lost` is called with the reason, at most once, if the broker does not
        get the message: on the event loop of the connection, or on the thread that closes it. It
        must neither block nor raise.

        Raises:
            Full: Too much is waiting.
        """
        timeout = self._tuning.publish_timeout
        ack = Ack(timeout) if wait else None
        entry = Entry(channel, data, time.monotonic() + timeout, ack, on_lost, kept=kept)
        wake = False
        with self._lock:
            closed = self._closed
            if not (closed or wait) and self._loop is not None and self._loop.is_closed():
                closed = LOST
            if not closed:
                if not self.queue.has_space(entry.cost):
                    raise Full(f"{len(self.queue)} messages wait for the broker", self.queue)
                wake = not self.queue and self._connection is not None
                self.queue.append(entry, entry.cost)
                self.published += 1
                self.published_cost += entry.cost
        if closed:
            self._fail([entry], closed)
        elif wake:
            self._wake(wait)
        return ack

    def _wake(self, at_once: bool) -> None:
        loop = self._loop
        assert loop is not None  # there is a connection
        if running_loop() is not loop:
            with contextlib.suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(self._send)
        elif at_once:
            self._send()
        else:
            loop.call_soon(self._send)  # together with other messages of this iteration

    def close(self, why: str) -> None:
        """Accept no more messages until `start`, and fail those that are waiting."""
        with self._lock:
            self._closed = why
            entries = self.queue.take_all()
        self._fail(entries, why)

    # On the loop

    def start(self) -> None:
        """Accept messages, to be sent on this event loop once there is a connection."""
        self._loop = asyncio.get_running_loop()
        self._sending = self._expiry = None
        self._fail_batch(LOST)  # if the loop of the last connection was closed before it ended
        with self._lock:
            self._connection = None
            self._closed = ""
        self._expire()

    def attach(self, connection: BrokerConnection) -> None:
        """Send over this connection from now on."""
        with self._lock:
            self._connection = connection
            self.max_payload = connection.max_payload
        self._send()

    def detach(self, connection: BrokerConnection | None) -> None:
        """Stop using this connection, if it is in use. What it has not confirmed is lost.

        It is called on another loop if that of the connection is closed.
        """
        with self._lock:
            if connection is None or self._connection is not connection:
                return
            self._connection = None
        sending, self._sending = self._sending, None
        if sending is not None and sending.get_loop() is running_loop():
            sending.cancel()
        self._fail_batch(LOST)
        self._expire()

    @property
    def unconfirmed_size(self) -> int:
        """Bytes that the broker has not confirmed."""
        return sum(len(entry.data) for entry in self._batch)

    def probe(self, channel: str, on_lost: OnLost) -> None:
        """Send an empty message before all others, and alone. It is not counted if it is lost."""
        entry = Entry(channel, b"", 0.0, on_lost=on_lost, is_probe=True)
        with self._lock:
            self.queue.prepend(entry, entry.cost)
        self._send()

    async def drain(self) -> None:
        """Send what is waiting, for two seconds at most."""
        with contextlib.suppress(TimeoutError):
            async with Deadline(self._tuning.publish_timeout):
                self._send()
                while self._sending is not None:
                    await asyncio.wait([self._sending])

    def _expire(self) -> None:
        """Remove messages that have waited too long, again and again until it is attached."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        now = time.monotonic()
        with self._lock:
            if self._connection is not None or self._closed:
                return
            entries = self.queue.entries
            expired = [entry for entry in entries if entry.has_expired(now)]
            if expired:
                size = self.queue.size - sum(entry.cost for entry in expired)
                self.queue.keep((entry for entry in entries if not entry.has_expired(now)), size)
            left = next((it.expires - now for it in self.queue.entries if it.ack is None), 0.0)
        self._fail(expired, EXPIRED)
        if running_loop() is self._loop:
            self._expiry = Overdue(max(left, EXPIRE_EVERY), self._expire)

    def _send(self) -> None:
        """Send a batch, unless the broker still has to confirm one."""
        connection = self._connection
        if self._busy or connection is None or running_loop() is not self._loop:
            return
        while self._sending is None and (batch := self._take_batch(connection)):
            self._batch = batch
            self._busy = True
            try:
                # A future is used as it is; a coroutine needs a task, and so an iteration more.
                self._sending = asyncio.ensure_future(_publish(connection, batch))
            except Exception as exc:
                self._fail_batch(logs.describe(exc))
            else:
                self._sending.add_done_callback(self._sent)
            finally:
                self._busy = False

    def _take_batch(self, connection: BrokerConnection) -> list[Entry]:
        batch: list[Entry] = []
        too_large: list[Entry] = []  # for this connection
        size, max_payload = 0, connection.max_payload
        max_messages, max_size = self._tuning.batch_messages, self._tuning.batch_size
        with self._lock:
            while self.queue.entries and len(batch) < max_messages and size < max_size:
                entry = self.queue.entries[0]
                if batch and (entry.kept is None) is not (batch[0].kept is None):
                    break  # the broker is given them in another way
                self.queue.drop_first(entry.cost)
                if len(entry.data) > max_payload:
                    too_large.append(entry)
                elif entry.ack is None or not entry.ack.abandoned:
                    batch.append(entry)
                    size += len(entry.data)
                if entry.is_probe:
                    break  # so that an error of the broker concerns the probe alone
            self.queue.tell()
        self._fail(too_large, f"the broker now takes {max_payload} bytes at most")
        return batch

    def _sent(self, sending: asyncio.Future[Any]) -> None:
        # If the connection is broken, the backend reports that, or the probe notices.
        error = ConnectionError(LOST) if sending.cancelled() else sending.exception()
        if sending is not self._sending:
            return  # it was detached meanwhile
        self._sending = None
        if isinstance(error, MessagesRefused):
            self._confirm_batch(error.positions, error.reasons)
        elif error is None:
            self._confirm_batch(sending.result() or (), {})
        else:
            self._fail_batch(logs.describe(error))
        self._send()

    def _confirm_batch(self, positions: Sequence[Position | None], refused: dict[int, str]) -> None:
        batch, self._batch = self._batch, []
        for number, entry in enumerate(batch):
            if number in refused:
                self._fail([entry], refused[number])
            elif entry.ack is not None:
                if entry.kept is not None:
                    entry.ack.position = positions[number]
                entry.ack.set()

    def _fail_batch(self, why: str) -> None:
        batch, self._batch = self._batch, []
        self._fail(batch, why)

    def _fail(self, entries: Iterable[Entry], why: str) -> None:
        lost = 0
        for entry in entries:
            if entry.ack is not None:
                entry.ack.fail(why)
                continue
            lost += not entry.is_probe
            if entry.on_lost is not None:
                entry.on_lost(why)
        if lost:
            with self._lock:
                self.lost += lost
            self._on_lost(why)
