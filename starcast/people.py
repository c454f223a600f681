"""People: whose a hub's clients are, and what is done with all clients of a user or a channel."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from starlette.websockets import WebSocket

from . import orders
from .arguments import check_close
from .close_codes import POLICY_VIOLATION, SERVICE_RESTART
from .codec import check_channel
from .connection import Connection
from .event import Command, Event
from .exceptions import StarcastError
from .group import Member
from .orders import Order, user_channel
from .outbox import Close
from .registry import Registry

logger = logging.getLogger("starcast")


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectedClient:
    """A client of this process, and whose it is: see `Broadcast.clients_of`.

    Attributes:
        websocket: The client.
        user: Its user; None if that is not known.
        info: What the app has said about it.
    """

    websocket: WebSocket
    user: str | None = None
    info: Any = None


class Agent(Protocol):
    """Does the protocol's way what is done with a client, on its event loop. None of these raise.

    A client without one is put on a channel, taken off it, or closed.
    """

    def subscribe_from_server(self, channel: str) -> None:
        """Subscribe the client, unless it is subscribed."""

    def unsubscribe_from_server(self, channel: str, code: int | None, reason: str) -> None:
        """Unsubscribe the client, and tell it."""

    def disconnect(self, code: int | None, reason: str, reconnect: bool) -> None:
        """Close the client. Without a code, `reconnect` decides whether it comes back."""


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Whose a connection is, and what does the protocol's way what is done with it."""

    user: str | None = None
    info: Any = None
    agent: Agent | None = None


NOBODY = Identity()


class People:
    """See the module. The table of identities is in the scopes of the websockets.

    Args:
        registry: The hub's.
        join: Puts a websocket that is registered on one more channel.
        publish: Publishes an event, without waiting.
        leave: Takes a websocket off a channel.
    """

    def __init__(
        self,
        registry: Registry,
        join: Callable[[WebSocket, str], Coroutine[Any, Any, object]],
        publish: Callable[[Event], object],
        leave: Callable[[WebSocket, str], object],
    ) -> None:
        self._registry = registry
        self._join = join
        self._publish = publish
        self._leave = leave
        self._joining: set[asyncio.Task[None]] = set()

    def identify(self, connection: Connection, identity: Identity) -> None:
        """Note whose a connection is."""
        connection.websocket.scope["starcast"][self] = connection, identity

    def of(self, connection: Connection) -> Identity:
        """Return whose a connection is."""
        known, identity = connection.websocket.scope["starcast"].get(self, (None, NOBODY))
        # The websocket may have left and come back as somebody else's.
        return identity if known is connection else NOBODY

    def clients(self, channel: str | None) -> list[ConnectedClient]:
        """Return the clients of this process, or those on a channel, and whose they are."""
        found = [(it.websocket, self.of(it)) for it in self._registry.clients(channel)]
        return [ConnectedClient(websocket, it.user, it.info) for websocket, it in found]

    # Who does not get a message

    def resolve(self, event: Event) -> None:
        """Exclude the connections of this process that are not to get an event."""
        if (unless := event.unless) is not None:
            channels = [*unless.channels]
            if unless.user is not None:
                channels.append(user_channel(unless.user))
            ids = {it.id for channel in channels for it in self._registry.clients(channel)}
            event.exclude |= ids

    def is_excluded(self, connection: Connection, event: Event) -> bool:
        """Whether a connection does not get an event of the past."""
        user = None if event.unless is None else event.unless.user
        return connection.id in event.exclude or (
            user is not None and user == self.of(connection).user
        )

    # Orders

    def carry_out(self, command: Command, members: Sequence[Member]) -> None:
        """Do what a command says with those of its members that are clients, on their loop."""
        order = orders.read(command)
        clients = [member for member in members if isinstance(member, Connection)]
        if order is None or not clients:
            return
        if order.do == "count":
            self._answer(order, len(clients))
            return
        for connection in clients:
            try:
                self._obey(order, command.channel, connection)
            except (StarcastError, TypeError):  # from somebody who writes to the broker
                logger.warning("ignored an order that is not valid")
                return

    def _obey(self, order: Order, channel: str, connection: Connection) -> None:
        agent = self.of(connection).agent
        if order.do == "disconnect":
            if agent is not None:
                agent.disconnect(order.code, order.reason, order.reconnect)
            else:
                code = SERVICE_RESTART if order.reconnect else POLICY_VIOLATION
                self._close(connection, order.code or code, order.reason)
        elif order.do == "close":
            if agent is not None:
                agent.unsubscribe_from_server(channel, None, order.reason)
            else:
                self._close(connection, order.code or POLICY_VIOLATION, order.reason)
        elif order.do == "subscribe":
            name = check_channel(order.channel)
            if agent is not None:
                agent.subscribe_from_server(name)
            else:
                task = asyncio.create_task(self._subscribe(connection.websocket, name))
                self._joining.add(task)
                task.add_done_callback(self._joining.discard)
        else:
            name = check_channel(order.channel)
            if agent is not None:
                agent.unsubscribe_from_server(name, order.code, order.reason)
            elif name in connection.channels:
                self._leave(connection.websocket, name)

    def _close(self, connection: Connection, code: int, reason: str) -> None:
        check_close(code, reason)
        self._registry.end(connection, Close(code, reason))

    async def _subscribe(self, websocket: WebSocket, channel: str) -> None:
        try:
            await self._join(websocket, channel)
        except Exception as exc:
            logger.warning("a client could not be subscribed to %r: %s", channel, exc)

    def _answer(self, order: Order, count: int) -> None:
        # Who has asked may be gone, and the broker away.
        with contextlib.suppress(StarcastError):
            self._publish(Event(orders.answer_channel(order.ask), str(count)))
