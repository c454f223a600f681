"""Subscriptions: the channels that this process wants from the broker, and those that it has.

`hold`, `want` and `release` may be called from any thread: they note what is wanted under the lock
and have the event loop of the connection make both agree. Each channel has a task while its
subscription changes, so that the changes of one channel happen in turn.

A channel that the broker refuses to those who ask for it is not theirs. One that somebody has
already, and that is refused after an outage or taken away, is asked for again and again, and when
it is back there is a gap: of this channel, while the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any, Protocol

from .. import logs
from ..backends.base import Backend
from ..gap import Gap
from ..logs import LogLimit
from ..sync.deadline import Deadline
from .opening import Backoff
from .sender import Taken

logger = logging.getLogger("starcast")

# Subscriptions that are asked for at the same time when the connection is back.
AT_ONCE = 1000

# Seconds after which a channel that was refused is asked for again, at most.
LONGEST_WAIT = 10.0


class Host(Protocol):
    """What the subscriptions need of the connection."""

    @property
    def alive(self) -> bool:
        """Whether the event loop of the connection is still there."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection, with all its subscriptions."""

    @property
    def broken(self) -> bool:
        """Whether the connection has broken. On its loop."""

    @property
    def is_here(self) -> bool:
        """Whether this is the loop of the connection, and it goes on."""

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call it on the loop of the connection."""

    def run(self, work: Coroutine[Any, Any, None]) -> object:
        """Have a task for it, on this loop, which ends with the connection."""

    @property
    def heard(self) -> float:
        """When something was asked that the broker has answered, in seconds since 1970."""

    def hear(self, asked: float) -> None:
        """Note that the broker has answered what was asked then."""

    def note(self, error: str) -> None:
        """Note what the broker has refused."""

    def tell_gap(self, gap: Gap) -> None:
        """Say that a channel is back that was refused."""


class Refusal:
    """That the broker refuses a channel which somebody has."""

    __slots__ = ("backoff", "pending", "since", "why")

    def __init__(self, since: float) -> None:
        self.why = ""
        self.since = since
        self.backoff = Backoff(LONGEST_WAIT)
        self.pending = False  # the next attempt has its time

    def over(self, channel: str) -> Gap:
        """Return the gap that it was."""
        return Gap(self.since, time.time() - self.since, self.why, channel)


class Subscription:
    """A channel that somebody wants."""

    __slots__ = ("changing", "count", "subscribed", "waiting")

    def __init__(self) -> None:
        self.count = 0
        self.subscribed = False
        self.changing = False
        self.waiting: list[Taken] = []


class Subscriptions:
    """See the module.

    Attributes:
        holds: The channels, guarded by the lock.
        refusals: Those of them that the broker refuses and somebody has, guarded by the lock.
    """

    def __init__(self, backend: Backend, lock: AbstractContextManager[object], host: Host) -> None:
        self.holds: dict[str, Subscription] = {}
        self.refusals: dict[str, Refusal] = {}
        self._backend = backend
        self._lock = lock
        self._host = host
        # For channels that somebody has, and for those that strangers may ask for without end.
        self._limits = {True: LogLimit(), False: LogLimit()}
        self._back_limit = LogLimit()
        self._generation = 0  # of the connection: what was asked of an earlier one does not count

    # From any thread

    async def hold(self, channel: str) -> None:
        """Want a channel, and return when the broker has confirmed it.

        Raises:
            BackendUnavailable: It has not within two seconds. The channel is not held then.
        """
        with self._lock:
            hold = self.holds.setdefault(channel, Subscription())
            hold.count += 1
            if hold.subscribed and self._host.connected:
                return
            taken = Taken()
            hold.waiting.append(taken)
        try:
            self._host.call(self._change, channel)
            await taken.wait()
        except BaseException:
            with self._lock, contextlib.suppress(ValueError):
                hold.waiting.remove(taken)
            self.release(channel)
            raise

    def want(self, channel: str) -> None:
        """Want a channel that is wanted already, without waiting."""
        with self._lock:
            self.holds.setdefault(channel, Subscription()).count += 1
        self._host.call(self._change, channel)

    def release(self, channel: str) -> None:
        """Want it no more; once for each `hold` or `want`."""
        with self._lock:
            hold = self.holds[channel]
            hold.count -= 1
            if hold.count:
                return
        self._host.call(self._change, channel)

    @property
    def wanted(self) -> bool:
        """Whether anybody wants any channel."""
        with self._lock:
            return any(hold.count for hold in self.holds.values())

    @property
    def refused(self) -> int:
        """How many channels the broker refuses that somebody has."""
        with self._lock:
            return sum(
                bool(hold.count) for name, hold in self.holds.items() if name in self.refusals
            )

    def fail(self, why: str) -> None:
        """Tell everybody who waits that they wait in vain."""
        with self._lock:
            waiting = [taken for hold in self.holds.values() for taken in hold.waiting]
        for taken in waiting:
            taken.fail(why)

    # On the loop of the connection

    def lose(self) -> None:
        """The connection is gone, and all subscriptions with it."""
        self._generation += 1
        with self._lock:
            self.holds = {name: hold for name, hold in self.holds.items() if hold.count}
            for hold in self.holds.values():
                hold.subscribed = hold.changing = False
            self.refusals = {name: it for name, it in self.refusals.items() if name in self.holds}
            for refusal in self.refusals.values():
                refusal.pending = False

    async def restore(self, seconds: float, heard_at: Callable[[], float]) -> None:
        """Subscribe to everything that is wanted, before the connection counts as open.

        Raises:
            TimeoutError: The broker was silent for so many seconds and had not confirmed a thousand
                of them: its answers may wait behind what arrives on the channels before. See
                `Overdue`.
        """
        tried: set[str] = set()
        while not self._host.broken and (missing := self._missing(tried)):
            tried.update(missing)
            for start in range(0, len(missing), AT_ONCE):
                some = missing[start : start + AT_ONCE]
                async with Deadline(seconds, heard_at):
                    await asyncio.gather(*map(self._subscribe, some))

    def _missing(self, tried: set[str]) -> list[str]:
        """Return the channels to subscribe to. Nobody else changes those until it is connected."""
        with self._lock:
            missing = [
                channel
                for channel, hold in self.holds.items()
                if hold.count and not hold.subscribed and channel not in tried
            ]
            for channel in missing:
                self.holds[channel].changing = True
        return missing

    def resume(self) -> None:
        """Follow changes again, and catch up on those that came meanwhile."""
        with self._lock:
            channels = list(self.holds)
            for hold in self.holds.values():
                hold.changing = False
        for channel in channels:
            self._change(channel)

    def confirm(self) -> None:
        """Tell those who came while it was connecting."""
        waiting: list[Taken] = []
        with self._lock:
            for hold in self.holds.values():
                if hold.subscribed:
                    waiting += hold.waiting
                    hold.waiting = []
        for taken in waiting:
            taken.set()

    def _change(self, channel: str) -> None:
        """Begin to do what is wanted, unless that is being done."""
        host = self._host
        with self._lock:
            hold = self.holds.get(channel)
            if hold is None or hold.changing:
                return
            if not hold.count and not (hold.subscribed and host.alive):
                del self.holds[channel]
                self.refusals.pop(channel, None)
                return
            if not (host.is_here and host.connected):
                return  # whoever connects next will do it
            if bool(hold.count) == hold.subscribed:
                return
            hold.changing = True
        host.run(self._settle(channel, hold, self._generation))

    async def _settle(self, channel: str, hold: Subscription, generation: int) -> None:
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
        asked = time.time()
        why = ""
        waiting: list[Taken] = []
        try:
            await self._backend.subscribe(channel)
        except Exception as exc:
            why = logs.describe(exc)
        with self._lock:
            hold = self.holds.get(channel)
            if hold is None or not self._host.is_here or generation != self._generation:
                return False
            if why and self._host.broken:
                return False  # and nobody is told: it may be back in time
            hold.subscribed = not why
            had = hold.count > len(hold.waiting)
            if why or self._host.connected:
                waiting, hold.waiting = hold.waiting, []
        if why:
            self._refuse(channel, why, had)
        else:
            if self._host.connected:
                self._host.hear(asked)
            self.come_back(channel)
        for taken in waiting:
            if why:
                taken.fail(why)
            else:
                taken.set()
        return not why

    def come_back(self, channel: str) -> None:
        """If a channel was refused, say that it is back.

        Its first message may come in the same turn as the confirmation, which the task that waits
        for it sees only in the next one: the gap goes before that message.
        """
        with self._lock:
            refusal = self.refusals.pop(channel, None)
        if refusal is None:
            return
        gap = refusal.over(channel)
        if self._back_limit.allows("back", channel):
            logger.warning(
                "subscribed to the channel %r again; messages of the last %.1f seconds "
                "may be missing",
                channel,
                gap.seconds,
            )
        self._host.tell_gap(gap)

    def revoke(self, channel: str, why: str) -> None:
        """The broker has taken a channel away."""
        with self._lock:
            hold = self.holds.get(channel)
            if hold is None or not hold.subscribed or self._host.broken:
                return
            hold.subscribed = False
        self._refuse(channel, why, had=True)

    def _refuse(self, channel: str, why: str, had: bool) -> None:
        """Say that a channel was refused; if somebody has it, ask for it again in a while."""
        if (channel not in self.refusals or not had) and self._limits[had].allows(
            "refused", channel
        ):
            logger.warning(
                "the broker refused the subscription to the channel %r%s: %s",
                channel,
                ", which is asked for again until it is back" if had else "",
                logs.escape(why),
            )
        if not had:
            return
        with self._lock:
            refusal = self.refusals.setdefault(channel, Refusal(self._host.heard))
        refusal.why = why
        self._host.note(why)
        if not refusal.pending:
            refusal.pending = True
            loop = asyncio.get_running_loop()
            loop.call_later(refusal.backoff.next(), self._again, channel, refusal, self._generation)

    def _again(self, channel: str, refusal: Refusal, generation: int) -> None:
        if generation == self._generation:
            refusal.pending = False
            self._change(channel)
