"""Inspection: what a `Broadcast` tells of itself. Nothing here changes anything."""

from __future__ import annotations

from starlette.websockets import WebSocket

from .codec import Channel
from .hub import Hub
from .stats import Stats


class Inspection:
    """The part of `Broadcast` that only looks. From any thread, unless stated otherwise."""

    _hub: Hub
    _kind: str  # of its backend

    @property
    def name(self) -> str:
        """The name of this hub on its broker."""
        return self._hub.claim.name

    def __repr__(self) -> str:
        """Return its kind of backend, its name, whether it is open and its clients; no secrets."""
        number = len(self)
        clients = "1 client" if number == 1 else f"{number} clients"
        state = "open" if self._hub.lifecycle.open else "closed"
        return f"<Broadcast {self._kind} {self.name!r} {state}, {clients}>"

    def __len__(self) -> int:
        """Return how many clients are connected to this process."""
        return len(self._hub.registry)

    def __contains__(self, websocket: object) -> bool:
        """Return whether a client is registered: `websocket in hub`. From any thread."""
        return isinstance(websocket, WebSocket) and self._hub.is_registered(websocket)

    def __bool__(self) -> bool:
        return True

    def clients(self, channel: Channel | None = None) -> list[WebSocket]:
        """Return the clients of this process, or those on a channel: a new list each time.

        They stand in the order in which they joined, on each event loop. From any thread.
        `clients_of` says whose they are.

        Raises:
            InvalidChannel: The name is not valid.
        """
        return self._hub.clients(channel)

    @property
    def channels(self) -> dict[str, int]:
        """Channel name to number of clients, for the channels that have any: a fresh copy."""
        return self._hub.registry.channels()

    def stats(self) -> Stats:
        """Return a snapshot of counters and health. From any thread."""
        return self._hub.stats()

    async def healthy(self) -> bool:
        """Whether the hub is open and its broker answers, for a readiness check. From any loop.

        With a broker, the hub sends itself a message through the broker and waits up to two seconds
        for it. It is not healthy either while the broker refuses a channel that has members. A hub
        that has not been opened is not healthy: give the app `lifespan=hub.lifespan`.
        """
        return await self._hub.healthy()
