"""Subscriptions: the channels that this process wants from the broker, and those that it has.

`acquire`, `acquire_again` and `release` may be called from any thread: they record what is wanted,
and the loop of the session makes what is confirmed agree with it. A channel has a task while its
subscription changes, so the changes of one channel happen one after another.

If the broker refuses a channel to the clients that join it, they get the error. A channel that
already has members, and that is refused after an outage or revoked, is tried again and again. When
it is restored there is a gap, of this channel only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from .. import logs
from ..event import Gap
from ..logs import LogLimit
from ..sync.deadline import Deadline
from ..tuning import Tuning
from .health import Health
from .opening import Backoff
from .sender import Ack
from .tracks import Tracks

if TYPE_CHECKING:
    from .session import Session

logger = logging.getLogger("starcast")


class Subscription:
    """A channel that is wanted: how often, and by whom it was not confirmed yet."""

    __slots__ = ("count", "waiting")

    def __init__(self) -> None:
        self.count = 0
        self.waiting: list[Ack] = []


class Refusal:
    """A channel that has members and that the broker refuses."""

    __slots__ = ("backoff", "retry", "since", "why")

    def __init__(self, since: float, backoff: Backoff) -> None:
        self.why = ""
        self.since = since
        self.backoff = backoff
        self.retry: asyncio.TimerHandle | None = None


class Subscriptions:
    """Makes the channels that the broker has confirmed agree with those that are wanted.

    Args:
        lock: The hub's.
        health: Of the link.
        tuning: The hub's.
        tracks: How far this process has come on the channels that have a history.
        on_gap: Called with the gap of a channel that is restored and has no history.

    Attributes:
        refusals: The channels that have members and that the broker refuses. Guarded by the lock.
    """

    def __init__(
        self,
        lock: AbstractContextManager[object],
        health: Health,
        tuning: Tuning,
        tracks: Tracks,
        on_gap: Callable[[Gap], None],
    ) -> None:
        self._lock = lock
        self._tracks = tracks
        self._health = health
        self._tuning = tuning
        self._on_gap = on_gap
        # Guarded by the lock:
        self.refusals: dict[str, Refusal] = {}
        self._wanted: dict[str, Subscription] = {}
        self._confirmed: set[str] = set()
        self._session: Session | None = None
        # On the loop of the session:
        self._changing: dict[str, asyncio.Task[None]] = {}
        # Of channels that have members, and of those that clients may ask for without end.
        self._refused_limits = {True: LogLimit(), False: LogLimit()}
        self._restored_limit = LogLimit()

    # From any thread

    async def acquire(self, channel: str) -> None:
        """Want a channel, and return when the broker has confirmed it.

        Raises:
            BackendUnavailable: It did not within two seconds. The channel is not acquired then.
        """
        with self._lock:
            subscription = self._wanted.setdefault(channel, Subscription())
            subscription.count += 1
            session = self._session
            if session is not None and session.ready and channel in self._confirmed:
                return
            ack = Ack(self._tuning.publish_timeout)
            subscription.waiting.append(ack)
        try:
            self._schedule(channel)
            await ack.wait()
        except BaseException:
            with self._lock, contextlib.suppress(ValueError):
                subscription.waiting.remove(ack)
            self.release(channel)
            raise

    def acquire_again(self, channel: str) -> None:
        """Want a channel that the caller has already, without waiting."""
        with self._lock:
            self._wanted.setdefault(channel, Subscription()).count += 1
        self._schedule(channel)

    def release(self, channel: str) -> None:
        """Want it no more. Call this once for each `acquire` and `acquire_again`."""
        with self._lock:
            subscription = self._wanted[channel]
            subscription.count -= 1
            if subscription.count:
                return
            del self._wanted[channel]
            self.refusals.pop(channel, None)
            if channel not in self._confirmed:
                self._tracks.forget(channel)
        self._schedule(channel)

    @property
    def wanted(self) -> bool:
        """Whether any channel is wanted."""
        return bool(self._wanted)

    @property
    def all_kept(self) -> bool:
        """Whether all channels that are wanted have a history, so that nothing can be missing."""
        find = self._tracks.histories.find
        with self._lock:
            return bool(self._wanted) and all(find(channel) for channel in self._wanted)

    @property
    def count(self) -> int:
        """How many channels are wanted, or still subscribed to. With the lock held."""
        return len(self._wanted.keys() | self._confirmed)

    def fail(self, why: str) -> None:
        """Fail every `acquire` that is waiting."""
        with self._lock:
            waiting = [ack for it in self._wanted.values() for ack in it.waiting]
        for ack in waiting:
            ack.fail(why)

    def _schedule(self, channel: str) -> None:
        session = self._session
        if session is not None:
            session.call(self._reconcile, session, channel)

    # On the loop of the session

    async def attach(self, session: Session) -> None:
        """Subscribe to everything that is wanted, and follow changes from now on.

        Raises:
            TimeoutError: The broker was silent for too long, with a thousand of them unconfirmed.
        """
        with self._lock:
            self._session = session
            channels = list(self._wanted)
        at_once = self._tuning.max_subscribing
        for start in range(0, len(channels), at_once):
            some = channels[start : start + at_once]
            for channel in some:
                self._reconcile(session, channel)
            tasks = [self._changing[channel] for channel in some if channel in self._changing]
            # The answers may wait behind messages of the channels that are confirmed already.
            async with Deadline(self._tuning.connect_timeout, session.heard_at):
                await asyncio.gather(*tasks, return_exceptions=True)

    def confirm(self) -> None:
        """The session is ready: confirm the channels that were acquired while it was opened."""
        waiting: list[Ack] = []
        with self._lock:
            for channel in self._confirmed & self._wanted.keys():
                subscription = self._wanted[channel]
                waiting += subscription.waiting
                subscription.waiting = []
        for ack in waiting:
            ack.set()

    def detach(self, session: Session) -> None:
        """The session has ended, and all subscriptions with it."""
        with self._lock:
            if self._session is not session:
                return
            self._session = None
            for channel in self._confirmed - self._wanted.keys():
                self._tracks.forget(channel)
            self._confirmed.clear()
            refusals = list(self.refusals.values())
        self._changing.clear()
        for refusal in refusals:
            refusal.retry = None

    def _reconcile(self, session: Session, channel: str) -> None:
        """Begin to do what is wanted, unless that is done or being done."""
        if session is self._session and channel not in self._changing and self._differs(channel):
            self._changing[channel] = session.run(self._settle(session, channel))

    def _differs(self, channel: str) -> bool:
        with self._lock:
            return (channel in self._wanted) != (channel in self._confirmed)

    async def _settle(self, session: Session, channel: str) -> None:
        while session is self._session and self._differs(channel):
            with self._lock:
                is_wanted = channel in self._wanted
                if not is_wanted:
                    self._confirmed.discard(channel)  # a new member has to wait
                    self._tracks.forget(channel)
            if not is_wanted:
                with contextlib.suppress(Exception):  # the connection is broken
                    await session.connection.unsubscribe(channel)
            elif not await self._subscribe(session, channel):
                break  # until it is acquired, or tried again
        if session is self._session:
            del self._changing[channel]

    async def _subscribe(self, session: Session, channel: str) -> bool:
        """Subscribe, and confirm it if the session is ready; return False if it was refused."""
        asked = time.time()
        why = ""
        try:
            await session.connection.subscribe(channel)
            await self._tracks.start(session, channel)
            while not self._confirm(session, channel):
                await self._tracks.start(session, channel)
        except Exception as exc:
            why = logs.describe(exc)
        is_held = False
        waiting: list[Ack] = []
        with self._lock:
            if session is not self._session:
                return False  # and this is not reported: the next session may be in time
            if subscription := self._wanted.get(channel):
                is_held = subscription.count > len(subscription.waiting)
                if why or session.ready:
                    waiting, subscription.waiting = subscription.waiting, []
        if why:
            self._refuse(session, channel, why, is_held)
        else:
            if session.ready:
                self._health.answered = asked
            self.restored(channel)
        for ack in waiting:
            if why:
                ack.fail(why)
            else:
                ack.set()
        return not why

    def _confirm(self, session: Session, channel: str) -> bool:
        """Note that it is subscribed to; False if it was released and acquired again meanwhile.

        Then its position is not known any more.
        """
        with self._lock:
            if channel in self._wanted and not self._tracks.has_started(channel):
                return False
            if session is self._session:
                self._confirmed.add(channel)
            return True

    def restored(self, channel: str) -> None:
        """The broker delivers a channel. If it was refused until now, report the gap.

        A message may arrive in the same iteration as the confirmation, which the task that awaits
        it only sees in the next one: the gap goes before that message.
        """
        with self._lock:
            refusal = self.refusals.pop(channel, None)
        session = self._session
        if refusal is None or (session and self._tracks.restored(session, channel)):
            return
        gap = Gap(refusal.since, time.time() - refusal.since, refusal.why, channel)
        if self._restored_limit.allows("restored", channel):
            logger.warning(
                "subscribed to the channel %r again; messages of the last %.1f seconds "
                "may be missing",
                channel,
                gap.seconds,
            )
        self._on_gap(gap)

    def revoke(self, channel: str, why: str) -> None:
        """The broker has stopped delivering a channel."""
        session = self._session
        with self._lock:
            is_held = channel in self._confirmed and channel in self._wanted
            self._confirmed.discard(channel)
        if session is not None and is_held:
            self._refuse(session, channel, why, is_held=True)

    def _refuse(self, session: Session, channel: str, why: str, is_held: bool) -> None:
        """Log that a channel is refused. If it has members, try it again later."""
        limit = self._refused_limits[is_held]
        if not (is_held and channel in self.refusals) and limit.allows("refused", channel):
            logger.warning(
                "the broker refused the subscription to the channel %r%s: %s",
                channel,
                ", which is tried again until it is restored" if is_held else "",
                logs.escape(why),
            )
        if not is_held:
            return
        self._health.note(why)
        with self._lock:
            if (
                channel not in self._wanted
            ):  # pragma: no cover  # another thread released it just now
                return
            if channel not in self.refusals:
                backoff = Backoff(self._tuning.first_backoff, self._tuning.subscribe_backoff)
                self.refusals[channel] = Refusal(self._health.answered, backoff)
            refusal = self.refusals[channel]
        refusal.why = why
        if refusal.retry is None:
            wait = refusal.backoff.next()
            refusal.retry = session.loop.call_later(wait, self._retry, session, channel, refusal)

    def _retry(self, session: Session, channel: str, refusal: Refusal) -> None:
        if session is self._session:
            refusal.retry = None
            self._reconcile(session, channel)
