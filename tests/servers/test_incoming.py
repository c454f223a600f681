"""What a client sends is understood as uvicorn's own protocol does, however it arrives."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import struct
import tracemalloc
import zlib
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from starcast.servers import incoming
from starcast.uvicorn import BroadcastProtocol, adopt
from support import examples, until

MAX_SIZE = 70_000
CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
HANDSHAKE = (
    "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    "{}\r\n"
)
DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"


def frame(opcode: int, payload: bytes, fin: bool = True, rsv: int = 0, mask: bytes = b"\1\2\3\4"):
    size = len(payload)
    if size < 126:
        length = bytes([size])
    elif size < 65536:
        length = struct.pack("!BH", 126, size)
    else:
        length = struct.pack("!BQ", 127, size)
    head = bytes([opcode | (fin << 7) | rsv << 4, length[0] | (0x80 if mask else 0)]) + length[1:]
    return head + mask + (incoming.unmask(payload, mask) if mask else payload)


def deflated(payload: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-12)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


class Transport(asyncio.Transport):
    """Takes everything at once, as the transport of a client that reads."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closing = False
        self.paused = False

    def write(self, data: bytes) -> None:
        if not self.closing:
            self.written += data

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass


async def outcome(
    pieces: list[bytes],
    deflate: bool,
    cls: type = WebSocketsSansIOProtocol,
    *,
    adopted_at: int = -1,
    max_size: int = MAX_SIZE,
) -> dict[str, Any]:
    """What the app has received and what the client gets, if what it sends arrives in pieces.

    The protocol is adopted before the piece of that number.
    """
    received: list[Any] = []
    accepted = asyncio.Event()

    async def app(scope, receive, send):
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        accepted.set()
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                received.append(message["code"])
                return
            received.append(message.get("text", message.get("bytes")))

    config = uvicorn.Config(app, ws_max_size=max_size, ws_ping_interval=None, log_config=None)
    config.load()
    protocol: Any = cls(config, ServerState(), {}, asyncio.get_running_loop())
    transport = Transport()
    protocol.connection_made(transport)
    protocol.data_received(HANDSHAKE.format(DEFLATE if deflate else "").encode())
    await accepted.wait()
    del transport.written[:]
    for number, piece in enumerate(pieces):
        if number == adopted_at:
            assert adopt(protocol) is not None
        if transport.closing:
            break
        protocol.data_received(piece)
        await until(lambda: not transport.paused or transport.closing)
    await asyncio.sleep(0)
    if not transport.closing:
        protocol.connection_lost(ConnectionResetError())
    else:
        protocol.connection_lost(None)
    await until(lambda: not protocol.tasks)
    return {"received": received, "sent": codes(bytes(transport.written))}


def codes(written: bytes) -> list[Any]:
    """The frames that a client gets: pongs, and the code of a close."""
    found: list[Any] = []
    while written:
        opcode, size = written[0] & 15, written[1]
        payload, written = written[2 : 2 + size], written[2 + size :]
        found.append(int.from_bytes(payload[:2], "big") if opcode == CLOSE else payload)
    return found


texts = st.one_of(st.text(max_size=20), st.text("aä\U0001f600", min_size=100, max_size=140))
payloads = st.one_of(
    texts.map(str.encode),
    st.binary(max_size=130),
    st.sampled_from([0, 125, 126, 127, 65535, 65536, MAX_SIZE]).map(bytes),
)
masks = st.binary(min_size=4, max_size=4)


def fragments(payload: bytes, cuts: list[int], opcode: int, between: list[bytes]) -> bytes:
    ends = sorted({min(cut, len(payload)) for cut in cuts}) + [len(payload)]
    sent, start = b"", 0
    for number, end in enumerate(ends):
        sent += frame(CONT if number else opcode, payload[start:end], fin=number == len(ends) - 1)
        if number < len(ends) - 1:
            sent += b"".join(between)
        start = end
    return sent


whole = st.builds(
    lambda opcode, payload, mask: frame(opcode, payload, mask=mask),
    st.sampled_from([TEXT, BINARY, PING, PONG]),
    payloads.filter(lambda payload: len(payload) < 126),
    masks,
)
large = st.builds(frame, st.just(BINARY), payloads)
messages = st.one_of(
    whole,
    whole,
    large,
    texts.map(lambda text: frame(TEXT, text.encode())),
    st.builds(
        fragments,
        texts.map(str.encode),
        st.lists(st.integers(0, 300), min_size=1, max_size=4),
        st.just(TEXT),
        st.lists(st.binary(max_size=5).map(lambda data: frame(PING, data)), max_size=2),
    ),
)
compressed = texts.map(lambda text: frame(TEXT, deflated(text.encode()), rsv=4))
faults = st.one_of(
    st.builds(frame, st.sampled_from([3, 7, 11, 15]), st.binary(max_size=5)),
    st.builds(frame, st.sampled_from([TEXT, PING]), st.binary(max_size=5), mask=st.just(b"")),
    st.builds(frame, st.just(TEXT), st.just(b"x"), rsv=st.integers(1, 7)),
    st.builds(frame, st.just(CONT), st.just(b"x"), st.booleans()),
    st.builds(frame, st.just(TEXT), st.just(b"half"), st.just(False)),
    st.builds(frame, st.sampled_from([PING, CLOSE]), st.just(bytes(126))),
    st.builds(frame, st.just(PING), st.just(b""), st.just(False)),
    st.just(frame(BINARY, bytes(MAX_SIZE + 1))),
    st.just(frame(TEXT, deflated(bytes(10 * MAX_SIZE)), rsv=4)),
    st.sampled_from([b"", b"\3", struct.pack("!H", 999), struct.pack("!H", 1000) + b"\xff"]).map(
        lambda payload: frame(CLOSE, payload)
    ),
    st.just(frame(CLOSE, struct.pack("!H", 1001))),
)


class Sent(bytes):
    """What a client sends, with a short `repr` for Hypothesis."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes: {self[:40].hex(' ')}>"


def cut(data: bytes, seed: int, most: int) -> list[bytes]:
    """Cut data into pieces, of one byte to `most`."""
    source, pieces, start = random.Random(seed), [], 0
    while start < len(data):
        end = start + source.randint(1, most)
        pieces.append(data[start:end])
        start = end
    return pieces


@contextlib.contextmanager
def no_log():
    """uvicorn's own protocol logs a traceback for text that is not UTF-8."""
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@settings(max_examples=examples(60))
@given(
    st.lists(st.one_of(messages, messages, compressed, faults).map(Sent), max_size=8),
    st.integers(0, 2**32),
    st.sampled_from([1, 7, 100, 5000, 10**6]),
    st.booleans(),
)
def test_whatever_comes_is_what_uvicorn_makes_of_it(sent, seed, most, deflate):
    data = b"".join(sent)
    most = most if len(data) < 10_000 else max(most, 1000)
    # uvicorn drops what has arrived together with a fault, so it gets each message by itself.
    with no_log():
        theirs = asyncio.run(outcome(sent, deflate))
    ours = asyncio.run(outcome(cut(data, seed, most), deflate, BroadcastProtocol))
    assert ours == theirs
    before = sent[: len(sent) // 2]
    then = b"".join(sent[len(before) :])
    pieces = [*before, *cut(then, seed, most)]
    with no_log():
        assert asyncio.run(outcome(pieces, deflate, adopted_at=len(before))) == theirs


@pytest.mark.parametrize("size", [100, 300, MAX_SIZE])
def test_the_longest_message(size):
    """It comes in one piece, whichever way its length is written."""
    for length, answer in ((size, []), (size + 1, [1009])):
        sent = [frame(TEXT, b"first"), frame(BINARY, bytes(length))]
        theirs = asyncio.run(outcome(sent, False, max_size=size))
        assert theirs["sent"] == answer
        assert asyncio.run(outcome(sent, False, BroadcastProtocol, max_size=size)) == theirs


def test_a_message_that_says_to_be_compressed_although_nothing_was_agreed():
    sent = [frame(TEXT, b"first"), frame(TEXT, deflated(b"hello"), rsv=4)]
    theirs = asyncio.run(outcome(sent, False))
    assert theirs == {"received": ["first", 1002], "sent": [1002]}
    assert asyncio.run(outcome(sent, False, BroadcastProtocol)) == theirs


@pytest.mark.parametrize("size", [125, 126, 65536])
def test_a_frame_is_found_once_it_is_complete(size):
    sent = frame(BINARY, bytes(size))
    begin = len(sent) - size
    for end in (*range(begin + 1), len(sent) - 1):
        assert incoming.find_frame(sent[:end], 0, None) is None
    assert incoming.find_frame(b"?" + sent, 1, size) == (incoming.BINARY, begin + 1, 1 + len(sent))
    assert incoming.find_frame(sent[:begin], 0, size - 1) == (0, begin, begin)


def test_a_parser_that_does_something_else_is_not_asked_how_much_it_needs():
    def parse():
        yield

    parser = parse()
    next(parser)
    assert incoming.missing(parser) is None


def test_every_cut():
    sent = [
        frame(TEXT, "h\xe9".encode()),
        frame(BINARY, bytes(200)),
        fragments("h\xe9llo".encode(), [2], TEXT, [frame(PING, b"?")]),
        frame(TEXT, b"last"),
        frame(CLOSE, struct.pack("!H", 4000)),
    ]
    data = b"".join(sent)
    whole = asyncio.run(outcome([data], False))
    assert whole == {
        "received": ["h\xe9", bytes(200), "h\xe9llo", "last", 4000],
        "sent": [b"?", 4000],
    }
    for end in range(1, len(data)):
        pieces = [data[:end], data[end:]]
        assert asyncio.run(outcome(pieces, False, BroadcastProtocol)) == whole
        assert asyncio.run(outcome(pieces, False, adopted_at=1)) == whole


@contextlib.asynccontextmanager
async def late(transport: Transport):
    """A connection whose app receives only when it is told to. Gives its protocol, an event that
    tells it, and what it has received.
    """

    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        accepted.set()
        await begin.wait()
        while not received or isinstance(received[-1], str):
            message = await receive()
            received.append(message.get("text", message.get("code")))

    accepted, begin = asyncio.Event(), asyncio.Event()
    received: list[Any] = []
    config = uvicorn.Config(app, ws_ping_interval=None, log_config=None)
    config.load()
    protocol: Any = BroadcastProtocol(config, ServerState(), {}, asyncio.get_running_loop())
    protocol.connection_made(transport)
    protocol.data_received(HANDSHAKE.format("").encode())
    await accepted.wait()
    yield protocol, begin, received
    begin.set()
    await until(lambda: not protocol.tasks)
    if protocol in protocol.connections:
        protocol.connection_lost(None)


async def after_the_end() -> int:
    """Send a large message to a connection that is closing; return the bytes that are kept."""
    async with late(Transport()) as (protocol, _, _):
        protocol.shutdown()
        return kept_of_a_message(protocol)


def kept_of_a_message(protocol: Any) -> int:
    sent = frame(BINARY, bytes(1_000_000))
    tracemalloc.start()
    for start in range(0, 900_000, 10_000):
        protocol.data_received(sent[start : start + 10_000])
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept


def test_what_still_comes_over_tls_while_a_connection_is_closing_takes_no_memory():
    assert asyncio.run(after_the_end()) < 100_000


class Broken(Transport):
    """Closes when it is written to, as that of a client that has reset its connection."""

    is_broken = False

    def write(self, data: bytes) -> None:
        self.closing = self.closing or self.is_broken
        super().write(data)


def test_what_follows_a_ping_whose_answer_cannot_be_sent_is_received():
    async def scenario() -> list[Any]:
        transport = Broken()
        async with late(transport) as (protocol, begin, received):
            transport.is_broken = True
            sent = [frame(PING, b""), *(frame(TEXT, b"%d" % number) for number in range(20))]
            protocol.data_received(b"".join(sent))
            assert transport.closing
            protocol.connection_lost(ConnectionResetError())
            begin.set()
            await until(lambda: not protocol.tasks)
        return received

    assert asyncio.run(scenario()) == [*map(str, range(20)), 1005]


@pytest.mark.parametrize("fault", [frame(3, b""), frame(TEXT, b"\xff")])
def test_a_shutdown_after_a_fault_in_what_came_before_the_end(fault):
    """asyncio's TLS reports the end of what is read before it closes."""

    async def scenario() -> list[Any]:
        async with late(Transport()) as (protocol, begin, received):
            sent = [*(frame(TEXT, b"%d" % number) for number in range(40)), fault]
            protocol.data_received(b"".join(sent))
            protocol.eof_received()
            begin.set()
            await until(lambda: not protocol.tasks)
            protocol.transport.closing = False  # it is about to
            protocol.shutdown()
            assert protocol.transport.closing
        return received

    assert asyncio.run(scenario()) == [*map(str, range(40)), 1005]
