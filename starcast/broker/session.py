"""Session: one connection to the broker after another, from its making to its end.

A connection is open when the backend has connected, a message to ourselves has come back and all
that is wanted is subscribed to. What arrives before that is kept, for it belongs behind the gap.
All of this happens on one event loop at a time.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from .. import logs
from ..backends.base import Backend, SubscriptionRevoked
from ..event import OVERHEAD
from ..exceptions import BackendUnavailable
from ..sync.bounded import BoundedQueue
from ..sync.deadline import Deadline
from . import life
from .probe import Probe, location
from .subscriptions import Subscriptions

logger = logging.getLogger("starcast")

# Seconds that a backend has to connect, and for a thousand subscriptions.
CONNECT_TIMEOUT = 10.0

# Bytes of messages that wait until everything is subscribed to, and so stand behind the gap; each
# counts `event.OVERHEAD` more. Half of what may wait for an event loop (`Tuning.max_pending`), for
# they are handed over in one turn of it.
MAX_EARLY = 8 * 1024 * 1024


class Session:
    """See the module.

    Args:
        backend: What talks to the broker.
        probe: Makes sure that the broker delivers.
        subscriptions: What is wanted.
        on_message: Called with the channel and the payload of each message.
        on_lost: Called with the reason and the generation when a connection breaks.

    Attributes:
        generation: Of the connection: what an earlier one brings does not count.
        dropped: Messages that were lost because there was no space for them before everything was
            subscribed to, or because it never was. They were the oldest ones, so they belong to the
            gap before the others.
    """

    def __init__(
        self,
        backend: Backend,
        probe: Probe,
        subscriptions: Subscriptions,
        on_message: Callable[[str, bytes], None],
        on_lost: Callable[[Exception, int], None],
    ) -> None:
        self.generation = 0
        self._backend = backend
        self._probe = probe
        self._subscriptions = subscriptions
        self._on_message = on_message
        self._on_lost = on_lost
        self._started = False  # the backend has to be stopped
        self.dropped = 0
        self._excess = 0  # how many of these since the connection was lost
        # What came before everything was subscribed to; None once it is.
        self._early: BoundedQueue[tuple[str, bytes]] | None = None

    async def open(self, seconds: float | None = None) -> None:
        """Connect and subscribe, once a message to ourselves has come back.

        Args:
            seconds: How long connecting may take, 10 at most, and the message to ourselves.

        Raises:
            BackendUnavailable: There is no connection, or it delivers nothing.
        """
        seconds = CONNECT_TIMEOUT if seconds is None else min(seconds, CONNECT_TIMEOUT)
        self.generation = generation = self.generation + 1
        self._started = True

        def deliver(channel: str, data: bytes) -> None:
            if generation == self.generation:
                self._probe.message_at = time.monotonic()
                if channel == self._probe.channel:
                    self._probe.came(data)
                elif self._early is not None:
                    self._hold_back(self._early, channel, data)
                else:
                    if channel in self._subscriptions.refusals:
                        self._subscriptions.come_back(channel)
                    self._on_message(channel, data)

        def lost(error: Exception) -> None:
            if not isinstance(error, SubscriptionRevoked) or error.channel == self._probe.channel:
                self._on_lost(error, generation)
            elif generation == self.generation:
                self._subscriptions.revoke(error.channel, str(error))

        self._early = BoundedQueue(contextlib.nullcontext(), MAX_EARLY)  # of this loop only
        try:
            async with Deadline(seconds):
                await self._backend.start(deliver, lost)
                await self._subscribe_to_probe()
            await self._probe.prove(seconds)
            await self._subscriptions.restore(CONNECT_TIMEOUT, self._probe.heard_at)
        except TimeoutError:
            await self.close()
            raise BackendUnavailable(
                f"the broker did not answer in time{location(self._backend)}"
            ) from None
        except BaseException:
            await self.close()
            raise

    async def _subscribe_to_probe(self) -> None:
        channel = self._probe.channel
        try:
            await self._backend.subscribe(channel)
        except Exception as exc:
            raise BackendUnavailable(
                f"the hub cannot subscribe to its own channel {channel!r}: {logs.describe(exc)}"
                f"{location(self._backend)}"
            ) from None

    def _hold_back(self, early: BoundedQueue[tuple[str, bytes]], channel: str, data: bytes) -> None:
        cost = len(data) + OVERHEAD
        while not early.has_space(cost):
            _, oldest = early.entries[0]
            early.drop_first(len(oldest) + OVERHEAD)
            self._excess += 1
        early.append((channel, data), cost)

    def catch_up(self) -> None:
        """Let in what came, and who came, before it was all back: the gap is not theirs."""
        early, self._early = self._early, None
        assert early is not None  # `open` has made it
        excess, self._excess = self._excess, 0
        if excess:
            self.dropped += excess
            logger.warning(
                "%d messages were lost that arrived before all channels were subscribed to again: "
                "of the last attempt only %d bytes are kept",
                excess,
                MAX_EARLY,
            )
        for channel, data in early.entries:
            self._on_message(channel, data)
        self._subscriptions.confirm()

    async def close(self) -> None:
        """Disconnect, if there is something to disconnect."""
        self.generation += 1
        if self._early is not None:
            self._excess += len(self._early)
            self._early = None
        self._subscriptions.lose()
        self._probe.forget()
        if not self._started:
            return
        try:
            async with Deadline(life.STOP_TIMEOUT):
                await self._backend.stop()
            self._started = False
        except Exception as exc:
            logger.warning(
                "the connection to the broker was not closed cleanly: %s", logs.describe(exc)
            )
