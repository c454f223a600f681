"""Session: one connection to the broker after another, from its making to its end.

A connection is open when the backend has connected, a message to ourselves has come back and all
that is wanted is subscribed to. What arrives before that is kept, for it belongs behind the gap.
All of this happens on one event loop at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from . import life
from .backends.base import Backend, SubscriptionRevoked
from .deadline import Deadline
from .exceptions import BackendUnavailable
from .probe import Probe, location
from .subscriptions import Subscriptions

logger = logging.getLogger("starcast")

# Seconds that a backend has to connect, and for a thousand subscriptions.
CONNECT_TIMEOUT = 10.0

# Messages that wait until everything is subscribed to, and so stand behind the gap.
MAX_EARLY = 10_000


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
        self._early: list[tuple[str, bytes]] | None = None  # what came before it is all back

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
                if channel == self._probe.channel:
                    self._probe.came()
                elif self._early is None or len(self._early) >= MAX_EARLY:
                    self._on_message(channel, data)
                else:
                    self._early.append((channel, data))

        def lost(error: Exception) -> None:
            if not isinstance(error, SubscriptionRevoked) or error.channel == self._probe.channel:
                self._on_lost(error, generation)
            elif generation == self.generation:
                self._subscriptions.revoke(error.channel, str(error))

        self._early = []
        try:
            async with Deadline(seconds):
                await self._backend.start(deliver, lost)
                await self._subscribe_to_probe()
            await self._probe.prove(seconds)
            await self._subscriptions.restore(CONNECT_TIMEOUT)
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
                f"the hub cannot subscribe to its own channel {channel!r}: {words(exc)}"
                f"{location(self._backend)}"
            ) from None

    def catch_up(self) -> None:
        """Let in what came, and who came, before it was all back: the gap is not theirs."""
        early, self._early = self._early or [], None
        for channel, data in early:
            self._on_message(channel, data)
        self._subscriptions.confirm()

    async def close(self) -> None:
        """Disconnect, if there is something to disconnect."""
        self.generation += 1
        self._subscriptions.lose()
        self._probe.forget()
        if not self._started:
            return
        try:
            async with Deadline(life.STOP_TIMEOUT):
                await self._backend.stop()
            self._started = False
        except Exception as exc:
            logger.warning("the connection to the broker was not closed cleanly: %s", words(exc))


def words(error: Exception) -> str:
    """Say what an error says, or what it is."""
    return str(error) or type(error).__name__
