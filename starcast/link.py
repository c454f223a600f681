"""Link: a hub's connection to a broker, which it keeps, loses and finds again.

It lives on the event loop that started it. `publish`, `hold` and `release` may be called from any
thread: they note what is wanted under a lock and wake that loop.

What is published is up to a `Sender`. Two tasks look after the connection: `_watch` sends itself a
message now and then, by way of the broker, so that a broker that has stopped answering is noticed.
`_keep` connects again when the connection is lost, for ever, subscribes to what is held, and says
that there was a gap. Besides, each channel has a task while its subscription changes: the changes
of one channel happen in turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from . import envelope
from .backends.base import Backend
from .event import Event
from .exceptions import BackendUnavailable, PayloadTooLarge, PublishQueueFull
from .gap import Gap
from .sender import TIMEOUT, Sender, Taken
from .stats import BackendStats
from .waiter import running_loop

logger = logging.getLogger("starcast")

State = Literal["closed", "connected", "reconnecting"]

# Seconds between two probes, and until one must be back: together less than ten.
PROBE_EVERY = 3.0
PROBE_TIMEOUT = 5.0

# Seconds before the first attempt to connect again, at most; each further one may wait half as long
# again, up to the longest. Each wait is a random part of that, so that a hundred processes do not
# come at once, and the longest leaves half a second of the two that it may take.
FIRST_WAIT = 0.1
LONGEST_WAIT = 1.5

# Seconds that a connection must have held for the waits to begin anew.
HELD = 10.0

# Seconds that a backend has to connect with all its subscriptions, and to stop.
CONNECT_TIMEOUT = 10.0
STOP_TIMEOUT = 5.0

# Messages that wait until everything is subscribed to, and so stand behind the gap.
MAX_EARLY = 10_000

# Subscriptions that are asked for at the same time when the connection is back.
AT_ONCE = 1000


class _Hold:
    """A channel that somebody wants."""

    __slots__ = ("changing", "count", "subscribed", "waiting")

    def __init__(self) -> None:
        self.count = 0
        self.subscribed = False
        self.changing = False
        self.waiting: list[Taken] = []


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


class Link:
    """See the module. Made on any thread.

    Args:
        backend: What talks to the broker.
        deliver: Called with each event that arrives, on the link's loop. Raises `PublishQueueFull`.
        on_gap: Called after each gap, on the link's loop.
        on_orphan: Called when that loop comes to its end, or somebody has cancelled all its tasks.
    """

    def __init__(
        self,
        backend: Backend,
        deliver: Callable[[Event], None],
        on_gap: Callable[[Gap], None],
        on_orphan: Callable[[], None],
    ) -> None:
        self.hub = b""  # names this process's hub to itself, anew with each start
        self._backend = backend
        self._deliver = deliver
        self._on_gap = on_gap
        self._on_orphan = on_orphan
        self._sender = Sender(backend)
        self._probe = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.RLock()  # the garbage collector may run a handler's end under it
        # Guarded by the lock:
        self._state: State = "closed"
        self._since = time.time()
        self._error: str | None = None
        self._gaps = 0
        self._blocked = 0  # messages that a blocked event loop had no room for
        self._malformed = 0
        self._holds: dict[str, _Hold] = {}
        # On the loop:
        self._tasks: set[asyncio.Task[None]] = set()
        self._generation = 0  # of the connection: what an earlier one brings does not count
        self._heard = 0.0  # when the broker was known to be there
        self._watching: asyncio.Task[None] | None = None
        self._broken = self._back = asyncio.Event()  # each its own in `start`
        self._stopping: asyncio.Task[None] | None = None
        self._orphaned = False  # somebody has cancelled all tasks of the loop
        self._early: list[tuple[str, bytes]] | None = None  # what came before it is all back

    # From any thread

    @property
    def alive(self) -> bool:
        """Whether the event loop that it lives on is still there, and its tasks are."""
        return self._loop is not None and not self._loop.is_closed() and not self._orphaned

    def stats(self) -> BackendStats:
        with self._lock:
            return BackendStats(
                state=self._state if self.alive else "closed",
                since=self._since,
                error=self._error,
                gaps=self._gaps,
                lost=self._sender.lost + self._blocked,
                malformed=self._malformed,
                channels=len(self._holds),
                waiting=len(self._sender),
            )

    def publish(self, event: Event, wait: bool) -> Taken | None:
        """Hand an event over. What comes back, if `wait`, is set when the broker has it.

        Without a connection and without `wait` the event is lost, and counted.

        Raises:
            PayloadTooLarge: The broker takes less.
            PublishQueueFull: Too much is waiting.
        """
        data = envelope.pack(event, self.hub)
        if len(data) > self._backend.max_payload:
            raise PayloadTooLarge(
                f"the message takes {len(data)} bytes, and the broker at most "
                f"{self._backend.max_payload}"
            )
        return self._sender.put(event.channel, data, wait)

    async def hold(self, channel: str) -> None:
        """Want a channel, and come back when the broker has confirmed it.

        Raises:
            BackendUnavailable: It has not within two seconds. The channel is not held then.
        """
        with self._lock:
            hold = self._holds.setdefault(channel, _Hold())
            hold.count += 1
            if hold.subscribed:
                return
            taken = Taken()
            hold.waiting.append(taken)
        try:
            self._call(self._change, channel)
            await taken.wait()
        except BaseException:
            with self._lock, contextlib.suppress(ValueError):
                hold.waiting.remove(taken)
            self.release(channel)
            raise

    def release(self, channel: str) -> None:
        """Want it no more; once for each `hold`."""
        with self._lock:
            hold = self._holds[channel]
            hold.count -= 1
            if hold.count:
                return
        self._call(self._change, channel)

    async def healthy(self) -> bool:
        """Whether a message comes back by way of the broker within two seconds. From any loop."""
        loop = self._loop
        if self._state != "connected" or loop is None or not self.alive:
            return False
        asking = asyncio.run_coroutine_threadsafe(self._answer(), loop)
        try:
            async with asyncio.timeout(TIMEOUT):
                await asyncio.wrap_future(asking)
        except TimeoutError:
            return False
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not asking.cancelled() or task is None or task.cancelling():
                raise
            return False  # its loop has ended
        return True

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        loop = self._loop
        if loop is None or running_loop() is loop:
            function(*arguments)
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: see `alive`
            loop.call_soon_threadsafe(function, *arguments)

    def _become(self, state: State, error: Exception | None = None) -> None:
        with self._lock:
            if state != self._state:
                self._state, self._since = state, time.time()
            if error is not None:
                self._error = _words(error)

    # Open and close

    async def start(self) -> None:
        """Connect, and live on this event loop from now on.

        If the loop that it lived on has ended, this is like a lost connection: it comes back at
        once and connects when it can.

        Raises:
            BackendUnavailable: There is no connection.
        """
        if self._stopping is not None:
            await asyncio.wait([self._stopping])
        moved = self._state != "closed"
        self.hub = os.urandom(8)
        self._probe = f"starcast-probe-{self.hub.hex()}"
        if moved and self._loop is asyncio.get_running_loop():
            tasks, self._tasks = self._tasks, set()
            for task in tasks:
                task.cancel()
        self._loop = asyncio.get_running_loop()
        self._orphaned = False
        self._broken, self._back = asyncio.Event(), asyncio.Event()
        self._tasks = set()
        self._watching = None
        self._sender.live_here()
        if moved:
            self._break(RuntimeError("the event loop of the connection ended"), self._generation)
        else:
            await self._connect()
            self._connected()
            self._catch_up()
        self._run(self._keep())

    async def stop(self) -> None:
        """Disconnect. From any loop."""
        loop = self._loop
        if loop is None:
            return
        if loop.is_closed() or loop is running_loop():
            self._stopping = asyncio.create_task(self._stop())
            await asyncio.shield(self._stopping)  # half of it would be no end
            return
        stopping = asyncio.run_coroutine_threadsafe(self._stop(), loop)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * STOP_TIMEOUT):
                await asyncio.wrap_future(stopping)

    async def _stop(self) -> None:
        self._become("closed")
        tasks, self._tasks = self._tasks, set()
        if self._loop is running_loop():
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._disconnect()
        await self._sender.close("the hub was closed")
        with self._lock:
            waiting = [taken for hold in self._holds.values() for taken in hold.waiting]
        for taken in waiting:
            taken.fail("the hub was closed")
        self._stopping = None

    async def _connect(self) -> None:
        self._generation = generation = self._generation + 1
        self._broken.clear()

        def deliver(channel: str, data: bytes) -> None:
            if generation == self._generation:
                if self._early is None or len(self._early) >= MAX_EARLY:
                    self._arrived(channel, data)
                else:
                    self._early.append((channel, data))

        def lost(error: Exception) -> None:
            self._break(error, generation)

        self._early = []
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await self._backend.start(deliver, lost)
                await self._backend.subscribe(self._probe)
            tried: set[str] = set()
            while missing := self._missing(tried):
                tried.update(missing)
                for start in range(0, len(missing), AT_ONCE):
                    some = missing[start : start + AT_ONCE]
                    async with asyncio.timeout(CONNECT_TIMEOUT):
                        await asyncio.gather(*map(self._subscribe, some))
        except TimeoutError:
            await self._disconnect()
            raise BackendUnavailable("the broker did not answer in time") from None
        except BaseException:
            await self._disconnect()
            raise

    def _missing(self, tried: set[str]) -> list[str]:
        """Return the channels to subscribe to. Nobody else changes those until it is connected."""
        with self._lock:
            missing = [
                channel
                for channel, hold in self._holds.items()
                if hold.count and not hold.subscribed and channel not in tried
            ]
            for channel in missing:
                self._holds[channel].changing = True
        return [] if self._broken.is_set() else missing

    def _connected(self) -> None:
        self._heard = time.time()
        self._become("connected")
        with self._lock:
            channels = list(self._holds)
            for hold in self._holds.values():
                hold.changing = False
        for channel in channels:
            self._change(channel)  # what was released meanwhile
        self._sender.open()
        if self._watching is not None:
            self._tasks.discard(self._watching)
            self._watching.cancel()
        self._watching = self._run(self._watch(self._generation))

    async def _disconnect(self) -> None:
        self._generation += 1
        with self._lock:
            self._holds = {name: hold for name, hold in self._holds.items() if hold.count}
            for hold in self._holds.values():
                hold.subscribed = hold.changing = False
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await self._backend.stop()
        except Exception as exc:
            logger.warning("the connection to the broker did not end in order: %s", _words(exc))

    # Stay connected

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._loop is not None
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task not in self._tasks:
            return
        self._tasks.remove(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:  # a mistake of ours, which must not be the end of the connection
            logger.error("the connection to the broker has to begin anew", exc_info=error)
        if (task.cancelled() or error) and self._state != "closed" and not self._orphaned:
            self._orphaned = True
            self._sender.pause()
            self._on_orphan()

    def _break(self, error: Exception, generation: int) -> None:
        if generation == self._generation:
            if self._state == "connected":
                logger.warning("lost the connection to the broker: %s", _words(error))
                self._become("reconnecting", error)
                self._sender.pause()
            self._broken.set()

    async def _keep(self) -> None:
        longest = FIRST_WAIT
        while True:
            since = time.monotonic()
            await self._broken.wait()
            if time.monotonic() - since > HELD:
                longest = FIRST_WAIT
            self._become("reconnecting")
            error = self._error or ""
            while self._broken.is_set():
                await self._disconnect()
                self._sender.give_up()
                await asyncio.sleep(random.uniform(0, longest))
                longest = min(1.5 * longest, LONGEST_WAIT)
                try:
                    await self._connect()
                except Exception as exc:
                    self._become("reconnecting", exc)
                    self._broken.set()
            self._tell_gap(error)

    def _tell_gap(self, error: str) -> None:
        since = self._heard
        self._connected()
        gap = Gap(since, self._heard - since, error)
        with self._lock:
            self._gaps += 1
        logger.warning("connected to the broker again after %.1f seconds", gap.seconds)
        self._on_gap(gap)
        self._catch_up()

    def _catch_up(self) -> None:
        early, self._early = self._early or [], None
        for channel, data in early:
            self._arrived(channel, data)

    async def _watch(self, generation: int) -> None:
        while True:
            await asyncio.sleep(PROBE_EVERY)
            self._ask()
            for _ in range(2):  # if this loop was blocked, the answer is here in a moment
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PROBE_TIMEOUT / 2):
                        await self._back.wait()
            if not self._back.is_set():
                error = TimeoutError(f"the broker did not answer for {PROBE_TIMEOUT:g} seconds")
                self._break(error, generation)
                return

    def _ask(self) -> None:
        """Send a message to ourselves; `_back` is set when it has come."""
        self._back.clear()
        self._sender.probe(self._probe)

    async def _answer(self) -> None:
        self._ask()
        await self._back.wait()

    # Receive

    def _arrived(self, channel: str, data: bytes) -> None:
        if channel == self._probe:
            self._heard = time.time()
            self._back.set()
            return
        try:
            self._deliver(envelope.unpack(channel, data, self.hub))
        except envelope.Malformed:
            with self._lock:
                self._malformed += 1
        except PublishQueueFull:  # an event loop of this process is blocked
            with self._lock:
                self._blocked += 1

    # Subscriptions

    def _change(self, channel: str) -> None:
        """Begin to do what is wanted, unless that is being done."""
        with self._lock:
            hold = self._holds.get(channel)
            if hold is None or hold.changing:
                return
            if not (hold.count or hold.subscribed):
                del self._holds[channel]
                return
            if self._state != "connected" or bool(hold.count) == hold.subscribed:
                return
            hold.changing = True
        self._run(self._settle(channel, hold, self._generation))

    async def _settle(self, channel: str, hold: _Hold, generation: int) -> None:
        refused = False
        while generation == self._generation and bool(hold.count) != hold.subscribed:
            if hold.count and refused:
                break  # until somebody wants it again
            if hold.count:
                refused = not await self._subscribe(channel)
            else:
                with self._lock:
                    hold.subscribed = False  # who wants it now has to wait
                with contextlib.suppress(Exception):  # the connection is broken: see `Sender`
                    await self._backend.unsubscribe(channel)
        if generation == self._generation:
            hold.changing = False
            if not hold.count:
                self._change(channel)

    async def _subscribe(self, channel: str) -> bool:
        """Subscribe, and tell whoever waits for it; False if the broker refused it."""
        generation = self._generation
        why = ""
        try:
            await self._backend.subscribe(channel)
        except Exception as exc:
            why = _words(exc)
        with self._lock:
            hold = self._holds.get(channel)
            if hold is None or generation != self._generation:
                return False
            hold.subscribed = not why
            waiting, hold.waiting = hold.waiting, []
        if why:
            logger.warning("the broker does not give the channel %r: %s", channel, why)
        for taken in waiting:
            if why:
                taken.fail(why)
            else:
                taken.set()
        return not why
