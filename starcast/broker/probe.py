"""Probe: messages that a hub sends to itself by way of the broker.

A connection may be open and yet carry nothing: the broker is frozen, a proxy in between swallows
what it does not understand, or everyone may publish to a channel and no one may subscribe to it. So
a connection only counts as open once a probe has come back, and is probed again now and then.

On a slow connection a probe waits behind other messages, for seconds or more. Anything that arrives
meanwhile is a sign of life, so the connection is dead only if nothing has arrived for a while.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..backends.base import Backend, BrokerConnection
from ..exceptions import BackendUnavailable
from ..sync.deadline import Deadline
from ..tuning import Tuning
from .health import Health
from .sender import LOST, Sender

# How the names of the channels begin that probes are sent to.
PROBE_CHANNEL = "starcast-probe-"


def location(backend: Backend) -> str:
    """Return where the broker is, to be appended to a sentence; empty if it is unknown."""
    address = getattr(backend, "address", None)
    return f" ({address})" if address else ""


class Probe:
    """Probes one connection, on its event loop.

    Args:
        channel: Where the probes are sent; nothing else subscribes to it.
        backend: Knows where the broker is.
        sender: Sends the probes, except for the first one.
        health: Is told when a probe has come back.
        tuning: The hub's.
    """

    def __init__(
        self, channel: str, backend: Backend, sender: Sender, health: Health, tuning: Tuning
    ) -> None:
        self.channel = channel
        self._backend = backend
        self._sender = sender
        self._health = health
        self._tuning = tuning
        self._asked = 0.0  # when the last probe was sent
        # Its result is empty when the probe has come back, or the reason why it will not. All who
        # ask meanwhile share it: many health checks send one message.
        self._pending: asyncio.Future[str] | None = None

    def ask(self) -> asyncio.Future[str]:
        """Send a probe. The result must not be cancelled; it is the error, or empty."""
        pending = self._pending
        if pending is None or pending.done():
            pending = self._begin()
            self._sender.probe(self.channel, self.fail)
        return pending

    def arrived(self) -> None:
        """A probe has come back."""
        self._health.answered = self._asked
        self.fail("")

    def fail(self, why: str = LOST) -> None:
        """The probe will not come back."""
        pending, self._pending = self._pending, None
        # If the loop is closed, nothing waits there any more.
        if pending is not None and not pending.done() and not pending.get_loop().is_closed():
            pending.set_result(why)

    async def prove(self, connection: BrokerConnection, seconds: float) -> None:
        """Send the first message of a new connection, on which nothing else is sent yet.

        Raises:
            BackendUnavailable: It has not come back in time.
        """
        seconds = min(seconds, self._tuning.probe_timeout)
        pending = self._begin()
        try:
            async with Deadline(seconds):
                await connection.publish([(self.channel, b"")])
        except TimeoutError:
            raise BackendUnavailable(
                f"the broker did not answer in time{location(self._backend)}"
            ) from None
        except Exception as exc:
            raise BackendUnavailable(
                f"the hub cannot publish to its own channel {self.channel!r}: {exc}"
                f"{location(self._backend)}"
            ) from None
        try:
            async with Deadline(seconds):
                error = await asyncio.shield(pending)
        except TimeoutError:
            error = "the broker takes what is published and delivers nothing of it"
            if hint := getattr(self._backend, "if_silent", ""):
                error = f"{error}; {hint}"
            error += location(self._backend)
        if error:
            raise BackendUnavailable(error)

    async def keep_asking(
        self, interval: float, is_needed: Callable[[], bool], heard_at: Callable[[], float]
    ) -> None:
        """Send a probe every so many seconds, until one does not come back.

        None is sent while nothing is published and `is_needed` returns False.

        Raises:
            BackendUnavailable: The connection is broken.
        """
        published = self._sender.published
        while True:
            await asyncio.sleep(interval)
            if published == self._sender.published and not is_needed():
                continue
            published = self._sender.published
            # The probe waits behind what is being sent.
            patience = self._sender.unconfirmed_size / self._tuning.min_throughput
            patience += self._tuning.probe_timeout
            try:
                async with Deadline(patience, heard_at):
                    error = await asyncio.shield(self.ask())
            except TimeoutError:
                raise BackendUnavailable(
                    f"the broker did not answer for {patience:.0f} seconds"
                ) from None
            if error:
                raise BackendUnavailable(
                    f"the hub cannot publish to its own channel {self.channel!r}: {error}"
                )

    def _begin(self) -> asyncio.Future[str]:
        self._asked = time.time()
        self._pending = asyncio.get_running_loop().create_future()
        return self._pending
