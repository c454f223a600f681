"""Tracks: how far this process has come on each channel that has a history.

A message from the broker is delivered if it is the one that follows. If it is not, or after an
outage, or if the broker has dropped messages without a word, what is missing is read from the
history and delivered in order, and then what has arrived meanwhile. Only what the history does not
have any more is a gap.

A track begins when the channel is first subscribed to and ends when it is no longer wanted, so it
outlives sessions. Everything here happens on the event loop of the connection, except `forget`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, cast

from .. import logs
from ..backends.base import HistoryConnection, Kept, Stored
from ..event import OVERHEAD, Gap
from ..history import Histories, Position
from ..logs import LogLimit
from ..sync.bounded import BoundedQueue
from ..tuning import Tuning
from .health import Health
from .opening import Backoff

if TYPE_CHECKING:
    from .session import Session

logger = logging.getLogger("starcast")

# Messages that are read from the broker at once.
PAGE = 1000

# Seconds between two looks at event loops that have much to deliver.
PAUSE = 0.001

# Channels whose positions are asked for at once.
AT_ONCE = 100

# Bytes that are held back of what arrives for one channel while its history is read.
MAX_HELD = 256 * 1024

FORGOTTEN = "the broker has lost the history of a channel, or no longer has all that was missed"


class Track:
    """One channel's."""

    __slots__ = ("filling", "heard_at", "held", "seen")

    def __init__(self) -> None:
        # What has arrived since the history is being read, which it may not have any more when it
        # is read again. On one loop, so the lock need not lock.
        self.held = BoundedQueue[tuple[bytes, Position, int | None]](
            contextlib.nullcontext(), MAX_HELD
        )
        self.seen: Position | None = None  # that of the newest message that was not delivered
        self.filling: asyncio.Task[None] | None = None
        self.heard_at = time.monotonic()  # when the position was last known to be the newest

    def hold(self, payload: bytes, position: Position, previous: int | None) -> None:
        """Hold a message back. If that is too much, the oldest are read from the history again."""
        cost = len(payload) + OVERHEAD
        while not self.held.has_space(cost):
            oldest, _, _ = self.held.entries[0]
            self.held.drop_first(len(oldest) + OVERHEAD)
        self.held.append((payload, position, previous), cost)

    def drop_held(self) -> None:
        """What has arrived so far is in what will be read."""
        if self.held:
            _, self.seen, _ = self.held.take_all()[-1]


class Tracks:
    """See the module.

    Args:
        lock: The hub's.
        health: Of the link.
        tuning: The hub's.
        histories: Which channels have a history.
        positions: The positions of this process. Guarded by the lock.
        receive: Called with a channel, a payload and a position: delivers the message.
        on_gap: Called with the gap of a channel.
        loops_are_behind: Whether an event loop has so much to deliver that a fill should wait.
    """

    def __init__(
        self,
        lock: AbstractContextManager[object],
        health: Health,
        tuning: Tuning,
        histories: Histories,
        positions: dict[str, Position],
        receive: Callable[[str, bytes, Position | None], None],
        on_gap: Callable[[Gap], None],
        loops_are_behind: Callable[[], bool],
    ) -> None:
        self._lock = lock
        self._health = health
        self._tuning = tuning
        self.histories = histories
        self.positions = positions
        self._receive = receive
        self._on_gap = on_gap
        self._loops_are_behind = loops_are_behind
        self._tracks: dict[str, Track] = {}
        self._limit = LogLimit()

    def kept(self, channel: str, payload: bytes, key: str | None) -> Kept | None:
        """Return what the broker is given to keep; None if the channel has no history."""
        history = self.histories.find(channel)
        if history is None:
            return None
        return Kept(channel, payload, history, key, self.positions.get(channel))

    def forget(self, channel: str) -> None:
        """The channel is not wanted any more. With the lock held, from any thread."""
        self._tracks.pop(channel, None)
        self.positions.pop(channel, None)

    async def read(
        self, session: Session, channel: str, since: int | None, limit: int, reverse: bool = False
    ) -> Stored:
        """Return what is kept of a channel that has a history: see `HistoryConnection.read_kept`.

        Raises:
            Exception: The connection is broken, or the broker refused.
        """
        history = self.histories.find(channel)
        assert history is not None
        known = self.positions.get(channel)
        connection = cast(HistoryConnection, session.connection)
        return await connection.read_kept(channel, history, since, limit, reverse, known)

    def has_started(self, channel: str) -> bool:
        """Whether it is known where the channel is, if it has a history."""
        return channel in self.positions or self.histories.find(channel) is None

    async def start(self, session: Session, channel: str) -> None:
        """Note where the channel is, if that is not known. It is subscribed to.

        Raises:
            Exception: The broker did not say.
        """
        if self.has_started(channel):
            return
        track = Track()
        with self._lock:
            self._tracks[channel] = track
        stored = await self.read(session, channel, None, 0)
        with self._lock:
            if self._tracks.get(channel) is not track:
                return  # it is not wanted any more
            self.positions[channel] = stored.position
        self._release(session, channel, track)

    def arrived(
        self,
        session: Session,
        channel: str,
        payload: bytes,
        position: Position,
        previous: int | None,
    ) -> None:
        """Deliver a message, or fill the channel if others are missing before it."""
        track = self._tracks.get(channel)
        if track is None:
            if self.histories.find(channel) is None:  # here; whoever has published it keeps one
                self._receive(channel, payload, None)
            return
        here = self.positions.get(channel)
        if here is None or track.filling is not None:
            track.hold(payload, position, previous)
            return
        if previous is None:
            previous = position.offset - 1
        if position.epoch == here.epoch:
            if position.offset <= here.offset:
                return  # it was delivered before
            follows = previous <= here.offset
        else:
            follows = previous == 0
        if follows:
            track.heard_at = time.monotonic()
            self._receive(channel, payload, position)
        else:
            track.seen = position
            self._fill(session, channel, track)

    def _release(self, session: Session, channel: str, track: Track) -> None:
        """Take what has arrived while the history was read: some of it is in there."""
        for held in track.held.take_all():
            self.arrived(session, channel, *held)

    def resume(self, session: Session) -> None:
        """Fill all channels, after an outage."""
        for channel, track in self._all():
            track.filling = None  # its task ended with its session, or with the event loop of that
            if channel in self.positions:  # pragma: no branch  # or it is just being asked for
                self._fill(session, channel, track)
        if self.histories.any:
            session.run(self._keep_checking(session))

    def restored(self, session: Session, channel: str) -> bool:
        """Fill a channel that the broker refused; False if it has no history."""
        track = self._tracks.get(channel)
        if track is None or channel not in self.positions:
            return False
        if session.ready:  # if not, `resume` is still to come
            self._fill(session, channel, track)
        return True

    async def catch_up(self, session: Session, channel: str) -> None:
        """Be where the broker is now, or later. The caller has acquired the channel."""
        track = self._tracks[channel]
        # What is under way may have read before the caller asked. The caller does not wait longer.
        for _ in range(1 if track.filling is None else 2):
            filling = self._fill(session, channel, track)
            await asyncio.wait([filling], timeout=self._tuning.publish_timeout)

    def _all(self) -> list[tuple[str, Track]]:
        with self._lock:  # other threads forget some
            return list(self._tracks.items())

    def _fill(self, session: Session, channel: str, track: Track) -> asyncio.Task[None]:
        if track.filling is None:
            track.filling = session.run(self._read_missing(session, channel, track))
        return track.filling

    async def _read_missing(self, session: Session, channel: str, track: Track) -> None:
        backoff = Backoff(self._tuning.first_backoff, self._tuning.subscribe_backoff)
        try:
            while self._tracks.get(channel) is track:
                try:
                    done = await self._read_page(session, channel, track)
                except Exception as exc:
                    self._health.note(logs.describe(exc))
                    if self._limit.allows("unreadable", channel):
                        logger.warning(
                            "the broker does not return the history of the channel %r, which is "
                            "tried again: %s",
                            channel,
                            logs.describe(exc),
                        )
                    await asyncio.sleep(backoff.next())
                else:
                    if done:
                        track.filling = None
                        self._release(session, channel, track)
                        return
        finally:
            if track.filling is asyncio.current_task():
                track.filling = None

    async def _read_page(self, session: Session, channel: str, track: Track) -> bool:
        """Deliver some of what is missing; return whether that is all."""
        here, since = self.positions[channel], track.heard_at
        track.drop_held()
        stored = await self.read(session, channel, here.offset, PAGE)
        lost = not self._is_complete(channel, stored, since)
        if stored.position.epoch != here.epoch:
            lost = True
            stored = await self.read(session, channel, None, PAGE)
        if self._tracks.get(channel) is not track:
            return True  # it was left meanwhile
        if lost:
            self._tell_gap(channel, since)
        end = time.monotonic() + self._tuning.publish_timeout
        for offset, payload in stored.messages:
            while (  # noqa: ASYNC110  # nothing tells when a loop has delivered something
                self._loops_are_behind() and time.monotonic() < end
            ):
                await asyncio.sleep(PAUSE)
            if self._tracks.get(channel) is not track:  # pragma: no cover  # left, as above
                return True
            self._receive(channel, payload, Position(stored.position.epoch, offset))
        is_all = len(stored.messages) < PAGE
        if is_all:
            with self._lock:
                if channel in self.positions:  # pragma: no branch  # another thread may leave it
                    self.positions[channel] = stored.position
            track.heard_at = time.monotonic()
            is_all = track.seen is None or not _is_behind(stored.position, track.seen)
            track.seen = None
        return is_all

    def _is_complete(self, channel: str, stored: Stored, heard_at: float) -> bool:
        """Whether nothing has expired that came after what this process has.

        Nothing has if this process was up to date a while ago, and that is less than messages are
        kept. It is half of that here: what arrives may have been on its way for some time.
        """
        if stored.complete is None:
            history = self.histories.find(channel)
            assert history is not None
            return time.monotonic() - heard_at < history.ttl / 2
        return bool(stored.complete)

    def _tell_gap(self, channel: str, heard_at: float) -> None:
        self._health.count(gaps=1)
        seconds = time.monotonic() - heard_at
        if self._limit.allows("forgotten", channel):
            logger.warning("messages of the channel %r may be missing: %s", channel, FORGOTTEN)
        self._on_gap(Gap(time.time() - seconds, seconds, FORGOTTEN, channel))

    async def _keep_checking(self, session: Session) -> None:
        """Look for messages that the broker has dropped, where nothing has arrived for a while."""
        interval = self._tuning.position_interval
        while True:
            await asyncio.sleep(interval / 2)
            limit = time.monotonic() - interval
            silent = [channel for channel, it in self._all() if it.heard_at <= limit]
            for start in range(0, len(silent), AT_ONCE):
                some = silent[start : start + AT_ONCE]
                await asyncio.gather(
                    *(self._check(session, channel) for channel in some), return_exceptions=True
                )

    async def _check(self, session: Session, channel: str) -> None:
        track, here = self._tracks.get(channel), self.positions.get(channel)
        if track is None or here is None or track.filling is not None:
            return  # pragma: no cover  # it was left, or something has arrived, a moment ago
        stored = await self.read(session, channel, here.offset, 1)
        # A channel whose messages have expired may get another position without a new message.
        is_news = stored.messages or stored.complete is False or stored.position.epoch != here.epoch
        if is_news and here == self.positions.get(channel):
            self._fill(session, channel, track)
        else:
            track.heard_at = time.monotonic()


def _is_behind(position: Position, seen: Position) -> bool:
    """Whether what was seen is not reached yet."""
    return seen.epoch != position.epoch or seen.offset > position.offset
