"""Logs: one line for each kind of trouble, however often it comes."""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger("starcast")

# Kinds that are told apart in this process. Further ones are not logged.
MAX_KINDS = 100

_seen: set[tuple[str, ...]] = set()
_lock = threading.Lock()


def once(kind: tuple[str, ...], message: str, *args: object) -> None:
    """Log a warning, unless one of this kind was logged before. From any thread."""
    with _lock:
        if kind in _seen or len(_seen) >= MAX_KINDS:
            return
        _seen.add(kind)
    logger.warning(message, *args)


def reset() -> None:
    """Forget what was logged, for tests."""
    with _lock:
        _seen.clear()
