"""RoundTrips: how much of what this hub published may not have come back from the broker yet.

A broker keeps the order of what one connection publishes. So when a message that the hub sends to
itself has come back, everything that it published before has arrived too.
"""

from __future__ import annotations

import os

from ..event import OVERHEAD
from ..exceptions import BackendUnavailable, PublishQueueFull
from .sender import LOST, Ack, Sender


class RoundTrips:
    """Waits for messages to come back. From any event loop, except where it says otherwise."""

    def __init__(self, sender: Sender, timeout: float) -> None:
        self._sender = sender
        self._timeout = timeout
        self._marks: dict[bytes, Ack] = {}  # messages that are waited for
        self._returned = 0  # of `Sender.published_cost`

    @property
    def outstanding(self) -> int:
        """What the messages cost that were published and may not be back."""
        return self._sender.published_cost - self._returned

    async def wait(self, channel: str) -> None:
        """Wait until everything published so far is back, or is given up.

        The broker has two seconds to accept a message on this channel, and two to deliver it.
        """
        mark, back = os.urandom(8), Ack(self._timeout)
        before = self._sender.published_cost
        self._marks[mark] = back
        try:
            sent = self._sender.put(channel, mark, wait=True)
            assert sent is not None
            await sent.wait()
            await back.wait()
        except (BackendUnavailable, PublishQueueFull):
            pass  # the next caller that publishes gets the error
        finally:
            del self._marks[mark]
        self._returned = max(self._returned, before + len(mark) + OVERHEAD)

    def arrived(self, mark: bytes) -> None:
        """A message has come back. On the loop of the connection."""
        if mark in self._marks:
            self._marks[mark].set()

    def fail(self) -> None:
        """The connection is lost, so nothing comes back. On its loop."""
        for back in list(self._marks.values()):
            back.fail(LOST)
