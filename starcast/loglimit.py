"""LogLimit: a log line for each kind of trouble, and not for each time."""

from __future__ import annotations

import re
import threading
import time

# Seconds in which trouble of one kind is logged once.
SECONDS = 10.0

# Kinds that are told apart. Further ones are not logged while these are recent.
KINDS = 20

# What differs between two errors of a kind: names, which brokers quote, and numbers.
_DETAILS = re.compile(r"""'[^']*'|"[^"]*"|\d+""")


class LogLimit:
    """Says whether an error is to be logged. May be asked from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[tuple[str, str], float] = {}

    def allows(self, words: str, about: str = "") -> bool:
        """Whether nothing of the kind was logged in the last ten seconds.

        Two errors are of one kind if they are about the same and differ only in numbers and in what
        they quote.
        """
        kind = (_DETAILS.sub("", words), about)
        now = time.monotonic()
        with self._lock:
            self._last = {k: last for k, last in self._last.items() if now - last < SECONDS}
            if kind in self._last or len(self._last) >= KINDS:
                return False
            self._last[kind] = now
            return True
