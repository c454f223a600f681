"""Link: a hub's connection to a broker, which it keeps, loses and finds again.

It lives on the event loop that started it. `publish`, `hold` and `release` may be called from any
thread: they note what is wanted under a lock and wake that loop.

What is published is up to a `Sender`. Two tasks look after the connection: `_watch` sends itself a
message now and then, by way of the broker, so that a broker that has stopped answering is noticed.
`_live` connects again when the connection is lost, for ever, subscribes to what is held, and says
that there was a gap. Besides, each channel has a task while its subscription changes: the changes
of one channel happen in turn.

Its time on one loop is a `_Life`. When the loop comes to its end, which cancels the tasks, `_live`
disconnects there, and the link may be started on another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

from . import envelope
from .backends.base import Backend
from .event import Event
from .exceptions import BackendUnavailable, PayloadTooLarge, PublishQueueFull
from .gap import Gap
from .sender import TIMEOUT, OnLost, Sender, Taken
from .stats import BackendStats
from .waiter import Waiter, running_loop

logger = logging.getLogger("starcast")

State = Literal["closed", "connected", "reconnecting"]

# Seconds between two probes, and until one must be back: together less than ten.
PROBE_EVERY = 3.0
PROBE_TIMEOUT = 5.0

# Bytes a second that a line carries, if it is to be taken for one that works: so much later the
# probe may be back that waits behind a large message.
SLOWEST = 1024 * 1024

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

# Seconds after which who waits for a stop sees whether its loop is still there.
STOP_LOOK = 0.2

# Seconds for which it is not started again on a loop that has cancelled its tasks: most likely that
# loop comes to its end, and would not wait for new ones.
REST = 1.0

CLOSED = "the hub was closed"

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


class _Life:
    """What belongs to one event loop, from a start until the loop ends or the link is stopped."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.broken = asyncio.Event()  # the connection is
        self.back = asyncio.Event()  # the probe is
        self.connected = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()
        self.watching: asyncio.Task[None] | None = None
        self.living: asyncio.Task[None] | None = None
        self.leaving = False
        self.ended = 0.0  # when its last task had, in time.monotonic()


class _Stopping:
    """A stop that is under way, and who waits for it."""

    def __init__(self, life: _Life) -> None:
        self.life = life
        self.loop = life.loop  # where it happens
        self.task: asyncio.Task[None] | None = None
        self.done = False
        self.waiters: set[Waiter] = set()

    def end(self, task: asyncio.Task[None]) -> None:
        """Call this when its task has ended; if that was cancelled, `_live` does what is left."""
        self.done = True
        for waiter in list(self.waiters):
            waiter.set()


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


class Link:
    """See the module. Made on any thread.

    Args:
        backend: What talks to the broker.
        lock: The hub's, for who holds the one may want the other.
        deliver: Called with each event that arrives, on the link's loop. Raises `PublishQueueFull`.
        on_gap: Called after each gap, on the link's loop.
    """

    def __init__(
        self,
        backend: Backend,
        lock: AbstractContextManager[object],
        deliver: Callable[[Event], None],
        on_gap: Callable[[Gap], None],
    ) -> None:
        self.hub = b""  # names this process's hub to itself, anew with each opening
        self._backend = backend
        self._deliver = deliver
        self._on_gap = on_gap
        self._sender = Sender(backend, lock)
        self._probe = ""
        self._lock = lock
        # Guarded by the lock:
        self._state: State = "closed"
        self._since = time.time()
        self._error: str | None = None
        self._gaps = 0
        self._blocked = 0  # messages that a blocked event loop had no room for
        self._malformed = 0
        self._holds: dict[str, _Hold] = {}
        self._life: _Life | None = None
        self._stopping: _Stopping | None = None
        # On the loop:
        self._generation = 0  # of the connection: what an earlier one brings does not count
        self._started = False  # the backend has to be stopped
        self._heard = 0.0  # when the broker was known to be there
        self._early: list[tuple[str, bytes]] | None = None  # what came before it is all back

    # From any thread

    @property
    def alive(self) -> bool:
        """Whether the event loop that it lives on is still there, and its tasks are."""
        life = self._life
        return life is not None and not (life.ended or life.loop.is_closed())

    @property
    def resting(self) -> bool:
        """Whether its tasks were cancelled a moment ago, on this loop."""
        life = self._life
        if life is None or life.loop is not running_loop():
            return False
        return bool(life.ended) and time.monotonic() < life.ended + REST

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

    def publish(self, event: Event, wait: bool, on_lost: OnLost | None = None) -> Taken | None:
        """Hand an event over. What comes back, if `wait`, is set when the broker has it.

        Without a connection and without `wait` the event is lost, and counted. `on_lost` is then
        called with the reason, on any thread.

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
        return self._sender.put(event.channel, data, wait, on_lost)

    async def hold(self, channel: str) -> None:
        """Want a channel, and come back when the broker has confirmed it.

        Raises:
            BackendUnavailable: It has not within two seconds. The channel is not held then.
        """
        with self._lock:
            hold = self._holds.setdefault(channel, _Hold())
            hold.count += 1
            if hold.subscribed and self._state == "connected":
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

    def want(self, channel: str) -> None:
        """The same without waiting, for who has it already."""
        with self._lock:
            self._holds.setdefault(channel, _Hold()).count += 1
        self._call(self._change, channel)

    def release(self, channel: str) -> None:
        """Want it no more; once for each `hold` or `want`."""
        with self._lock:
            hold = self._holds[channel]
            hold.count -= 1
            if hold.count:
                return
        self._call(self._change, channel)

    async def healthy(self) -> bool:
        """Whether a message comes back by way of the broker within two seconds. From any loop."""
        life = self._life
        if life is None or not self.alive or self._state != "connected":
            return False
        answered = Waiter()
        self._call(self._answer, life, answered)
        try:
            async with asyncio.timeout(TIMEOUT):
                await answered
        except TimeoutError:
            return False
        return True

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call it on the link's loop, in its next turn; here, if there is none."""
        life = self._life
        if life is None:
            function(*arguments)
        elif running_loop() is life.loop:
            life.loop.call_soon(function, *arguments)  # not under a lock of the caller's
        else:
            try:
                life.loop.call_soon_threadsafe(function, *arguments)
            except RuntimeError:  # it is closed
                function(*arguments)

    def _become(self, state: State, error: Exception | None = None) -> None:
        with self._lock:
            if state != self._state:
                self._state, self._since = state, time.time()
            if error is not None:
                self._error = _words(error)

    # Open and close

    async def start(self) -> None:
        """Connect, and live on this event loop from now on.

        If the loop that it lived on has ended, and somebody wants a channel, this is like a lost
        connection: it comes back at once and connects when it can.

        Raises:
            BackendUnavailable: There is no connection.
        """
        if self._stopping is not None:
            await self._stopped(self._stopping)
            self._sender.close(CLOSED)  # if that was too long
            self._stopping = None
        life = self._life
        if self.resting:
            raise BackendUnavailable("the event loop of the connection comes to its end")
        with self._lock:
            moved = life is not None and any(hold.count for hold in self._holds.values())
        if not moved:
            self.hub = os.urandom(8)
            self._probe = f"starcast-probe-{self.hub.hex()}"
        life = self._life = _Life()
        self._sender.live_here()
        if moved:
            self._break(RuntimeError("the event loop of the connection ended"), self._generation)
        else:
            try:
                await self._disconnect()  # if what stopped it last was cut off
                await self._connect(life)
            except BaseException:
                self._life = None
                raise
            self._connected(life)
            self._catch_up(life)
        life.living = self._run(life, self._live(life))

    async def ready(self) -> None:
        """Wait, for two seconds at most, until a connection that has moved here is there."""
        life = self._life
        if life is not None and life.loop is running_loop():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TIMEOUT):
                    await life.connected.wait()

    async def stop(self) -> None:
        """Disconnect, after what waits for the broker, if it takes it within two seconds.

        From any loop; on a loop that is blocked it happens as soon as it can.
        """
        with self._lock:
            life, self._life = self._life, None
            if life is not None:
                self._stopping = _Stopping(life)
                self._become("closed")
            stopping = self._stopping
            waiting = [taken for hold in self._holds.values() for taken in hold.waiting]
        if stopping is None:
            return
        for taken in waiting:
            taken.fail(CLOSED)
        if life is not None:
            self._begin_stop_there(stopping)
        await self._stopped(stopping)

    def _begin_stop_there(self, stopping: _Stopping) -> None:
        here = asyncio.get_running_loop()
        if stopping.loop is not here and not stopping.loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it was closed in this moment
                stopping.loop.call_soon_threadsafe(self._begin_stop, stopping)
                return
        stopping.loop = here
        self._begin_stop(stopping)

    async def _stopped(self, stopping: _Stopping) -> None:
        """Wait for it, and no longer than it takes if nothing is blocked."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + 2 * STOP_TIMEOUT
        while not stopping.done and clock() < deadline:
            waiter = Waiter()
            stopping.waiters.add(waiter)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_LOOK):
                    await waiter
            stopping.waiters.discard(waiter)
            if stopping.loop.is_closed():
                self._begin_stop_there(stopping)

    def _begin_stop(self, stopping: _Stopping) -> None:
        if stopping is self._stopping:
            stopping.task = asyncio.get_running_loop().create_task(self._stop(stopping))
            stopping.task.add_done_callback(stopping.end)
            return
        stopping.life.leaving = True  # it has been started anew since, elsewhere
        for task in stopping.life.tasks:
            task.cancel()

    async def _stop(self, stopping: _Stopping) -> None:
        try:
            if stopping.life.loop is running_loop():
                await self._sender.drain()
        finally:
            self._sender.close(CLOSED)
            await self._leave(stopping.life)

    async def _leave(self, life: _Life) -> None:
        """End everything that belongs to a loop, on it; if it is closed, what is left of it."""
        life.leaving = True
        if self._life in (life, None):  # else there is a new one already, elsewhere
            self._sender.pause()
        try:
            if life.loop is running_loop():
                tasks = life.tasks - {asyncio.current_task()}
                for task in tasks:
                    task.cancel()
                if tasks:
                    await asyncio.wait(tasks, timeout=STOP_TIMEOUT)
        finally:
            if self._life in (life, None):
                await self._disconnect()
                self._sender.give_up()

    async def _connect(self, life: _Life) -> None:
        self._generation = generation = self._generation + 1
        life.broken.clear()
        self._started = True

        def deliver(channel: str, data: bytes) -> None:
            if generation == self._generation:
                if self._early is None or len(self._early) >= MAX_EARLY:
                    self._arrived(life, channel, data)
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
            while not life.broken.is_set() and (missing := self._missing(tried)):
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
        return missing

    def _connected(self, life: _Life) -> None:
        self._heard = time.time()
        self._become("connected")
        with self._lock:
            channels = list(self._holds)
            for hold in self._holds.values():
                hold.changing = False
        for channel in channels:
            self._change(channel)  # what was released meanwhile
        self._sender.open()
        if life.watching is not None:
            life.tasks.discard(life.watching)
            life.watching.cancel()
        life.watching = self._run(life, self._watch(life, self._generation))
        life.connected.set()

    async def _disconnect(self) -> None:
        self._generation += 1
        with self._lock:
            self._holds = {name: hold for name, hold in self._holds.items() if hold.count}
            for hold in self._holds.values():
                hold.subscribed = hold.changing = False
        if not self._started:
            return
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await self._backend.stop()
            self._started = False
        except Exception as exc:
            logger.warning("the connection to the broker did not end in order: %s", _words(exc))

    # Stay connected

    def _run(self, life: _Life, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = life.loop.create_task(work)
        life.tasks.add(task)
        task.add_done_callback(partial(self._ended, life))
        return task

    def _ended(self, life: _Life, task: asyncio.Task[None]) -> None:
        """A task of ours has ended. If it was cancelled, or we made a mistake, all of them end."""
        if task is life.living:
            life.ended = time.monotonic()
        if task not in life.tasks:
            return
        life.tasks.remove(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error("the connection to the broker has to begin anew", exc_info=error)
        if (error is not None or task.cancelled()) and not life.leaving:
            for other in life.tasks:
                other.cancel()

    def _break(self, error: Exception, generation: int) -> None:
        life = self._life
        if generation == self._generation and life is not None:
            if self._state == "connected":
                logger.warning("lost the connection to the broker: %s", _words(error))
                self._become("reconnecting", error)
                self._sender.pause()
            life.broken.set()

    async def _live(self, life: _Life) -> None:
        try:
            await self._keep(life)
        finally:
            if not life.leaving:  # nobody has stopped it: the loop comes to its end
                await self._leave(life)

    async def _keep(self, life: _Life) -> None:
        longest = FIRST_WAIT
        while not life.leaving:
            since = time.monotonic()
            await life.broken.wait()
            if time.monotonic() - since > HELD:
                longest = FIRST_WAIT
            self._become("reconnecting")
            self._sender.pause()
            error = self._error or ""
            while life.broken.is_set() and not life.leaving:
                await self._disconnect()
                self._sender.give_up()
                await asyncio.sleep(random.uniform(0, longest))
                longest = min(1.5 * longest, LONGEST_WAIT)
                try:
                    await self._connect(life)
                except Exception as exc:
                    self._become("reconnecting", exc)
                    life.broken.set()
            if not life.leaving:
                self._tell_gap(life, error)

    def _tell_gap(self, life: _Life, error: str) -> None:
        since = self._heard
        self._connected(life)
        gap = Gap(since, self._heard - since, error)
        with self._lock:
            self._gaps += 1
        logger.warning(
            "connected to the broker again; messages of the last %.1f seconds may be missing",
            gap.seconds,
        )
        self._on_gap(gap)
        self._catch_up(life)

    def _catch_up(self, life: _Life) -> None:
        """Let in what came, and who came, before it was all back: the gap is not theirs."""
        early, self._early = self._early or [], None
        for channel, data in early:
            self._arrived(life, channel, data)
        with self._lock:
            waiting = []
            for hold in self._holds.values():
                if hold.subscribed:
                    waiting += hold.waiting
                    hold.waiting = []
        for taken in waiting:
            taken.set()

    async def _watch(self, life: _Life, generation: int) -> None:
        while True:
            await asyncio.sleep(PROBE_EVERY)
            # It waits behind what is being handed over.
            patience = PROBE_TIMEOUT + self._sender.under_way / SLOWEST
            self._ask(life)
            answered = False
            for _ in range(2):  # if this loop was blocked, the answer is here in a moment
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience / 2):
                        await life.back.wait()
                        answered = True
            if not answered:
                error = TimeoutError(f"the broker did not answer for {patience:.0f} seconds")
                self._break(error, generation)
                return

    def _ask(self, life: _Life) -> None:
        """Send a message to ourselves; `back` is set when it has come."""
        life.back.clear()
        self._sender.probe(self._probe)

    def _answer(self, life: _Life, answered: Waiter) -> None:
        """Set the waiter when a message to ourselves has come."""

        async def answer() -> None:
            self._ask(life)
            await life.back.wait()
            answered.set()

        if life is self._life and life.loop is running_loop() and not life.leaving:
            self._run(life, answer())

    # Receive

    def _arrived(self, life: _Life, channel: str, data: bytes) -> None:
        if channel == self._probe:
            self._heard = time.time()
            life.back.set()
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
            if not hold.count and not (hold.subscribed and self.alive):
                del self._holds[channel]
                return
            life = self._life
            if life is None or life.leaving or life.loop is not running_loop():
                return  # it will be done by who connects next
            if self._state != "connected" or bool(hold.count) == hold.subscribed:
                return
            hold.changing = True
        self._run(life, self._settle(channel, hold, self._generation))

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
        """Subscribe, and tell whoever waits for it, if it is connected; False if it was refused."""
        generation = self._generation
        why = ""
        waiting: list[Taken] = []
        try:
            await self._backend.subscribe(channel)
        except Exception as exc:
            why = _words(exc)
        with self._lock:
            hold = self._holds.get(channel)
            life = self._life
            if hold is None or life is None or generation != self._generation:
                return False
            if why and life.broken.is_set():
                return False  # and nobody is told: it may be back in time
            hold.subscribed = not why
            if why or self._state == "connected":
                waiting, hold.waiting = hold.waiting, []
        if why:
            logger.warning("the broker does not give the channel %r: %s", channel, why)
        for taken in waiting:
            if why:
                taken.fail(why)
            else:
                taken.set()
        return not why
