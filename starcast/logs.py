"""Log lines: those that a developer needs once or seldom, and what may stand in them."""

from __future__ import annotations

import logging
import threading

from .loglimit import LogLimit

logger = logging.getLogger("starcast")

# Kinds of lines that a process logs: in all, and with the same first word. Clients may be able to
# cause new kinds without limit. They must not fill a disk, nor use up what other kinds need.
MAX_KINDS = 100
MAX_ALIKE = 20

_said: set[tuple[str, ...]] = set()
_lock = threading.Lock()
_limit = LogLimit()


def once(kind: tuple[str, ...], message: str, *args: object, level: int = logging.WARNING) -> None:
    """Log a line, unless this process has logged one of this kind before. From any thread."""
    if not logger.isEnabledFor(level):
        return
    with _lock:
        alike = sum(1 for said in _said if said[0] == kind[0])
        if kind in _said or len(_said) >= MAX_KINDS or alike >= MAX_ALIKE:
            return
        _said.add(kind)
    logger.log(level, message, *args)


def seldom(kind: str, message: str, *args: object) -> None:
    """Log a warning, unless one of this kind was logged in the last ten seconds. Any thread."""
    if _limit.allows(kind):
        logger.warning(message, *args)


def describe(error: BaseException) -> str:
    """Return what an error says, or its type if it says nothing."""
    return str(error) or type(error).__name__


def escape(text: str) -> str:
    """Return the text without what would begin a line, or move a terminal's cursor, or worse."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reset() -> None:
    """Forget what was logged, so that the next test sees it again."""
    global _limit
    with _lock:
        _said.clear()
        _limit = LogLimit()
