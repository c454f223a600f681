"""Subscriptions: the channels of one connection, and the commands that are about a channel."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import codec
from ..event import Event
from ..exceptions import BackendUnavailable, CommandError, InvalidChannel
from ..history import Position, Resumed, Wish, parse_id
from ..members import Member
from ..outbox import Unsubscribed
from . import codes
from .clock import remaining, ttl
from .codes import Code
from .formats import publication, text, write
from .model import Subscription

if TYPE_CHECKING:
    from .session import Session

logger = logging.getLogger("starcast")

# What a client asks for with the flag of a `subscribe` that is to fail if it is not recovered.
REJECT_UNRECOVERED = 2


class Subscriptions:
    """See the module. It belongs to the event loop of the connection."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._hub = session.hub
        # None while it is being subscribed to.
        self._subscriptions: dict[str, Subscription | None] = {}
        self._unwanted: dict[str, Code] = {}  # those of them that are to end at once
        # Those that the client has not asked for, and does not ask for again if they end.
        self._servers: set[str] = set()

    # Subscribe

    async def begin(
        self, subscriptions: Mapping[str, Subscription], asked: Any
    ) -> dict[str, dict[str, Any]]:
        """Subscribe the client to the channels that it need not ask for.

        Returns:
            What it is told of each. It gets nothing of them before that.
        """
        results: dict[str, dict[str, Any]] = {}
        for channel, subscription in subscriptions.items():
            wanted = asked.get(channel) if isinstance(asked, dict) else None
            params = wanted if isinstance(wanted, dict) else {}

            def keep(result: dict[str, Any], channel: str = channel) -> Sequence[Event]:
                results[channel] = result
                return []

            self._servers.add(channel)
            await self._add(channel, subscription, params, keep)
        return results

    async def subscribe(self, id: int, params: dict[str, Any]) -> None:
        """Subscribe the client as it asks."""
        session = self._session
        channel = check_channel(params)
        if channel in self._subscriptions:
            raise CommandError(*codes.ALREADY_SUBSCRIBED)
        if len(self._subscriptions) >= session.limits.max_subscriptions:
            raise CommandError(*codes.LIMIT_EXCEEDED)
        token = text(params, "token")
        subscription = await session.hooks.subscribe(
            session.websocket, channel, token, params.get("data")
        )
        if _is_over(subscription):
            raise CommandError(*codes.TOKEN_EXPIRED)
        if channel in self._subscriptions:  # the server has subscribed it meanwhile
            raise CommandError(*codes.ALREADY_SUBSCRIBED)
        reply = session.writer.reply
        await self._add(
            channel, subscription, params, lambda result: [reply(id, "subscribe", result)]
        )

    async def _add(
        self,
        channel: str,
        subscription: Subscription,
        params: Mapping[str, Any],
        compose: Callable[[dict[str, Any]], Sequence[Event]],
    ) -> None:
        """Subscribe the client; `compose` makes what it gets first of what it is to be told."""
        session = self._session
        (connection,) = session.members
        wish = self._wish(channel, params)

        def tell(resumed: Resumed | None, events: list[Event]) -> Sequence[Event]:
            excluded = self._hub.people.is_excluded
            past = [event for event in events if not excluded(connection, event)]
            return compose(self._result(subscription, wish, resumed, past, params))

        self._subscriptions[channel] = None
        try:
            await self._hub.add_channel(session.members, channel, wish, tell)
        except BaseException:
            del self._subscriptions[channel]
            self._unwanted.pop(channel, None)
            raise
        self._subscriptions[channel] = subscription
        if subscription.presence or subscription.join_leave:
            try:
                await self._take_in(channel, subscription)
            except BackendUnavailable:
                self._lose(channel, codes.INSUFFICIENT, codes.SERVER_ERROR)
                return
        if (code := self._unwanted.pop(channel, None)) is not None:
            self.end(channel, code)
            return
        if subscription.expires_at is not None:
            self._expire(channel, subscription.expires_at)

    async def _take_in(self, channel: str, subscription: Subscription) -> None:
        """Let the client be a member of a channel, and be told who joins and leaves."""
        from . import members  # not for those who do not use it

        session = self._session
        (connection,) = session.members
        members.learn(session.writer)
        if subscription.join_leave:
            await self._hub.presence.announce(connection, channel)
        if subscription.presence:
            assert session.client is not None
            client = session.client
            member = Member(client.user or session.id, client.info, subscription.info)
            await self._hub.presence.enter(connection, channel, session.id, member)

    def _wish(self, channel: str, params: Mapping[str, Any]) -> Wish:
        """Return what a client wants of the past: what came after its position."""
        if not params.get("recover") or self._hub.settings.histories.find(channel) is None:
            return Wish()
        return Wish(since=f"{text(params, 'epoch')}-{params.get('offset', 0)}")

    def _result(
        self,
        subscription: Subscription,
        wish: Wish,
        resumed: Resumed | None,
        past: list[Event],
        params: Mapping[str, Any],
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if subscription.expires_at is not None:
            result |= {"expires": True, "ttl": ttl(subscription.expires_at)}
        position = None if resumed is None else parse_id(resumed.id)
        if resumed is not None and position is not None:
            offset = position.offset
            if wish.since is not None:
                flags = params.get("flag", 0)
                if not resumed.recovered and isinstance(flags, int) and flags & REJECT_UNRECOVERED:
                    raise CommandError(*codes.UNRECOVERABLE)
                result |= {"was_recovering": True, "recovered": bool(resumed.recovered)}
                if resumed.recovered and (since := parse_id(wish.since)) is not None:
                    offset = since.offset  # each of the publications moves it on
            result |= {
                "recoverable": True,
                "positioned": True,
                "epoch": position.epoch,
                "offset": offset,
            }
            if past:
                result["publications"] = [publication(event) for event in past]
        if subscription.data is not None:
            result["data"] = self._session.raw(subscription.data)
        return result

    def _expire(self, channel: str, expires_at: float) -> None:
        self._session.clock.call(
            f"channel {channel}",
            remaining(expires_at),
            self._lose,
            channel,
            codes.SUBSCRIPTION_EXPIRED,
            codes.EXPIRED,
        )

    async def refresh(self, id: int, params: dict[str, Any]) -> None:
        """Renew a subscription."""
        session = self._session
        channel, _ = self._find(params)
        subscription = await session.hooks.subscribe(
            session.websocket, channel, text(params, "token"), None
        )
        if _is_over(subscription):
            raise CommandError(*codes.TOKEN_EXPIRED)
        result: dict[str, Any] = {}
        if self._subscriptions.get(channel):  # it may have ended meanwhile
            self._subscriptions[channel] = subscription
            session.clock.cancel(f"channel {channel}")
            if subscription.expires_at is not None:
                self._expire(channel, subscription.expires_at)
                result = {"expires": True, "ttl": ttl(subscription.expires_at)}
        session.reply(id, "sub_refresh", result)

    # Unsubscribe

    async def unsubscribe(self, id: int, params: dict[str, Any]) -> None:
        """Unsubscribe the client as it asks."""
        self._remove(check_channel(params))
        self._session.reply(id, "unsubscribe", {})

    def _lose(self, channel: str, unsubscribe: Code, disconnect: Code) -> None:
        """Unsubscribe the client, so that it asks again, or close it if it has never asked."""
        if channel in self._servers:
            self._session.disconnect(disconnect)
        else:
            self.end(channel, unsubscribe)

    def end(self, channel: str, code: Code) -> None:
        """Unsubscribe the client, and tell it."""
        if self._subscriptions.get(channel, code) is None:
            self._unwanted[channel] = code
        if self._remove(channel):
            content = {"code": code.number, "reason": code.reason}
            self._session.send(self._session.writer.push(channel, "unsubscribe", content))

    # What the server does with all clients of a user or a channel: see `people.Agent`

    def subscribe_from_server(self, channel: str) -> None:
        """Subscribe the client, and tell it."""
        if channel not in self._subscriptions:
            self._subscriptions[channel] = None
            self._servers.add(channel)
            push = self._session.writer.push
            self._session.spawn(
                lambda: self._add(
                    channel, Subscription(), {}, lambda result: [push(channel, "subscribe", result)]
                )
            )

    def unsubscribe_from_server(self, channel: str, code: int | None, reason: str) -> None:
        """Unsubscribe the client, and tell it."""
        number, text, _ = codes.UNSUBSCRIBED
        self.end(channel, Code(code or number, reason or text))

    def disconnect(self, code: int | None, reason: str, reconnect: bool) -> None:
        """Close the client."""
        number, text, _ = codes.FORCE_RECONNECT if reconnect else codes.FORCE_DISCONNECT
        self._session.disconnect(Code(code or number, reason or text))

    def shed(self, channel: str) -> bool:
        """Unsubscribe the client from a channel that it does not follow, so that it resumes.

        A client that has not even taken that after some time is given up.
        """
        session = self._session
        if self._subscriptions.get(channel, channel) is None or channel in self._servers:
            # It is just being subscribed to; or the client comes back to all its channels.
            return False
        self._remove(channel)
        content = {"code": codes.INSUFFICIENT.number, "reason": codes.INSUFFICIENT.reason}
        told = Unsubscribed(channel, session.writer.push(channel, "unsubscribe", content).message)
        session.send(told)
        (connection,) = session.members

        def give_up() -> None:
            if told in (connection.outbox.items or ()):
                connection.kill()

        session.clock.call("slow", self._hub.settings.tuning.close_timeout, give_up)
        return True

    def _remove(self, channel: str) -> bool:
        subscription = self._subscriptions.get(channel)
        if subscription is None:
            return False
        del self._subscriptions[channel]
        self._servers.discard(channel)
        self._session.clock.cancel(f"channel {channel}")
        self._hub.leave(self._session.websocket, channel)
        return True

    # The other commands

    def _find(self, params: dict[str, Any]) -> tuple[str, Subscription]:
        """Return the channel of a command, and the client's subscription to it."""
        channel = check_channel(params)
        subscription = self._subscriptions.get(channel)
        if subscription is None:
            raise CommandError(*codes.PERMISSION_DENIED)
        return channel, subscription

    async def publish(self, id: int, params: dict[str, Any]) -> None:
        """Publish what a client wants, as the hook changes it."""
        session = self._session
        channel = check_channel(params)
        data = await session.hooks.publish(session.websocket, channel, params.get("data"))
        event = self._hub.event(channel, data, None, "json")
        subscription = self._subscriptions.get(channel)
        event.info = write(session.info(subscription.info if subscription else None))
        await session.relay.publish_and_wait(event)
        session.reply(id, "publish", {})

    async def history(self, id: int, params: dict[str, Any]) -> None:
        """Answer with a part of a channel's history."""
        channel, subscription = self._find(params)
        if not subscription.history:
            raise CommandError(*codes.PERMISSION_DENIED)
        if self._hub.settings.histories.find(channel) is None:
            raise CommandError(*codes.NOT_AVAILABLE)
        limit, since, reverse = params.get("limit", 0), params.get("since"), params.get("reverse")
        most = self._session.limits.max_history
        if type(limit) is not int or not -1 <= limit <= most:
            raise CommandError(codes.BAD_REQUEST.number, f"limit is a number from -1 to {most}")
        id_since = None
        if isinstance(since, dict):
            id_since = f"{text(since, 'epoch')}-{since.get('offset', 0)}"
        past = await self._hub.past.history(
            channel, id_since, most if limit == -1 else limit, bool(reverse)
        )
        if not past.complete:
            raise CommandError(*codes.UNRECOVERABLE)
        position = parse_id(past.id) or Position("", 0)
        self._session.reply(
            id,
            "history",
            {
                "publications": [publication(event) for event in past.events],
                "epoch": position.epoch,
                "offset": position.offset,
            },
        )

    async def presence(self, id: int, params: dict[str, Any]) -> None:
        """Answer with the clients that are on a channel."""
        from . import members

        clients = await self._hub.presence.clients(self._present(params))
        found = {client: members.describe(client, member) for client, member in clients.items()}
        self._session.reply(id, "presence", {"presence": found})

    async def presence_stats(self, id: int, params: dict[str, Any]) -> None:
        """Answer with how many clients and users are on a channel."""
        clients, users = await self._hub.presence.counts(self._present(params))
        self._session.reply(id, "presence_stats", {"num_clients": clients, "num_users": users})

    def _present(self, params: dict[str, Any]) -> str:
        """Return the channel of a command about members, if the client may look at them."""
        channel, subscription = self._find(params)
        if not subscription.presence:
            raise CommandError(*codes.PERMISSION_DENIED)
        return channel


def check_channel(params: Mapping[str, Any]) -> str:
    """Return the channel that a command names."""
    channel = params.get("channel")
    if not isinstance(channel, str):
        raise InvalidChannel("a channel is a text")
    return codec.check_channel(channel)


def _is_over(subscription: Subscription) -> bool:
    return subscription.expires_at is not None and remaining(subscription.expires_at) <= 0


Handler = Callable[[Subscriptions, int, dict[str, Any]], Coroutine[Any, Any, None]]

CHANNEL_COMMANDS: dict[str, Handler] = {
    "subscribe": Subscriptions.subscribe,
    "unsubscribe": Subscriptions.unsubscribe,
    "sub_refresh": Subscriptions.refresh,
    "publish": Subscriptions.publish,
    "history": Subscriptions.history,
    "presence": Subscriptions.presence,
    "presence_stats": Subscriptions.presence_stats,
}
