"""The frames that are written ready-made, read by a reader of the test's own.

Compressed ones are inflated in small pieces by one inflater for the whole connection, with no more
window than was agreed: a one-shot inflate has its output at hand and hides a window too large.
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starcast import frames
from starcast.event import Event
from support import examples

KIB = 1024
SIZES = [0, 125, 126, 65_535, 65_536, 1024 * KIB]
WINDOWS = range(9, 16)
SETTINGS = [frames.PLAIN, *WINDOWS]
OPCODES = [frames.TEXT, frames.BINARY]
CONTINUATION, CLOSE, PING, PONG = 0, 8, 9, 10


@dataclasses.dataclass
class Frame:
    first: int  # the bits of the first byte above the opcode
    opcode: int
    payload: bytes

    @property
    def compressed(self) -> bool:
        return bool(self.first & 0x40)


class Reader:
    """Splits what a server writes into frames, and inflates messages as a small client would."""

    def __init__(self, window: int = 0) -> None:
        self._rest = b""
        self._inflater = zlib.decompressobj(wbits=-window) if window else None

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that are complete; the lengths must be in their shortest form."""
        buffer = memoryview(self._rest + data)
        at = 0
        while len(buffer) - at >= 2:
            first, length = buffer[at], buffer[at + 1]
            assert length < 128, "a server does not mask"
            start = at + 2
            if length >= 126:
                size = 2 if length == 126 else 8
                if len(buffer) - start < size:
                    break
                length = int.from_bytes(buffer[start : start + size], "big")
                assert length >= (126 if size == 2 else 65_536), "the shortest form is due"
                start += size
            if len(buffer) - start < length:
                break
            at = start + length
            yield Frame(first & 0xF0, first & 0x0F, bytes(buffer[start:at]))
        self._rest = bytes(buffer[at:])

    def message(self, frame: Frame) -> str | bytes:
        """Return the message in an unfragmented frame."""
        assert frame.first & 0x80
        assert not frame.first & 0x30
        payload = frame.payload
        if frame.compressed:
            assert self._inflater is not None, "nothing was agreed upon"
            payload = b"".join(self._inflate(payload + b"\0\0\xff\xff"))
        assert frame.opcode in OPCODES
        return payload.decode() if frame.opcode == frames.TEXT else payload

    def _inflate(self, compressed: bytes) -> Iterator[bytes]:
        for at in range(0, len(compressed), 61):
            piece = compressed[at : at + 61]
            while piece:
                yield self._inflater.decompress(piece, 97)
                piece = self._inflater.unconsumed_tail
        while more := self._inflater.decompress(b"", 97):
            yield more
        assert not self._inflater.eof

    def messages(self, data: bytes) -> list[str | bytes]:
        return [self.message(frame) for frame in self.feed(data)]

    @property
    def whole(self) -> bool:
        return not self._rest


def content(size: int, seed: int = 0, distances: tuple[int, ...] = (300, 900, 6000, 31_000)):
    """Bytes that are text, with much to find at these distances and little elsewhere."""
    rng = random.Random(seed)
    text = bytearray()
    while len(text) < size:
        distance = rng.choice(distances)
        if distance < len(text):
            text += text[-distance:][: rng.randrange(20, 200)]
        else:
            text += rng.randbytes(150).hex().encode()
        text += rng.randbytes(4).hex().encode()
    return bytes(text[:size])


@pytest.mark.parametrize("opcode", OPCODES)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_for_every_setting(size, opcode):
    payload = content(size)
    expected = payload.decode() if opcode == frames.TEXT else payload
    for setting in SETTINGS:
        reader = Reader(setting)
        written = frames.make(opcode, payload, setting)
        (frame,) = reader.feed(written)
        assert reader.whole
        assert frame.opcode == opcode
        assert frame.compressed == bool(setting and size >= frames.WORTH_COMPRESSING)
        assert len(written) <= len(payload) + 10
        assert reader.message(frame) == expected


@pytest.mark.parametrize("window", WINDOWS)
def test_each_is_right_whatever_went_before(window):
    """One inflater for all of them: a frame that referred to an earlier one would be garbage."""
    reader = Reader(window)
    connection = zlib.compressobj(wbits=-window)  # an ordinary message, with a fresh context too
    ordinary = content(5000, 99)
    deflated = (connection.compress(ordinary) + connection.flush(zlib.Z_SYNC_FLUSH))[:-4]
    for number, size in enumerate([40_000, 128, 127, 5000, 70_000, 0, 300, 40_000]):
        payload = content(size, number % 3)
        assert reader.messages(frames.make(frames.BINARY, payload, window)) == [payload]
        written = frames.header(0x40 | frames.BINARY, len(deflated)) + deflated
        assert reader.messages(written) == [ordinary]


@pytest.mark.parametrize("window", range(9, 15))
def test_this_reader_notices_a_window_that_is_too_large(window):
    payload = content(200_000, distances=(2 * 2**window - 300,))
    with pytest.raises(zlib.error, match="too far back"):
        Reader(window).messages(frames.make(frames.BINARY, payload, window + 1))


def test_a_larger_window_finds_more():
    payload = content(200_000)
    sizes = [len(frames.make(frames.TEXT, payload, window)) for window in WINDOWS]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]


@pytest.mark.parametrize("size", [128, 1000, 65_535, 65_536, 200_000])
def test_what_does_not_get_shorter_is_not_compressed(size):
    payload = random.Random(size).randbytes(size)
    for window in WINDOWS:
        written = frames.make(frames.BINARY, payload, window)
        assert written == frames.make(frames.BINARY, payload)
        assert Reader().messages(written) == [payload]


def test_what_is_short_is_not_compressed():
    assert not next(Reader().feed(frames.make(frames.TEXT, b"x" * 127, 15))).compressed
    assert next(Reader().feed(frames.make(frames.TEXT, b"x" * 128, 15))).compressed


def test_the_bytes_of_the_standard():
    """The examples of RFC 6455 section 5.7, and that of RFC 7692 section 7.2.3.2."""
    assert frames.make(frames.TEXT, b"Hello") == bytes.fromhex("810548656c6c6f")
    assert frames.make(frames.BINARY, b"\0" * 256)[:4] == bytes.fromhex("827e0100")
    assert frames.make(frames.BINARY, b"\0" * 65_536)[:10] == bytes.fromhex("827f0000000000010000")
    example = bytes.fromhex("c107f248cdc9c90700c105f200110000")
    assert Reader(9).messages(example) == ["Hello", "Hello"]


messages = st.one_of(
    st.text(max_size=300),
    st.binary(max_size=300),
    st.builds(content, st.integers(0, 3000), st.integers(0, 3)),
    st.builds(lambda text, times: text * times, st.text(max_size=20), st.integers(0, 400)),
)


@given(st.lists(messages, max_size=12), st.sampled_from(SETTINGS), st.integers(1, 2000))
@settings(max_examples=examples(100))
def test_a_stream_of_messages_cut_anywhere(sent, setting, cut):
    written = b""
    for message in sent:
        opcode = frames.TEXT if isinstance(message, str) else frames.BINARY
        payload = message.encode() if isinstance(message, str) else message
        written += frames.make(opcode, payload, setting)
    reader = Reader(setting)
    got = [reader.messages(written[at : at + cut]) for at in range(0, len(written), cut)]
    assert [message for some in got for message in some] == sent
    assert reader.whole


@pytest.mark.parametrize("message", ["text " * 100, b"bytes " * 100])
def test_an_event_makes_each_frame_once_and_none_that_nobody_needs(message, monkeypatch):
    made = []

    def make(opcode, payload, setting):
        made.append(setting)
        return frame(opcode, payload, setting)

    frame = frames.make
    monkeypatch.setattr(frames, "make", make)
    event = Event("channel", message, message.encode() if isinstance(message, str) else message)
    assert made == []
    for setting in (0, 12, 0, 12, 9, 12):
        written = event.frame(setting)
        assert written is event.frame(setting)
        assert Reader(setting).messages(written) == [message]
    assert made == [0, 12, 9]
