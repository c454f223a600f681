"""Watch: notices that a client has left, or that its ASGI app has ended, without a message to it.

ASGI tells an app that its client has left only when the app calls `receive`, and a handler that
only pushes never does. Under uvicorn the transport of the connection can be found, so a `Watch`
looks at the transports of its event loop now and then. On other servers the end of the task that
runs the ASGI app is what can be seen.
"""

from __future__ import annotations

import asyncio
import itertools
import select
from collections.abc import Iterator
from typing import Any, Protocol

from starlette.websockets import WebSocket

from .served import app_task

# Transports that are looked at before other tasks of the loop get their turn.
SLICE = 1024

# What a socket says when its client has closed it or is gone. Where it cannot be asked (Windows),
# a client that leaves while reading is paused is noticed at the next message.
_RESET = getattr(select, "POLLERR", 0) | getattr(select, "POLLHUP", 0)
_CLOSED = getattr(select, "POLLRDHUP", 0)


def has_unsent(transport: Any) -> bool:
    """Whether there are bytes that the operating system has not taken yet."""
    try:
        return bool(transport.get_write_buffer_size())
    except AttributeError:  # of a TLS connection that is over
        return False


def is_there(transport: Any) -> bool:
    """Whether it can be aborted: it is open, or is closing and has bytes to send until then."""
    return not transport.is_closing() or has_unsent(transport)


def abort(transport: Any) -> None:
    """Drop a connection whose client has not read everything.

    A transport that is closed waits until everything is sent: for a client that reads nothing, as
    long as the TCP connection lasts. A server that shuts down waits for it too.
    """
    if has_unsent(transport):  # if not, it may be over, and asyncio's raise AttributeError then
        transport.abort()


class Watched(Protocol):
    """What a watch needs of a connection."""

    @property
    def transport(self) -> Any:
        """That of the client's socket."""

    @property
    def is_stuck(self) -> bool:
        """Whether the send that is in flight takes too long. It has to be asked now and then."""

    def lose(self, *, drop: bool = False) -> None:
        """Forget the client: it has left. `drop` its connection if it has not read everything."""


class Presence:
    """What tells that a client has left: its transport, or else the end of the task of its app.

    Attributes:
        transport: What a `Watch` looks at; None if the server is not uvicorn.
        sends: How many sends to the client have begun.
    """

    __slots__ = ("_client", "_seen", "_since", "_task", "sends", "transport")

    def __init__(self, client: Watched, websocket: WebSocket, protocol: Any) -> None:
        self._client = client
        self.transport: Any = None if protocol is None else protocol.transport
        self.sends = 0
        self._seen = -1  # the send that was in flight at the last look
        self._since = 0.0  # when it was first seen
        self._task = app_task(websocket) if protocol is None else None
        if self._task is not None:
            self._task.add_done_callback(self._app_ended)

    @property
    def is_over(self) -> bool:
        """Whether the transport is closed or about to be. From any thread."""
        return self.transport is not None and bool(self.transport.is_closing())

    def is_stuck(self, sending: bool, timeout: float) -> bool:
        """Whether the send that is in flight takes longer than so many seconds. On the loop."""
        now = asyncio.get_running_loop().time()
        if not sending or self._seen != self.sends:
            self._seen, self._since = self.sends, now
        return now - self._since > timeout

    @property
    def has_unsent(self) -> bool:
        """Whether the client has not read everything, as far as it can be known."""
        return self.transport is not None and has_unsent(self.transport)

    def abort(self) -> None:
        """Drop the connection if the client has not read everything."""
        if self.transport is not None:
            abort(self.transport)

    def forget(self) -> None:
        """Do not look at the task any more."""
        if self._task is not None:
            self._task.remove_done_callback(self._app_ended)
            self._task = None

    def _app_ended(self, task: asyncio.Task[Any]) -> None:
        self._client.lose()


class Watch:
    """The transports of one event loop's clients. `add` and `discard` need the hub's lock.

    Args:
        loop: The event loop.
        interval: How many seconds pass between two looks at the transports.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self._interval = interval
        self._loop = loop
        self._connections: dict[Watched, None] = {}
        self._looking = False

    def add(self, connection: Watched) -> None:
        """Look at this one from now on, on the loop of the watch."""
        self._connections[connection] = None
        if not self._looking:
            self._looking = True
            self._loop.call_later(self._interval, self._begin)

    def discard(self, connection: Watched) -> None:
        self._connections.pop(connection, None)

    def _begin(self) -> None:
        if self._connections:
            self._look(iter(list(self._connections)))
        else:
            self._looking = False

    def _look(self, connections: Iterator[Watched]) -> None:
        some = list(itertools.islice(connections, SLICE))
        unread: dict[int, Watched] = {}
        for connection in some:
            transport = connection.transport
            if transport is None:
                if connection.is_stuck:
                    connection.lose(drop=True)
            elif transport.is_closing():
                connection.lose(drop=_was_failed(transport))
            elif not transport.is_reading() and (fileno := _fileno(transport)) >= 0:
                # The event loop does not look at it, because the handler has not received what
                # the client sent before.
                unread[fileno] = connection
        for fileno, events in _poll(unread):
            connection = unread[fileno]
            if events & _RESET:
                connection.transport.abort()
            connection.lose()
        if len(some) == SLICE:
            self._loop.call_soon(self._look, connections)
        else:
            self._loop.call_later(self._interval, self._begin)


def _was_failed(transport: Any) -> bool:
    """Whether uvicorn closes the connection of a registered client for a reason of its own.

    That is a client that answers no pings, or one that does not keep to the protocol.
    """
    return bool(getattr(transport.get_protocol(), "close_sent", False))


def _fileno(transport: Any) -> int:
    sock = transport.get_extra_info("socket")
    return -1 if sock is None else int(sock.fileno())


def _poll(filenos: dict[int, Watched]) -> list[tuple[int, int]]:
    if not filenos or not _RESET:
        return []
    poll = select.poll()
    for fileno in filenos:
        poll.register(fileno, _CLOSED)
    return poll.poll(0)
