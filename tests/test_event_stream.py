"""The wire format of server-sent events."""

from __future__ import annotations

import pytest

from starcast import Event, event_stream, frames


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one", [b"data: one"]),
        ("", [b"data: "]),
        (" x", [b"data:  x"]),
        ("a\nb", [b"data: a", b"data: b"]),
        ("a\r\nb\rc\n", [b"data: a", b"data: b", b"data: c", b"data: "]),
        ("id: 1\n\ndata: 2", [b"data: id: 1", b"data: ", b"data: data: 2"]),
        ("\u2028\x0b\x85\0", ["data: \u2028\x0b\x85\0".encode()]),  # none of these ends a line
    ],
)
def test_each_line_of_a_message_is_a_line_of_data(text, lines):
    assert event_stream.make(text.encode(), None, False) == b"\n".join([*lines, b"", b""])


def test_ids_and_bytes():
    assert event_stream.make(b"x", "e-1", False) == b"id: e-1\ndata: x\n\n"
    assert event_stream.make(b"\xff\n", "e-1", True) == b"id: e-1\nevent: bytes\ndata: /wo=\n\n"
    assert event_stream.named(b"reset", b"{}") == b"event: reset\ndata: {}\n\n"
    assert event_stream.retry(0) == b"retry: 0\n\n"


def test_a_block_is_made_once():
    event = Event("a", "x")
    block = event.frame(frames.EVENT_STREAM)
    assert block == b"data: x\n\n"
    assert event.frame(frames.EVENT_STREAM) is block
    both = event.frame(frames.EVENT_STREAM | frames.WITH_ID)
    assert both == b'data: {"id": null, "channel": "a", "data": "x"}\n\n'
    assert event.frame(frames.EVENT_STREAM | frames.WITH_ID) is both
    assert event.frame(frames.PLAIN) == b"\x81\x01x"
