from __future__ import annotations

import pytest

from starcast import Broadcast, Event
from starcast.event import OVERHEAD

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
