"""Watch: notice that a client has left, or that its ASGI app has ended, without sending to it.

ASGI tells an app that its client has left only when the app calls `receive`, and a handler that
only pushes never does. Under uvicorn the transport of the connection can be found, so a `Watch`
checks the transports of its event loop at an interval. On other servers, all that can be seen is
that the task running the ASGI app has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import select
import socket
from collections.abc import Iterator
from typing import Any, Protocol

from starlette.websockets import WebSocket

from .served import app_task

# How many transports are checked before other tasks of the loop get a turn.
SLICE = 1024

# The events of a socket whose client has closed or lost the connection. Where sockets cannot be
# polled (Windows), a client that leaves while reading is paused is noticed at the next message.
_RESET = getattr(select, "POLLERR", 0) | getattr(select, "POLLHUP", 0)
_CLOSED = getattr(select, "POLLRDHUP", 0)


def has_unsent(transport: Any) -> bool:
    """Return whether the transport has bytes that the operating system has not taken yet."""
    try:
        return bool(transport.get_write_buffer_size())
    except AttributeError:  # raised by a TLS connection that has ended
        return False


def can_abort(transport: Any) -> bool:
    """Return whether the transport is open, or is closing and still has bytes to send."""
    return not transport.is_closing() or has_unsent(transport)


def abort(transport: Any) -> None:
    """Drop the connection if its client has not read everything.

    A transport that is closed waits until everything is sent. If the client reads nothing, that
    lasts as long as the TCP connection, and a server that is shutting down waits for it too.
    """
    if has_unsent(transport):  # otherwise it may have ended, and `abort` may raise AttributeError
        transport.abort()


def limit_silence(transport: Any, seconds: float) -> None:
    """Let the system drop the connection when what was sent is not acknowledged for so long.

    Without pings of its own, a protocol would not notice for a quarter of an hour that the client's
    machine or network is gone (RFC 5482, on Linux). 0 stands for the default of the system.
    """
    if transport is None or transport.is_closing():
        return  # uvloop closes the socket at once, and another one may have its number now
    sock = transport.get_extra_info("socket")
    usable = sock is not None and hasattr(socket, "TCP_USER_TIMEOUT")
    if usable:  # pragma: no branch  # on other systems it is not
        with contextlib.suppress(OSError):  # it is no TCP socket
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


class Watched(Protocol):
    """What a `Watch` needs of a connection or a subscription."""

    @property
    def transport(self) -> Any:
        """The transport of the client's socket; None if it is not known."""

    @property
    def is_stuck(self) -> bool:
        """Whether the send in flight takes too long. Has to be read at regular intervals."""

    def lose(self, *, drop: bool = False) -> None:
        """Forget the client, which has left. `drop` aborts its connection if bytes are unsent."""


class Presence:
    """Tells whether a client is still there, by its transport or else by the task of its app.

    Attributes:
        transport: The transport that a `Watch` checks; None if the server is not uvicorn.
        sends: How many sends to the client have begun.
    """

    __slots__ = ("_client", "_seen_since", "_send_seen", "_task", "sends", "transport")

    def __init__(self, client: Watched, websocket: WebSocket, protocol: Any) -> None:
        self._client = client
        self.transport: Any = None if protocol is None else protocol.transport
        self.sends = 0
        self._send_seen = -1  # the number of the send that was in flight at the last check
        self._seen_since = 0.0  # when that send was first seen
        self._task = app_task(websocket) if protocol is None else None
        if self._task is not None:
            self._task.add_done_callback(self._on_app_ended)

    @property
    def is_over(self) -> bool:
        """Whether the transport is closed or closing. Safe from any thread."""
        return self.transport is not None and bool(self.transport.is_closing())

    def is_stuck(self, sending: bool, timeout: float) -> bool:
        """Return whether the send in flight takes longer than so many seconds. On the loop."""
        now = asyncio.get_running_loop().time()
        if not sending or self._send_seen != self.sends:
            self._send_seen, self._seen_since = self.sends, now
        return now - self._seen_since > timeout

    @property
    def has_unsent(self) -> bool:
        """Whether the client is known not to have read everything."""
        return self.transport is not None and has_unsent(self.transport)

    def abort(self) -> None:
        """Drop the connection if the client has not read everything."""
        if self.transport is not None:
            abort(self.transport)

    def forget(self) -> None:
        """Stop watching the app's task."""
        if self._task is not None:
            self._task.remove_done_callback(self._on_app_ended)
            self._task = None

    def _on_app_ended(self, task: asyncio.Task[Any]) -> None:
        self._client.lose()


class Watch:
    """Checks the clients of one event loop. Call `add` and `discard` with the hub's lock held.

    Args:
        loop: The event loop.
        interval: Seconds between two checks of the transports.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self._interval = interval
        self._loop = loop
        self._connections: dict[Watched, None] = {}
        self._running = False

    def add(self, connection: Watched) -> None:
        """Check this connection from now on. Call it on the loop of the watch."""
        self._connections[connection] = None
        if not self._running:
            self._running = True
            self._loop.call_later(self._interval, self._start_round)

    def discard(self, connection: Watched) -> None:
        self._connections.pop(connection, None)

    def _start_round(self) -> None:
        if self._connections:
            self._check_slice(iter(list(self._connections)))
        else:
            self._running = False

    def _check_slice(self, connections: Iterator[Watched]) -> None:
        checked = list(itertools.islice(connections, SLICE))
        unread: dict[int, Watched] = {}
        for connection in checked:
            transport = connection.transport
            if transport is None:
                if connection.is_stuck:
                    connection.lose(drop=True)
            elif transport.is_closing():
                # The server may just have told the handler, which knows the close code then.
                lose = functools.partial(connection.lose, drop=_failed_by_server(transport))
                self._loop.call_soon(lose)
            elif not transport.is_reading() and (fileno := _fileno(transport)) >= 0:
                # The event loop does not read this socket, because the handler has not received
                # earlier messages yet.
                unread[fileno] = connection
        for fileno, events in _poll(unread):
            connection = unread[fileno]
            if events & _RESET:
                connection.transport.abort()
            connection.lose()
        if len(checked) == SLICE:
            self._loop.call_soon(self._check_slice, connections)
        else:
            self._loop.call_later(self._interval, self._start_round)


def _failed_by_server(transport: Any) -> bool:
    """Return whether uvicorn has failed the connection: no pong arrived, or a protocol error."""
    try:
        protocol = transport.get_protocol()
    except AttributeError:  # raised by a TLS connection that has ended
        return False
    return bool(getattr(protocol, "close_sent", False))


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
