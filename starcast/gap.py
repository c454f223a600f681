"""Gap: what a hub says when its broker was away."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """The broker was away, did not answer or refused a channel: messages before may be missing.

    Attributes:
        since: When the broker was last known to be there, in seconds since 1970.
        seconds: The time from then until all channels were subscribed again. Messages of this time
            may be missing. The outage itself may have been up to three seconds shorter, because the
            broker is checked that often.
        error: What went wrong.
        channel: The only channel that it is about: the broker refused it for a time. None if it is
            about all of them.
    """

    since: float
    seconds: float
    error: str
    channel: str | None = None
