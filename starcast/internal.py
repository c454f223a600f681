"""Internal channels: what hubs tell each other, and what a hub tells some of its own clients.

Their names begin with a control character, which no name that an app or a client passes can. They
have no history, and do not count in what a hub tells of itself.
"""

# A channel of all hubs of this name on the broker begins with this, and one of this hub alone, of
# which the broker does not know, with that. The latter are for the registry only.
SHARED = "\x01"
LOCAL = "\x02"


def announcements(channel: str) -> str:
    """Return the channel of those who are told who joins and leaves a channel."""
    return f"{LOCAL}joins:{channel}"


def is_internal(channel: str) -> bool:
    """Whether it is an internal channel."""
    return "" < channel < " "
