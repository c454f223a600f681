"""The hub: registering clients, publishing to them, and looking at them."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json

import pytest
from fastapi import WebSocket
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect, WebSocketState

from starcast import (
    BackendUnavailable,
    Broadcast,
    BroadcastEndpoint,
    ClientGone,
    ConfigurationError,
    ConnectionManager,
    EncodingError,
    Gap,
    InvalidChannel,
    NotConnected,
    PublishQueueFull,
    SubscriberLagged,
    Tuning,
)
from support import Bus, Peer, by_another, joined, until, until_sync

pytestmark = pytest.mark.anyio


# Registering


async def test_connect_accepts_unless_somebody_has():
    hub = Broadcast()
    one, two = Peer(), Peer()
    await hub.connect(one.websocket, subprotocol="chat", headers=[(b"x-a", b"b")])
    await two.websocket.accept()
    await hub.connect(two.websocket)
    assert one.sent == [
        {"type": "websocket.accept", "subprotocol": "chat", "headers": [(b"x-a", b"b")]}
    ]
    assert len(two.sent) == 1
    assert len(hub) == 2
    assert hub.channels == {"default": 2}


async def test_an_empty_hub_is_true():
    assert len(Broadcast()) == 0
    assert Broadcast()


async def test_a_client_may_be_on_several_channels_and_leave_them_one_by_one():
    hub = Broadcast()
    peer = await joined(hub, "a")
    await hub.connect(peer.websocket, "b")
    await hub.connect(peer.websocket, "b")
    assert hub.channels == {"a": 1, "b": 1}
    await hub.publish("a", "1")
    await hub.publish("b", "2")
    await hub.disconnect(peer.websocket, "a")
    await hub.disconnect(peer.websocket, "a")
    await hub.disconnect(peer.websocket, "never joined")
    await hub.publish("a", "3")
    await hub.publish("b", "4")
    assert peer.got == ["1", "2", "4"]
    assert hub.channels == {"b": 1}
    assert len(hub) == 1
    await hub.disconnect(peer.websocket, "b")
    assert not hub.channels
    assert len(hub) == 0


async def test_channels_is_a_fresh_copy():
    hub = Broadcast()
    await joined(hub, "a")
    before = hub.channels
    await joined(hub, "b")
    assert before == {"a": 1}
    before["a"] = 2
    assert hub.channels == {"a": 1, "b": 1}


async def test_disconnecting_a_stranger_or_twice_is_harmless():
    hub = Broadcast()
    peer = await joined(hub)
    await hub.disconnect(peer.websocket)
    await hub.disconnect(peer.websocket)
    await hub.disconnect(Peer().websocket)


async def test_connecting_a_client_that_has_left_says_so():
    hub = Broadcast()
    peer = Peer()
    await peer.websocket.accept()
    peer.leave()
    with pytest.raises(WebSocketDisconnect):
        await peer.websocket.receive_text()
    with pytest.raises(ClientGone):
        await hub.connect(peer.websocket)
    assert len(hub) == 0


async def test_a_client_accepted_while_the_hub_closes_is_told_to_go():
    hub = Broadcast()
    peer = Peer()
    peer.open.clear()
    connecting = asyncio.create_task(hub.connect(peer.websocket))
    await until(lambda: peer.stalled)
    await hub.disconnect()
    peer.open.set()
    with pytest.raises(ClientGone):
        await connecting
    assert peer.closed == 1001
    assert len(hub) == 0


async def test_a_client_that_goes_while_it_is_accepted():
    hub = Broadcast()
    peer = Peer()
    peer.fail = OSError()
    with pytest.raises(ClientGone):
        await hub.connect(peer.websocket)
    again = Peer()
    again.fail = OSError()
    assert await hub.serve(again.websocket) == 1006


@pytest.mark.parametrize("name", ["", "x" * 201, "a\0b", "a\r\nb", "\x9f", "\ud800", 5.0, None])
async def test_a_name_that_is_no_channel(name):
    hub = Broadcast()
    peer = Peer()
    with pytest.raises(InvalidChannel):
        await hub.connect(peer.websocket, name)
    with pytest.raises(InvalidChannel):
        await hub.publish(name, "x")
    with pytest.raises(InvalidChannel):
        hub.publish_nowait(name, "x")
    with pytest.raises(InvalidChannel):
        hub.subscribe(name)
    assert peer.sent == []
    assert not hub.channels


@pytest.mark.parametrize("name", ["x", "*", ">", "a b", "a.b", "'\"", "🙂", "é" * 200, "../x"])
async def test_a_name_that_is_a_channel(name):
    hub = Broadcast()
    peer = await joined(hub, name)
    other = await joined(hub, "other")
    await hub.publish(name, "x")
    assert peer.got == ["x"]
    assert other.got == []


async def test_settings_for_one_client():
    hub = Broadcast()
    with pytest.raises(ConfigurationError):
        await joined(hub, overflow="explode")
    with pytest.raises(ConfigurationError):
        await joined(hub, max_buffer=-1)
    peer = await joined(hub, overflow="drop_newest", max_buffer=100)
    peer.open.clear()
    for _ in range(5):
        await hub.send("x" * 30)
    assert hub.stats().dropped == 3  # one on its way, one that fits
    assert hub.stats().buffered == 94
    assert len(hub) == 1


async def test_a_client_of_a_server_may_be_on_several_channels(serve):
    hub = Broadcast()

    async def endpoint(websocket: WebSocket) -> None:
        await hub.connect(websocket, "a")
        await hub.serve(websocket, "b")

    server = await serve(Starlette(routes=[WebSocketRoute("/", endpoint)]))
    async with server.connect("/") as client:
        await until(lambda: hub.channels == {"a": 1, "b": 1})
        await hub.publish("a", "hello")
        assert await client.recv() == "hello"
    await until(lambda: len(hub) == 0)


async def test_a_hub_that_is_closed_while_a_subscriber_joins_says_so():
    closing = []

    async def subscribe(connection, channel, proceed):
        await proceed()
        if channel.endswith("room"):  # the hub closes before the subscriber's task goes on
            closing.append(asyncio.create_task(hub.disconnect()))

    hub = Broadcast(backend=Bus(on_subscribe=subscribe))
    await hub.connect()
    with pytest.raises(BackendUnavailable, match="the hub was closed"):
        await hub.subscribe("room").__aenter__()
    await asyncio.gather(*closing)
    assert hub.stats().subscribers == hub.stats().backend.channels == 0


# Publishing


async def test_publish_by_position_and_by_keyword():
    hub = Broadcast()
    peer = await joined(hub, "room")
    await hub.publish("room", "1")
    await hub.publish(channel="room", message="2")
    await hub.send("3", channel="room")
    await hub.send("elsewhere")
    hub.publish_nowait(channel="room", message="4")
    await until(lambda: len(peer.got) == 4)
    assert peer.got == ["1", "2", "3", "4"]
    assert hub.stats().published == 5
    assert hub.stats().delivered == 4


@pytest.mark.parametrize(
    ("message", "encoding", "expected"),
    [
        ("ok", None, "ok"),
        ("ok", "text", "ok"),
        ("ok", "json", '"ok"'),
        (b"ok", None, b"ok"),
        (b"ok", "bytes", b"ok"),
        (bytearray(b"ok"), None, b"ok"),
        (memoryview(b"ok"), None, b"ok"),
        ({"ä": [1, None]}, None, '{"ä":[1,null]}'),
        (None, None, "null"),
    ],
)
async def test_encodings(message, encoding, expected):
    hub = Broadcast()
    peer = await joined(hub)
    await hub.publish("default", message, encoding=encoding)
    hub.publish_nowait("default", message, encoding=encoding)
    await hub.send(message, encoding=encoding)
    await hub.send(message, to=peer.websocket, encoding=encoding)
    assert peer.got == [expected] * 4


@pytest.mark.parametrize(
    ("message", "encoding"),
    [(5, "text"), ("x", "bytes"), (object(), None), (float("nan"), None), ("\ud800", None)],
)
async def test_what_has_no_such_form_is_refused(message, encoding):
    hub = Broadcast()
    peer = await joined(hub)
    with pytest.raises(EncodingError):
        await hub.send(message, encoding=encoding)
    with pytest.raises(EncodingError):
        await hub.send(message, to=peer.websocket, encoding=encoding)
    assert peer.got == []
    with pytest.raises(ConfigurationError):
        await hub.send("x", encoding="morse")


async def test_a_str_that_is_an_enum_too_goes_out_as_its_value():
    class Word(str, enum.Enum):  # noqa: UP042  # the older way, whose str() is its name
        HELLO = "hello"

    hub = Broadcast()
    async with hub.subscribe() as subscriber:
        await hub.send(Word.HELLO)
        message = (await anext(subscriber)).message
    assert message == "hello"
    assert type(message) is str


async def test_json_is_written_once_a_message():
    calls = []

    def dumps(value):
        calls.append(value)
        return json.dumps(value).encode()

    hub = Broadcast(dumps=dumps)
    peers = [await joined(hub) for _ in range(5)]
    await hub.send({"a": 1})
    assert calls == [{"a": 1}]
    assert [peer.got for peer in peers] == [['{"a": 1}']] * 5


async def test_exclude_takes_one_or_several_and_strangers():
    hub = Broadcast()
    one, two, three = [await joined(hub) for _ in range(3)]
    await hub.send("1", exclude=one.websocket)
    await hub.publish("default", "2", exclude=[one.websocket, two.websocket])
    await hub.send("3", exclude=Peer().websocket)
    hub.publish_nowait("default", "4", exclude={three.websocket})
    await hub.send("5")
    assert one.got == ["3", "4", "5"]
    assert two.got == ["1", "3", "4", "5"]
    assert three.got == ["1", "2", "3", "5"]


async def test_a_message_to_one_client():
    hub = Broadcast()
    one, two = await joined(hub), await joined(hub)
    await hub.send("you", to=one.websocket)
    assert (one.got, two.got) == (["you"], [])
    stranger = Peer()
    await stranger.websocket.accept()
    with pytest.raises(NotConnected):
        await hub.send("you", to=stranger.websocket)
    one.leave()
    await hub.serve(one.websocket)
    assert not await by_another(hub.send("gone", to=one.websocket))
    assert one.got == ["you"]


async def test_a_message_to_a_client_that_the_hub_is_closing():
    hub = Broadcast()
    peer = await joined(hub)
    peer.open.clear()
    await hub.send("in flight")
    closing = asyncio.create_task(hub.close(peer.websocket, 4000))
    await until(lambda: len(hub) == 0)
    assert not await by_another(hub.send("too late", to=peer.websocket))
    with pytest.raises(ClientGone):
        await hub.send("too late", to=peer.websocket)
    peer.open.set()
    await closing
    assert peer.got == ["in flight"]


def fill(hub: Broadcast) -> None:
    """Publish as much as may wait for this event loop, which gets no turn meanwhile."""
    with contextlib.suppress(PublishQueueFull):
        while True:
            hub.publish_nowait("default", "x" * 100)


async def test_a_message_to_one_client_waits_for_space_on_its_event_loop():
    hub = Broadcast(tuning=Tuning(max_pending=1000))
    peer = await joined(hub)
    fill(hub)
    assert await hub.send("you", to=peer.websocket)
    assert peer.got[-1] == "you"


async def test_a_client_that_leaves_while_a_message_to_it_waits_for_space():
    hub = Broadcast(tuning=Tuning(max_pending=1000))
    peer = await joined(hub)
    sending = asyncio.create_task(hub.send("too late", to=peer.websocket))
    fill(hub)
    await asyncio.sleep(0)  # the task starts, then the loop delivers, and then this goes on
    assert hub.stats().waiting_senders == 1
    ConnectionManager(hub).disconnect(peer.websocket)
    with pytest.raises(NotConnected):
        await sending
    await until(lambda: not hub.stats().pending)
    assert "too late" not in peer.got


async def test_who_joins_later_does_not_get_what_was_published_before():
    hub = Broadcast()
    one = await joined(hub)
    hub.publish_nowait("default", "early")
    two = await joined(hub)
    await hub.send("late")
    assert one.got == ["early", "late"]
    assert two.got == ["late"]


async def test_closing_a_client_comes_after_what_was_published():
    hub = Broadcast()
    peer = await joined(hub)
    hub.publish_nowait("default", "last words")
    await hub.close(peer.websocket, 4000)
    assert peer.got == ["last words"]
    assert peer.closed == 4000
    with pytest.raises(ClientGone):
        await hub.connect(peer.websocket)


async def test_closing_a_stranger_closes_it_plainly():
    hub = Broadcast()
    peer = Peer()
    await peer.websocket.accept()
    await hub.close(peer.websocket, 4000, "bye")
    await hub.close(peer.websocket, 4000, "bye")
    assert peer.closed == 4000


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2999, 5000])
async def test_a_close_code_that_may_not_be_sent(code):
    with pytest.raises(ConfigurationError, match="close code"):
        await Broadcast().close(Peer().websocket, code)


async def test_a_close_reason_that_is_too_long():
    with pytest.raises(ConfigurationError, match="123"):
        await Broadcast().close(Peer().websocket, 1000, "é" * 62)


# TestClient, whose sockets live on a loop each unless it is entered


@pytest.mark.parametrize("entered", [False, True])
def test_with_a_test_client(entered):
    hub = Broadcast()

    async def endpoint(websocket: WebSocket) -> None:
        await hub.serve(websocket)

    app = Starlette(routes=[WebSocketRoute("/ws", endpoint)])
    client = TestClient(app)
    if entered:
        client.__enter__()
    with client.websocket_connect("/ws") as one, client.websocket_connect("/ws") as two:
        for number in range(20):
            one.send_text(f"one {number}")
            assert one.receive_text() == two.receive_text() == f"one {number}"
        hub.publish_nowait("default", "from the test's thread")
        assert one.receive_text() == two.receive_text() == "from the test's thread"
    until_sync(lambda: len(hub) == 0)
    if entered:
        client.__exit__(None, None, None)


def test_startup_may_run_on_another_loop_than_the_clients():
    hub = Broadcast()
    asyncio.run(hub.connect())

    async def endpoint(websocket: WebSocket) -> None:
        await hub.serve(websocket)

    client = TestClient(Starlette(routes=[WebSocketRoute("/ws", endpoint)]))
    with client.websocket_connect("/ws") as websocket:
        websocket.send_text("hello")
        assert websocket.receive_text() == "hello"
        asyncio.run(hub.disconnect())
        assert websocket.receive()["code"] == 1001


# With a broker


@pytest.mark.parametrize("after_gap", ["keep", "close"])
async def test_the_members_are_told_of_a_gap(after_gap):
    bus, gaps = Bus(), []
    hub = Broadcast(backend=bus, on_gap=gaps.append, after_gap=after_gap)
    peer = await joined(hub, "room")
    async with hub.subscribe("room", gaps=True) as told, hub.subscribe("room") as untold:
        bus.broker.restart()
        await until(lambda: gaps)
        await hub.publish("room", "later")
        assert await anext(told) == gaps[0]
        assert (await anext(told)).message == (await anext(untold)).message == "later"
    assert peer.closed == (1012 if after_gap == "close" else None)
    await hub.disconnect()


@pytest.mark.parametrize("after_gap", ["keep", "close"])
async def test_an_event_loop_without_space_misses_messages_and_its_members_are_told(after_gap):
    """Of a broker, which does not wait: several messages come at once here, and not all fit."""
    gaps = []
    tuning = Tuning(max_pending=300)
    hub = Broadcast(backend=Bus(), on_gap=gaps.append, after_gap=after_gap, tuning=tuning)
    peer, quiet = await joined(hub, "room"), await joined(hub, "quiet")
    async with hub.subscribe("room", gaps=True) as subscriber:
        for number in range(5):
            hub.publish_nowait("room", str(number) * 60)
        await until(lambda: gaps)
        await hub.publish("room", "later")
        got = [await anext(subscriber) for _ in range(4)]
    assert [each if isinstance(each, Gap) else each.message[0] for each in got] == [
        "0",
        "1",
        gaps[0],
        "l",
    ]
    assert gaps[0].error == "an event loop was blocked or too slow and missed 3 messages"
    assert hub.stats().backend.lost == 3
    assert peer.closed == (1012 if after_gap == "close" else None)
    assert quiet.closed is None
    await hub.disconnect()


async def test_another_event_loop_takes_the_connection_over(other):
    bus = Bus()
    hub = Broadcast(backend=bus)
    await asyncio.to_thread(other.run, hub.connect())
    peer = await joined(hub, "room")
    await asyncio.to_thread(other.close)
    await until(lambda: hub.stats().backend.gaps == 1)
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])
    assert bus.connects == 2
    await hub.disconnect()


@pytest.mark.parametrize("backend", [None, Bus])
async def test_a_hub_is_healthy_while_it_is_open(backend):
    hub = Broadcast(backend=backend and backend())
    assert not await hub.healthy()
    async with hub:
        assert await hub.healthy()
    assert not await hub.healthy()


# Looking


async def test_the_clients_and_subscribers_that_are_gone_are_not_counted():
    hub = Broadcast()
    peer = await joined(hub)
    async with hub.subscribe(max_buffer=100) as subscriber:
        await hub.send("1")
        await hub.send("x" * 100)
        assert hub.stats().subscribers == 0
        assert hub.clients() == [peer.websocket]
        assert (await anext(subscriber)).message == "1"
        with pytest.raises(SubscriberLagged):
            await anext(subscriber)
    assert hub.stats().slow_clients == 1


async def test_the_clients_of_a_channel_stand_in_the_order_in_which_they_joined():
    hub = Broadcast()
    one, two, three = [Peer().websocket for _ in range(3)]
    await hub.connect(two, "a")
    await hub.connect(one, "a")
    await hub.connect(three, "b")
    await hub.connect(two, "b")
    async with hub.subscribe("a"):
        assert hub.clients("a") == [two, one]
    assert hub.clients("b") == [three, two]
    assert hub.clients() == [two, one, three]
    assert hub.clients("c") == []
    hub.clients("a").clear()
    await hub.disconnect(two, "a")
    assert hub.clients("a") == [one]
    await hub.close(one)
    assert hub.clients("a") == []
    await hub.connect(one.__class__(Peer().scope, Peer().receive, Peer().send), 42)
    assert len(hub.clients(42)) == 1
    await hub.disconnect()
    assert hub.clients() == hub.clients("b") == []


async def test_the_clients_of_a_channel_are_those_of_every_loop(other):
    hub = Broadcast()
    here = await joined(hub, "room")
    there = other.run(joined(hub, "room"))
    assert set(hub.clients("room")) == {here.websocket, there.websocket}
    other.close()
    assert hub.clients("room") == [here.websocket]
    await hub.disconnect()


def test_the_clients_of_a_channel_that_can_be_none():
    with pytest.raises(InvalidChannel):
        Broadcast().clients("")


async def test_stats_is_a_snapshot():
    hub = Broadcast()
    peer = await joined(hub, "room")
    async with hub.subscribe("room") as subscriber:
        await hub.publish("room", "hello")
        buffered = hub.stats().buffered
        assert (await anext(subscriber)).message == "hello"
        stats = hub.stats()
    await hub.disconnect(peer.websocket)
    assert stats.open
    assert (stats.clients, stats.subscribers) == (1, 1)
    assert stats.channels == {"room": 1}
    assert (stats.published, stats.delivered, stats.failed) == (1, 2, 0)
    assert (stats.dropped, stats.slow_clients, stats.pending) == (0, 0, 0)
    assert stats.buffered == 0
    assert buffered == 5 + 64
    with pytest.raises(AttributeError):
        stats.clients = 5
    await hub.send(stats, to=(await joined(hub)).websocket)  # a dataclass like any other


async def test_a_client_is_in_the_hub_while_it_is_registered():
    hub, other, peer = Broadcast(), Broadcast(), Peer()
    assert peer.websocket not in hub
    await hub.connect(peer.websocket, "one")
    await hub.connect(peer.websocket, "two")
    assert peer.websocket in hub
    assert peer.websocket not in other
    await hub.disconnect(peer.websocket, "one")
    assert peer.websocket in hub
    await hub.disconnect(peer.websocket)
    assert peer.websocket not in hub
    assert None not in hub
    assert "one" not in hub
    await hub.disconnect()


async def test_a_client_that_starlette_knows_to_be_gone_is_forgotten_at_once():
    hub, peer = Broadcast(), Peer()
    await hub.connect(peer.websocket)
    peer.websocket.client_state = WebSocketState.DISCONNECTED  # read behind the hub's back
    await hub.disconnect(peer.websocket)
    assert peer.websocket not in hub
    assert not peer.sent[1:]
    await hub.disconnect()


async def test_a_handler_that_reads_from_a_client_that_has_left_is_no_mistake():
    class Chat(BroadcastEndpoint):
        broadcast = Broadcast()

        async def on_connect(self, websocket):
            await super().on_connect(websocket)
            await websocket.receive_text()

    peer = Peer()
    peer.leave()
    await Chat(peer.scope, peer.receive, peer.send)
    assert len(Chat.broadcast) == 0
