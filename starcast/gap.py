"""Gap: what a hub says when messages may be missing."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """Messages before this point may be missing.

    The broker was away or did not answer; or it refused a channel for a time; or an event loop of
    this process was blocked for so long that more arrived than can wait for it: 16 MiB. Then those
    are told who are on that loop and on a channel of which messages are missing.

    Attributes:
        since: When the broker was last known to be there, in seconds since 1970: nothing is missing
            of what was published before.
        seconds: The time from then until all channels were subscribed again, or until the loop went
            on. Messages of this time may be missing. The outage itself may have been up to three
            seconds shorter, because the broker is asked that often; or by more, where its answer
            came late.
        error: What went wrong.
        channel: The only channel that it is about: the broker refused it for a time. None if it is
            about all of them.
    """

    since: float
    seconds: float
    error: str
    channel: str | None = None
