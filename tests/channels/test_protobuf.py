"""The client protocol in Protobuf: each message says what it says in JSON, and none is harmful."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import centrifuge
import pytest
import websockets
from centrifuge.protocol import client_pb2
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from starcast import Broadcast, ChannelsEndpoint, Client, Event, History, Subscription
from starcast.channels.clock import ttl
from starcast.channels.formats import JSON, MAX_COMMANDS, Malformed, Raw
from starcast.channels.protobuf import PROTOBUF
from starcast.channels.schema import MESSAGES, Field
from starcast.frames import PROTOCOL_JSON, PROTOCOL_PROTOBUF
from starcast.history import Position
from support import Served, examples, until

pytestmark = pytest.mark.anyio

PROTOCOL = "centrifuge-protobuf"

# What the official client for Python was made from: the numbers are from there.
OFFICIAL = client_pb2.DESCRIPTOR.message_types_by_name


# Messages as a client has them, with the official classes


def fill(record: Any, content: dict[str, Any]) -> Any:
    """Put what JSON has into a message of an official class: data as JSON, the rest as it is."""
    for name, value in content.items():
        field = record.DESCRIPTOR.fields_by_name[name]
        if field.type == field.TYPE_BYTES:
            setattr(record, name, json.dumps(value).encode())
        elif field.type != field.TYPE_MESSAGE:
            setattr(record, name, value)
        elif not field.message_type.GetOptions().map_entry:
            part = getattr(record, name)
            part.SetInParent()
            fill(part, value)
        else:
            for key, item in value.items():
                if isinstance(item, dict):
                    fill(getattr(record, name)[key], item)
                else:
                    getattr(record, name)[key] = item
    return record


def plain(value: Any) -> Any:
    """Return what an official message has, as JSON has it."""
    if isinstance(value, bytes):
        return json.loads(value)
    if not hasattr(value, "ListFields"):
        return value
    content: dict[str, Any] = {}
    for field, part in value.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            content[field.name] = {key: plain(item) for key, item in part.items()}
        elif hasattr(part, "extend"):
            content[field.name] = [plain(item) for item in part]
        else:
            content[field.name] = plain(part)
    return content


def length(content: bytes) -> bytes:
    """Return a varint: the length of a message."""
    number, digits = len(content), []
    while number > 127:
        digits.append(number % 128 + 128)
        number //= 128
    return bytes([*digits, number])


def packed(*commands: dict[str, Any]) -> bytes:
    """A frame with commands."""
    parts = [fill(client_pb2.Command(), command).SerializeToString() for command in commands]
    return b"".join(length(part) + part for part in parts)


def unpacked(frame: bytes) -> list[dict[str, Any]]:
    """The replies of a frame."""
    replies = []
    while frame:
        size = shift = 0
        while True:
            byte, frame = frame[0], frame[1:]
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        assert size <= len(frame), "cut off"
        replies.append(plain(client_pb2.Reply.FromString(frame[:size])))
        frame = frame[size:]
    return replies


def read(frame: bytes) -> list[dict[str, Any]]:
    return PROTOBUF.read({"type": "websocket.receive", "bytes": frame})


# The messages


@pytest.mark.parametrize("message", MESSAGES)
def test_each_field_is_the_protocols(message):
    theirs = OFFICIAL[message].fields_by_name
    for field in MESSAGES[message].values():
        official = theirs[field.name]
        assert field.number == official.number
        kind = official.message_type
        if is_dict := kind is not None and kind.GetOptions().map_entry:
            official = kind.fields_by_name["value"]
            kind = official.message_type
        elif field.of == "list":
            assert isinstance(getattr(getattr(client_pb2, message)(), field.name)[:], list)
        assert is_dict is (field.of == "dict")
        if kind is not None:
            assert field.type == kind.name
        else:
            assert official.type == getattr(official, f"TYPE_{field.type.upper()}")


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "bool": st.just(True),
    "string": st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
    "uint32": st.integers(1, 2**32 - 1),
    "uint64": st.integers(1, 2**64 - 1),
    "int32": st.integers(-(2**31), 2**31 - 1).filter(bool),
    "int64": st.integers(-(2**63), 2**63 - 1).filter(bool),
    "bytes": st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab"), inner),
        max_leaves=4,
    ),
}


def values(field: Field) -> st.SearchStrategy[Any]:
    one = VALUES[field.type] if field.type in VALUES else contents(field.type)
    if field.of == "list":
        return st.lists(one, min_size=1, max_size=3)
    if field.of == "dict":
        return st.dictionaries(VALUES["string"], one, min_size=1, max_size=3)
    return one


def contents(message: str) -> st.SearchStrategy[dict[str, Any]]:
    """What a message may have. In Protobuf there is no telling a default from what is missing."""
    fields = {name: values(field) for name, field in MESSAGES[message].items()}
    return st.deferred(lambda: st.fixed_dictionaries({}, optional=fields))


def one_of_each(message: str) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """A method or kind, and its content."""
    kinds = {name: f.type for name, f in MESSAGES[message].items() if f.type in MESSAGES}
    kinds.pop("push", None)
    return st.one_of([st.tuples(st.just(n), contents(type)) for n, type in kinds.items()])


@settings(max_examples=examples(300))
@given(st.lists(st.tuples(VALUES["uint32"], one_of_each("Command")), min_size=1, max_size=3))
def test_a_command_is_read_as_in_json(sent):
    commands = [{"id": id, method: params} for id, (method, params) in sent]
    lines = "\n".join(map(json.dumps, commands))
    expected = JSON.read({"type": "websocket.receive", "text": lines})
    assert read(packed(*commands)) == expected == commands


@settings(max_examples=examples(300))
@given(VALUES["uint32"], one_of_each("Reply"))
def test_a_reply_says_what_it_says_in_json(id, reply):
    method, result = reply
    expected = json.loads(JSON.reply(id, method, result).payload)
    assert unpacked(PROTOBUF.reply(id, method, result).payload) == [expected]


@settings(max_examples=examples(300))
@given(VALUES["string"], one_of_each("Push"))
def test_a_push_says_what_it_says_in_json(channel, push):
    kind, content = push
    expected = json.loads(JSON.push(channel, kind, content).payload)
    assert unpacked(PROTOBUF.push(channel, kind, content).payload) == [expected]


@pytest.mark.parametrize("method", [name for name in MESSAGES["Command"] if name != "id"])
def test_a_command_without_anything_is_one(method):
    assert read(packed({"id": 1, method: {}})) == [{"id": 1, method: {}}]


@pytest.mark.parametrize("method", [name for name in MESSAGES["Reply"] if name != "id"])
def test_a_reply_without_anything_is_one(method):
    assert unpacked(PROTOBUF.reply(1, method, {}).payload) == [{"id": 1, method: {}}]


def test_a_push_that_belongs_to_no_channel_names_none():
    pushed = PROTOBUF.push("", "disconnect", {"code": 3000, "reason": "bye"})
    assert unpacked(pushed.payload) == [
        {"push": {"disconnect": {"code": 3000, "reason": "bye"}}},
    ]


@pytest.mark.parametrize("size", [0, 1, 100, 127, 128, 16_383, 16_384, 3_000_000])
def test_messages_of_every_length_are_framed(size):
    data = "x" * size
    result = PROTOBUF.reply(1, "rpc", {"data": data})
    assert unpacked(result.payload) == [{"id": 1, "rpc": {"data": data}}]
    command = {"id": 1, "rpc": {"method": "m", "data": data}}
    assert read(packed(command, command)) == [command, command]


def test_pings_and_pongs_are_empty():
    assert PROTOBUF.ping.payload == b"\0"
    assert PROTOBUF.ping.kind == "bytes"
    assert read(b"\0") == [{}]
    assert read(packed({}, {"id": 1, "ping": {}}, {})) == [{}, {"id": 1, "ping": {}}, {}]
    assert read(b"") == []


def test_no_time_is_longer_than_a_client_can_be_told():
    longest = ttl(time.time() + 1e12)  # who has meant milliseconds, say
    result = {"expires": True, "ttl": longest}
    assert unpacked(PROTOBUF.reply(1, "sub_refresh", result).payload) == [
        {"id": 1, "sub_refresh": {"expires": True, "ttl": 2**32 - 1}}
    ]


# Publications


def published(message: Any, info: str | None = None, **options: Any) -> Any:
    event = Event("tea", message, **options)
    event.info = info
    event.position = Position("epoch", 7)
    made = event.in_form(PROTOCOL_PROTOBUF)
    assert made.kind == "bytes"
    (reply,) = unpacked(made.payload)
    # The same as in JSON
    assert reply == json.loads(event.in_form(PROTOCOL_JSON).payload)
    return reply["push"]["pub"]


def test_what_was_published_is_json():
    assert published('{"a":\n1}', is_json=True) == {"data": {"a": 1}, "offset": 7}
    assert published('{"a": 1}', is_json=False) == {"data": '{"a": 1}', "offset": 7}
    assert published("Grüße") == {"data": "Grüße", "offset": 7}


def test_bytes_are_in_base64_as_in_json():
    tagged = {"data": "AP8=", "tags": {"encoding": "base64"}, "offset": 7}
    assert published(b"\x00\xff") == tagged


def test_who_has_published_it_is_told_digit_for_digit():
    info = '{"user":"7","client":"c","conn_info":{"n":1.10,"m":1e999,"k":' + "9" * 5000 + "}}"
    event = Event("tea", "x")
    event.info = info.replace("}}", '},"of a newer hub":1}')
    payload = event.in_form(PROTOCOL_PROTOBUF).payload
    assert b'{"n":1.10,"m":1e999,"k":999' in payload
    assert b"newer" not in payload
    simple = '{"user":"7","client":"c","chan_info":["x"]}'
    assert published("x", simple)["info"] == json.loads(simple)


def test_a_message_to_a_client_belongs_to_no_channel():
    (reply,) = unpacked(Event("", '{"a":1}', is_json=True).in_form(PROTOCOL_PROTOBUF).payload)
    assert reply == {"push": {"message": {"data": {"a": 1}}}}


def test_the_form_is_made_once():
    event = Event("tea", "x")
    assert event.in_form(PROTOCOL_PROTOBUF) is event.in_form(PROTOCOL_PROTOBUF)


def test_what_is_written_already_is_not_written_again():
    (reply,) = unpacked(PROTOBUF.reply(1, "rpc", {"data": Raw('{"a":1}')}).payload)
    assert reply == {"id": 1, "rpc": {"data": {"a": 1}}}


# Malformed and hostile messages

SUBSCRIBE = packed({"id": 1, "subscribe": {"channel": "tea", "data": {"a": [1]}}})


def rpc(data: bytes) -> bytes:
    content = client_pb2.Command(id=1, rpc={"method": "m", "data": data}).SerializeToString()
    return length(content) + content


@pytest.mark.parametrize(
    "frame",
    [
        b"\x80",  # a length that is cut off
        b"\x80\x80\x80\x80\x80\x00",  # one that is too long
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x01",  # nothing after it
        b"\xff\xff\xff\xff\x0f",
        SUBSCRIBE[:-1],
        SUBSCRIBE + b"\x05\x08",
        b"\x01\x08",  # a field without its value
        b"\x01\x00",  # a field with number 0
        b"\x02\x0f\x00",  # a type that does not exist
        b"\x05\x22\x03\x0a\x01\xff",  # a token that is not UTF-8
        b"\x01\x0c",  # the end of a group that has not begun
        b"\x78" + b"\x53" * 120,  # groups in groups
        b"\xe0\xd4\x03" + b"\x53" * 60_000,
        rpc(b"{"),
        rpc(b"\xff"),
        rpc(b"NaN"),
        rpc(b"1e999"),
        rpc(b'"\\ud800"'),
        rpc(b"[" * 100_000),
        rpc(b"9" * 5_000),
    ],
)
def test_what_is_malformed_is_refused(frame):
    with pytest.raises(Malformed) as refused:
        read(frame)
    assert len(str(refused.value)) < 80
    assert refused.value.__cause__ is None


@pytest.mark.parametrize("command", [b"\0", b"\x02\x08\x01"])
def test_a_frame_has_a_bounded_number_of_commands(command):
    line = "{}\n" if command == b"\0" else '{"id":1}\n'
    for count, is_too_many in ((MAX_COMMANDS, False), (MAX_COMMANDS + 1, True)):
        for format, message in (
            (PROTOBUF, {"bytes": command * count}),
            (JSON, {"text": line * count}),
        ):
            refused = pytest.raises(Malformed, match="too many commands")
            with refused if is_too_many else contextlib.nullcontext():
                assert len(format.read(message)) == count


def test_binary_frames_only():
    for message in ({"text": "{}"}, {"text": "{}", "bytes": None}):
        with pytest.raises(Malformed, match="binary frames only"):
            PROTOBUF.read({"type": "websocket.receive", **message})


def test_what_is_not_known_is_skipped():
    field = b"\xf2\x3f\x03abc"  # number 1022
    assert read(b"\x08\x08\x05" + field) == [{"id": 5}]  # a command that is not known
    assert read(b"\x06" + field) == [{}]
    group = b"\x53\x08\x01\x54"
    assert read(b"\x06\x08\x05" + group) == [{"id": 5}]
    content = b"\x08\x05\x5a\x06" + field + field  # in `ping`, and beside it
    assert read(length(content) + content) == [{"id": 5, "ping": {}}]
    # A text where a number is expected
    assert read(b"\x03\x0a\x01x") == [{}]


@settings(max_examples=examples(1000))
@given(st.binary(max_size=200))
@example(b"")
def test_any_bytes_are_commands_or_refused(frame):
    with contextlib.suppress(Malformed):
        assert all(isinstance(command, dict) for command in read(frame))


@settings(max_examples=examples(1000))
@given(
    st.lists(one_of_each("Command"), min_size=1, max_size=2),
    st.lists(st.tuples(st.integers(0), st.binary(max_size=3)), min_size=1, max_size=3),
)
def test_damaged_commands_are_commands_or_refused(sent, damages):
    frame = packed(*({"id": 1, method: params} for method, params in sent))
    for place, damage in damages:
        place %= len(frame)
        frame = frame[:place] + damage + frame[place + 1 :] or b"\0"
    with contextlib.suppress(Malformed):
        read(frame)


# On a server


class Live(ChannelsEndpoint):
    async def on_connect(self, websocket, token, data):
        return Client(user="7", info={"name": "Ann"}, data={"you said": data})

    async def on_subscribe(self, websocket, channel, token, data):
        is_hall = channel == "hall"
        return Subscription(history=True, info=data, presence=is_hall, join_leave=is_hall)

    async def on_publish(self, websocket, channel, data):
        return data

    async def on_rpc(self, websocket, method, data):
        return {"method": method, "data": data}


def make_app() -> tuple[Starlette, Broadcast]:
    hub = Broadcast(history={"past*": History(size=100, ttl=60)})
    endpoint = type("Live", (Live,), {"broadcast": hub})
    return Starlette(routes=[WebSocketRoute("/live", endpoint)], lifespan=hub.lifespan), hub


@pytest.fixture
async def live() -> AsyncIterator[tuple[Served, Broadcast]]:
    app, hub = make_app()
    server = Served(app)
    await server.start()
    yield server, hub
    await server.stop()


class Connection:
    """A client of few words, in one of the forms."""

    def __init__(self, websocket: Any, protobuf: bool) -> None:
        self.websocket = websocket
        self.protobuf = protobuf
        self.frames: list[int] = []  # replies in each frame

    async def send(self, *commands: dict[str, Any]) -> None:
        lines = "\n".join(map(json.dumps, commands))
        await self.websocket.send(packed(*commands) if self.protobuf else lines)

    async def receive(self) -> list[dict[str, Any]]:
        frame = await asyncio.wait_for(self.websocket.recv(), 20)
        assert isinstance(frame, bytes) is self.protobuf
        replies = unpacked(frame) if self.protobuf else list(map(json.loads, frame.split("\n")))
        self.frames.append(len(replies))
        return [reply for reply in replies if reply]  # no pings

    async def take(self, count: int) -> list[dict[str, Any]]:
        replies: list[dict[str, Any]] = []
        while len(replies) < count:
            replies += await self.receive()
        assert len(replies) == count
        return replies

    async def ask(self, **command: Any) -> dict[str, Any]:
        await self.send({"id": 9, **command})
        (reply,) = await self.take(1)
        assert reply.pop("id") == 9
        return reply


@contextlib.asynccontextmanager
async def connected(server: Served, protobuf: bool = True) -> AsyncIterator[Connection]:
    path = "/live?cf_protocol=protobuf" if protobuf else "/live"
    async with server.connect(path) as websocket:
        connection = Connection(websocket, protobuf)
        reply = await connection.ask(connect={"token": "t", "data": [1]})
        assert reply["connect"]["data"] == {"you said": [1]}
        yield connection


async def test_the_subprotocol_or_the_url_chooses_it(live):
    server, _ = live
    for path, offered, chosen in [
        ("/live", [PROTOCOL], PROTOCOL),
        ("/live", ["other", PROTOCOL], PROTOCOL),
        ("/live?cf_protocol=protobuf", None, None),
        ("/live?cf_protocol=protobuf", [PROTOCOL], PROTOCOL),
    ]:
        async with server.connect(path, subprotocols=offered) as websocket:
            assert websocket.subprotocol == chosen
            await Connection(websocket, True).ask(connect={})


async def test_others_get_json(live):
    server, _ = live
    for path in ("/live", "/live?cf_protocol=json"):
        async with server.connect(path) as websocket:
            await Connection(websocket, False).ask(connect={})


async def closed(server: Served, frame: str | bytes) -> tuple[int, str]:
    async with connected(server) as connection:
        await connection.websocket.send(frame)
        with pytest.raises(websockets.ConnectionClosedError) as closing:
            await asyncio.wait_for(connection.websocket.recv(), 20)
        return closing.value.rcvd.code, closing.value.rcvd.reason


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        ("{}", "binary frames only"),
        (b"\x05\x08", "a command is cut off"),
        (b"\x01\x08", "a command is no Protobuf"),
        (rpc(b"NaN"), "data: not valid JSON"),
        (rpc(b"\xff"), "data: not valid UTF-8"),
    ],
)
async def test_a_client_that_sends_nonsense_is_closed(live, caplog, frame, reason):
    server, hub = live
    assert await closed(server, frame) == (3501, f"bad request: {reason}")
    await until(lambda: hub.stats().clients == 0)
    assert not [record for record in caplog.records if record.levelname != "INFO"]


async def test_an_unknown_command_is_answered(live):
    server, _ = live
    async with connected(server) as connection:
        await connection.websocket.send(b"\x05\x08\x05\xf2\x3f\x00")
        assert await connection.take(1) == [
            {"id": 5, "error": {"code": 104, "message": "method not found"}}
        ]


async def test_a_message_that_is_too_long_closes_the_client(live):
    server, _ = live
    code, _ = await closed(server, rpc(b'"%s"' % (b"x" * 300_000)))
    assert code == 1009


async def test_commands_in_one_frame_are_answered_in_order(live):
    server, _ = live
    async with connected(server) as connection:
        await connection.send(
            {},  # a pong
            {"id": 2, "subscribe": {"channel": "tea", "data": "mine"}},
            {"id": 3, "publish": {"channel": "tea", "data": {"n": 1}}},
            {"id": 4, "unsubscribe": {"channel": "tea"}},
            {"id": 5, "publish": {"channel": "tea", "data": {"n": 2}}},
        )
        replies = await connection.take(5)
        (push,) = [reply["push"] for reply in replies if "push" in reply]
        info = push["pub"].pop("info")
        assert (info["user"], info["conn_info"], info["chan_info"]) == (
            "7",
            {"name": "Ann"},
            "mine",
        )
        assert push == {"channel": "tea", "pub": {"data": {"n": 1}}}
        assert [reply for reply in replies if "id" in reply] == [
            {"id": 2, "subscribe": {}},
            {"id": 3, "publish": {}},
            {"id": 4, "unsubscribe": {}},
            {"id": 5, "publish": {}},
        ]


async def test_clients_of_both_forms_and_of_none_share_a_channel(live):
    server, hub = live
    async with connected(server) as one, connected(server, protobuf=False) as other:
        for client in (one, other):
            assert "subscribe" in await client.ask(subscribe={"channel": "tea"})
        await hub.publish("tea", {"a": 1})
        await hub.publish("tea", "text")
        await hub.publish("tea", b"\x00\xff")
        got = await one.take(3)
        assert got == await other.take(3)
        assert [push["push"]["pub"] for push in got] == [
            {"data": {"a": 1}},
            {"data": "text"},
            {"data": "AP8=", "tags": {"encoding": "base64"}},
        ]
        # What one publishes, the other gets
        assert await one.ask(rpc={"method": "m", "data": 1}) == {
            "rpc": {"data": {"method": "m", "data": 1}}
        }
        await other.send({"id": 5, "publish": {"channel": "tea", "data": ["from JSON"]}})
        (push,) = await one.take(1)
        assert push["push"]["pub"]["data"] == ["from JSON"]


async def test_publications_of_one_turn_share_a_frame(live):
    server, hub = live
    async with connected(server) as client:
        await client.ask(subscribe={"channel": "tea"})
        client.frames.clear()
        for number in range(100):
            hub.publish_nowait("tea", number)
        pushes = await client.take(100)
        assert [push["push"]["pub"]["data"] for push in pushes] == list(range(100))
        assert len(client.frames) < 10


async def test_what_was_missed_is_recovered(live):
    server, hub = live
    async with connected(server) as client:
        reply = (await client.ask(subscribe={"channel": "past"}))["subscribe"]
        assert reply["recoverable"]
        assert reply["positioned"]
    for number in range(3):
        await hub.publish("past", {"n": number})
    position = {"offset": reply.get("offset", 0), "epoch": reply["epoch"]}
    missed = [{"data": {"n": number}, "offset": number + 1} for number in range(3)]
    async with connected(server) as client:
        recover = {"channel": "past", "recover": True, **position}
        reply = (await client.ask(subscribe=recover))["subscribe"]
        assert reply["recovered"]
        assert reply["was_recovering"]
        assert reply["publications"] == missed
        history = {"channel": "past", "limit": -1, "since": {**position, "offset": 1}}
        reply = (await client.ask(history=history))["history"]
        assert reply == {"publications": missed[1:], "epoch": position["epoch"], "offset": 3}
        lost = {"channel": "past", "limit": -1, "since": {"offset": 1, "epoch": "other"}}
        assert (await client.ask(history=lost))["error"]["code"] == 112


async def test_members_are_told_of_each_other(live):
    server, _ = live
    async with connected(server) as one:
        await one.send({"id": 2, "subscribe": {"channel": "hall", "data": "first"}})
        (reply, join) = await one.take(2)
        assert reply == {"id": 2, "subscribe": {}}
        info = join["push"]["join"]["info"]
        member = {"user": "7", "conn_info": {"name": "Ann"}, "chan_info": "first"}
        assert info == {**member, "client": info["client"]}
        async with connected(server, protobuf=False) as other:
            await asked(other, subscribe={"channel": "hall"})
            for client in (one, other):
                reply = await asked(client, presence={"channel": "hall"})
                assert len(reply["presence"]["presence"]) == 2
                assert reply["presence"]["presence"][info["client"]] == info
                reply = await asked(client, presence_stats={"channel": "hall"})
                assert reply == {"presence_stats": {"num_clients": 2, "num_users": 1}}


async def asked(client: Connection, **command: Any) -> dict[str, Any]:
    """The reply to a command, without what comes before it."""
    await client.send({"id": 8, **command})
    while True:
        for reply in await client.receive():
            if reply.pop("id", None) == 8:
                return reply


def test_it_needs_no_fast_path():
    app, hub = make_app()
    with TestClient(app) as client, client.websocket_connect("/live?cf_protocol=protobuf") as peer:
        subscribe = {"channel": "tea"}
        peer.send_bytes(packed({"id": 1, "connect": {}}, {"id": 2, "subscribe": subscribe}))
        replies: list[dict[str, Any]] = []
        while len(replies) < 2:
            replies += filter(None, unpacked(peer.receive_bytes()))
        hub.publish_nowait("tea", {"a": 1})
        assert unpacked(peer.receive_bytes()) == [
            {"push": {"channel": "tea", "pub": {"data": {"a": 1}}}}
        ]


# The official client for Python


class Events(centrifuge.ClientEventHandler):
    def __init__(self) -> None:
        self.errors: list[Any] = []

    async def on_error(self, ctx: Any) -> None:
        self.errors.append(ctx)


class Publications(centrifuge.SubscriptionEventHandler):
    def __init__(self) -> None:
        self.got: list[Any] = []
        self.contexts: list[Any] = []

    async def on_subscribed(self, ctx: Any) -> None:
        self.contexts.append(ctx)

    async def on_publication(self, ctx: Any) -> None:
        self.got.append(json.loads(ctx.pub.data))


async def test_the_official_client_speaks_it(live):
    server, hub = live
    events, publications = Events(), Publications()
    client = centrifuge.Client(server.url("/live"), events=events, use_protobuf=True, data=b"[1]")
    subscription = client.new_subscription("past", events=publications)
    await client.connect()
    await subscription.subscribe()
    await client.ready(20)
    await subscription.ready(20)
    await subscription.publish(b'{"n":0}')
    result = await client.rpc("m", b'{"x":1}')
    assert json.loads(result.data) == {"method": "m", "data": {"x": 1}}
    for number in range(1, 100):
        await hub.publish("past", {"n": number})
    await until(lambda: len(publications.got) == 100)
    # It was away, and comes back by itself.
    for connection in server.server.server_state.connections:
        connection.transport.abort()
    for number in range(100, 110):
        await hub.publish("past", {"n": number})
    await until(lambda: len(publications.got) == 110)
    assert publications.got == [{"n": number} for number in range(110)]
    assert publications.contexts[-1].recovered
    history = await subscription.history(limit=2)
    assert [json.loads(pub.data) for pub in history.publications] == [{"n": 10}, {"n": 11}]
    await client.disconnect()
    assert not events.errors


# Without the package


def refusal(client: TestClient) -> int:
    """Return the code that a client is refused with, before or after it is accepted."""
    try:
        with client.websocket_connect("/live", subprotocols=[PROTOCOL]) as websocket:
            assert websocket.accepted_subprotocol == PROTOCOL
            return int(websocket.receive()["code"])
    except WebSocketDisconnect as exc:
        return exc.code


@pytest.mark.parametrize("refuse", ["http", "close"])
def test_who_lacks_the_package_is_told(monkeypatch, caplog, refuse):
    monkeypatch.setitem(sys.modules, "starcast.channels.protobuf", None)
    app, _ = make_app()
    app.router.routes[0].endpoint.refuse = refuse
    with TestClient(app) as client:
        assert [refusal(client), refusal(client)] == [3508, 3508]
        with client.websocket_connect("/live") as websocket:  # others do not need it
            websocket.send_json({"id": 1, "connect": {}})
            assert "connect" in websocket.receive_json()
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "pip install 'starcast[protobuf]'" in line
    assert ("HTTP 403" in line) is (refuse == "http")


def test_an_app_may_answer_for_it(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "starcast.channels.protobuf", None)
    app, _ = make_app()
    seen: list[Exception] = []

    async def handle(websocket: Any, exc: Any) -> None:
        seen.append(exc)
        await websocket.close(4000)

    app.add_exception_handler(WebSocketException, handle)
    with (
        TestClient(app) as client,
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect("/live?cf_protocol=protobuf"),
    ):
        pass
    assert [type(exc).__name__ for exc in seen] == ["ProtobufMissing"]


def test_it_is_not_imported_unless_it_is_used():
    code = """
import sys
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
import starcast
app = Starlette(routes=[WebSocketRoute("/live", starcast.ChannelsEndpoint)])
with TestClient(app) as client:
    def connect(path):
        with client.websocket_connect(path) as websocket:
            websocket.send_bytes(b"\\x04\\x08\\x01\\x22\\x00") if "?" in path else (
                websocket.send_json({"id": 1, "connect": {}}))
            websocket.receive()
        return "google.protobuf" in sys.modules
    print(connect("/live"), connect("/live?cf_protocol=protobuf"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "False True\n", done.stderr
