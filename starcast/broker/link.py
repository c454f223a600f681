"""Link: a hub's connection to a broker, which it keeps, loses and finds again.

It lives on the event loop that started it, for the time of a `Life`; `publish` may be called from
any thread. A `Sender` hands over what is published, `Subscriptions` knows what is subscribed to, a
`Probe` whether the broker is really there, and a `Session` makes a connection.

`_live` makes a new connection whenever one is lost, however long that takes, and says that there
was a gap. `_watch` looks at the probe. When the loop ends, which cancels the tasks, `_live`
disconnects there, and the link may be started on another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any

from .. import logs
from ..backends.base import Backend
from ..event import Event
from ..exceptions import BackendUnavailable, PayloadTooLarge, PublishQueueFull
from ..gap import Gap
from ..logs import LogLimit
from ..stats import BackendStats
from ..sync.deadline import Deadline
from . import envelope
from .health import Health
from .life import Life, Stopping
from .opening import CLOSED, Backoff, keep_trying
from .probe import PROBE_CHANNEL, Probe
from .sender import LATE, TIMEOUT, OnLost, Sender, Taken
from .session import Session
from .subscriptions import Subscriptions

logger = logging.getLogger("starcast")

# Seconds that a connection must have held for the waits to begin anew.
HELD = 10.0


class Link:
    """See the module. Made on any thread.

    Args:
        backend: What talks to the broker.
        lock: The hub's: code that holds it may call this, and the other way round.
        deliver: Called with each event that arrives, on the link's loop, and with the time before
            which nothing is missing, in seconds since 1970. Returns whether everybody gets it;
            those who do not are told of a gap: see `report`.
        on_gap: Called after each gap, on the link's loop.
        open_timeout: Seconds for which the first connection is tried to be made.
        probe_interval: Seconds between two messages to itself.

    Attributes:
        hub: Names this process's hub to itself, anew with each opening.
        subscriptions: The channels that somebody wants.
        probe: Its messages to itself.
    """

    def __init__(
        self,
        backend: Backend,
        lock: AbstractContextManager[object],
        deliver: Callable[[Event, float], bool],
        on_gap: Callable[[Gap], None],
        open_timeout: float,
        probe_interval: float,
    ) -> None:
        self.hub = b""
        self._backend = backend
        self._deliver = deliver
        self._on_gap = on_gap
        self._timing = (open_timeout, probe_interval)
        self._limit = LogLimit()
        self._sender = Sender(backend, lock, self._on_refused)
        self.subscriptions = Subscriptions(backend, lock, self)
        self.probe = Probe(backend, self._sender)
        self._session = Session(backend, self.probe, self.subscriptions, self._arrived, self._break)
        self._lock = lock
        self._health = Health(lock)
        # Guarded by the lock:
        self._life: Life | None = None
        self._stopping: Stopping | None = None

    # From any thread

    @property
    def alive(self) -> bool:
        """Whether the event loop that it lives on is still there, and its tasks are."""
        life = self._life
        return life is not None and life.alive

    @property
    def resting(self) -> bool:
        """Whether its tasks were cancelled a moment ago, on this loop."""
        life = self._life
        return life is not None and life.resting

    @property
    def connected(self) -> bool:
        return self._health.state == "connected"

    @property
    def broken(self) -> bool:
        return self._life is None or self._life.broken.is_set()

    @property
    def is_here(self) -> bool:
        life = self._life
        return life is not None and life.is_here

    def stats(self) -> BackendStats:
        with self._lock:
            return self._health.snapshot(
                alive=self.alive,
                lost=self._sender.lost + self._session.dropped,
                channels=len(self.subscriptions.holds),
                queued=len(self._sender.queue),
                refused=self.subscriptions.refused,
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
        self.note(why)
        if self._limit.allows(why):
            logger.warning("messages did not reach the broker: %s", why)

    async def healthy(self) -> bool:
        """Whether a message comes back by way of the broker within two seconds. From any loop.

        Others that arrive meanwhile will do: on a slow line it waits behind them. It is not while
        the broker refuses a channel that somebody has.
        """
        life = self._life
        if life is None or not self.alive or not self.connected or self.subscriptions.refused:
            return False
        answered = Taken()
        self.call(self._answer, life, answered)
        try:
            await answered.wait()
        except BackendUnavailable:
            return answered.failed == LATE and self.probe.heard_at() + TIMEOUT > time.monotonic()
        return True

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call it on the link's loop, in its next turn; here, if there is none."""
        life = self._life
        if life is None:
            function(*arguments)
        else:
            life.call(function, *arguments)

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
            await self._stopping.wait()
            self._sender.close(CLOSED)  # if that was too long
            self._stopping = None
        life = self._life
        if self.resting:
            raise BackendUnavailable("the event loop of the connection is ending")
        moved = life is not None and self.subscriptions.wanted
        if not moved:
            self.hub = os.urandom(8)
            self.probe.channel = f"{PROBE_CHANNEL}{self.hub.hex()}"
        life = self._life = Life()
        self._sender.live_here()
        if moved:
            lost = RuntimeError("the event loop of the connection ended")
            self._break(lost, self._session.generation)
        else:

            async def connect(seconds: float | None) -> None:
                life.broken.clear()
                await self._session.open(seconds)

            try:
                await self._session.close()  # if what stopped it last was cut off
                await keep_trying(
                    connect,
                    self._timing[0] if patient else 0.0,
                    lambda error: self._health.become("closed", error),
                    lambda: life.last_attempt,
                )
            except BaseException:
                self._life = None
                raise
            self._connected(life)
            self._session.catch_up()
        life.living = life.run(self._live(life))

    def stop_opening(self) -> None:
        """Make no further attempt at a first connection: the hub is to be closed. Any thread."""
        life = self._life
        if life is not None:
            life.last_attempt = True  # one that succeeds is stopped like any other connection

    async def ready(self) -> None:
        """Wait, for two seconds at most, until a connection that has moved here is there."""
        life = self._life
        if life is not None and life.is_here:
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
                self._stopping = Stopping(life, self._stop, lambda it: it is self._stopping)
                self._health.become("closed")
            stopping = self._stopping
        if stopping is None:
            return
        self.subscriptions.fail(CLOSED)
        if life is not None:
            stopping.begin()
        await stopping.wait()

    async def _stop(self, life: Life) -> None:
        try:
            if life.loop is asyncio.get_running_loop():
                await self._sender.drain()
        finally:
            if self._life is None:  # else it has been started anew, elsewhere
                self._sender.close(CLOSED)
            await self._leave(life)

    async def _leave(self, life: Life) -> None:
        """End everything that belongs to a loop, on it; if it is closed, what is left of it."""
        life.leaving = True
        if self._life in (life, None):  # else there is a new one already, elsewhere
            self._sender.pause()
        try:
            await life.end()
        finally:
            if self._life in (life, None):
                await self._session.close()
                self._sender.give_up()

    def _connected(self, life: Life) -> None:
        self._health.become("connected")
        self.subscriptions.resume()
        self._sender.open()
        if life.watching is not None:
            life.tasks.discard(life.watching)
            life.watching.cancel()
        life.watching = life.run(self._watch(self._session.generation))
        life.connected.set()

    # Stay connected

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        life = self._life
        assert life is not None  # the subscriptions have asked
        life.run(work)

    def _break(self, error: Exception, generation: int) -> None:
        life = self._life
        if generation == self._session.generation and life is not None:
            if self.connected:
                logger.warning("lost the connection to the broker: %s", logs.describe(error))
                self._health.become("reconnecting", error)
                self._sender.pause()
            life.broken.set()
            self.probe.forget()

    async def _live(self, life: Life) -> None:
        try:
            await self._keep(life)
        finally:
            if not life.leaving:  # nobody has stopped it: the loop is ending
                await self._leave(life)

    async def _keep(self, life: Life) -> None:
        backoff = Backoff()
        while not life.leaving:
            since = time.monotonic()
            await life.broken.wait()
            if time.monotonic() - since > HELD:
                backoff = Backoff()
            self._health.become("reconnecting")
            self._sender.pause()
            error = self._health.error or ""
            # While nobody is there, nobody misses anything.
            heard = self.probe.heard if self.subscriptions.wanted else time.time()
            while life.broken.is_set() and not life.leaving:
                await self._session.close()
                self._sender.give_up()
                await asyncio.sleep(backoff.next())
                try:
                    life.broken.clear()
                    await self._session.open()
                except Exception as exc:
                    self._health.become("reconnecting", exc)
                    life.broken.set()
            if not life.leaving:
                self._tell_gap(life, heard, error)

    def report(self, gap: Gap, on_gap: Callable[[Gap], None]) -> None:
        """Count and log a gap that is not the broker's, and call `on_gap` on the link's loop."""
        self._health.count(gaps=1)
        if self._limit.allows(gap.error):
            logger.warning("%s; its clients were told of a gap", gap.error)
        self.call(on_gap, gap)

    @property
    def heard(self) -> float:
        return self.probe.heard

    def hear(self, asked: float) -> None:
        self.probe.heard = asked

    def note(self, error: str) -> None:
        self._health.note(error)

    def tell_gap(self, gap: Gap) -> None:
        self._on_gap(gap)

    def _tell_gap(self, life: Life, since: float, error: str) -> None:
        self._connected(life)
        gap = Gap(since, time.time() - since, error)
        self._health.count(gaps=1)
        logger.warning(
            "connected to the broker again; messages of the last %.1f seconds may be missing",
            gap.seconds,
        )
        self._on_gap(gap)
        self._session.catch_up()

    async def _watch(self, generation: int) -> None:
        wrong = await self.probe.watch(self._timing[1], lambda: self.subscriptions.wanted)
        self._break(ConnectionError(wrong), generation)

    def _answer(self, life: Life, answered: Taken) -> None:
        """Set it when a message to ourselves has come."""

        def tell(probe: asyncio.Future[str]) -> None:
            if lost := probe.result():
                answered.fail(lost)
            else:
                answered.set()

        if life is self._life and self.is_here:
            self.probe.ask().add_done_callback(tell)

    # Receive

    def _arrived(self, channel: str, data: bytes) -> None:
        try:
            event = envelope.unpack(channel, data, self.hub)
        except envelope.Malformed:
            self._health.count(malformed=1)
            return
        if not self._deliver(event, self.probe.heard):
            self._health.count(missed=1)
