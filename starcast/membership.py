"""Membership: who is on the channels of a `Broadcast`, on all workers together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from . import codec
from .codec import DEFAULT_CHANNEL, Channel
from .hub import Hub
from .members import Member, MemberCounts
from .watching import MemberWatch


class Membership:
    """The part of `Broadcast` that is about the members of channels. On any event loop.

    A client is a member if it was connected with `member=`, or if it subscribed with
    `Subscription(presence=True)`.
    """

    _hub: Hub

    async def members(self, channel: Channel = DEFAULT_CHANNEL) -> list[Member]:
        """Return the members of a channel, on all workers, each of them once.

        A member stays for `Presence.grace` after its last client was lost: that may be a page that
        is loaded again. Every worker that uses presence knows all members, so this asks nobody.
        What happens on another worker is known here a little later: in a tenth of a second, mostly.

        The first call of an event loop, and one after an outage of the broker, waits until all
        other workers have answered: at least 0.3 seconds, and 2 at most. The members of a worker
        that does not answer in this time come later. During an outage, those are returned that
        were known before, until they are older than `Presence.ttl`.

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

    def watch_members(self, channel: Channel = DEFAULT_CHANNEL) -> MemberWatch:
        """Return who joins and leaves a channel, on all workers, for code on the server.

            async with broadcast.watch_members("room") as watch:
                here = {member.id for member in watch.members}
                async for joined, left in watch:
                    here |= {member.id for member in joined}
                    here -= {member.id for member in left}

        A member that is on the channel with several clients joins with the first and leaves with
        the last, as `Presence.grace` says.

        Raises:
            InvalidChannel: The name is not valid. BackendUnavailable is raised on entering the
                block, if the broker cannot be reached.
        """
        presence = self._hub.presence
        return MemberWatch(
            codec.check_channel(channel),
            self._hub.settings.outbox(None, "disconnect"),
            join=lambda watch: presence.watch(cast(MemberWatch, watch)),
            leave=self._hub.registry.unsubscribe,
        )
