"""uvicorn's WebSocket protocol, which takes ready-made frames.

A hub makes the frames of a message once for all clients, joins what was published in one turn of
the event loop, and writes to the transport, without an ASGI message and a coroutine for each
client. A client whose connection is uvicorn's own is adopted when it connects to the hub: see
`starcast.fastpath`. Nothing has to be configured for that.

    uvicorn main:app --ws starcast.uvicorn:BroadcastProtocol

gives every connection the protocol from the beginning. It is announced to the app in
`scope["extensions"]["starcast"]`, and then also bypasses middleware that wraps `send`, unless the
hub is made with `ready_frames=False`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.protocol import State

from . import logs
from .frames import PLAIN, WireFormat
from .handler import DirectReceive
from .servers.hardened import HardenedProtocol


class Wire:
    """Writes frames to one client's transport, bypassing ASGI. Use it on the server's event loop.

    Attributes:
        wire_format: The wire format of the frames that the client takes.
        ready: Whether frames may be written: the connection is open and its buffer is not full.
        changed: Called when `ready` may have changed.
    """

    __slots__ = ("_conn", "_protocol", "_transport", "_writable", "changed", "wire_format")

    def __init__(self, protocol: BroadcastProtocol) -> None:
        self._protocol = protocol
        self._conn = protocol.conn
        self._transport = protocol.transport
        self.changed: Callable[[], None] | None = None
        self._writable = protocol.writable
        self.wire_format: WireFormat = PLAIN
        for extension in protocol.conn.extensions:
            if isinstance(extension, PerMessageDeflate):
                self.wire_format = extension.local_max_window_bits
                # The connection's own compressor does not see our frames, which move the client's
                # window on. So it must never refer back: it starts afresh with each message. Its
                # state so far, tens of kilobytes, is freed.
                extension.local_no_context_takeover = True
                vars(extension).pop("encoder", None)

    @property
    def closed(self) -> bool:
        """Whether nothing more may be written: a close frame was, or the connection is lost."""
        return self._conn.state is not State.OPEN or self._transport.is_closing()

    @property
    def ready(self) -> bool:
        return not self.closed and self._writable.is_set()

    def write(self, frames: bytes) -> None:
        """Write whole frames to the transport, unless it is closed. Only while `ready`."""
        if self._conn.close_sent is None and not self._transport.is_closing():
            self._transport.write(frames)
        elif self.changed is not None:
            self.changed()

    async def drain(self) -> bool:
        """Wait until the buffer has space; return False if the connection is closing."""
        await self._writable.wait()
        return not self.closed

    def abort(self) -> None:
        """Drop the connection at once, together with what is still unsent."""
        self._protocol.abort()

    @property
    def receive(self) -> DirectReceive:
        """The server's `receive` for this client."""
        return self._protocol.receive  # type: ignore[return-value]  # uvicorn has TypedDicts

    def stop_receiving(self, code: int) -> None:
        """Let the app, which is waiting in `receive`, receive a disconnect."""
        self._protocol.queue.put_nowait({"type": "websocket.disconnect", "code": code})

    @property
    def buffered(self) -> int:
        """Bytes in the transport's buffer, which the socket has not taken yet."""
        return self._protocol.transport.get_write_buffer_size()


class _Announcement(dict[str, Any]):
    """The ASGI extension in the scope, which has to be a dict. `open()` returns the wire."""

    __slots__ = ("_protocol",)
    version = 1

    def __init__(self, protocol: BroadcastProtocol) -> None:
        super().__init__()
        self._protocol = protocol

    def open(self) -> Wire | None:
        """Return the wire, after the handshake; None if this version of uvicorn is unknown."""
        return _open(self._protocol)


class BroadcastProtocol(HardenedProtocol):
    """uvicorn's default WebSocket protocol, which lets a hub write frames."""

    wire: Wire | None = None

    async def run_asgi(self) -> None:
        """Announce the protocol to the app. uvicorn calls this for each connection."""
        extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
        extensions["starcast"] = _Announcement(self)
        await super().run_asgi()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._change_wire()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._change_wire()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._change_wire()

    def _change_wire(self) -> None:
        if self.wire is not None and self.wire.changed is not None:
            self.wire.changed()


def adopt(protocol: Any) -> Wire | None:
    """Make uvicorn's own protocol object one of `BroadcastProtocol`, and return its wire.

    The connection may be in the middle of anything but its handshake. It keeps all that it has.
    Call this on its event loop.

    Returns:
        None if this version of uvicorn is not supported. The object is left as it was.
    """
    if isinstance(protocol, BroadcastProtocol):  # a hub had the client before
        return _open(protocol)
    missing = _missing_methods(protocol.__class__) | _ATTRIBUTES.difference(vars(protocol))
    if missing:
        _not_supported(", ".join(sorted(missing)))
        return None
    protocol.__class__ = BroadcastProtocol
    protocol.take_over()
    return _open(protocol)


# What `HardenedProtocol` and `Wire` use of uvicorn's objects, and what they override or call.
_ATTRIBUTES = frozenset(
    """
    client close_sent close_timeout close_timer config conn curr_msg_data_type disconnected frames
    handshake_complete handshake_initiated loop ping_timeout ping_timer pong_timer queue
    read_paused request response tasks transport writable
    """.split()  # noqa: SIM905  # a list would take a line for each
)
_METHODS = frozenset(
    """
    connection_lost data_received eof_received handle_close handle_cont handle_parser_exception
    handle_ping keepalive_timeout pause_writing receive resume_writing run_asgi send
    send_500_response send_keepalive_ping send_receive_event_to_app shutdown stop_keepalive
    """.split()  # noqa: SIM905  # a list would take a line for each
)


@functools.cache
def _missing_methods(cls: type) -> frozenset[str]:
    return frozenset(name for name in _METHODS if not hasattr(cls, name))


def _open(protocol: BroadcastProtocol) -> Wire | None:
    try:
        protocol.slim()
        wire = protocol.wire = Wire(protocol)
    except AttributeError as exc:
        _not_supported(str(exc))
        return None
    return wire


def _not_supported(why: str) -> None:
    logs.once(
        ("uvicorn",),
        "this version of uvicorn is not supported (%s): continuing without the fast path",
        why,
    )
