"""Wire: a way to a client's socket around ASGI, and how frames are written to it.

While nothing is in flight and the socket takes more, a shard calls `FrameWriter.direct` and is
done. Otherwise a message goes the way of any other, and `FrameWriter.write` waits for the socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from ..event import Event, join, part
from ..frames import WireFormat
from ..handler import Reader
from ..outbox import Item, Outbox

# Bytes of frames that are joined for one write.
MAX_JOIN = 64 * 1024


class Wire(Reader, Protocol):
    """A way to the socket around ASGI; `starcast.uvicorn` has one."""

    wire_format: WireFormat
    changed: Callable[[], None] | None  # called when `ready` may have changed

    @property
    def closed(self) -> bool:
        """Whether nothing may be written any more."""

    @property
    def ready(self) -> bool:
        """Whether whole frames may be written now."""

    def write(self, frames: bytes) -> None:
        """Write whole frames. Only while it is ready."""

    async def drain(self) -> bool:
        """Wait until it may be possible again; False if it never will be."""

    def abort(self) -> None:
        """Drop the connection at once."""


class Versioned(Protocol):
    """What is told of changes."""

    version: int


class Client(Protocol):
    """What the writer of its frames needs of a connection."""

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight, and the client is neither closed nor left."""

    @property
    def shard(self) -> Versioned:
        """Its shard, whose version changes with any client's `direct`."""

    @property
    def outbox(self) -> Outbox:
        """What waits for the client."""

    def failed(self) -> None:
        """Let go of the client: its connection is closed."""


class FrameWriter:
    """Writes frames to one client. It belongs to the event loop of the client.

    Attributes:
        wire: Where they go.
        wire_format: What kind of frames the client takes.
        direct: Writes frames at once; None while that must not be done.
    """

    __slots__ = ("_client", "direct", "wire", "wire_format")

    def __init__(self, wire: Wire, client: Client) -> None:
        self.wire = wire
        self.wire_format = wire.wire_format | client.outbox.form
        self.direct: Callable[[bytes], None] | None = None
        self._client = client
        wire.changed = self._look

    def _look(self) -> None:
        if self._client.idle:
            if self.wire.closed:
                self._client.failed()
            else:
                self.resume()

    def resume(self) -> None:
        """Let frames be written at once if the wire takes them. Only while the client is idle."""
        client, wire = self._client, self.wire
        # A client with a smaller buffer might not have space for what a group joins.
        if wire.ready and client.outbox.max_buffer >= MAX_JOIN and not client.outbox.cut:
            self.direct = wire.write
            client.shard.version += 1
        else:
            self.suspend()

    def suspend(self) -> None:
        """Let none be written at once until it is resumed: the client is not idle any more."""
        if self.direct is not None:
            self.direct = None
            self._client.shard.version += 1

    async def write(self, items: Iterable[Item]) -> int:
        """Write events, joined with each other and with what follows them in the outbox.

        Returns:
            How many events were written: none if the client has left.
        """
        outbox = self._client.outbox
        limit = min(MAX_JOIN, outbox.max_buffer)
        events = deque(item for item in items if isinstance(item, Event))
        written = 0
        while events:
            if not await self.wire.drain():
                return 0
            parts: list[bytes] = []
            size = 0
            while (event := events[0] if events else outbox.next_event()) is not None:
                item = part(event, self.wire_format)
                size += len(item)
                if parts and size > limit:
                    break
                parts.append(item)
                if events:
                    events.popleft()
                else:
                    outbox.take()
            self.wire.write(join(parts, self.wire_format))
            written += len(parts)
        return written
