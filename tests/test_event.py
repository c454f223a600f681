from __future__ import annotations

import copy
import pickle

import pytest

from starcast import Broadcast, Event
from starcast.event import OVERHEAD
from starcast.frames import BINARY, TEXT, make

pytestmark = pytest.mark.anyio


def test_an_event_says_what_was_published_where():
    event = Event("room", "h\xe9", b"h\xc3\xa9", frozenset({7}))
    assert event.channel == "room"
    assert event.message == "h\xe9"
    assert event.payload == b"h\xc3\xa9"
    assert event.exclude == frozenset({7})
    assert repr(event) == "Event(channel='room', message='h\xe9')"


def test_an_event_excludes_nobody_by_default():
    assert Event("room", "x", b"x").exclude == frozenset()


@pytest.mark.parametrize("payload", [b"", b"x", b"x" * 1000])
def test_an_event_costs_its_bytes_and_something_for_itself(payload):
    assert Event("room", payload, payload).cost == len(payload) + OVERHEAD
    assert OVERHEAD == 64  # the documentation of `max_buffer` gives the figure


@pytest.mark.parametrize("message", ['{"a":[1]}', b'{"a":[1]}'])
def test_json_parses_text_and_bytes(message):
    assert Event("room", message, b"").json() == {"a": [1]}


@pytest.mark.parametrize("message", ["not JSON", "", "1" * 5000, b"\xff", b"{", "[" * 100_000])
def test_json_raises_value_error_for_what_is_not_json(message):
    with pytest.raises(ValueError, match=r"."):
        Event("room", message, b"").json()


def test_an_event_can_be_made_of_its_channel_and_message():
    """As the tests of programs that were written for encode/broadcaster do."""
    text, binary = Event("room", "h\xe9"), Event("room", b"\xff")
    assert (text.payload, text.kind) == (b"h\xc3\xa9", "text")
    assert (binary.payload, binary.kind) == (b"\xff", "bytes")
    assert text == Event(channel="room", message="h\xe9", payload=b"h\xc3\xa9")


def test_an_event_of_anything_else_is_a_type_error():
    with pytest.raises(TypeError, match="has a str or bytes, not dict"):
        Event("room", {"a": 1})


def test_events_are_equal_if_their_channel_and_message_are():
    event = Event("room", "x")
    assert event == Event("room", "x", b"x", frozenset({7}))
    assert len({event, Event("room", "x"), Event("room", "y"), Event("other", "x")}) == 3
    assert event != Event("room", "y")
    assert event != Event("other", "x")
    assert event != Event("room", b"x")
    assert event != ("room", "x")


def test_an_event_can_be_pickled_and_copied():
    event = Event("room", "x", b"x", frozenset({7}))
    for same in (pickle.loads(pickle.dumps(event)), copy.copy(event)):
        assert (same, same.payload, same.exclude) == (event, b"x", frozenset({7}))


def test_an_event_has_no_room_for_anything_else():
    with pytest.raises(AttributeError):
        Event("room", "x", b"x").other = 1


@pytest.mark.parametrize(
    ("data", "encoding", "message", "payload"),
    [
        ("ok", None, "ok", b"ok"),
        ("ok", "json", '"ok"', b'"ok"'),
        (b"\xff", None, b"\xff", b"\xff"),
        ({"a": 1}, None, '{"a":1}', b'{"a":1}'),
        ("", None, "", b""),
    ],
)
async def test_subscribers_share_one_event(data, encoding, message, payload):
    hub = Broadcast()
    async with hub.subscribe("room") as one, hub.subscribe("room") as two:
        await hub.publish("room", data, encoding=encoding)
        event = await anext(one)
        assert await anext(two) is event
    assert (event.channel, event.message, event.payload) == ("room", message, payload)
    await hub.disconnect()


@pytest.mark.parametrize(("message", "opcode"), [("h\xe9" * 100, TEXT), (b"h\xe9" * 100, BINARY)])
def test_a_frame_is_made_once_for_each_wire_format(message, opcode):
    event = Event("room", message)
    plain, deflated = event.frame(0), event.frame(15)
    assert plain == make(opcode, event.payload, 0)
    assert deflated == make(opcode, event.payload, 15)
    assert len(deflated) < len(plain)
    assert event.frame(0) is plain
    assert event.frame(15) is deflated
