"""Reading: what a client sends, parsed so that no client keeps an event loop from other work.

uvicorn parses everything that it has read in one go, however long that takes, and buffers any
number of pongs for a client that asks for them and reads none. It pauses and resumes reading for
each message, which are two system calls.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import PayloadTooBig, ProtocolError
from websockets.frames import Frame, Opcode
from websockets.protocol import State

from ..close_codes import INVALID_DATA, PROTOCOL_ERROR, TOO_BIG
from ..handler import Take
from .incoming import (
    COMPRESSED,
    MESSAGES,
    TEXT,
    begin_of_whole,
    find_frame,
    has_parsed,
    missing,
    size_of_message,
    unmask,
)
from .lean import Decompressor, Gate, Inbox, Inflater

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent

# Seconds of parsing for one client before the event loop does other work.
SLICE = 0.002

# Messages of one client that may wait for the app, and their bytes, counted since none waited.
# Then parsing pauses until the app has received all of them.
MAX_QUEUED = 32
MAX_QUEUED_BYTES = 64 * 1024

# Fragments of one message that are kept apart, then joined. `--ws-max-size` bounds their size only.
MAX_FRAGMENTS = 4096


class ReadingProtocol(WebSocketsSansIOProtocol):
    """uvicorn's default WebSocket protocol, with another way to read.

    What a client sends is parsed frame by frame, so that the event loop can do other work in
    between. A message in one frame is parsed in place; any other frame is left to the parser of
    websockets, which takes several times as long. Reading is only paused while many messages wait
    for the app.

    While a client does not read the pongs it has asked for, nothing more is read from it. A client
    that does not read the messages of others is still read from: its answers to pings, its close
    frame and its end must be seen.
    """

    # These are class attributes, so that an object of uvicorn's class can become one of this class.
    _unparsed: bytes | bytearray = b""  # read but not parsed yet
    _is_between = False  # whether the parser of websockets is known to be between two frames
    _follows = False  # whether something was read after what is being parsed
    _is_paused = False  # the app has many messages to receive; until then, nothing more is read
    _has_inflated = False  # whether a message was inflated in place
    _queued_bytes = 0  # of the messages that were queued since none waited
    _pongs_wait = False  # the client does not read its pongs; until then, nothing more is read
    _has_eof = False  # the client will send nothing more
    _heard = False  # whether anything was received from the client since the last ping

    def slim(self) -> None:
        """Replace what takes much memory, once the handshake is over. A second call does no more.

        What somebody waits for stays, and a decompressor that was used. Of a queue that is empty,
        only a private list tells whether anybody waits for it.
        """
        self._is_between = not self._unparsed and missing(self.conn.parser) == 0
        queue: Any = self.queue
        if queue.empty() and not getattr(queue, "_getters", True):
            self.queue = Inbox()  # type: ignore[assignment]  # it stands in for uvicorn's
        if isinstance(self.writable, asyncio.Event) and self.writable.is_set():
            self.writable = Gate()  # type: ignore[assignment]  # likewise
        if self._is_between and not self._has_inflated and not has_parsed(self.conn.parser):
            for extension in self.conn.extensions:
                if isinstance(getattr(extension, "decoder", None), Decompressor):
                    vars(extension)["decoder"] = Inflater(extension)
        self.conn.available_extensions = None
        # The scope has a copy of these: about 2 KiB a connection.
        self.request.headers.clear()
        self.response.headers.clear()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self.handshake_initiated:
            if self._is_between and not self._unparsed:
                self._follows = False
                if self._read_alone(data):
                    return
            if self._has_ended:
                return  # TLS may go on for a while
            if not self._unparsed:
                self._unparsed = data
            elif isinstance(self._unparsed, bytearray):
                self._unparsed += data
            else:
                self._unparsed = bytearray(self._unparsed + data)
            self._parse()
            return
        super().data_received(data)
        if not self.handshake_initiated:
            # uvicorn passes whole requests. The parser has refused this one, because a line is too
            # long or there are too many headers, and uvicorn would not send its answer.
            self.handshake_complete = True
            self.transport.write(b"".join(self.conn.data_to_send()))
            self._close_transport()

    def _read_alone(self, data: bytes) -> bool:
        """Handle a message that is all there is to parse; return False if it is anything else."""
        begin = begin_of_whole(data)
        if (
            not begin
            or self.frames
            or self._is_paused
            or self._pongs_wait
            or self.conn.close_sent is not None
        ):
            return False
        max_size = self.config.ws_max_size
        if max_size is not None and len(data) - begin > max_size:
            return False
        first, payload = data[0], unmask(data[begin:], data[begin - 4 : begin])
        if first & COMPRESSED:
            if not self.conn.extensions:
                return False
            try:
                payload = self._inflated(payload, max_size)
            except ProtocolError as exc:
                self._fail(PROTOCOL_ERROR, str(exc))
                return True
            except PayloadTooBig as exc:
                self._fail(TOO_BIG, str(exc))
                return True
        self._on_message(first & ~COMPRESSED == TEXT, payload)
        return True

    def _inflated(self, payload: bytes, max_size: int | None) -> bytes:
        self._has_inflated = True
        frame = Frame(Opcode.BINARY, payload, rsv1=True)
        for extension in reversed(self.conn.extensions):
            frame = extension.decode(frame, max_size=max_size)
        return bytes(frame.data)

    def _parse(self) -> bool:
        """Parse what was read, until it is to be paused or the event loop has other work to do.

        It is also called in the app's task: see `_parse_rest`.

        Returns:
            Whether no whole frame is left.
        """
        data, begin, size, deadline = self._unparsed, 0, len(self._unparsed), 0.0
        had_ended, is_late = self._has_ended, False
        while begin < size and not self._is_paused and not self._pongs_wait:
            if self._is_between:
                max_size = self.config.ws_max_size
                if max_size is not None and self.frames:
                    max_size -= size_of_message(self.conn)
                found = find_frame(data, begin, max_size)
                if found is None:  # the rest is still to come
                    break
                first, content, end = found
                # `frames` are those of a message in fragments.
                if first in MESSAGES and not self.frames and self.conn.state is State.OPEN:
                    unmasked = unmask(data[content:end], data[content - 4 : content])
                    begin = end
                    self._follows = end < size
                    self._on_message(first == TEXT, unmasked)
                    continue
            else:
                rest = missing(self.conn.parser)
                if rest == 0:
                    self._is_between = True
                    continue
                end = size if rest is None else begin + rest
            self._follows = end < size
            super().data_received(bytes(data[begin:end]))
            begin = end
            if self.transport.is_closing() and not had_ended:
                if self.conn.state is not State.OPEN:
                    begin = size  # what follows a close frame or a fault does not matter
                break  # otherwise the connection is broken: see `_parse_rest`
            if (now := self.loop.time()) > (deadline := deadline or now + SLICE):
                is_late = True
                self._pause_reading()
                self.loop.call_soon(self._parse_more)
                break
        if begin:  # without a copy of the frame that is still arriving
            self._unparsed = data[begin:] if begin < size else b""
        return not (is_late or self._is_paused or self._pongs_wait)

    def _parse_more(self) -> None:
        """Parse what was read, and then read more, unless reading is paused."""
        if not self._is_paused and not self._pongs_wait and not self._has_ended:
            self._heard = True
            # In this order: over TLS, what has come with the client's end is lost otherwise.
            if self._parse() and not self._has_ended:
                self.transport.resume_reading()

    def _parse_rest(self, ends: list[Any]) -> None:
        """Parse more of what was read before the connection ended.

        The app receives that, as much as may wait for it at a time, and calls this again.

        Args:
            ends: The disconnects that it is to receive afterwards, one for each task that waits. A
                close frame of the client's has precedence.
        """
        self._is_paused = self._pongs_wait = False
        self._queued_bytes = 0
        is_done = self._parse()
        closed = self.conn.close_rcvd
        if is_done or closed is not None:
            self._unparsed = b""  # no whole frame, or nothing that matters
        for end in ends:
            if closed is not None:
                end = {**end, "code": closed.code, "reason": closed.reason}
            self.queue.put_nowait(end)

    def _pause_reading(self) -> None:
        if not self._has_ended:
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._unparsed:
            self.loop.call_soon(self._parse_more)
        else:
            self._parse_more()

    def _on_message(self, is_text: bool, payload: bytes) -> None:
        """Hand a message over, or let the app receive it, and pause reading if that has many."""
        content: str | bytes = payload
        if is_text:
            # uvicorn would log a traceback for text that is not UTF-8.
            try:
                content = str(payload, "utf-8")
            except UnicodeDecodeError as exc:
                self._fail(INVALID_DATA, f"{exc.reason} at position {exc.start}")
                return
        queue: Any = self.queue
        if not self._follows and isinstance(queue, Inbox) and queue.handle(content, payload):
            return
        message = {"type": "websocket.receive", "text" if is_text else "bytes": content}
        queue.put_nowait(message)
        self._queued_bytes += len(payload)
        if self._queued_bytes >= MAX_QUEUED_BYTES or queue.qsize() >= MAX_QUEUED:
            self._is_paused = True
            self._pause_reading()

    async def receive(self, take: Take | None = None) -> ASGIReceiveEvent:
        """Return the next message for the app that `take` does not handle: see `Inbox.get`."""
        queue: Any = self.queue
        getting = queue.get(take) if isinstance(queue, Inbox) else queue.get()
        message: ASGIReceiveEvent = await getting
        while self._unparsed and message["type"] == "websocket.disconnect" and self._has_ended:
            ends = [message]
            while not queue.empty():
                ends.append(await queue.get())
            self._parse_rest(ends)
            await asyncio.sleep(0)  # other tasks have a turn
            message = await queue.get()
        self._heard = True
        if self.queue.empty():
            self._queued_bytes = 0
            if self._is_paused:
                self.read_paused = False
        return message

    @property
    def _has_ended(self) -> bool:
        """Whether the connection has ended, apart from what was read before."""
        return self._has_eof or self.transport.is_closing()

    @property
    def read_paused(self) -> bool:
        """Whether the app has so much to receive that nothing more is read."""
        return self._is_paused

    @read_paused.setter
    def read_paused(self, paused: bool) -> None:
        """Methods of uvicorn's set it too, even one that began before the object was adopted."""
        resumes = self._is_paused and not paused
        self._is_paused = paused
        if resumes:
            self._resume_reading()

    def handle_ping(self) -> None:
        if self._has_ended:
            self.conn.data_to_send()  # nobody would read the pong
            return
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
        data = self.frames[0] if len(self.frames) == 1 else b"".join(self.frames)
        self.frames = []
        if not self.close_sent:  # otherwise the message is discarded
            self._on_message(self.curr_msg_data_type == "text", data)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._pongs_wait:
            self._pongs_wait = False
            self._resume_reading()

    def _fail(self, code: int, reason: str) -> None:
        """Close the connection because of what the client sent."""
        self.conn.fail(code, reason)
        self.handle_parser_exception()

    def _close_transport(self) -> None:
        # After a second `close`, asyncio's TLS transport cannot be aborted any more.
        if not self.transport.is_closing():
            self.transport.close()
