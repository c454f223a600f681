"""Logs: a line that is written once for each kind of event, however often the event happens."""

from __future__ import annotations

import logging
from collections.abc import Hashable

logger = logging.getLogger("starcast")

# Kinds that one `Once` remembers. What it has no room for is not logged: a stranger who comes with
# ever new kinds must not be able to fill a disk.
MAX_KINDS = 100


class Once:
    """Writes a WARNING for each kind that it has not met before. From any thread.

    Use one of your own where a client can choose the kinds, so that it uses up nobody else's.
    """

    def __init__(self) -> None:
        self._kinds: set[Hashable] = set()

    def __call__(self, kind: Hashable, message: str, *args: object) -> None:
        """Log `message % args`, unless this kind was logged before.

        Args:
            kind: What makes it another event: a word of ours, the name of a type.
            message: What happened and what to do about it. Ours alone; user text goes into `args`.
            args: What the message is formatted with.
        """
        if kind not in self._kinds and len(self._kinds) < MAX_KINDS:
            self._kinds.add(kind)
            logger.warning(message, *args)


# For kinds that only the program can bring about, once in a process. Call it as `logs.once(...)`.
once = Once()
