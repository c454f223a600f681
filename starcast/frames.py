"""Frames: make WebSocket frames that are ready to be written (RFC 6455 section 5, RFC 7692).

A server does not mask its frames, so a frame is the same for all clients with the same wire format:
whether messages are compressed, and how large a window the client has agreed to keep for that.
"""

from __future__ import annotations

import functools
import zlib

TEXT = 1
BINARY = 2

_FIN = 0x80
_RSV1 = 0x40  # the message is compressed, RFC 7692 section 6

# The wire format of a client: 0 without compression, else the base-two logarithm of the window.
WireFormat = int
PLAIN: WireFormat = 0

# Added to the wire format of a client that gets each message in an object with its id.
WITH_ID: WireFormat = 16

# The wire format of a stream of server-sent events.
EVENT_STREAM: WireFormat = 32

# Added to the wire format of a client that speaks the protocol of `starcast.channels`.
PROTOCOL_JSON: WireFormat = 64
PROTOCOL_PROTOBUF: WireFormat = 128

# The forms that a message may have for a client, besides what was published.
FORMS: WireFormat = WITH_ID | PROTOCOL_JSON | PROTOCOL_PROTOBUF

# In these forms, several messages may go into one frame, with this between them.
SEPARATORS: dict[WireFormat, bytes] = {PROTOCOL_JSON: b"\n", PROTOCOL_PROTOBUF: b""}

# Smaller payloads are not compressed, in bytes. A short JSON object would hardly become shorter,
# and each client would have to inflate it.
WORTH_COMPRESSING = 128


@functools.lru_cache(maxsize=1024)
def header(opcode: int, length: int) -> bytes:
    """Return the header of an unfragmented frame. `opcode` may include the compression bit."""
    if length < 126:
        return bytes((_FIN | opcode, length))
    if length < 65536:
        return bytes((_FIN | opcode, 126)) + length.to_bytes(2)
    return bytes((_FIN | opcode, 127)) + length.to_bytes(8)


def make(opcode: int, payload: bytes, wire_format: WireFormat = PLAIN) -> bytes:
    """Return the frame of a message in a wire format.

    Each frame is compressed with a new context. It does not refer to earlier messages, so it can be
    sent to any client whose window is at least as large, whatever the client has received before.
    It does change the window of the client: see `starcast.uvicorn` for what this means for messages
    that the server compresses itself.

    Args:
        opcode: `TEXT` or `BINARY`.
        payload: The message as bytes.
        wire_format: `PLAIN`, or the size of the window in bits, 9 to 15.
    """
    if wire_format and len(payload) >= WORTH_COMPRESSING:
        deflate = zlib.compressobj(wbits=-wire_format, memLevel=5)
        # Remove the empty block at the end of the message, RFC 7692 section 7.2.1.
        compressed = (deflate.compress(payload) + deflate.flush(zlib.Z_SYNC_FLUSH))[:-4]
        if len(compressed) < len(payload):
            return header(_RSV1 | opcode, len(compressed)) + compressed
    return header(opcode, len(payload)) + payload
