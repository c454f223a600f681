"""Link: a hub's connection to a broker, which it keeps, loses and finds again.

It lives on the event loop that started it; `publish`, `hold` and `release` may be called from any
thread. What is published is up to a `Sender`, who is subscribed to what up to `Subscriptions`, and
whether the broker is really there up to a `Probe`.

A connection is open when the backend has connected, a message to ourselves has come back and all
that is wanted is subscribed to. `_live` makes a new one whenever the connection is lost, without
end, and says that there was a gap. `_watch` looks at the probe.

The link's time on one loop is a `_Life`. When the loop comes to its end, which cancels the tasks,
`_live` disconnects there, and the link may be started on another one.
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
from .backends.base import Backend, LoginRefused
from .deadline import Deadline
from .event import Event
from .exceptions import (
    BackendUnavailable,
    ConfigurationError,
    PayloadTooLarge,
    PublishQueueFull,
)
from .gap import Gap
from .loglimit import LogLimit
from .probe import Probe
from .sender import TIMEOUT, OnLost, Sender, Taken
from .stats import BackendStats
from .subscriptions import Subscriptions
from .waiter import Waiter, running_loop

logger = logging.getLogger("starcast")

State = Literal["closed", "connected", "reconnecting"]

# Seconds for which a hub that is being opened waits for its broker. One that is started together
# with the app, as containers are, needs a few; gunicorn kills a worker that is not up within 30.
OPEN_TIMEOUT = 10.0

# Seconds that the last attempt gets, however little is left: it shall say what is wrong.
LAST_ATTEMPT = 1.0

# Seconds between two probes.
PROBE_INTERVAL = 3.0
MAX_PROBE_INTERVAL = 3600.0

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


class _Life:
    """What belongs to one event loop, from a start until the loop ends or the link is stopped."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.broken = asyncio.Event()  # the connection is
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


def check_timing(open_timeout: float, probe_interval: float) -> None:
    """Refuse settings that make no sense.

    Raises:
        ConfigurationError: One of them is not a number of seconds that is possible.
    """
    if not (isinstance(open_timeout, int | float) and open_timeout >= 0):
        raise ConfigurationError(
            f"open_timeout must be a number of seconds, or 0 to try once, not {open_timeout!r}"
        )
    if not (isinstance(probe_interval, int | float) and 0 < probe_interval <= MAX_PROBE_INTERVAL):
        raise ConfigurationError(
            f"probe_interval must be more than 0 and at most {MAX_PROBE_INTERVAL:.0f} seconds, "
            f"not {probe_interval!r}"
        )


class _Backoff:
    """How long to wait before the next attempt to connect."""

    def __init__(self) -> None:
        self._longest = FIRST_WAIT

    def next(self) -> float:
        wait = random.uniform(0, self._longest)
        self._longest = min(1.5 * self._longest, LONGEST_WAIT)
        return wait


class _Health:
    """What `stats` says of a link. Guarded by the hub's lock."""

    def __init__(self) -> None:
        self.state: State = "closed"
        self.since = time.time()
        self.error: str | None = None
        self.gaps = 0
        self.blocked = 0  # messages that a blocked event loop had no room for
        self.malformed = 0


class Link:
    """See the module. Made on any thread.

    Args:
        backend: What talks to the broker.
        lock: The hub's, for who holds the one may want the other.
        deliver: Called with each event that arrives, on the link's loop. Raises `PublishQueueFull`.
        on_gap: Called after each gap, on the link's loop.
        open_timeout: Seconds for which the first connection is tried to be made.
        probe_interval: Seconds between two messages to itself.
    """

    def __init__(
        self,
        backend: Backend,
        lock: AbstractContextManager[object],
        deliver: Callable[[Event], None],
        on_gap: Callable[[Gap], None],
        open_timeout: float = OPEN_TIMEOUT,
        probe_interval: float = PROBE_INTERVAL,
    ) -> None:
        self.hub = b""  # names this process's hub to itself, anew with each opening
        self._backend = backend
        self._deliver = deliver
        self._on_gap = on_gap
        self._timing = (open_timeout, probe_interval)
        self._limit = LogLimit()
        self._sender = Sender(backend, lock, self._on_refused)
        self._subscriptions = Subscriptions(backend, lock, self)
        self._probe = Probe(backend, self._sender)
        self._lock = lock
        # Guarded by the lock:
        self._health = _Health()
        self._life: _Life | None = None
        self._stopping: _Stopping | None = None
        # On the loop:
        self._generation = 0  # of the connection: what an earlier one brings does not count
        self._started = False  # the backend has to be stopped
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

    @property
    def connected(self) -> bool:
        return self._health.state == "connected"

    @property
    def broken(self) -> bool:
        return self._life is None or self._life.broken.is_set()

    @property
    def is_here(self) -> bool:
        life = self._life
        return life is not None and not life.leaving and life.loop is running_loop()

    def stats(self) -> BackendStats:
        with self._lock:
            health = self._health
            return BackendStats(
                state=health.state if self.alive else "closed",
                since=health.since,
                error=health.error,
                gaps=health.gaps,
                lost=self._sender.lost + health.blocked,
                malformed=health.malformed,
                channels=len(self._subscriptions.holds),
                waiting=len(self._sender),
            )

    def publish(self, event: Event, wait: bool, on_lost: OnLost | None = None) -> Taken | None:
        """Hand an event over. What comes back, if `wait`, is set when the broker has it.

        Without `wait` it waits for a broker that is away for two seconds and is then lost, which is
        counted and logged. `on_lost` is then called with the reason, once, on the link's loop or on
        the thread that closes the link; it must neither block nor raise.

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
        try:
            return self._sender.put(event.channel, data, wait, on_lost)
        except PublishQueueFull as exc:
            if not wait:
                self._on_refused(str(exc))
            raise

    def _on_refused(self, why: str) -> None:
        """Say what became of messages that nobody awaits."""
        with self._lock:
            self._health.error = why
        if self._limit.allows(why):
            logger.warning("messages did not reach the broker: %s", why)

    async def hold(self, channel: str) -> None:
        """See `Subscriptions`."""
        await self._subscriptions.hold(channel)

    def want(self, channel: str) -> None:
        """See `Subscriptions`."""
        self._subscriptions.want(channel)

    def release(self, channel: str) -> None:
        """See `Subscriptions`."""
        self._subscriptions.release(channel)

    async def healthy(self) -> bool:
        """Whether a message comes back by way of the broker within two seconds. From any loop."""
        life = self._life
        if life is None or not self.alive or not self.connected:
            return False
        answered = Taken()
        self.call(self._answer, life, answered)
        try:
            await answered.wait()
        except BackendUnavailable:
            return False
        return True

    def call(self, function: Callable[..., object], *arguments: object) -> None:
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
            health = self._health
            if state != health.state:
                health.state, health.since = state, time.time()
            if error is not None:
                health.error = _words(error)

    # Open and close

    async def start(self, patient: bool = True) -> None:
        """Connect, and live on this event loop from now on.

        If the loop that it lived on has ended, and somebody wants a channel, this is like a lost
        connection: it comes back at once and connects when it can.

        Args:
            patient: Whether to try again for as long as `open_timeout` says.

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
        moved = life is not None and self._subscriptions.wanted
        if not moved:
            self.hub = os.urandom(8)
            self._probe.channel = f"starcast-probe-{self.hub.hex()}"
        life = self._life = _Life()
        self._sender.live_here()
        if moved:
            self._break(RuntimeError("the event loop of the connection ended"), self._generation)
        else:
            try:
                await self._disconnect()  # if what stopped it last was cut off
                await self._open(life, self._timing[0] if patient else 0.0)
            except BaseException:
                self._life = None
                raise
            self._connected(life)
            self._catch_up(life)
        life.living = self._run(life, self._live(life))

    async def _open(self, life: _Life, seconds: float) -> None:
        """Connect for the first time, again and again until there is no time left."""
        until = time.monotonic() + seconds
        backoff = _Backoff()
        while True:
            left = max(until - time.monotonic(), LAST_ATTEMPT) if seconds else CONNECT_TIMEOUT
            try:
                await self._connect(life, left)
                return
            except BackendUnavailable as exc:
                self._become("closed", exc)
                wait = backoff.next()
                left = until - time.monotonic() - wait
                if left <= 0 or isinstance(exc, LoginRefused):
                    raise
                logger.warning(
                    "no connection to the broker yet, trying again for %.1f seconds: %s", left, exc
                )
            await asyncio.sleep(wait)
            if life.leaving:
                raise BackendUnavailable(CLOSED)

    def stop_opening(self) -> None:
        """Make no further attempt at a first connection: the hub is to be closed. Any thread."""
        life = self._life
        if life is not None and life.living is None:
            life.leaving = True

    async def ready(self) -> None:
        """Wait, for two seconds at most, until a connection that has moved here is there."""
        life = self._life
        if life is not None and life.loop is running_loop():
            with contextlib.suppress(TimeoutError):
                async with Deadline(TIMEOUT):
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
        if stopping is None:
            return
        self._subscriptions.fail(CLOSED)
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

    async def _connect(self, life: _Life, seconds: float = CONNECT_TIMEOUT) -> None:
        """Connect and subscribe, once a message to ourselves has come back."""
        self._generation = generation = self._generation + 1
        life.broken.clear()
        self._started = True

        def deliver(channel: str, data: bytes) -> None:
            if generation == self._generation:
                if channel == self._probe.channel:
                    self._probe.came()
                elif self._early is None or len(self._early) >= MAX_EARLY:
                    self._arrived(channel, data)
                else:
                    self._early.append((channel, data))

        def lost(error: Exception) -> None:
            self._break(error, generation)

        self._early = []
        seconds = min(seconds, CONNECT_TIMEOUT)
        try:
            async with Deadline(seconds):
                await self._backend.start(deliver, lost)
                await self._subscribe_to_probe()
            await self._probe.prove(seconds)
            await self._subscriptions.restore(CONNECT_TIMEOUT)
        except TimeoutError:
            await self._disconnect()
            raise BackendUnavailable("the broker did not answer in time") from None
        except BaseException:
            await self._disconnect()
            raise

    async def _subscribe_to_probe(self) -> None:
        channel = self._probe.channel
        try:
            await self._backend.subscribe(channel)
        except Exception as exc:
            raise BackendUnavailable(
                f"the hub cannot subscribe to its own channel {channel!r}: {_words(exc)}"
            ) from None

    def _connected(self, life: _Life) -> None:
        self.hear()
        self._become("connected")
        self._subscriptions.resume()
        self._sender.open()
        if life.watching is not None:
            life.tasks.discard(life.watching)
            life.watching.cancel()
        life.watching = self._run(life, self._watch(self._generation))
        life.connected.set()

    async def _disconnect(self) -> None:
        self._generation += 1
        self._subscriptions.lose()
        self._probe.forget()
        if not self._started:
            return
        try:
            async with Deadline(STOP_TIMEOUT):
                await self._backend.stop()
            self._started = False
        except Exception as exc:
            logger.warning("the connection to the broker did not end in order: %s", _words(exc))

    # Stay connected

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        life = self._life
        assert life is not None  # the subscriptions have asked
        self._run(life, work)

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
            if self.connected:
                logger.warning("lost the connection to the broker: %s", _words(error))
                self._become("reconnecting", error)
                self._sender.pause()
            life.broken.set()
            self._probe.forget()

    async def _live(self, life: _Life) -> None:
        try:
            await self._keep(life)
        finally:
            if not life.leaving:  # nobody has stopped it: the loop comes to its end
                await self._leave(life)

    async def _keep(self, life: _Life) -> None:
        backoff = _Backoff()
        while not life.leaving:
            since = time.monotonic()
            await life.broken.wait()
            if time.monotonic() - since > HELD:
                backoff = _Backoff()
            self._become("reconnecting")
            self._sender.pause()
            error = self._health.error or ""
            if not self._subscriptions.wanted:
                self.hear()  # nobody was there to miss anything
            heard = self._probe.heard
            while life.broken.is_set() and not life.leaving:
                await self._disconnect()
                self._sender.give_up()
                await asyncio.sleep(backoff.next())
                try:
                    await self._connect(life)
                except Exception as exc:
                    self._become("reconnecting", exc)
                    life.broken.set()
            if not life.leaving:
                self._tell_gap(life, heard, error)

    def hear(self) -> None:
        self._probe.heard = time.time()

    def _tell_gap(self, life: _Life, since: float, error: str) -> None:
        self._connected(life)
        gap = Gap(since, self._probe.heard - since, error)
        with self._lock:
            self._health.gaps += 1
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
            self._arrived(channel, data)
        self._subscriptions.confirm()

    async def _watch(self, generation: int) -> None:
        wrong = await self._probe.watch(self._timing[1], lambda: self._subscriptions.wanted)
        self._break(ConnectionError(wrong), generation)

    def _answer(self, life: _Life, answered: Taken) -> None:
        """Set it when a message to ourselves has come."""

        def tell(probe: asyncio.Future[str]) -> None:
            if lost := probe.result():
                answered.fail(lost)
            else:
                answered.set()

        if life is self._life and self.is_here:
            self._probe.ask().add_done_callback(tell)

    # Receive

    def _arrived(self, channel: str, data: bytes) -> None:
        try:
            self._deliver(envelope.unpack(channel, data, self.hub))
        except envelope.Malformed:
            with self._lock:
                self._health.malformed += 1
        except PublishQueueFull:  # an event loop of this process is blocked
            with self._lock:
                self._health.blocked += 1
