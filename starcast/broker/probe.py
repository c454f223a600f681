"""Probe: messages that a hub sends to itself by way of the broker.

A connection may be open and yet carry nothing: the broker is frozen, a proxy in between swallows
what it does not understand, nobody may subscribe to what everybody may publish. So a connection
counts as open only when a message to ourselves has come back, and is asked for one now and then.
All of this happens on the event loop of the connection.

On a line that is slow a message to ourselves waits behind the others, for seconds or more. Whatever
arrives meanwhile is a sign of life, so the line is dead only when nothing has come for a while.

The same way shows what has come back of what was published here: everything that was sent before a
message to ourselves, for a broker keeps the order of what one connection publishes.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from ..backends.base import Backend
from ..event import OVERHEAD
from ..exceptions import BackendUnavailable, PublishQueueFull
from ..sync.deadline import Deadline
from ..sync.waiter import running_loop
from .sender import LOST, Sender, Taken

# How the names of the channels begin that probes are sent to.
PROBE_CHANNEL = "starcast-probe-"

# Seconds until a probe must be back. Together with the interval between two, which is 3 by default,
# less than ten.
PROBE_TIMEOUT = 5.0

# Bytes a second that a working line carries at least: a probe that waits behind a large message may
# come back that much later.
SLOWEST = 1024 * 1024


def location(backend: Backend) -> str:
    """Return where the broker is, to go behind a sentence; empty if the backend does not say."""
    address = getattr(backend, "address", None)
    return f" ({address})" if address else ""


class Probe:
    """See the module.

    Attributes:
        channel: Where the messages go; nobody else subscribes to it.
        heard: When something was asked that the broker has answered, in seconds since 1970: what it
            had for us before that has arrived. The answer itself may have waited for long, on a
            slow line or for a blocked event loop, and with it what came behind it.
        message_at: When a message arrived last, in `time.monotonic()`.
    """

    def __init__(self, backend: Backend, sender: Sender) -> None:
        self.channel = ""
        self.heard = 0.0
        self._asked = 0.0  # when the last message was sent
        self.message_at = 0.0
        self._backend = backend
        self._sender = sender
        # Done with "" when the message has come back, or with the reason why it will not. Everybody
        # who asks meanwhile waits for the same one: many health checks make one message.
        self._pending: asyncio.Future[str] | None = None
        self._marks: dict[bytes, Taken] = {}  # messages whose return somebody waits for
        self._returned = 0  # of `Sender.published_cost`

    def ask(self) -> asyncio.Future[str]:
        """Send a message to ourselves. What comes back must not be cancelled."""
        pending = self._pending
        if pending is None or pending.done():
            pending = self._expect()
            self._sender.probe(self.channel, self._end)
        return pending

    def came(self, mark: bytes) -> None:
        """Call this when a message on `channel` has arrived."""
        if not mark:
            self.heard = self._asked
            self._end("")
        elif mark in self._marks:
            self._marks[mark].set()

    def heard_at(self) -> float:
        """Return when there was a sign of life last, in `time.monotonic()`.

        The backend may know it to the byte: a single message may take minutes to arrive.
        """
        heard_at: float | None = getattr(self._backend, "heard_at", None)
        return self.message_at if heard_at is None else heard_at

    def forget(self) -> None:
        """Call this when the connection that should bring the message back is gone."""
        self._end(LOST)
        for back in list(self._marks.values()):
            back.fail(LOST)

    def on_their_way(self) -> int:
        """Return what messages cost that were published and may not be back. From any thread."""
        return self._sender.published_cost - self._returned

    async def round_trip(self) -> None:
        """Wait until what was published until now is back, or is given up. From any loop.

        The broker has two seconds to take a message to ourselves, and two to bring it.
        """
        mark, back = os.urandom(8), Taken()
        before = self._sender.published_cost
        self._marks[mark] = back
        try:
            taken = self._sender.put(self.channel, mark, wait=True)
            assert taken is not None
            await taken.wait()
            await back.wait()
        except (BackendUnavailable, PublishQueueFull):
            pass  # whoever publishes next will be told
        finally:
            del self._marks[mark]
        self._returned = max(self._returned, before + len(mark) + OVERHEAD)

    async def prove(self, seconds: float) -> None:
        """Send the first message of a new connection, on which nothing else is sent yet.

        Raises:
            BackendUnavailable: It has not come back within so many seconds, 5 at most.
        """
        seconds = min(seconds, PROBE_TIMEOUT)
        pending = self._expect()
        try:
            async with Deadline(seconds):
                await self._backend.publish([(self.channel, b"")])
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
                lost = await asyncio.shield(pending)
        except TimeoutError:
            lost = "the broker takes what is published and delivers nothing of it"
            if hint := getattr(self._backend, "if_silent", ""):
                lost = f"{lost}; {hint}"
            lost += location(self._backend)
        if lost:
            raise BackendUnavailable(lost)

    async def watch(self, interval: float, is_needed: Callable[[], bool]) -> str:
        """Send a message every so many seconds, and return what is wrong when there is none back.

        None is sent while nothing is published and `is_needed` says no.
        """
        published = self._sender.published
        while True:
            await asyncio.sleep(interval)
            if published == self._sender.published and not is_needed():
                continue
            published = self._sender.published
            # It waits behind what is being handed over.
            patience = PROBE_TIMEOUT + self._sender.under_way / SLOWEST
            try:
                async with Deadline(patience, self.heard_at):
                    lost = await asyncio.shield(self.ask())
            except TimeoutError:
                return f"the broker did not answer for {patience:.0f} seconds"
            if lost:
                return f"the hub cannot publish to its own channel {self.channel!r}: {lost}"

    def _expect(self) -> asyncio.Future[str]:
        self._asked = time.time()
        self._pending = asyncio.get_running_loop().create_future()
        return self._pending

    def _end(self, lost: str) -> None:
        pending, self._pending = self._pending, None
        # The loop of an earlier connection may be closed, and nobody waits there any more.
        if pending is not None and pending.get_loop() is running_loop() and not pending.done():
            pending.set_result(lost)
