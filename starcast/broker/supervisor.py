"""Supervisor: keeps a link connected on one event loop, with one session after another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from .. import logs
from ..event import Gap
from ..sync.deadline import Deadline
from ..sync.waiter import running_loop
from .opening import Backoff, keep_trying
from .session import Parts, Session

logger = logging.getLogger("starcast")


class Supervisor:
    """Keeps a link connected. Made on the event loop that it stays on.

    Args:
        parts: What the sessions share.
        channel: The channel that probes are sent to.
        probe_interval: Seconds between two probes.
        on_gap: Called after each gap, before messages that arrived after it.
        on_end: Called with this and the error, if any, when it has ended without `stop`: its task
            was cancelled, which happens when the loop ends, or there is a bug.

    Attributes:
        loop: Its event loop.
        session: The current session, or the last one.
        giving_up: Whether to make no further attempt at a first connection.
    """

    def __init__(
        self,
        parts: Parts,
        channel: str,
        probe_interval: float,
        on_gap: Callable[[Gap], None],
        on_end: Callable[[Supervisor, BaseException | None], None],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.session = Session(parts, channel)
        self.giving_up = False
        self._parts = parts
        self._channel = channel
        self._probe_interval = probe_interval
        self._on_gap = on_gap
        self._on_end = on_end
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._connected = asyncio.Event()  # there was a session that was ready

    @property
    def alive(self) -> bool:
        """Whether its task goes on, as far as can be known from another thread."""
        ended = self._stopping or (self._task is not None and self._task.done())
        return not (ended or self.loop.is_closed())

    async def open(self, seconds: float) -> None:
        """Connect for the first time.

        Args:
            seconds: How long to try; 0 to try once.

        Raises:
            BackendUnavailable: There is no connection.
        """

        async def connect(seconds: float | None) -> None:
            self.session = Session(self._parts, self._channel)
            await self.session.open(seconds)

        await keep_trying(
            connect,
            seconds,
            self._backoff(),
            lambda error: self._parts.health.become("closed", error),
            lambda: self.giving_up,
        )
        self._begin_session()
        self._catch_up()

    async def start(self) -> None:
        """Supervise the session from now on."""
        self._task = self.loop.create_task(self._supervise())
        self._task.add_done_callback(self._ended)
        await asyncio.sleep(0)  # from now on, its end closes the session

    async def wait_connected(self, seconds: float) -> None:
        """Wait until there has been a connection, on this loop, but not longer than this."""
        with contextlib.suppress(TimeoutError):
            async with Deadline(seconds):
                await self._connected.wait()

    async def stop(self) -> None:
        """End the session and the task. If this was cancelled, it may be called again.

        It is called on another loop if its own one does not run any more.
        """
        self._stopping = True
        task = self._task
        if task is not None and not task.done() and self.loop is running_loop():
            task.cancel()
            try:
                await asyncio.wait([task], timeout=self._parts.tuning.stop_timeout)
            finally:
                await self.session.close()
        else:
            await self.session.close()

    async def _supervise(self) -> None:
        parts = self._parts
        backoff = self._backoff()
        try:
            while True:
                opened = time.monotonic()
                lost = await self.session.lost
                if time.monotonic() - opened > parts.tuning.stable_after:
                    backoff = self._backoff()
                error = logs.describe(lost)
                logger.warning("lost the connection to the broker: %s", error)
                parts.health.become("reconnecting", lost)
                # While no channel is wanted, nothing is missed.
                since = parts.health.answered if parts.subscriptions.wanted else time.time()
                dropped = await self._reconnect(backoff)
                self._begin_session()
                self._report_gap(Gap(since, time.time() - since, error))
                self._catch_up(dropped)
        finally:
            await self.session.close()

    async def _reconnect(self, backoff: Backoff) -> int:
        """Make a session; return how many messages were lost that arrived in vain meanwhile."""
        dropped = 0
        while True:
            await self.session.close()
            dropped += self.session.dropped
            if self._stopping:  # and the backend has swallowed the cancellation
                raise asyncio.CancelledError
            await asyncio.sleep(backoff.next())
            self.session = Session(self._parts, self._channel)
            try:
                await self.session.open()
            except Exception as exc:
                self._parts.health.become("reconnecting", exc)
            else:
                if not self.session.lost.done():
                    return dropped + self.session.dropped
                self._parts.health.become("reconnecting", self.session.lost.result())

    def _begin_session(self) -> None:
        self._parts.health.become("connected")
        self._parts.sender.attach(self.session.connection)
        self._connected.set()

    def _report_gap(self, gap: Gap) -> None:
        if self._parts.subscriptions.all_kept:
            logger.warning(
                "connected to the broker again; messages of the last %.1f seconds are read from "
                "the history",
                gap.seconds,
            )
            return
        self._parts.health.count(gaps=1)
        logger.warning(
            "connected to the broker again; messages of the last %.1f seconds may be missing",
            gap.seconds,
        )
        self._on_gap(gap)

    def _catch_up(self, dropped: int = 0) -> None:
        if dropped:
            self._parts.health.count(lost=dropped)
            logger.warning(
                "%d messages were lost that arrived before all channels were subscribed to again: "
                "of the last attempt only %d bytes are kept",
                dropped,
                self._parts.tuning.max_held_back,
            )
        self.session.catch_up(self._probe_interval)

    def _backoff(self) -> Backoff:
        return Backoff(self._parts.tuning.first_backoff, self._parts.tuning.max_backoff)

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if not self._stopping:
            self._on_end(self, error)
