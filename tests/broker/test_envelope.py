"""What goes over a broker, and what may come from one."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from starcast import Event
from starcast.broker.envelope import Malformed, pack, unpack
from starcast.event import Command, Unless
from starcast.event import is_json as is_valid

US, THEM = b"12345678", b"87654321"
IDS = st.frozensets(st.integers(0, 2**64 - 1), max_size=20)


def made(message: str | bytes, exclude: frozenset[int] = frozenset()) -> Event:
    payload = message.encode() if isinstance(message, str) else message
    return Event("room", message, payload, exclude)


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.binary(), IDS)
@example("", frozenset())
@example(b"\xff", frozenset())
@example("\xff", frozenset())
def test_an_event_comes_back_as_it_was(message, exclude):
    data = pack(made(message, exclude), US)
    event = unpack("room", data, US)
    assert (event.channel, event.message, event.exclude) == ("room", message, exclude)
    assert event.payload == made(message).payload
    assert event.cost == made(message).cost
    elsewhere = unpack("room", data, THEM)
    assert elsewhere.message == message
    assert not elsewhere.exclude


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_plain_text_travels_bare_and_is_never_taken_for_an_envelope(text):
    assert pack(made(text), US) == text.encode()
    assert unpack("room", text.encode(), US).message == text


JSONS = st.sampled_from(['{"a":1}', "[1]", "5", '"x"', "null", "{", "[bot] hello", "NaN", "[NaN]"])


@given(JSONS | st.text(st.characters(exclude_categories=["Cs"])), st.booleans())
def test_json_stays_json_and_a_text_that_looks_like_it_stays_a_text(text, is_json):
    event = Event("room", text, is_json=is_json)
    assert unpack("room", pack(event, US), US).is_json == is_json or not is_valid(text)


@pytest.mark.parametrize("text", ['{"a":1}', "[1]", "hello", "[bot] hello", "{", "[NaN]"])
def test_other_programs_read_objects_and_most_texts_as_they_are(text):
    is_json = is_valid(text)
    assert pack(Event("room", text, is_json=is_json), US) == text.encode()
    assert unpack("room", text.encode(), US).is_json == is_json


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_who_has_published_it_travels_too(info):
    event = Event("room", "hello", exclude=frozenset({7}))
    event.info = info
    arrived = unpack("room", pack(event, US), US)
    assert (arrived.info, arrived.message, arrived.exclude) == (info, "hello", {7})


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.none() | TEXT, st.lists(TEXT, max_size=3), st.booleans())
def test_who_does_not_get_it_and_commands_travel_too(user, channels, is_command):
    event = (Command if is_command else Event)("room", "{}")
    event.unless = Unless(user, tuple(channels))
    arrived = unpack("room", pack(event, US), US)
    assert arrived.unless == event.unless
    assert type(arrived) is type(event)


@pytest.mark.parametrize("text", [b"{", b"5", b"[1]", b"[5,[]]", b'[null,["a",5]]', b"[" * 10000])
def test_what_is_no_list_of_those_is_malformed(text):
    with pytest.raises(Malformed):
        unpack("room", b"\xff\x01\x10" + len(text).to_bytes(4) + text + b"hello", US)


@given(st.binary())
@example(b"\xff")
@example(b"\xff\x01")
@example(b"\xff\x01\x02")
@example(b"\xff\x01\x02" + US + b"\xff\xff\xff\xff")
@example(b"\xff\x01\x04x")
@example(b"\xff\x01\x08\x00\x00\x00\x05x")
@example(b"\xff\x01\x08\x00\x00\x00\x01\xff")
@example(b"\xff\x01\x10x")
@example(b"\xff\x01\x40x")
@example(b"\xff\x02\x00x")
@example(b"\xff\x01\x00\xff")
@example(b"\xfe")
@example(b"\x80\x04\x95\x05")  # a pickle
def test_whatever_comes_is_text_or_an_envelope_or_refused(data):
    try:
        event = unpack("room", data, US)
    except Malformed:
        with pytest.raises(UnicodeDecodeError):
            data.decode()
    else:
        assert event.payload in data
        assert event.message in (event.payload, event.payload.decode(errors="replace"))


def test_the_bytes_are_those_of_the_documentation():
    assert pack(made(b"\0"), US) == b"\xff\x01\x01\0"
    assert pack(made("x", frozenset([258])), US) == (
        b"\xff\x01\x02" + US + b"\0\0\0\x01" + b"\0\0\0\0\0\0\x01\x02" + b"x"
    )
