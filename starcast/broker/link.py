"""Link: a hub's connection to a broker, over every outage and on any event loop.

It is in one of these states, of which `stats()` calls the first three "closed":

- CLOSED: there is no supervisor, and `publish` raises. `start` opens it.
- OPENING: `start` makes a first connection, and raises if there is none in time. It is CLOSED then.
- ENDED: the supervisor's task was cancelled, or its event loop was closed. The other loops that
  have clients are asked to take over, and so is its own one, in case it goes on after a moment. The
  next use of the hub does the same. Whichever is first calls `start`, and the link is RECONNECTING:
  what was waiting is kept.
- CONNECTED: a session is ready. The supervisor waits until it is lost, and then closes it.
- RECONNECTING: the supervisor waits a moment, makes a session, and again if that fails, as long as
  it takes. Messages are queued for up to two seconds. Then the gap is reported, messages that
  arrived meanwhile are delivered behind it, and the link is CONNECTED.

`stop` closes it from any of these, on the event loop of the connection.

A `Supervisor` belongs to one event loop, a `Session` to one connection. The `Sender` queues what is
published, `Subscriptions` records which channels are wanted; both outlive sessions and loops.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractContextManager
from typing import Any

from ..backends.base import Backend, Stored
from ..event import Command, Event, Gap
from ..exceptions import BackendUnavailable, PayloadTooLarge, PublishQueueFull
from ..history import Histories, Position
from ..logs import LogLimit
from ..stats import BackendStats
from ..sync.waiter import running_loop
from ..tuning import Tuning
from . import envelope
from .health import Health
from .opening import CLOSED
from .probe import PROBE_CHANNEL
from .round_trips import RoundTrips
from .sender import LATE, NOT_OPEN, Ack, OnLost, Sender
from .session import Parts, Session
from .subscriptions import Subscriptions
from .supervisor import Supervisor
from .tracks import Tracks

logger = logging.getLogger("starcast")

NO_HISTORY_NOW = "there is no connection to the broker, which has the history"


@dataclasses.dataclass(frozen=True, slots=True)
class Owner:
    """What a link calls of its hub.

    Attributes:
        deliver: Called with each event that arrives, on the link's loop, and with the time before
            which nothing is missing, in seconds since 1970. Returns whether everybody gets it;
            those who do not are told of a gap: see `Link.report`.
        on_gap: Called after each gap, on the link's loop.
        loops: Returns the event loops that have clients. From any thread.
        histories: Which channels have a history.
        positions: The place that the clients of this process have reached on each of these. Guarded
            by the hub's lock; `deliver` sets it.
        is_behind: Returns whether an event loop has much to deliver: what can wait should wait.
        reopen: Starts the link on this event loop, if the hub is open and the link has ended.
    """

    deliver: Callable[[Event, float], bool]
    on_gap: Callable[[Gap], None]
    loops: Callable[[], Iterable[asyncio.AbstractEventLoop]]
    reopen: Callable[[], Coroutine[Any, Any, None]]
    histories: Histories
    positions: dict[str, Position]
    is_behind: Callable[[], bool]


class Link:
    """A hub's connection to a broker. Made on any thread.

    Args:
        backend: Connects to the broker.
        lock: The hub's: code that holds it may call this, and the other way round.
        owner: The hub.
        tuning: The hub's.
        probe_interval: Seconds between two probes.

    Attributes:
        is_local: Whether there is no broker.
    """

    is_local = False

    def __init__(
        self,
        backend: Backend,
        lock: AbstractContextManager[object],
        owner: Owner,
        tuning: Tuning,
        probe_interval: float,
    ) -> None:
        self._lock = lock
        self._owner = owner
        self._tuning = tuning
        self._probe_interval = probe_interval
        self._limit = LogLimit()
        self._health = Health(lock)
        self._sender = Sender(lock, tuning, self._on_lost)
        self._round_trips = RoundTrips(self._sender, tuning.publish_timeout)
        tracks = Tracks(
            lock,
            self._health,
            tuning,
            owner.histories,
            owner.positions,
            self._receive,
            owner.on_gap,
            owner.is_behind,
        )
        self._subscriptions = Subscriptions(lock, self._health, tuning, tracks, owner.on_gap)
        self._parts = Parts(
            backend,
            tuning,
            self._health,
            self._sender,
            self._subscriptions,
            self._round_trips,
            tracks,
            self._receive,
        )
        self._hub = b""  # names this process's hub to itself, anew with each opening
        # Guarded by the lock:
        self._supervisor: Supervisor | None = None
        self._stop: tuple[Supervisor, concurrent.futures.Future[None]] | None = None
        # Loops on which the supervisor's task was cancelled a moment ago. They are likely ending,
        # and would not wait for a new task.
        self._ending: set[asyncio.AbstractEventLoop] = set()
        self._reopening: set[asyncio.Task[None]] = set()

    # From any thread

    @property
    def alive(self) -> bool:
        """Whether a supervisor looks after the connection."""
        supervisor = self._supervisor
        return supervisor is not None and supervisor.alive

    @property
    def connected(self) -> bool:
        session = self._session
        return session is not None and session.connected

    @property
    def outstanding(self) -> int:
        """What the messages cost that were published and may not have come back yet."""
        return self._round_trips.outstanding if self.connected else 0

    @property
    def _session(self) -> Session | None:
        supervisor = self._supervisor
        return None if supervisor is None else supervisor.session

    @property
    def _probe_channel(self) -> str:
        return f"{PROBE_CHANNEL}{self._hub.hex()}"

    def stats(self) -> BackendStats:
        with self._lock:
            return self._health.snapshot(
                alive=self.alive,
                lost=self._sender.lost,
                channels=self._subscriptions.count,
                queued=len(self._sender.queue),
                refused=len(self._subscriptions.refusals),
            )

    def publish(
        self,
        event: Event,
        wait: bool = False,
        on_lost: OnLost | None = None,
        key: str | None = None,
    ) -> Ack | None:
        """Queue an event. With `wait`, return what is set when the broker has it.

        Without `wait`, the event waits up to two seconds for a broker that is away and is then
        lost, which is counted and logged. `on_lost` is called with the reason, once, on the link's
        loop or on the thread that closes the link; it must neither block nor raise.

        Raises:
            PayloadTooLarge: It is larger than the broker accepts.
            PublishQueueFull: Too much is waiting.
        """
        data = envelope.pack(event, self._hub)
        if len(data) > self._sender.max_payload:
            raise PayloadTooLarge(
                f"the message takes {len(data)} bytes, and the broker at most "
                f"{self._sender.max_payload}"
            )
        is_command = isinstance(event, Command)
        kept = None if is_command else self._parts.tracks.kept(event.channel, data, key)
        try:
            return self._sender.put(event.channel, data, wait, on_lost, kept)
        except PublishQueueFull as exc:
            if not wait:
                self._on_lost(str(exc))
            raise

    def _on_lost(self, why: str) -> None:
        """Log that messages were lost that are not awaited."""
        self._health.note(why)
        if self._limit.allows(why):
            logger.warning("messages did not reach the broker: %s", why)

    def report(self, gap: Gap, on_gap: Callable[[Gap], None]) -> None:
        """Count and log a gap that is not the broker's, and call `on_gap` on the link's loop."""
        self._health.count(gaps=1)
        if self._limit.allows(gap.error):
            logger.warning("%s; its clients were told of a gap", gap.error)
        if (session := self._session) is not None:  # pragma: no branch  # closed just now
            session.call(on_gap, gap)

    async def acquire(self, channel: str) -> None:
        """Want a channel: see `Subscriptions`."""
        await self._subscriptions.acquire(channel)

    def acquire_again(self, channel: str) -> None:
        """Want a channel that the caller has already."""
        self._subscriptions.acquire_again(channel)

    def release(self, channel: str) -> None:
        """Want a channel no more."""
        self._subscriptions.release(channel)

    def position(self, channel: str) -> Position | None:
        """Return the place that clients have reached. With the lock held."""
        return self._owner.positions.get(channel)

    def unpack(self, channel: str, payload: bytes) -> Event:
        """Return the event that the broker has as this.

        Raises:
            Malformed: It is none.
        """
        return envelope.unpack(channel, payload, self._hub)

    async def read(self, channel: str, since: int | None, limit: int, reverse: bool) -> Stored:
        """Return what is kept of a channel that has a history: see `HistoryConnection.read_kept`.

        From any loop.

        Raises:
            BackendUnavailable: The broker is away, or did not answer within two seconds.
        """
        session = self._session_now()
        return await session.ask(
            lambda: self._parts.tracks.read(session, channel, since, limit, reverse)
        )

    async def catch_up(self, channel: str) -> None:
        """Let this process be where the broker is. Raises as `read` does."""
        session = self._session_now()
        await session.ask(lambda: self._parts.tracks.catch_up(session, channel))

    def _session_now(self) -> Session:
        session = self._session
        if session is None or not self.connected:
            raise BackendUnavailable(NO_HISTORY_NOW)
        return session

    async def round_trip(self) -> None:
        """Wait until everything published so far has come back, or is given up. From any loop."""
        await self._round_trips.wait(self._probe_channel)

    async def healthy(self) -> bool:
        """Whether a probe comes back within two seconds. From any loop.

        Other messages that arrive meanwhile will do: on a slow connection a probe waits behind
        them. It is False while the broker refuses a channel that has members.
        """
        session = self._session
        if session is None or not (self.alive and self.connected) or self._subscriptions.refusals:
            return False
        timeout = self._tuning.publish_timeout
        answer = Ack(timeout)

        def tell(probe: asyncio.Future[str]) -> None:
            if error := probe.result():
                answer.fail(error)
            else:
                answer.set()

        session.call(lambda: session.probe.ask().add_done_callback(tell))
        try:
            await answer.wait()
        except BackendUnavailable:
            return answer.failed == LATE and session.heard_at() + timeout > time.monotonic()
        return True

    # Open and close, one at a time

    async def start(self, seconds: float) -> None:
        """Connect, and keep the connection on this event loop from now on.

        If the supervisor has ended and a channel is wanted, this is like a lost connection: it
        returns at once, and there is a connection as soon as possible.

        Args:
            seconds: How long to try; 0 to try once.

        Raises:
            BackendUnavailable: There is no connection.
        """
        if self._stop is not None:
            await self._stopped()
            self._sender.close(CLOSED)  # if that took too long
            self._stop = None
        if self._supervisor is not None:
            await asyncio.sleep(0)  # if its task has just ended, `_hand_over` is still to be called
        if asyncio.get_running_loop() in self._ending:
            raise BackendUnavailable("the event loop of the connection is ending")
        last = self._supervisor
        taking_over = last is not None and self._subscriptions.wanted
        if last is not None:
            await last.stop()
        if not taking_over:
            self._hub = os.urandom(8)
        supervisor = self._supervisor = Supervisor(
            self._parts,
            self._probe_channel,
            self._probe_interval,
            self._owner.on_gap,
            self._hand_over,
        )
        self._sender.start()
        if taking_over:
            supervisor.session.lose(RuntimeError("the event loop of the connection ended"))
        else:
            try:
                await supervisor.open(seconds)
            except BaseException:
                self._supervisor = None
                self._sender.close(NOT_OPEN)
                raise
        await supervisor.start()

    def stop_opening(self) -> None:
        """Make no further attempt at a first connection: the hub is to be closed. Any thread."""
        supervisor = self._supervisor
        if supervisor is not None:
            supervisor.giving_up = True

    async def ready(self) -> None:
        """Wait, for two seconds at most, for a connection that this loop has taken over."""
        supervisor = self._supervisor
        if supervisor is not None and supervisor.loop is asyncio.get_running_loop():
            await supervisor.wait_connected(self._tuning.publish_timeout)

    async def stop(self) -> None:
        """Disconnect, after sending what is waiting, if the broker takes it within two seconds.

        From any loop. If the loop of the connection is blocked, this does not wait longer than it
        should take, and the connection is closed later.
        """
        with self._lock:
            supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            self._health.become("closed")
            self._subscriptions.fail(CLOSED)
            self._stop = supervisor, self._begin_stop(supervisor)
        await self._stopped()

    def _begin_stop(self, supervisor: Supervisor) -> concurrent.futures.Future[None]:
        """Disconnect on the supervisor's loop; here, if that does not run."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def begin() -> None:
            task = asyncio.get_running_loop().create_task(self._disconnect(supervisor))
            task.add_done_callback(lambda task: done.set_result(None))

        loop = supervisor.loop
        if loop.is_running() and loop is not running_loop():
            with contextlib.suppress(RuntimeError):  # it was closed in this moment
                loop.call_soon_threadsafe(begin)
                return done
        begin()  # at once: if this loop is ending, it would not wait for a later task
        return done

    async def _disconnect(self, supervisor: Supervisor) -> None:
        try:
            if self._supervisor is None and supervisor.loop is asyncio.get_running_loop():
                await self._sender.drain()
        finally:
            if self._supervisor is None:  # it may have been started anew, elsewhere
                self._sender.close(CLOSED)
            await supervisor.stop()

    async def _stopped(self) -> None:
        """Wait for a stop that is under way; do it here if its loop has ended meanwhile."""
        if self._stop is None:
            return
        supervisor, stop = self._stop
        await asyncio.wait([asyncio.wrap_future(stop)], timeout=2 * self._tuning.stop_timeout)
        if not (supervisor.session.closed or supervisor.loop.is_running()):
            await supervisor.stop()

    # On the loop of the connection

    def _hand_over(self, supervisor: Supervisor, error: BaseException | None) -> None:
        """The supervisor has ended: let any loop that has clients take over."""
        if error is not None:
            logger.error(
                "the connection to the broker is started again after an error", exc_info=error
            )
        if self._supervisor is not supervisor:
            return
        own = supervisor.loop
        self._ending.add(own)
        own.call_later(self._tuning.restart_delay, self._retake, own)
        for loop in set(self._owner.loops()) - {own}:
            with contextlib.suppress(RuntimeError):  # it was closed in this moment
                loop.call_soon_threadsafe(self.take_over)

    def _retake(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop of the connection goes on: it is not ending after all."""
        self._ending.discard(loop)
        self.take_over()

    def take_over(self) -> None:
        """If the supervisor has ended and this loop has clients, let it go on here."""
        loop = asyncio.get_running_loop()
        if not self.alive and loop in self._owner.loops():
            task = loop.create_task(self._reopen())
            self._reopening.add(task)
            task.add_done_callback(self._reopening.discard)

    async def _reopen(self) -> None:
        with contextlib.suppress(BackendUnavailable):  # the next use of the hub tries again
            await self._owner.reopen()

    def _receive(self, channel: str, data: bytes, position: Position | None) -> None:
        try:
            event = self.unpack(channel, data)
        except envelope.Malformed:
            self._health.count(malformed=1)
            with self._lock:
                if position is not None and channel in self._owner.positions:
                    self._owner.positions[channel] = position
            return
        event.position = position
        if not self._owner.deliver(event, self._health.answered):
            self._health.count(lost=1)
