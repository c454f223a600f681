"""Gap: what a hub says when its broker was away."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """The broker was away, or silent: of the messages before this point some may be missing.

    Attributes:
        since: When the broker was known to be there last, in seconds since 1970.
        seconds: How long it took from then until everything was subscribed to again: of these last
            seconds messages may be missing. The broker may have been there for the first three of
            them, because it is asked that often.
        error: What was wrong.
    """

    since: float
    seconds: float
    error: str
