"""Membership: who is on the channels of a `Broadcast`, on all workers together."""

from __future__ import annotations

from collections.abc import Iterable

from . import codec
from .codec import Channel
from .hub import Hub
from .members import Member, MemberCounts


class Membership:
    """The part of `Broadcast` that is about the members of channels. On any event loop.

    A client is a member if it was connected with `member=`, or if it subscribed with
    `Subscription(presence=True)`.
    """

    _hub: Hub

    async def members(self, channel: Channel) -> list[Member]:
        """Return the members of a channel, on all workers, each of them once.

        A member stays for `Presence.grace` after its last client was lost: that may be a page that
        is loaded again. Every worker that uses presence knows all members, so this asks nobody.
        What happens on another worker is known here a little later: in a tenth of a second, mostly.
        The first call of an event loop waits 0.3 seconds for what the other workers know.

        Raises:
            InvalidChannel: The name is not valid.
            BackendUnavailable: The hub was not open and cannot reach its broker.
        """
        clients = await self._hub.presence.clients(codec.check_channel(channel))
        return list({member.id: member for member in clients.values()}.values())

    async def member_counts(self, channels: Iterable[Channel]) -> dict[str, MemberCounts]:
        """Return how many clients and how many members channels have. Like `members` otherwise."""
        presence = self._hub.presence
        names = [codec.check_channel(channel) for channel in channels]
        return {name: await presence.counts(name) for name in names}
