"""MemberWatch: who joins and leaves a channel, for code on the server."""

from __future__ import annotations

from typing import Protocol, cast

from .internal import announcements
from .members import Member, MemberChange
from .outbox import Outbox
from .subscriber import Iteration, Join, Leave


class Announced(Protocol):
    """What arrives: each member with one of its clients."""

    joined: list[tuple[str, Member]]
    left: list[tuple[str, Member]]


class MemberWatch(Iteration[MemberChange]):
    """Returned by `Broadcast.watch_members`: an async context manager and an async iterator.

    It yields a `MemberChange` at most ten times a second. It belongs to the event loop that entered
    the block, ends when a `Subscriber` does, and raises what that raises.

    Attributes:
        members: Who was on the channel when the block was entered, and is not among the changes.
    """

    def __init__(self, channel: str, outbox: Outbox, *, join: Join, leave: Leave) -> None:
        super().__init__(announcements(channel), outbox, join=join, leave=leave)
        self.channel = channel
        self.members: list[Member] = []

    async def __anext__(self) -> MemberChange:
        announced = cast(Announced, await super().__anext__())  # nothing else is published there
        return MemberChange(
            [member for _, member in announced.joined], [member for _, member in announced.left]
        )
