"""Personal: messages to one client. The sender waits for space, and learns if it has left."""

from __future__ import annotations

from starlette.websockets import WebSocket

from .close_codes import ABNORMAL
from .connection import Connection
from .exceptions import ClientGone, NotConnected
from .handler import is_gone
from .registry import Registry
from .servers import served
from .sync.space import SpaceQueue


async def reserve(
    registry: Registry, websocket: WebSocket, connection: Connection | None, cost: int
) -> Connection | None:
    """Wait for space in the client's buffer; None if the client has left.

    Args:
        websocket, connection: The client, and what was registered for it last.
        cost: What the message counts for in the buffer.

    Raises:
        ClientGone: The client has left, and this task serves it.
        NotConnected: It is alive and not registered.
    """
    if connection is not None and connection.is_here:
        await _wait_for_space(registry, connection, cost)
        if connection.is_here:
            return connection
    refuse(websocket, connection)
    return None


async def _wait_for_space(registry: Registry, connection: Connection, cost: int) -> None:
    """Wait until a message for this client may be posted, or it is not registered any more."""
    outbox = connection.outbox
    if not outbox.space and outbox.has_space(cost):
        return
    with registry.lock:
        if outbox.space is None:
            outbox.space = SpaceQueue(registry.tuning.space_timeout)
    registry.count_waiting(1)
    try:
        await outbox.space.wait(
            lambda: (
                connection not in registry.connections
                or not connection.is_here
                or outbox.has_space(cost)
            )
        )
    finally:
        registry.count_waiting(-1)


def refuse(websocket: WebSocket, connection: Connection | None) -> None:
    """Raise what `claim` raises for a client that is not registered, if that is an error.

    A client that the hub is closing has left, even if its handler does not know that yet.
    """
    unregistered = connection is None or connection.leaving is not None
    if unregistered and not (is_gone(websocket) or (connection and connection.departed)):
        raise NotConnected("the websocket is not registered; call connect(websocket) first")
    tell_gone(websocket, connection)


def tell_gone(websocket: WebSocket, connection: Connection | None) -> None:
    """Raise an error if this task serves the client, which has left. Other tasks go on.

    Raises:
        ClientGone: This task serves it.
    """
    code = ABNORMAL if connection is None or connection.code is None else connection.code
    if served.is_served_here(None if connection is None else connection.id, websocket):
        raise ClientGone(code)
