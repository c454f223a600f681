"""Session: one connection to the broker, from its making to its end, on one event loop.

A session is ready when the backend has connected, a probe has come back, all channels that are
wanted are subscribed to, and the gap before it was reported. Messages that arrive earlier are held
back until then. Once it is lost or closed, nothing that the connection still calls has any effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from .. import logs
from ..backends.base import Backend, BrokerConnection, SubscriptionRevoked
from ..event import OVERHEAD
from ..exceptions import BackendUnavailable
from ..history import Position
from ..sync.bounded import BoundedQueue
from ..sync.deadline import Deadline
from ..sync.waiter import running_loop
from ..tuning import Tuning
from .health import Health
from .probe import Probe, location
from .round_trips import RoundTrips
from .sender import LOST, Ack, Sender
from .subscriptions import Subscriptions
from .tracks import Tracks

logger = logging.getLogger("starcast")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """What all sessions of a link share.

    Attributes:
        backend: Makes the connections.
        tracks: How far this process has come on the channels that have a history.
        receive: Called with the channel and the payload of each message of the others.
    """

    backend: Backend
    tuning: Tuning
    health: Health
    sender: Sender
    subscriptions: Subscriptions
    round_trips: RoundTrips
    tracks: Tracks
    receive: Callable[[str, bytes, Position | None], None]


class Session:
    """One connection to the broker. Made on its event loop.

    Args:
        parts: What it shares with the sessions before and after it.
        channel: The channel that probes are sent to.

    Attributes:
        loop: Its event loop.
        lost: Done with the reason when the connection has broken.
        ready: Whether it delivers messages; see the module.
        dropped: How many messages it has lost that it was holding back.
    """

    def __init__(self, parts: Parts, channel: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[Exception] = self.loop.create_future()
        self.ready = False
        self.dropped = 0
        self.probe = Probe(channel, parts.backend, parts.sender, parts.health, parts.tuning)
        self._parts = parts
        self._connection: BrokerConnection | None = None
        self._closing = False
        self._message_at = 0.0  # when a message arrived last, in `time.monotonic()`
        self._tasks: set[asyncio.Task[None]] = set()
        # Of this loop only, so its lock need not lock.
        self._held_back = BoundedQueue[tuple[str, bytes, Position | None, int | None]](
            contextlib.nullcontext(), parts.tuning.max_held_back
        )

    @property
    def connection(self) -> BrokerConnection:
        assert self._connection is not None  # only asked for once it is connected
        return self._connection

    @property
    def connected(self) -> bool:
        return self.ready and not self.lost.done()

    @property
    def closed(self) -> bool:
        """Whether there is nothing to close."""
        return self._connection is None

    def heard_at(self) -> float:
        """Return when there was a sign of life last, in `time.monotonic()`. From any thread.

        The backend may know it to the byte: a single message may take minutes to arrive.
        """
        heard_at: float | None = getattr(self._connection, "heard_at", None)
        return self._message_at if heard_at is None else heard_at

    async def open(self, seconds: float | None = None) -> None:
        """Connect, and subscribe once a probe has come back.

        Args:
            seconds: How long connecting may take, and the probe, if that is less than the tuning
                allows.

        Raises:
            BackendUnavailable: There is no connection, or it delivers nothing.
        """
        parts = self._parts
        limit = parts.tuning.connect_timeout
        seconds = limit if seconds is None else min(seconds, limit)
        try:
            async with Deadline(seconds):
                self._connection = await parts.backend.connect(self._deliver, self.lose)
                await self._subscribe_to_probe()
            await self.probe.prove(self.connection, seconds)
            await parts.subscriptions.attach(self)
        except TimeoutError:
            await self.close()
            raise BackendUnavailable(
                f"the broker did not answer in time{location(parts.backend)}"
            ) from None
        except BaseException:
            await self.close()
            raise

    async def _subscribe_to_probe(self) -> None:
        channel = self.probe.channel
        try:
            await self.connection.subscribe(channel)
        except Exception as exc:
            raise BackendUnavailable(
                f"the hub cannot subscribe to its own channel {channel!r}: {logs.describe(exc)}"
                f"{location(self._parts.backend)}"
            ) from None

    def catch_up(self, probe_interval: float) -> None:
        """Deliver what was held back, and confirm waiting subscribers. They come after the gap."""
        self.ready = True
        self._parts.tracks.resume(self)
        for message in self._held_back.take_all():
            self._receive(*message)
        subscriptions = self._parts.subscriptions
        subscriptions.confirm()
        self.run(
            self.probe.keep_asking(probe_interval, lambda: subscriptions.wanted, self.heard_at)
        )

    async def close(self) -> None:
        """Disconnect. If this was cancelled, it may be called again.

        It is called on another loop if that of the session does not run any more.
        """
        self._closing = True
        self._detach()
        self.dropped += len(self._held_back)
        self._held_back.take_all()
        tuning = self._parts.tuning
        if self.loop is running_loop():
            tasks = self._tasks - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            try:
                if tasks:
                    await asyncio.wait(tasks, timeout=tuning.stop_timeout)
            finally:
                await self._disconnect()
        else:
            await self._disconnect()

    async def _disconnect(self) -> None:
        if self._connection is None:
            return
        try:
            async with Deadline(self._parts.tuning.stop_timeout):
                await self._connection.close()
        except Exception as exc:
            logger.warning(
                "the connection to the broker was not closed cleanly: %s", logs.describe(exc)
            )
        self._connection = None

    # From any thread

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call it on the session's loop in its next iteration, or never if that is closed."""
        if running_loop() is self.loop:
            self.loop.call_soon(function, *arguments)  # not now: the caller may hold a lock
        else:
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(function, *arguments)

    async def ask(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do something on the session's loop, and return its result. From any loop.

        Raises:
            BackendUnavailable: It raised an error, or there was no result in time.
        """
        answer = Ack(self._parts.tuning.publish_timeout)
        results: list[T] = []

        async def answer_it() -> None:
            try:
                results.append(await work())
            except Exception as exc:
                answer.fail(logs.describe(exc))
            except BaseException:
                answer.fail(LOST)
                raise
            else:
                # And nothing after it: on another loop, it is not seen at once that this is set.
                answer.set()

        def begin() -> None:
            if self._closing:  # pragma: no cover  # since a moment ago
                answer.fail(LOST)
            else:
                self.run(answer_it())

        self.call(begin)
        await answer.wait()
        return results[0]

    # On its loop

    def run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Make a task of it, which ends with the session."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[None]) -> None:
        """A task has ended. The session only goes on if it ended well."""
        self._tasks.discard(task)
        if task.cancelled():
            self.lose(ConnectionError("a task of the connection was cancelled"))
        elif error := task.exception():
            if not isinstance(error, BackendUnavailable):
                logger.error("the connection to the broker ends after an error", exc_info=error)
            self.lose(ConnectionError(logs.describe(error)))

    def lose(self, error: Exception) -> None:
        """The connection is lost, or one channel of it."""
        if self._closing or self.lost.done():
            return
        if isinstance(error, SubscriptionRevoked) and error.channel != self.probe.channel:
            self._parts.subscriptions.revoke(error.channel, str(error))
            return
        if self.ready:
            self._parts.health.become("reconnecting", error)
        self.lost.set_result(error)
        self._detach()

    def _detach(self) -> None:
        """End everything that waits for this connection."""
        self._parts.subscriptions.detach(self)
        self._parts.sender.detach(self._connection)
        self._parts.round_trips.fail()
        self.probe.fail()

    def _deliver(
        self,
        channel: str,
        data: bytes,
        position: Position | None = None,
        previous: int | None = None,
    ) -> None:
        if self._closing or self.lost.done():
            return
        self._message_at = time.monotonic()
        subscriptions = self._parts.subscriptions
        if channel == self.probe.channel:
            if data:
                self._parts.round_trips.arrived(data)
            else:
                self.probe.arrived()
        elif not self.ready:
            self._hold_back(channel, data, position, previous)
        else:
            if channel in subscriptions.refusals:
                subscriptions.restored(channel)
            self._receive(channel, data, position, previous)

    def _receive(
        self, channel: str, data: bytes, position: Position | None, previous: int | None
    ) -> None:
        if position is None:
            self._parts.receive(channel, data, None)
        else:
            self._parts.tracks.arrived(self, channel, data, position, previous)

    def _hold_back(
        self, channel: str, data: bytes, position: Position | None, previous: int | None
    ) -> None:
        held_back = self._held_back
        cost = len(data) + OVERHEAD
        while not held_back.has_space(cost):
            _, oldest, kept, _ = held_back.entries[0]
            held_back.drop_first(len(oldest) + OVERHEAD)
            self.dropped += kept is None  # the others are still in the history
        held_back.append((channel, data, position, previous), cost)
