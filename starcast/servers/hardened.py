"""uvicorn's default WebSocket protocol, hardened against clients that misbehave.

One client, whatever it sends and however it leaves, harms no other. uvicorn by itself waits without
end for a client that has left and has not read everything; it keeps as many pongs as somebody who
reads none of them asks for; it parses whatever it has read at once, however long that takes; and
it ends itself, with everybody on it, if it is told to shut down while certain clients are leaving.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from .. import logs
from ..close_codes import ABNORMAL, INVALID_DATA, NO_STATUS, POLICY_VIOLATION
from . import served

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent, ASGISendEvent

logger = logging.getLogger("starcast")

# Bytes that are parsed before a look at the clock. The smallest frames have six bytes, and 341 of
# them take some two milliseconds. The rest of a frame that has begun is cheap, however long it is.
PIECE = 2 * 1024

# Seconds for which one client's frames are parsed before the event loop does other work.
SLICE = 0.002

# Messages of one client that wait for the app before the rest of what was read is parsed.
MAX_QUEUED = 256

# Fragments of one message. They may be empty, so that `--ws-max-size` does not bound them.
MAX_FRAGMENTS = 4096


class HardenedProtocol(WebSocketsSansIOProtocol):
    """See the module.

    Whatever ends a connection, its socket is gone `close_timeout` seconds later, with what the
    client has not read until then. What a client sends is parsed in pieces, between which the event
    loop does other work. Nothing more is read from it while it does not read the pongs that it has
    asked for. Its messages are read on nevertheless while it does not read those of others: so are
    its answers to pings, its close frame and its end.
    """

    # The defaults are the class's, so that an object of uvicorn's class can become one of this.
    _deadline: asyncio.TimerHandle | None = None
    _unparsed = b""  # what was read and is not parsed yet; nothing more is read meanwhile
    _pongs_wait = False  # the client does not read them; nothing more is read meanwhile
    _unsent = 0  # bytes that the client had not read when the last ping was sent
    _heard = False  # whether something of the client was taken since

    async def run_asgi(self) -> None:
        try:
            await super().run_asgi()
        finally:
            self._abort_later()

    def take_over(self) -> None:
        """Begin in the middle of a connection, whose object was one of uvicorn's class until now.

        The transport and the timers of the event loop may hold methods of that class.
        """
        self.transport.set_protocol(self)
        if self.ping_timer is not None:
            self.ping_timer.cancel()
            self.ping_timer = self.loop.call_at(self.ping_timer.when(), self.send_keepalive_ping)
        if self.pong_timer is not None:
            self.pong_timer.cancel()
            self.pong_timer = self.loop.call_at(self.pong_timer.when(), self.keepalive_timeout)
        task = served.task_of(self)
        if task is not None:
            task.add_done_callback(lambda _: self._abort_later())

    # What is sent

    async def send(self, message: ASGISendEvent) -> None:
        closes = message["type"] == "websocket.close"
        if not closes and not self.handshake_complete and self.transport.is_closing():
            raise ClientDisconnected  # uvicorn would accept in silence, and then take no message
        paused = self.read_paused
        await super().send(message)
        if self.close_sent:
            self._abort_later()
            if paused:  # uvicorn reads on, for the client's close frame
                self._read_on()

    def send_500_response(self) -> None:
        if not self.conn.eof_sent:  # nothing may follow what has ended the handshake
            super().send_500_response()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._pongs_wait:
            self._pongs_wait = False
            self._read_on()

    # What is received

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self._unparsed or (len(data) > PIECE and self.handshake_initiated):
            self._unparsed += data
            self._parse()
            return
        super().data_received(data)
        if not self.handshake_initiated:
            # uvicorn gives it whole requests. This one is refused, for a line or a number of
            # headers that is too long, and uvicorn does not send what the parser has answered.
            self.handshake_complete = True
            self.transport.write(b"".join(self.conn.data_to_send()))
            self._close_transport()

    def _parse(self) -> None:
        """Parse what was read, as much as one turn of the event loop may take."""
        self._heard = True
        data, done, end = self._unparsed, 0, self.loop.time() + SLICE
        while done < len(data) and not self.transport.is_closing():
            piece = max(PIECE, self._missing())
            super().data_received(data[done : done + piece])
            done += piece
            if self._pongs_wait or self.queue.qsize() >= MAX_QUEUED or self.loop.time() > end:
                break
        self._unparsed = b"" if self.transport.is_closing() else data[done:]
        if self._unparsed:
            self.transport.pause_reading()
        self._read_on()

    def _missing(self) -> int:
        """Return how many bytes of a frame that has begun are still to come, as far as is known."""
        buffer = self.conn.reader.buffer
        if not buffer:  # most often a frame begins
            return 0
        reading: Any = self.conn.parser
        while reading.gi_yieldfrom is not None:
            reading = reading.gi_yieldfrom
        # The innermost generator is `read_exact(n)` of websockets, unless nothing more is parsed.
        wanted: int = reading.gi_frame.f_locals.get("n", 0)
        return wanted - len(buffer)

    def _read_on(self) -> None:
        """Parse what was read, or else read, unless something stands against it."""
        if self.read_paused or self._pongs_wait or self.disconnected:
            return
        if self._unparsed:
            self.loop.call_soon(self._parse)
        else:
            self.transport.resume_reading()

    async def receive(self) -> ASGIReceiveEvent:
        # As in uvicorn, which would read on even if not everything is parsed.
        message = await self.queue.get()
        self._heard = True
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self._read_on()
        return message

    def handle_ping(self) -> None:
        super().handle_ping()
        if not self.writable.is_set():
            self._pongs_wait = True
            self.transport.pause_reading()

    def handle_cont(self, event: Frame) -> None:
        if self.close_sent:
            return  # nobody will get the message
        if len(self.frames) < MAX_FRAGMENTS:
            super().handle_cont(event)
        else:
            self._fail(POLICY_VIOLATION, "too many fragments")

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type != "text" or self.close_sent:
            super().send_receive_event_to_app()
            return
        # uvicorn logs a traceback for what is not UTF-8.
        data = self.frames[0] if len(self.frames) == 1 else b"".join(self.frames)
        self.frames = []
        try:
            text = str(data, "utf-8")
        except UnicodeDecodeError as exc:
            self._fail(INVALID_DATA, f"{exc.reason} at position {exc.start}")
            return
        self.queue.put_nowait({"type": "websocket.receive", "text": text})
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    # How it ends

    def handle_close(self, event: Frame) -> None:
        if self.close_sent:  # the client's answer
            self._close_transport()
        else:
            super().handle_close(event)
        self._abort_later()

    def eof_received(self) -> None:
        """Take a client that sends nothing more for one that has left."""
        self.stop_keepalive()
        code = NO_STATUS if self.handshake_complete else ABNORMAL
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code})
        self._abort_later()

    def handle_parser_exception(self) -> None:
        closed = self.conn.close_sent
        if closed is None:  # before the handshake is over, no close frame can be sent
            self.queue.put_nowait({"type": "websocket.disconnect", "code": ABNORMAL})
            self._close_transport()
        else:
            host, port = self.client or ("?", 0)
            logger.warning(
                "closed the client %s:%d with %d: %s",
                logs.escape(host),
                port,
                closed.code,
                logs.escape(closed.reason),
            )
            super().handle_parser_exception()
        self._abort_later()

    def _fail(self, code: int, reason: str) -> None:
        """Close the connection for what the client sent."""
        self.conn.fail(code, reason)
        self.handle_parser_exception()

    def send_keepalive_ping(self) -> None:
        super().send_keepalive_ping()
        self._unsent, self._heard = self.transport.get_write_buffer_size(), False

    def keepalive_timeout(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        is_alive = self._heard or (self._pongs_wait and unsent < self._unsent)
        if is_alive and self.ping_timeout is not None:
            # The pong may stand behind what is not read of the client yet, because its room or its
            # app takes no more, or because it reads its own pongs slowly.
            self._unsent, self._heard = unsent, False
            self.pong_timer = self.loop.call_later(self.ping_timeout, self.keepalive_timeout)
            return
        super().keepalive_timeout()
        if unsent:
            self.abort()  # nobody is there to take it
        self._abort_later()

    def shutdown(self) -> None:
        if self.close_sent or self.transport.is_closing():
            # uvicorn would send a second close frame to some of them, which is an error that ends
            # the whole server.
            self.stop_keepalive()
            self._close_transport()
        else:
            super().shutdown()
        self._abort_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._unparsed = b""
        self.read_paused = False  # nothing is to be resumed any more
        super().connection_lost(exc)

    def abort(self) -> None:
        """Drop the connection at once, with what the socket has not taken."""
        if not self.disconnected:  # asyncio's transport raises AttributeError once it is over
            self.transport.abort()

    def _close_transport(self) -> None:
        # After a second `close`, asyncio's TLS transport can no longer be aborted.
        if not self.transport.is_closing():
            self.transport.close()

    def _abort_later(self) -> None:
        """Do not wait indefinitely for a client that does not read."""
        if self.disconnected:
            return
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.close_timeout, self.abort)
        if self.close_timer is not self._deadline:
            if self.close_timer is not None:
                self.close_timer.cancel()
            # If it has a timer, uvicorn does not close the transport again when the app ends.
            self.close_timer = self._deadline
