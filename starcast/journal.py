"""Journal: the log's lines about joins, leaves and messages, which are written at DEBUG only."""

from __future__ import annotations

import logging
from asyncio import AbstractEventLoop
from collections.abc import Mapping
from contextlib import AbstractContextManager

from .connection import Connection
from .event import Event
from .internal import is_internal
from .shard import Shard

logger = logging.getLogger("starcast")


class Journal:
    """See the module. From any thread.

    Args:
        lock: The hub's.
        shards: Who is on which channel of which event loop.
    """

    def __init__(
        self, lock: AbstractContextManager[object], shards: Mapping[AbstractEventLoop, Shard]
    ) -> None:
        self._lock = lock
        self._shards = shards
        self._noted: list[tuple[str, str]] = []  # who did what, and on which channel

    def note(self, what: str, channel: str) -> None:
        """Keep something for `write`. With the lock held."""
        if logger.isEnabledFor(logging.DEBUG) and not is_internal(channel):
            self._noted.append((what, channel))

    def write(self) -> None:
        """Log what was noted. Without the lock, for which a log handler may wait."""
        if self._noted:
            with self._lock:
                noted, self._noted = self._noted, []
            for what, channel in noted:
                logger.debug("%s %r: %s", what, channel, self._describe(channel))

    def message(self, what: str, event: Event) -> None:
        """Log what became of a message, and how many there are to get it. Without the lock.

        Args:
            what: That, with places for the message's size and its channel.
            event: The message.
        """
        if logger.isEnabledFor(logging.DEBUG) and not is_internal(event.channel):
            size = len(event.payload)
            logger.debug(what + ": %s", size, event.channel, self._describe(event.channel))

    def _describe(self, channel: str) -> str:
        """Say who is on a channel in this process now."""
        with self._lock:
            members = [
                m for shard in self._shards.values() for m in shard.channels.get(channel, ())
            ]
        clients = sum(isinstance(m, Connection) or m.kind is not None for m in members)
        subscribers = len(members) - clients
        words = "1 client" if clients == 1 else f"{clients} clients"
        if subscribers:
            words += f" and {subscribers} subscriber" + "s" * (subscribers > 1)
        return f"{words} on this hub in this process"
