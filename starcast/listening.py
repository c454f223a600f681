"""Listening: what code on the server gets of a channel, as it comes and afterwards."""

from __future__ import annotations

from typing import Literal, overload

from . import codec
from .codec import DEFAULT_CHANNEL, Channel
from .hub import Hub
from .outbox import Overflow
from .resume import Past
from .subscriber import GapSubscriber, Subscriber


class Listening:
    """The part of `Broadcast` that is for code on the server. On any event loop."""

    _hub: Hub

    @overload
    def subscribe(
        self,
        channel: Channel = DEFAULT_CHANNEL,
        *,
        max_buffer: int | None = None,
        overflow: Overflow = "disconnect",
        since: str | None = None,
        history: int = 0,
        gaps: Literal[False] = False,
    ) -> Subscriber: ...

    @overload
    def subscribe(
        self,
        channel: Channel = DEFAULT_CHANNEL,
        *,
        max_buffer: int | None = None,
        overflow: Overflow = "disconnect",
        since: str | None = None,
        history: int = 0,
        gaps: Literal[True],
    ) -> GapSubscriber: ...

    def subscribe(
        self,
        channel: Channel = DEFAULT_CHANNEL,
        *,
        max_buffer: int | None = None,
        overflow: Overflow = "disconnect",
        since: str | None = None,
        history: int = 0,
        gaps: bool = False,
    ) -> Subscriber | GapSubscriber:
        """Return a channel's messages for code on the server.

            async with broadcast.subscribe("room") as subscriber:
                async for event in subscriber:
                    print(event.message)

        Args:
            channel: 1 to 200 characters without control characters. An int or a UUID names the
                channel of its `str()`.
            max_buffer: Bytes that may wait to be read; the hub's setting by default.
            overflow: What happens when the buffer is full. `"disconnect"`, the default whatever the
                hub's setting is: iteration returns what is buffered and then raises
                `SubscriberLagged`.
            since, history: See `connect`. The subscriber's `resumed` says where it begins.
            gaps: Whether to get a `Gap` at its place among the events when the broker was away.

        Raises:
            InvalidChannel, ConfigurationError: An argument is not valid. BackendUnavailable is
                raised on entering the block, if the broker has not confirmed the subscription
                within two seconds.
        """
        name = codec.check_channel(channel)
        return (GapSubscriber if gaps else Subscriber)(
            name,
            self._hub.settings.outbox(max_buffer, overflow),
            join=self._hub.join,
            leave=self._hub.registry.unsubscribe,
            wish=self._hub.past.wish(name, since, history),
        )

    async def history(
        self,
        channel: Channel = DEFAULT_CHANNEL,
        *,
        limit: int = 100,
        since: str | None = None,
        reverse: bool = False,
    ) -> Past:
        """Return what is kept of a channel, which needs a `history` in `Broadcast`.

        Args:
            channel: 1 to 200 characters without control characters. An int or a UUID names the
                channel of its `str()`.
            limit: How many events at most, 100 by default; 0 for the position alone.
            since: The id of an event: return those after it, or with `reverse` those before it. If
                it is no id of this history, this is as if none was given, and the `complete` of
                what is returned is False.
            reverse: Whether to begin with the newest event. By default, the oldest comes first.

        Raises:
            ConfigurationError: The channel has no history, or `limit` is not valid.
            InvalidChannel: The name is not valid.
            BackendUnavailable: The hub was closed, or the broker did not answer within two seconds.
        """
        name = codec.check_channel(channel)
        await self._hub.lifecycle.ensure_open()
        return await self._hub.past.history(name, since, limit, reverse)
