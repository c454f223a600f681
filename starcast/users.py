"""Users: what a `Broadcast` does with all clients of a user, on every worker."""

from __future__ import annotations

import abc
import asyncio
import uuid
from typing import Any

from . import codec
from .arguments import check_close, check_user
from .codec import Channel, Encoding
from .event import Event
from .hub import Hub
from .listener import Listener
from .orders import Order, answer_channel, user_channel
from .people import ConnectedClient


class Users(abc.ABC):
    """The part of `Broadcast` that is about users. On any event loop.

    A user is whatever the app says with `connect(websocket, user=...)`, or with the `Client` that
    `ChannelsEndpoint.on_connect` returns: a `str`, an `int` or a `UUID`, which name the user of
    their `str()`, 1 to 150 characters. A user may have any number of clients on any number of
    workers.
    """

    _hub: Hub

    def clients_of(self, channel: Channel | None = None) -> list[ConnectedClient]:
        """Return the clients of this process, or those on a channel, and whose they are.

        A new list each time, in the order in which they joined, on each event loop. From any
        thread.

        Raises:
            InvalidChannel: The name is not valid.
        """
        name = None if channel is None else codec.check_channel(channel)
        return self._hub.people.clients(name)

    async def send_user(
        self,
        user: object,
        data: Any,
        *,
        encoding: Encoding | None = None,
        wait: float = 0,
    ) -> int:
        """Send a message to every client of a user, on every worker.

        It is sent like a message to a channel, and does not wait for slow clients. Clients of
        `ChannelsEndpoint` get it as a message to them that belongs to no channel.

        Args:
            user: The user.
            data, encoding: See `publish`.
            wait: With a broker, for how many seconds to wait for other workers to say how many
                clients of the user have got it. 0, the default: not at all.

        Returns:
            How many clients of the user it was sent to in this process, and with `wait` in all that
            have answered in time. A client that does not keep up may still not get it.

        Raises:
            TypeError: `user` is None or cannot be one.
            ConfigurationError: `user` is not valid.
            EncodingError, BackendUnavailable, PayloadTooLarge, PublishQueueFull: See `publish`.
        """
        channel = user_channel(check_user(user))
        event = self._hub.event(channel, data, None, encoding)
        if wait <= 0:
            count = len(self._hub.registry.clients(channel))
            await self._hub.publish(event)
            return count
        ask = uuid.uuid4().hex
        counts: list[int] = []
        listener = Listener([answer_channel(ask)], lambda it: _count(counts, it))
        await self._hub.join(listener)
        try:
            await self._hub.publish(event)
            await self._hub.publish(Order("count", ask=ask).to(channel))
            await asyncio.sleep(wait)
        finally:
            self._hub.registry.unsubscribe(listener)
        return sum(counts)

    async def subscribe_user(self, user: object, channel: Channel) -> None:
        """Put every client of a user on a channel, on every worker.

        Clients of `ChannelsEndpoint` are told that they are subscribed. No hook is asked. What
        happens on other workers is not waited for, and clients that connect later are not affected.

        Raises:
            TypeError, ConfigurationError: See `send_user`.
            InvalidChannel: The name of the channel is not valid.
            BackendUnavailable, PublishQueueFull: See `publish`.
        """
        await self._order(user, Order("subscribe", channel=codec.check_channel(channel)))

    async def unsubscribe_user(self, user: object, channel: Channel) -> None:
        """Take every client of a user off a channel, on every worker. Raises as `subscribe_user`.

        Clients of `ChannelsEndpoint` are told so with code 2000, and do not subscribe again. Other
        clients stay connected, unless it was their last channel: then their registration ends, and
        the socket is their handler's.
        """
        await self._order(user, Order("unsubscribe", channel=codec.check_channel(channel)))

    async def disconnect_user(
        self,
        user: object,
        code: int | None = None,
        reason: str = "",
        *,
        reconnect: bool = False,
    ) -> None:
        """Close every client of a user, on every worker, after what it still has to get.

        Args:
            user: The user.
            code: The close code. By default, 3503 (`force disconnect`) for clients of
                `ChannelsEndpoint`, or 3011 (`force reconnect`) with `reconnect`; and for others
                1008, or 1012 with `reconnect`.
            reason: Up to 123 bytes.
            reconnect: Whether the clients should come back.

        Raises:
            TypeError, ConfigurationError: See `send_user`; or the code or the reason is not valid.
            BackendUnavailable, PublishQueueFull: See `publish`.
        """
        if code is not None or reason:
            check_close(1000 if code is None else code, reason)
        await self._order(user, Order("disconnect", code=code, reason=reason, reconnect=reconnect))

    async def close_channel(
        self, channel: Channel, code: int | None = None, reason: str = ""
    ) -> None:
        """Close every client that is on a channel, on every worker, after what it has to get.

        Clients of `ChannelsEndpoint` are unsubscribed from the channel instead, with code 2000.
        Subscribers and streams are not affected.

        Args:
            channel: The channel.
            code: The close code; 1008 by default.
            reason: Up to 123 bytes.

        Raises:
            InvalidChannel: The name of the channel is not valid.
            ConfigurationError: The code or the reason is not valid.
            BackendUnavailable, PublishQueueFull: See `publish`.
        """
        if code is not None or reason:
            check_close(1000 if code is None else code, reason)
        name = codec.check_channel(channel)
        await self._hub.publish(Order("close", code=code, reason=reason).to(name))

    async def _order(self, user: object, order: Order) -> None:
        await self._hub.publish(order.to(user_channel(check_user(user))))


def _count(counts: list[int], answer: Event) -> None:
    counts.extend([int(answer.payload)] if answer.payload.isdigit() else [])
