"""uvicorn's default WebSocket protocol, hardened against clients that misbehave.

No client can harm another, whatever it sends and however it leaves. uvicorn by itself waits
indefinitely for a client that has left without reading everything. It buffers any number of pongs
for a client that asks for them and reads none. It parses everything it has read in one go, however
long that takes. And a shutdown while certain clients are leaving crashes the whole server.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from .. import logs
from ..close_codes import ABNORMAL, INVALID_DATA, NO_STATUS
from . import served

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent, ASGISendEvent

logger = logging.getLogger("starcast")

# Bytes to parse before checking the clock. The smallest frames have six bytes, and 341 of them take
# about two milliseconds. The rest of a frame that has begun is cheap, however long it is.
PIECE = 2 * 1024

# Seconds of parsing for one client before the event loop does other work.
SLICE = 0.002

# Messages of one client that may wait for the app. While there are more, parsing pauses.
MAX_QUEUED = 256

# Fragments of one message that are kept apart, then joined. `--ws-max-size` bounds their size only.
MAX_FRAGMENTS = 4096


class HardenedProtocol(WebSocketsSansIOProtocol):
    """See the module.

    However a connection ends, its socket is closed `close_timeout` seconds later at the latest,
    and what the client has not read by then is dropped. What a client sends is parsed in pieces,
    so that the event loop can do other work in between. While a client does not read the pongs it
    has asked for, nothing more is read from it. A client that does not read the messages of others
    is still read from: its answers to pings, its close frame and its end must be seen.
    """

    # These are class attributes, so that an object of uvicorn's class can become one of this class.
    _deadline: asyncio.TimerHandle | None = None
    _unparsed = b""  # read but not parsed yet; while there is any, nothing more is read
    _pongs_wait = False  # the client does not read its pongs; until then, nothing more is read
    _unsent = 0  # bytes that were unsent when the last ping was sent
    _heard = False  # whether anything was received from the client since then

    async def run_asgi(self) -> None:
        try:
            await super().run_asgi()
        finally:
            self._abort_later()

    def take_over(self) -> None:
        """Take over a connection in progress, whose object was of uvicorn's class until now.

        The transport and the event loop's timers may hold bound methods of that class.
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
            raise ClientDisconnected  # uvicorn would accept it silently, and then refuse messages
        paused = self.read_paused
        await super().send(message)
        if self.close_sent:
            self._abort_later()
            if paused:  # uvicorn has resumed reading, to see the client's close frame
                self._resume_reading()

    def send_500_response(self) -> None:
        if not self.conn.eof_sent:  # nothing may follow the end of a failed handshake
            super().send_500_response()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._pongs_wait:
            self._pongs_wait = False
            self._resume_reading()

    # What is received

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self._unparsed or (len(data) > PIECE and self.handshake_initiated):
            self._unparsed += data
            self._parse()
            return
        super().data_received(data)
        if not self.handshake_initiated:
            # uvicorn passes whole requests. The parser has refused this one, because a line is too
            # long or there are too many headers, and uvicorn would not send its answer.
            self.handshake_complete = True
            self.transport.write(b"".join(self.conn.data_to_send()))
            self._close_transport()

    def _parse(self) -> None:
        """Parse as much of what was read as one turn of the event loop allows."""
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
        self._resume_reading()

    def _missing(self) -> int:
        """Return how many bytes of the current frame are still to come, as far as is known."""
        buffer = self.conn.reader.buffer
        if not buffer:  # usually a new frame begins here
            return 0
        reading: Any = self.conn.parser
        while reading.gi_yieldfrom is not None:
            reading = reading.gi_yieldfrom
        # The innermost generator is `read_exact(n)` of websockets, unless parsing has ended.
        wanted: int = reading.gi_frame.f_locals.get("n", 0)
        return wanted - len(buffer)

    def _resume_reading(self) -> None:
        """Parse what was read, or else read more, unless reading is paused."""
        if self.read_paused or self._pongs_wait or self.disconnected:
            return
        if self._unparsed:
            self.loop.call_soon(self._parse)
        else:
            self.transport.resume_reading()

    async def receive(self) -> ASGIReceiveEvent:
        # As in uvicorn, which would resume reading even if not everything is parsed.
        message = await self.queue.get()
        self._heard = True
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self._resume_reading()
        return message

    def handle_ping(self) -> None:
        super().handle_ping()
        if not self.writable.is_set():
            self._pongs_wait = True
            self.transport.pause_reading()

    def handle_cont(self, event: Frame) -> None:
        if self.close_sent:
            return  # the message is discarded
        if len(self.frames) >= MAX_FRAGMENTS:
            self.frames = [b"".join(self.frames)]
        super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type != "text" or self.close_sent:
            super().send_receive_event_to_app()
            return
        # uvicorn would log a traceback for text that is not UTF-8.
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
        """Treat a client that will send nothing more as one that has left."""
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
        """Close the connection because of what the client sent."""
        self.conn.fail(code, reason)
        self.handle_parser_exception()

    def send_keepalive_ping(self) -> None:
        super().send_keepalive_ping()
        self._unsent, self._heard = self.transport.get_write_buffer_size(), False

    def keepalive_timeout(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        is_alive = self._heard or (self._pongs_wait and unsent < self._unsent)
        if is_alive and self.ping_timeout is not None:
            # The pong may be queued behind data that is not read yet, because the channel or the
            # app cannot keep up, or because the client reads its own pongs slowly.
            self._unsent, self._heard = unsent, False
            self.pong_timer = self.loop.call_later(self.ping_timeout, self.keepalive_timeout)
            return
        super().keepalive_timeout()
        if unsent:
            self.abort()  # the client will not read it
        self._abort_later()

    def shutdown(self) -> None:
        if self.close_sent or self.transport.is_closing():
            # To some of these, uvicorn would send a second close frame, an error that ends the
            # whole server.
            self.stop_keepalive()
            self._close_transport()
        else:
            super().shutdown()
        self._abort_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._unparsed = b""
        self.read_paused = False  # there is nothing left to resume
        super().connection_lost(exc)

    def abort(self) -> None:
        """Drop the connection at once, together with what is still unsent."""
        if not self.disconnected:  # asyncio's transport raises AttributeError once it is closed
            self.transport.abort()

    def _close_transport(self) -> None:
        # After a second `close`, asyncio's TLS transport cannot be aborted any more.
        if not self.transport.is_closing():
            self.transport.close()

    def _abort_later(self) -> None:
        """Drop the connection after `close_timeout` if the client does not read the rest."""
        if self.disconnected:
            return
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.close_timeout, self.abort)
        if self.close_timer is not self._deadline:
            if self.close_timer is not None:
                self.close_timer.cancel()
            # While it has a timer, uvicorn does not close the transport again when the app ends.
            self.close_timer = self._deadline
