"""Sender: messages on their way to the broker, in batches.

What comes while the broker has not confirmed a batch is the next one. `put` may be called from any
thread; everything else happens on the event loop of the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from .backends.base import Backend
from .event import OVERHEAD
from .exceptions import BackendUnavailable
from .waiter import Full, Waiter, running_loop

# Seconds that `publish` and `connect` wait for the broker.
TIMEOUT = 2.0

# Bytes that may wait to be handed over. Each message counts `event.OVERHEAD` more.
MAX_WAITING = 16 * 1024 * 1024

# Messages and bytes that are handed over together.
BATCH = 1000
BATCH_BYTES = 1024 * 1024

LOST = "the connection to the broker was lost"

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
        try:
            if deadline is None:
                deadline = asyncio.get_running_loop().time() + TIMEOUT
            async with asyncio.timeout_at(deadline):
                await self
        except TimeoutError:
            raise BackendUnavailable("the broker did not answer in time") from None
        finally:
            self.abandoned = True
        if self.failed is not None:
            raise BackendUnavailable(self.failed)


class Entry:
    """A message that waits, and who waits for it."""

    __slots__ = ("channel", "cost", "counts", "data", "on_lost", "taken")

    def __init__(
        self,
        channel: str,
        data: bytes,
        taken: Taken | None,
        on_lost: OnLost | None = None,
        counts: bool = True,
    ) -> None:
        self.channel = channel
        self.data = data
        self.taken = taken
        self.on_lost = on_lost
        self.counts = counts  # if it is lost
        self.cost = len(data) + OVERHEAD


class Sender:
    """See the module. Made on any thread, closed at first."""

    def __init__(self, backend: Backend, lock: AbstractContextManager[object]) -> None:
        self._backend = backend
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = lock
        # Guarded by the lock:
        self.lost = 0
        self._open = False
        self._closed = ""  # why nobody has to wait
        self._queue: deque[Entry] = deque()
        self._size = 0
        self._room: set[Waiter] = set()
        # On the loop:
        self._batch: list[Entry] = []  # what the broker has not confirmed
        self._sending: asyncio.Future[None] | None = None
        self._busy = False

    def __len__(self) -> int:
        return len(self._queue)

    # From any thread

    def put(
        self, channel: str, data: bytes, wait: bool, on_lost: OnLost | None = None
    ) -> Taken | None:
        """Hand a message over. What comes back, if `wait`, is set when the broker has it.

        Without a connection and without `wait` the message is lost, and counted. `on_lost` is then
        called with the reason, on any thread.

        Raises:
            Full: Too much is waiting.
        """
        entry = Entry(channel, data, Taken() if wait else None, on_lost)
        if not (wait or (self._open and self._loop and not self._loop.is_closed())):
            self._fail([entry], LOST)
            return None
        with self._lock:
            if self._closed and entry.taken is not None:
                entry.taken.fail(self._closed)
                return entry.taken
            if self._queue and self._size + entry.cost > MAX_WAITING:
                raise Full(f"{len(self._queue)} messages wait for the broker", self)
            wake = not self._queue
            self._queue.append(entry)
            self._size += entry.cost
        if wake:
            self._wake(wait)
        return entry.taken

    def tell_room(self, waiter: Waiter) -> None:
        """Set the waiter when some of what waits now is on its way."""
        with self._lock:
            if self._queue:
                self._room.add(waiter)
            else:
                waiter.set()

    def forget_room(self, waiter: Waiter) -> None:
        with self._lock:
            self._room.discard(waiter)

    def _wake(self, at_once: bool) -> None:
        loop = self._loop
        assert loop is not None  # who waits has opened the hub
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
        self._sending = None
        self._fail_batch(LOST)
        with self._lock:
            self._closed = ""

    @property
    def under_way(self) -> int:
        """Bytes that the broker has not confirmed."""
        return sum(len(entry.data) for entry in self._batch)

    def probe(self, channel: str) -> None:
        """Send an empty message before all others. It does not count if it is lost."""
        with self._lock:
            self._queue.appendleft(Entry(channel, b"", None, counts=False))
            self._size += OVERHEAD
        self._send()

    def pause(self) -> None:
        """Send no more until `open`. From any thread."""
        with self._lock:
            self._open = False

    async def drain(self) -> None:
        """Hand over what waits, for two seconds at most. It stays open."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUT):
                self._send()
                while self._sending is not None:
                    await asyncio.wait([self._sending])

    def give_up(self) -> None:
        """Lose what the broker had not confirmed, and what nobody waits for.

        Who waits for another message may still see the end of the outage.
        """
        sending, self._sending = self._sending, None
        if sending is not None and sending.get_loop() is running_loop():
            sending.cancel()
        self._fail_batch(LOST)
        with self._lock:
            lost = [entry for entry in self._queue if entry.taken is None]
            kept = [entry for entry in self._queue if entry.taken and not entry.taken.abandoned]
            self._replace(kept)
        self._fail(lost, LOST)

    def close(self, why: str) -> None:
        """Take no more until `live_here`, and tell whoever is not sent yet why. From any thread."""
        with self._lock:
            self._open = False
            self._closed = why
            queue = list(self._queue)
            self._replace([])
        self._fail(queue, why)

    def _replace(self, entries: list[Entry]) -> None:
        self._queue = deque(entries)
        self._size = sum(entry.cost for entry in entries)
        self._tell()

    def _tell(self) -> None:
        room, self._room = self._room, set()
        for waiter in room:
            waiter.set()

    def _send(self) -> None:
        """Hand over what waits, unless the broker still has to confirm some."""
        if self._busy or running_loop() is not self._loop:
            return
        while self._sending is None and (batch := self._take()):
            self._batch = batch
            self._busy = True
            try:
                # A future is waited for as it is; a coroutine needs a task, and so a turn.
                self._sending = asyncio.ensure_future(
                    self._backend.publish([(entry.channel, entry.data) for entry in batch])
                )
            except Exception as exc:
                self._fail_batch(str(exc) or type(exc).__name__)
            else:
                self._sending.add_done_callback(self._sent)
            finally:
                self._busy = False

    def _take(self) -> list[Entry]:
        batch: list[Entry] = []
        size = 0
        with self._lock:
            while self._open and self._queue and len(batch) < BATCH and size < BATCH_BYTES:
                entry = self._queue.popleft()
                self._size -= entry.cost
                if entry.taken is None or not entry.taken.abandoned:
                    batch.append(entry)
                    size += len(entry.data)
            if self._room:
                self._tell()
        return batch

    def _sent(self, sending: asyncio.Future[None]) -> None:
        why = LOST
        if not sending.cancelled():
            # If the connection is broken, the backend says so, or the probe finds out.
            error = sending.exception()
            why = "" if error is None else str(error) or type(error).__name__
        if sending is not self._sending:
            return  # closed meanwhile
        self._sending = None
        if why:
            self._fail_batch(why)
        else:
            batch, self._batch = self._batch, []
            for entry in batch:
                if entry.taken is not None:
                    entry.taken.set()
        self._send()

    def _fail_batch(self, why: str) -> None:
        batch, self._batch = self._batch, []
        self._fail(batch, why)

    def _fail(self, entries: Iterable[Entry], why: str) -> None:
        lost = 0
        for entry in entries:
            if entry.taken is not None:
                entry.taken.fail(why)
                continue
            lost += entry.counts
            if entry.on_lost is not None:
                entry.on_lost(why)
        with self._lock:
            self.lost += lost
