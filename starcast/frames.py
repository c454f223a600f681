"""WebSocket frames of a server, ready to be written (RFC 6455 section 5, RFC 7692).

A frame of a server is not masked, so it is the same for every client that agreed on the same wire
setting: whether messages are compressed, and how large a window the client keeps for that.
"""

from __future__ import annotations

import zlib

TEXT = 1
BINARY = 2

_FIN = 0x80
_RSV1 = 0x40  # the message is compressed, RFC 7692 section 6

# The wire setting of a client: 0 for frames as they are, else the base-two logarithm of the window.
Setting = int
PLAIN: Setting = 0

# Payloads under this many bytes are not compressed: a short JSON object becomes little shorter, and
# each client has to inflate it.
WORTH_COMPRESSING = 128


def header(opcode: int, length: int) -> bytes:
    """Return the header of an unfragmented frame; `opcode` may carry the bit of compression."""
    if length < 126:
        return bytes((_FIN | opcode, length))
    if length < 65536:
        return bytes((_FIN | opcode, 126)) + length.to_bytes(2)
    return bytes((_FIN | opcode, 127)) + length.to_bytes(8)


def make(opcode: int, payload: bytes, setting: Setting = PLAIN) -> bytes:
    """Return the frame of a message for one wire setting.

    A compressed frame is made with a context of its own. It refers to nothing before it, so it is
    right for a client whatever that has got before, as long as its window is no smaller. The
    client's window does move on: see `starcast.uvicorn` for what follows for other messages.

    Args:
        opcode: `TEXT` or `BINARY`.
        payload: The message as bytes.
        setting: `PLAIN`, or the window's size in bits, 9 to 15.
    """
    if setting and len(payload) >= WORTH_COMPRESSING:
        deflate = zlib.compressobj(wbits=-setting, memLevel=5)
        # Without the empty block that ends each message, RFC 7692 section 7.2.1.
        compressed = (deflate.compress(payload) + deflate.flush(zlib.Z_SYNC_FLUSH))[:-4]
        if len(compressed) < len(payload):
            return header(_RSV1 | opcode, len(compressed)) + compressed
    return header(opcode, len(payload)) + payload
