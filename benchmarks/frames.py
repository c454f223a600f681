"""The client's side of a WebSocket: frames to send, and received ones counted."""

from __future__ import annotations

import zlib
from collections.abc import Callable

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10

Control = Callable[[int, bytes], None]


def client_frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """Make a frame as a client sends it. Its mask is four zero bytes, which costs nothing here."""
    return _head(opcode, len(payload), 0x80) + bytes(4) + payload


def server_frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """Make a frame as a server sends it."""
    return _head(opcode, len(payload), 0) + payload


def _head(opcode: int, length: int, masked: int) -> bytes:
    if length < 126:
        return bytes((0x80 | opcode, masked | length))
    if length < 65536:
        return bytes((0x80 | opcode, masked | 126)) + length.to_bytes(2, "big")
    return bytes((0x80 | opcode, masked | 127)) + length.to_bytes(8, "big")


class FrameCounter:
    """Counts the messages in what a server sent, by their headers.

    Attributes:
        messages: Whole messages so far.
        compressed: How many of them had been deflated.
        payloads: With `keep=True`, their content; else None.
    """

    def __init__(self, control: Control | None = None, *, keep: bool = False) -> None:
        self.messages = 0
        self.compressed = 0
        self.payloads: list[bytes] | None = [] if keep else None
        self.partial = bytearray()  # the beginning of a frame that has not come as a whole
        self._control = control
        self._inflater = zlib.decompressobj(-15)
        self._message = bytearray()
        self._deflated = False

    def feed(self, data: bytes | bytearray | memoryview) -> int:
        """Take what was read, and return how many messages it completes."""
        if self.partial:
            data = self.partial + data
        before = self.messages
        pos, end = 0, len(data)
        while end - pos >= 2:
            first, length = data[pos], data[pos + 1]
            start = pos + 2
            if length == 126:
                start += 2
                if start > end:
                    break
                length = data[start - 2] << 8 | data[start - 1]
            elif length == 127:
                start += 8
                if start > end:
                    break
                length = int.from_bytes(data[start - 8 : start], "big")
            elif length > 127:
                raise ValueError("the server sent a masked frame")
            stop = start + length
            if stop > end:
                break
            if first & 8:
                if self._control is not None:
                    self._control(first & 15, bytes(data[start:stop]))
            else:
                if first & 0x40:
                    self.compressed += 1
                    self._deflated = True
                if self.payloads is not None:
                    self._message += data[start:stop]
                if first & 0x80:
                    self.messages += 1
                    if self.payloads is not None:
                        self.payloads.append(self._content())
            pos = stop
        self.partial = bytearray(data[pos:end])
        return self.messages - before

    def _content(self) -> bytes:
        content = bytes(self._message)
        if self._deflated:
            content = self._inflater.decompress(content + b"\x00\x00\xff\xff")
        self._message.clear()
        self._deflated = False
        return content
