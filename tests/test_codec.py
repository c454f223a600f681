from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import json
import math
import uuid
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.websockets import WebSocket

from starcast import ConfigurationError, EncodingError, InvalidChannel, InvalidMessage, codec
from support import examples


class Colour(enum.Enum):
    RED = "red"
    NESTED = (1, 2)


class Level(enum.IntEnum):
    HIGH = 3


class Word(enum.StrEnum):
    HELLO = "hello"


class OldWord(str, enum.Enum):  # noqa: UP042  # the older way, whose str() is its name
    HELLO = "hello"


class OldLevel(int, enum.Enum):
    HIGH = 3


class Text(str):
    """A str of somebody's own, such as a `Markup`."""

    __slots__ = ()


@dataclasses.dataclass
class Point:
    x: int
    y: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    points: list[Point]
    at: datetime.date


class Model(pydantic.BaseModel):
    name: str
    at: datetime.datetime
    tags: set[int] = set()


class Measure(pydantic.BaseModel):
    value: float


class NotAModel:
    """Has the method on the instance only, so it is none of pydantic's."""

    def __init__(self) -> None:
        self.model_dump = lambda mode: {}


NOON = datetime.datetime(2024, 2, 29, 12, 30, 15, 250)
UID = uuid.UUID("12345678-1234-5678-1234-567812345678")


def circle() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


def circle_of_dataclasses() -> Point:
    point = Point(1)
    point.y = point
    return point


class Itself(collections.UserDict):
    """A mapping, which is no dict, that is in itself."""

    def __init__(self) -> None:
        super().__init__()
        self.data["self"] = self


def failing() -> Iterator[int]:
    yield 1
    raise LookupError("the generator failed")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


# Channel names


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "x" * 200,
        "\N{GRINNING FACE}" * 200,
        "*",
        ">",
        "a.*.b",
        '\'; drop table "chat"; --',
        " ",
        "two words",
        "a/b",
        "\N{NO-BREAK SPACE}",
        "\N{LATIN SMALL LETTER E WITH ACUTE}",
        "\N{GRINNING FACE}",
        "\ue000",
    ],
)
def test_a_channel_may_have_any_visible_name(name):
    assert codec.check_channel(name) == name


@pytest.mark.parametrize("name", ["", "x" * 201, "\N{GRINNING FACE}" * 201])
def test_a_channel_has_1_to_200_characters(name):
    with pytest.raises(InvalidChannel, match=f"1 to 200 characters, not {len(name)}"):
        codec.check_channel(name)


@pytest.mark.parametrize(
    "character",
    [
        "\x00",
        "\n",
        "\r\n",
        "\t",
        "\x1b",
        "\x1f",
        "\x7f",
        "\x80",
        "\x85",
        "\x9f",
        "\ud800",
        chr(0xDFFF),
    ],
)
@pytest.mark.parametrize("name", ["{}", "{}room", "ro{}om", "room{}"])
def test_a_channel_has_no_control_characters_and_no_lone_surrogates(name, character):
    with pytest.raises(InvalidChannel) as raised:
        codec.check_channel(name.format(character))
    # The message shows the character in a form that can be printed.
    assert repr(character[0]) in str(raised.value)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("name", "type_name"),
    [
        (None, "NoneType"),
        (True, "bool"),
        (7.0, "float"),
        (b"room", "bytes"),
        (["room"], "list"),
        (Colour.RED, "Colour"),
    ],
)
def test_a_channel_is_a_str_an_int_or_a_uuid(name, type_name):
    with pytest.raises(InvalidChannel) as raised:
        codec.check_channel(name)
    assert str(raised.value) == (
        f"a channel's name must be a str, an int or a UUID, not {type_name}"
    )


@pytest.mark.parametrize(
    ("channel", "name"),
    [
        (7, "7"),
        (-1, "-1"),
        (0, "0"),
        (10**199, "1" + "0" * 199),
        (UID, str(UID)),
        (Level.HIGH, "3"),
        (Word.HELLO, "hello"),
        (OldWord.HELLO, "hello"),
        (OldLevel.HIGH, "3"),
        (Text("room"), "room"),
    ],
)
def test_a_channel_has_the_name_of_its_str(channel, name):
    got = codec.check_channel(channel)
    assert got == name
    assert type(got) is str


@pytest.mark.parametrize("digits", [201, 301, 302, 400, 5000])
def test_a_number_too_long_for_a_channel_is_refused(digits):
    with pytest.raises(InvalidChannel, match="1 to 200 characters"):
        codec.check_channel(10 ** (digits - 1))


@settings(max_examples=examples(100))
@given(st.text(max_size=210))
def test_a_valid_channel_has_a_utf8_form_and_no_line_breaks(name):
    try:
        codec.check_channel(name)
    except InvalidChannel:
        assert (
            not 1 <= len(name) <= 200
            or any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in name)
            or any(0xD800 <= ord(c) < 0xE000 for c in name)
        )
    else:
        assert name.encode().decode() == name
        assert 1 <= len(name) <= 200
        assert not set(name) & {chr(c) for c in (*range(0x20), *range(0x7F, 0xA0))}


@pytest.mark.parametrize("encoding", ["text", "bytes", "json", None])
def test_an_encoding_is_one_of_starlettes_or_none(encoding):
    assert codec.check_encoding(encoding) == encoding


@pytest.mark.parametrize("encoding", ["xml", "", "JSON", 0, False])
def test_another_encoding_is_refused(encoding):
    with pytest.raises(ConfigurationError, match="text, bytes, json or None, not "):
        codec.check_encoding(encoding)


# Writing JSON


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ({"a": [1, 2.5, None, True], "b": "x"}, '{"a":[1,2.5,null,true],"b":"x"}'),
        ("ok", '"ok"'),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}\N{GRINNING FACE}", '"\xe9\U0001f600"'),
        ("a\nb\x00", '"a\\nb\\u0000"'),
        (10**100, "1" + "0" * 100),
        (NOON, '"2024-02-29T12:30:15.000250"'),
        (NOON.replace(tzinfo=datetime.UTC), '"2024-02-29T12:30:15.000250Z"'),
        (NOON.date(), '"2024-02-29"'),
        (NOON.time(), '"12:30:15.000250"'),
        (UID, '"12345678-1234-5678-1234-567812345678"'),
        (Colour.RED, '"red"'),
        (Colour.NESTED, "[1,2]"),
        (Level.HIGH, "3"),
        ([Word.HELLO], '["hello"]'),
        (Point(1), '{"x":1,"y":null}'),
        (
            Line([Point(1, UID), Point(2, Colour.RED)], NOON.date()),
            '{"points":[{"x":1,"y":"12345678-1234-5678-1234-567812345678"},{"x":2,"y":"red"}],'
            '"at":"2024-02-29"}',
        ),
        (
            Model(name="x", at=NOON, tags={7}),
            '{"name":"x","at":"2024-02-29T12:30:15.000250","tags":[7]}',
        ),
        (
            [Point(1, Model(name="x", at=NOON))],
            '[{"x":1,"y":{"name":"x","at":"2024-02-29T12:30:15.000250","tags":[]}}]',
        ),
    ],
)
def test_the_default_dumps_writes_compact_json(value, written):
    assert codec.dumps(value) == written
    assert codec.encode({"v": value}, None, codec.dumps)[0] == f'{{"v":{written}}}'


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "holding",
    [
        lambda number: number,
        lambda number: [number],
        lambda number: Point(1, number),
        lambda number: Measure(value=number),
        lambda number: [Point(1, [Measure(value=number)])],
    ],
)
def test_nan_and_infinities_are_not_json(holding, number):
    data = holding(number)
    with pytest.raises(EncodingError, match="cannot be written as JSON"):
        codec.encode(data, "json", codec.dumps)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "null", ["NaN", None], Point(1, "-Infinity")])
def test_the_words_for_them_may_be_said(word):
    assert json.loads(codec.dumps({"v": [word]})) == {"v": [json.loads(codec.dumps(word))]}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (object(), "object cannot be written as JSON"),
        ([{"deep": {1: range(3)}}], "range cannot be written as JSON"),
        (Point(object()), "object cannot be written as JSON"),
        (Model.model_construct(name=object()), "object cannot be written as JSON"),
        ([memoryview(b"bytes")], "memoryview cannot be written as JSON"),
        (WebSocket({"type": "websocket"}, None, None), "WebSocket cannot be written as JSON"),
        ([Request({"type": "http"})], "Request cannot be written as JSON"),
        ({"key": b"\xff"}, "bytes that are not UTF-8"),
        (Point, "type cannot be written as JSON"),
        (Model, "ModelMetaclass cannot be written as JSON"),
        (NotAModel(), "NotAModel cannot be written as JSON"),
        ({object(): 3}, "object cannot be written as JSON"),
        (circle(), "Circular reference"),
        (circle_of_dataclasses(), "Circular reference"),
        (10**5000, "digits"),
        (failing(), "the generator failed"),
        (Itself(), "Circular reference"),
        ((value for value in [math.nan]), "NaN is not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_json_does_not_know_is_refused_by_name(value, says):
    with pytest.raises(EncodingError, match="the message cannot be written as JSON: ") as raised:
        codec.encode(value, None, codec.dumps)
    assert says in str(raised.value)


def test_a_value_nested_too_deeply_is_refused():
    with pytest.raises(EncodingError, match="depth"):
        codec.encode(nested(100_000), None, codec.dumps)


# From what is published to a frame


@pytest.mark.parametrize("encoding", ["text", None])
def test_a_str_becomes_a_text_frame(encoding):
    assert codec.encode("h\xe9", encoding, codec.dumps) == ("h\xe9", b"h\xc3\xa9")


@pytest.mark.parametrize("encoding", ["bytes", None])
@pytest.mark.parametrize(
    "data", [b"\x00\xff", bytearray(b"\x00\xff"), memoryview(b"\x00-\xff-")[::2]]
)
def test_bytes_become_a_binary_frame(data, encoding):
    content, payload = codec.encode(data, encoding, codec.dumps)
    assert content == payload == b"\x00\xff"
    assert type(content) is type(payload) is bytes


def test_a_frame_does_not_change_with_the_buffer_it_was_made_from():
    data = bytearray(b"before")
    content, payload = codec.encode(data, None, codec.dumps)
    data[:] = b"after!"
    assert content == payload == b"before"


@pytest.mark.parametrize("data", [{"a": 1}, [1], 1, 1.5, None, True, Point(1)])
def test_anything_else_becomes_json_in_a_text_frame(data):
    content, payload = codec.encode(data, None, codec.dumps)
    assert content == codec.dumps(data)
    assert payload == codec.dumps(data).encode()


def test_a_str_becomes_json_if_the_encoding_says_so():
    assert codec.encode("ok", "json", codec.dumps) == ('"ok"', b'"ok"')


@pytest.mark.parametrize(
    ("data", "encoding", "says"),
    [
        ("text", "bytes", 'encoding="bytes" needs bytes, not str'),
        ({"a": 1}, "bytes", 'encoding="bytes" needs bytes, not dict'),
        (b"bytes", "text", "a text message needs a str, not bytes"),
        ({"a": 1}, "text", "a text message needs a str, not dict"),
        (memoryview(b"bytes"), "json", "memoryview cannot be written as JSON"),
    ],
)
def test_data_that_does_not_fit_its_encoding_is_refused(data, encoding, says):
    with pytest.raises(EncodingError) as raised:
        codec.encode(data, encoding, codec.dumps)
    assert says in str(raised.value)


@pytest.mark.parametrize("data", ["\ud800", "a\udfffb"])
@pytest.mark.parametrize("encoding", ["text", "json", None])
def test_a_lone_surrogate_is_refused(data, encoding):
    with pytest.raises(EncodingError, match="has no UTF-8 form"):
        codec.encode(data, encoding, codec.dumps)


@pytest.mark.parametrize(
    "value", [{"\udc00": 1}, ["\udc00"], Point(1, "\udc00"), {UID: Point(1, ["\udc00"])}]
)
def test_a_lone_surrogate_inside_a_value_is_refused(value):
    with pytest.raises(EncodingError, match="has no UTF-8 form"):
        codec.encode(value, None, codec.dumps)


def test_dumps_of_your_own_may_return_bytes():
    def like_orjson(value: Any) -> bytes:
        return json.dumps(value, ensure_ascii=False).encode()

    content, payload = codec.encode({"a": "h\xe9"}, None, like_orjson)
    assert content == '{"a": "h\xe9"}'
    assert payload == b'{"a": "h\xc3\xa9"}'


def test_dumps_of_your_own_may_return_str():
    assert codec.encode(1, None, lambda value: f"<{value}>") == ("<1>", b"<1>")


@pytest.mark.parametrize("data", ["text", b"bytes"])
def test_dumps_is_not_asked_about_text_and_bytes(data):
    assert codec.encode(data, None, lambda value: "wrong")[0] == data


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (b"\xff", "bytes that are not UTF-8"),
        (None, "needs a str, not NoneType"),
        (bytearray(b"1"), "needs a str, not bytearray"),
        ("\ud800", "has no UTF-8 form"),
    ],
)
def test_dumps_that_returns_something_else_is_an_encoding_error(returned, says):
    with pytest.raises(EncodingError, match=says):
        codec.encode({"a": 1}, None, lambda value: returned)


@pytest.mark.parametrize(
    "error", [TypeError("no"), ValueError("no"), RecursionError("no"), LookupError("no")]
)
def test_dumps_that_refuses_is_an_encoding_error(error):
    def refuse(value: Any) -> str:
        raise error

    with pytest.raises(EncodingError, match="cannot be written as JSON: no") as raised:
        codec.encode({"a": 1}, None, refuse)
    assert raised.value.__cause__ is error


# From a client's frame to what a handler gets


def text(content: str) -> dict[str, Any]:
    return {"type": "websocket.receive", "text": content}


def binary(content: bytes) -> dict[str, Any]:
    return {"type": "websocket.receive", "bytes": content}


@pytest.mark.parametrize(
    ("message", "encoding", "value"),
    [
        (text("h\xe9"), "text", "h\xe9"),
        (text(""), "text", ""),
        (text("{"), "text", "{"),
        (text("1e999"), "text", "1e999"),
        ({**text("x"), "bytes": None}, "text", "x"),
        (binary(b"\xff\x00"), "bytes", b"\xff\x00"),
        (binary(b""), "bytes", b""),
        ({**binary(b"x"), "text": None}, "bytes", b"x"),
        (text("x"), None, "x"),
        (text(""), None, ""),
        (binary(b"\xff"), None, b"\xff"),
        ({**binary(b""), "text": None}, None, b""),
        (text('{"a":[1,2.5,null]}'), "json", {"a": [1, 2.5, None]}),
        (text(' "ok"\n'), "json", "ok"),
        (text("-0.5E3"), "json", -500.0),
        (text("1e308"), "json", 1e308),
        (text("1e-999"), "json", 0.0),
        (text("9" * 4000), "json", int("9" * 4000)),
        (binary(b'{"a":"h\xc3\xa9"}'), "json", {"a": "h\xe9"}),
        (text(r'"\u00e9"'), "json", "\xe9"),
        (text(r'"\ud83d\ude00"'), "json", "\N{GRINNING FACE}"),
        (text(r'"\uD83D\uDE00"'), "json", "\N{GRINNING FACE}"),
        (text(r'"\\ud800"'), "json", r"\ud800"),
        (text("[" * 100 + "]" * 100), "json", nested(99)),
    ],
)
def test_a_frame_is_read_by_its_encoding(message, encoding, value):
    got = codec.decode(message, encoding)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("message", "encoding", "reason"),
    [
        (binary(b"x"), "text", "text frames only"),
        (binary(b""), "text", "text frames only"),
        (text("x"), "bytes", "binary frames only"),
        (text(""), "bytes", "binary frames only"),
        ({**text("x"), "bytes": None}, "bytes", "binary frames only"),
    ],
)
def test_the_wrong_type_of_frame_is_1003(message, encoding, reason):
    with pytest.raises(InvalidMessage) as raised:
        codec.decode(message, encoding)
    assert (raised.value.code, raised.value.reason) == (1003, reason)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "nul",
        "'x'",
        "[1,]",
        '{"a":1}}',
        "{a:1}",
        '"a\nb"',
        "\ufeff1",
        "NaN",
        "[Infinity]",
        '{"a":-Infinity}',
        "1e999",
        "[-1e999]",
        "1" * 5000,
        '{"a":' + "1" * 5000 + "}",
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
    ],
    ids=lambda content: repr(content[:20]),
)
@pytest.mark.parametrize("frame", ["text", "binary"])
def test_bad_json_is_1007(content, frame):
    message = text(content) if frame == "text" else binary(content.encode())
    with pytest.raises(InvalidMessage) as raised:
        codec.decode(message, "json")
    assert (raised.value.code, raised.value.reason) == (1007, "not valid JSON")
    # The parser's error quotes what the client sent; nobody needs that in a traceback.
    assert raised.value.__suppress_context__


@pytest.mark.parametrize(
    ("message", "encoding"),
    [
        (text("\ud800"), "text"),
        (text("a\udfff"), None),
        (text('"\ud800"'), "json"),
        (text(r'"\ud800"'), "json"),
        (text(r'"\uDFFF"'), "json"),
        (text(r'{"\ud800":1}'), "json"),
        (text(r'[["\ude00\ud83d"]]'), "json"),
        (binary(b'"\\ud800"'), "json"),
        (binary(b"\xff"), "json"),
        (binary(b'"\xed\xa0\x80"'), "json"),
        (binary(b'"\xc3"'), "json"),
    ],
)
def test_what_has_no_utf8_form_is_1007(message, encoding):
    with pytest.raises(InvalidMessage) as raised:
        codec.decode(message, encoding)
    assert (raised.value.code, raised.value.reason) == (1007, "not valid UTF-8")
    assert raised.value.__suppress_context__


def test_a_frame_without_content_is_bad_json():
    with pytest.raises(InvalidMessage) as raised:
        codec.decode({"type": "websocket.receive"}, "json")
    assert raised.value.code == 1007


@settings(max_examples=examples(100))
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=8,
    )
)
def test_what_can_be_published_can_be_received_again(value):
    try:
        content, payload = codec.encode(value, "json", codec.dumps)
    except EncodingError:
        return
    assert codec.decode(text(content), "json") == value
    assert codec.decode(binary(payload), "json") == value


@settings(max_examples=examples(100))
@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda s: s.encode("utf-8", "replace")))
def test_whatever_a_client_sends_is_read_or_refused_with_a_code(content):
    code = 1007
    try:
        value = codec.decode(binary(content), "json")
    except InvalidMessage as exc:
        code = exc.code
    else:
        assert codec.decode(text(codec.dumps(value)), "json") == value
    assert code == 1007
