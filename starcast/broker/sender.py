"""Sender: messages on their way to the broker, in batches.

What comes while the broker has not confirmed a batch is the next one. `put` may be called from any
thread; everything else happens on the event loop of the connection.

While the broker is away everything waits in the queue, in its order, for two seconds: a message
that somebody awaits until they give up, any other until it expires and is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from .. import logs
from ..backends.base import Backend, MessagesRefused
from ..event import OVERHEAD
from ..exceptions import BackendUnavailable
from ..sync.bounded import BoundedQueue, Full
from ..sync.deadline import Deadline, Overdue
from ..sync.waiter import Waiter, running_loop

# Seconds that `publish` and `connect` wait for the broker, and a message that nobody awaits.
TIMEOUT = 2.0

# Seconds between two looks at what has expired: each goes through the whole queue.
EXPIRE_EVERY = 0.1

# Bytes that may wait to be handed over. Each message counts `event.OVERHEAD` more.
MAX_WAITING = 16 * 1024 * 1024

# Messages and bytes that are handed over together.
BATCH = 1000
BATCH_BYTES = 1024 * 1024

LOST = "the connection to the broker was lost"
LATE = "the broker did not answer in time"
EXPIRED = "the broker was away for too long"

OnLost = Callable[[str], object]


class Taken(Waiter):
    """Set when the broker has a message or a subscription, or when it is known that it has not."""

    __slots__ = ("abandoned", "failed")

    def __init__(self) -> None:
        super().__init__()
        self.failed: str | None = None  # why
        self.abandoned = False  # nobody waits any more

    def fail(self, why: str) -> None:
        self.failed = why
        self.set()

    async def wait(self, deadline: float | None = None) -> None:
        """Wait until it is set, two seconds at most, or until a time of this loop.

        Raises:
            BackendUnavailable: The broker refused it, was lost, or did not answer in time.
        """
        left = TIMEOUT
        if deadline is not None:
            left = deadline - asyncio.get_running_loop().time()
        overdue = Overdue(left, self._give_up)
        try:
            await self
        finally:
            overdue.cancel()
            self.abandoned = True
        if self.failed is not None:
            raise BackendUnavailable(self.failed)

    def _give_up(self) -> None:
        if not self._future.done():
            self.fail(LATE)


class Entry:
    """A message that waits, and who waits for it or wants to know that it is lost."""

    __slots__ = ("channel", "cost", "data", "expires", "is_probe", "on_lost", "taken")

    def __init__(
        self,
        channel: str,
        data: bytes,
        taken: Taken | None = None,
        on_lost: OnLost | None = None,
        is_probe: bool = False,
    ) -> None:
        self.channel = channel
        self.data = data
        self.taken = taken
        self.on_lost = on_lost
        self.is_probe = is_probe
        self.expires = time.monotonic() + TIMEOUT  # unless somebody awaits it
        self.cost = len(data) + OVERHEAD

    def is_due(self, now: float) -> bool:
        """Whether it has waited long enough: nobody awaits it, or nobody does any more."""
        if self.taken is not None:
            return self.taken.abandoned
        return self.is_probe or self.expires <= now


class Sender:
    """See the module. Made on any thread, closed at first.

    Args:
        backend: What talks to the broker.
        lock: The hub's.
        on_refused: Called with the reason when messages that nobody awaits were lost.
    """

    def __init__(
        self,
        backend: Backend,
        lock: AbstractContextManager[object],
        on_refused: OnLost = lambda why: None,
    ) -> None:
        self._backend = backend
        self._on_refused = on_refused
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = lock
        # Guarded by the lock:
        self.lost = 0
        self.published = 0  # messages that were ever put here,
        self.published_cost = 0  # and what they cost
        self._open = False
        self._closed = ""  # why nobody has to wait
        self.queue = BoundedQueue[Entry](lock, MAX_WAITING)
        # On the loop:
        self._batch: list[Entry] = []  # what the broker has not confirmed
        self._sending: asyncio.Future[None] | None = None
        self._busy = False
        self._expiry: Overdue | None = None

    # From any thread

    def put(
        self, channel: str, data: bytes, wait: bool, on_lost: OnLost | None = None
    ) -> Taken | None:
        """Hand a message over. What comes back, if `wait`, is set when the broker has it.

        Without `wait`, `on_lost` is called with the reason, once at most, if the broker does not
        get the message: on the event loop of the connection, or on the thread that closes it. It
        must neither block nor raise.

        Raises:
            Full: Too much is waiting.
        """
        entry = Entry(channel, data, Taken() if wait else None, on_lost)
        wake = False
        with self._lock:
            closed = self._closed
            if not wait and (self._loop is None or self._loop.is_closed()):
                closed = closed or LOST
            if not closed:
                if not self.queue.has_space(entry.cost):
                    raise Full(f"{len(self.queue)} messages wait for the broker", self.queue)
                wake = not self.queue or not (wait or self._open or self._expiry)
                self.queue.append(entry, entry.cost)
                self.published += 1
                self.published_cost += entry.cost
        if closed:
            self._fail([entry], closed)
        elif wake:
            self._wake(wait)
        return entry.taken

    def _wake(self, at_once: bool) -> None:
        loop = self._loop
        assert loop is not None  # only an open hub waits for a message
        if running_loop() is not loop:
            with contextlib.suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(self._send)
        elif at_once:
            self._send()
        else:
            loop.call_soon(self._send)  # with what else comes in this turn

    # On the loop

    def open(self) -> None:
        """Begin to send: the broker is there."""
        with self._lock:
            self._open = True
        self._send()

    def live_here(self) -> None:
        """Live on this event loop from now on. What another one had under way is lost."""
        self._loop = asyncio.get_running_loop()
        self._sending = self._expiry = None
        self._fail_batch(LOST)
        with self._lock:
            self._closed = ""
        self._expire()

    @property
    def under_way(self) -> int:
        """Bytes that the broker has not confirmed."""
        return sum(len(entry.data) for entry in self._batch)

    def probe(self, channel: str, on_lost: OnLost) -> None:
        """Send an empty message before all others, and alone. It does not count if it is lost."""
        with self._lock:
            self.queue.prepend(Entry(channel, b"", on_lost=on_lost, is_probe=True), OVERHEAD)
        self._send()

    def pause(self) -> None:
        """Send no more until `open`. From any thread."""
        with self._lock:
            self._open = False
        if running_loop() is self._loop:
            self._expect()

    async def drain(self) -> None:
        """Hand over what waits, for two seconds at most. It stays open."""
        with contextlib.suppress(TimeoutError):
            async with Deadline(TIMEOUT):
                self._send()
                while self._sending is not None:
                    await asyncio.wait([self._sending])

    def give_up(self) -> None:
        """Lose what the broker had not confirmed. What waits may still see the outage's end."""
        sending, self._sending = self._sending, None
        if sending is not None and sending.get_loop() is running_loop():
            sending.cancel()
        self._fail_batch(LOST)
        self._expire()

    def _expect(self) -> None:
        """Have what nobody awaits lost in time, as long as the broker is away."""
        if self._open or self._expiry is not None:
            return
        with self._lock:
            awaited_by_nobody = (entry for entry in self.queue.entries if entry.taken is None)
            expires = next((entry.expires for entry in awaited_by_nobody), None)
        if expires is not None:
            left = max(expires - time.monotonic(), EXPIRE_EVERY)
            self._expiry = Overdue(left, self._expire)

    def _expire(self) -> None:
        """Lose what has waited for too long."""
        here = running_loop() is self._loop
        if here:
            self._expiry = None
        now = time.monotonic()
        with self._lock:
            entries = self.queue.entries
            lost = [entry for entry in entries if entry.is_due(now)] if not self._open else []
            if lost:
                size = self.queue.size - sum(entry.cost for entry in lost)
                self.queue.keep((entry for entry in entries if not entry.is_due(now)), size)
        self._fail(lost, EXPIRED)
        if here:
            self._expect()

    def close(self, why: str) -> None:
        """Take no more until `live_here`, and tell whoever is not sent yet why. From any thread."""
        with self._lock:
            self._open = False
            self._closed = why
            entries = self.queue.take_all()
        self._fail(entries, why)

    def _send(self) -> None:
        """Hand over what waits, unless the broker still has to confirm some."""
        if self._busy or running_loop() is not self._loop:
            return
        self._expect()
        while self._sending is None and (batch := self._take()):
            self._batch = batch
            self._busy = True
            try:
                # A future is waited for as it is; a coroutine needs a task, and so a turn.
                self._sending = asyncio.ensure_future(
                    self._backend.publish([(entry.channel, entry.data) for entry in batch])
                )
            except Exception as exc:
                self._fail_batch(logs.describe(exc))
            else:
                self._sending.add_done_callback(self._sent)
            finally:
                self._busy = False

    def _take(self) -> list[Entry]:
        batch: list[Entry] = []
        too_large: list[Entry] = []  # for the broker that is there now
        size = 0
        with self._lock:
            while self._open and self.queue.entries and len(batch) < BATCH and size < BATCH_BYTES:
                entry = self.queue.entries[0]
                self.queue.drop_first(entry.cost)
                if len(entry.data) > self._backend.max_payload:
                    too_large.append(entry)
                elif entry.taken is None or not entry.taken.abandoned:
                    batch.append(entry)
                    size += len(entry.data)
                if entry.is_probe:
                    break  # what the broker says is then about the probe, and nothing else
            self.queue.tell()
        self._fail(too_large, f"the broker now takes {self._backend.max_payload} bytes at most")
        return batch

    def _sent(self, sending: asyncio.Future[None]) -> None:
        # If the connection is broken, the backend says so, or the probe finds out.
        error = None if sending.cancelled() else sending.exception()
        if sending is not self._sending:
            return  # closed meanwhile
        self._sending = None
        if sending.cancelled():
            self._fail_batch(LOST)
        elif error is None or isinstance(error, MessagesRefused):
            self._confirm_batch({} if error is None else error.reasons)
        else:
            self._fail_batch(logs.describe(error))
        self._send()

    def _confirm_batch(self, refused: dict[int, str]) -> None:
        """The broker has the batch, without those that it has refused."""
        batch, self._batch = self._batch, []
        for number, entry in enumerate(batch):
            if number in refused:
                self._fail([entry], refused[number])
            elif entry.taken is not None:
                entry.taken.set()

    def _fail_batch(self, why: str) -> None:
        batch, self._batch = self._batch, []
        self._fail(batch, why)

    def _fail(self, entries: Iterable[Entry], why: str) -> None:
        lost = 0
        for entry in entries:
            if entry.taken is not None:
                entry.taken.fail(why)
                continue
            lost += not entry.is_probe
            if entry.on_lost is not None:
                entry.on_lost(why)
        if lost:
            with self._lock:
                self.lost += lost
            self._on_refused(why)
