"""Members: who is on a channel, and the settings for it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from .arguments import check_info, check_user
from .tuning import check_positive


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """Somebody who is on a channel, with any number of clients.

    Args:
        id: Who it is, most often a user: 1 to 150 characters without control characters; an `int`
            and a `UUID` stand for their `str()`.
        info: What others see of it: JSON data of up to 2 KiB.
        channel_info: What they see of it on this channel only: the same.

    Raises:
        ConfigurationError: A value is not valid.
        TypeError: `id` is None, or cannot be one.
    """

    id: str
    info: Any = None
    channel_info: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", check_user(self.id))
        object.__setattr__(self, "info", check_info(self.info))
        object.__setattr__(self, "channel_info", check_info(self.channel_info))


def check_member(member: object) -> Member | None:
    """Return a member, or None for none.

    Raises:
        TypeError: It is something else.
    """
    if member is None or isinstance(member, Member):
        return member
    raise TypeError(f"member needs a Member, such as Member(7), not {type(member).__name__}")


class MemberCounts(NamedTuple):
    """How many clients and how many members a channel has."""

    clients: int
    users: int


class MemberChange(NamedTuple):
    """Who has joined a channel, and who has left it: see `Broadcast.watch_members`."""

    joined: list[Member]
    left: list[Member]


@dataclasses.dataclass(frozen=True, slots=True)
class Presence:
    """How the members of channels are kept: `Broadcast(url, presence=Presence())`.

    Args:
        ttl: How long the members of a worker that has been killed, or that cannot be reached any
            more, stay at most, in seconds: 30 by default. Workers say that they are there four
            times as often.
        grace: How long a member stays after its last client was lost, in seconds: 5 by default. So
            nobody is told of a page that is loaded again. Who leaves a channel and stays connected
            is gone at once.
        interval: How long changes are collected before others are told, in seconds: 0.1 by default.

    Raises:
        ConfigurationError: A value is not more than 0.
    """

    ttl: float = 30.0
    grace: float = 5.0
    interval: float = 0.1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_positive(field.name, getattr(self, field.name))
