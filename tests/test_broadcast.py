"""The hub: opening, registering, publishing, serving, mounting, looking."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import functools
import gc
import json
import pickle
import threading

import pytest
from fastapi import FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.responses import Response
from starlette.routing import Mount, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect, WebSocketState
from websockets.exceptions import ConnectionClosed, InvalidStatus

from starcast import (
    BackendUnavailable,
    Broadcast,
    BroadcastEndpoint,
    ClientGone,
    ConfigurationError,
    ConnectionManager,
    EncodingError,
    Event,
    InvalidChannel,
    NotConnected,
    OriginRefused,
    PublishQueueFull,
    SubscriberLagged,
    Tuning,
)
from starcast.broker.local import LocalLink
from starcast.dispatcher import Dispatcher
from starcast.registry import Registry
from starcast.sync.bounded import BoundedQueue, Full
from support import Broker, Bus, Peer, by_another, until, until_sync

pytestmark = pytest.mark.anyio


async def joined(hub: Broadcast, channel: str = "default", **options) -> Peer:
    peer = Peer()
    await hub.connect(peer.websocket, channel, **options)
    return peer


def parts() -> tuple[Registry, Dispatcher]:
    """Return those of a hub in memory that publish."""
    registry = Registry(Tuning(), lambda channel: None, lambda missed: None)
    return registry, Dispatcher(registry, LocalLink(registry.deliver, registry.shards))


async def several(hub: Broadcast, count: int, channel: str = "default") -> list[Peer]:
    return [await joined(hub, channel) for _ in range(count)]


# Opening and closing


@pytest.mark.parametrize(
    "options",
    [
        {"url": "carrier-pigeon://x"},
        {"url": "memory"},
        {"max_buffer": 0},
        {"max_buffer": "1 MiB"},
        {"overflow": "explode"},
        {"origins": "https://example.com"},
        {"origins": ["example.com"]},
    ],
)
async def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigurationError):
        Broadcast(**options)


async def test_an_unknown_url_is_refused_without_its_password():
    with pytest.raises(ConfigurationError) as caught:
        Broadcast("carrier-pigeon://user:secret@host")
    assert "carrier-pigeon" in str(caught.value)
    assert "memory://" in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_every_way_of_opening_and_closing():
    hub = Broadcast()
    assert not hub.stats().open
    await hub.connect()
    await hub.connect()
    assert hub.stats().open
    await hub.disconnect()
    await hub.disconnect()
    assert not hub.stats().open
    async with hub as entered:
        assert entered is hub
        assert hub.stats().open
    async with hub.lifespan(object()):
        assert hub.stats().open
    assert not hub.stats().open
    peer = await joined(hub)  # on first use
    assert hub.stats().open
    await hub.disconnect()
    assert peer.closed == 1001
    assert len(hub) == 0


async def test_a_closed_hub_can_be_opened_again():
    hub = Broadcast()
    await joined(hub)
    await hub.disconnect()
    with pytest.raises(BackendUnavailable, match="hub is not open; open it with the app"):
        hub.publish_nowait("default", "to nobody")
    with pytest.raises(BackendUnavailable, match="hub is not open; open it with the app"):
        await hub.publish("default", "last words of an on_disconnect")
    assert not hub.stats().open
    peer = await joined(hub)
    await hub.send("again")
    assert peer.got == ["again"]


async def test_a_hub_in_memory_that_was_never_opened_may_be_published_to():
    """Its first client opens it, and who publishes does not know whether that has come."""
    hub = Broadcast()
    hub.publish_nowait("room", "to nobody")
    assert not hub.stats().open
    await hub.publish("room", "to nobody")
    assert (hub.stats().open, hub.stats().published) == (True, 2)
    await hub.disconnect()


async def test_a_closed_hub_says_so_to_all_who_publish_until_a_client_opens_it():
    hub = Broadcast()
    async with hub:
        pass
    before = hub.stats().published
    for publish in (hub.publish, hub.send):
        with pytest.raises(BackendUnavailable, match=r"await hub\.connect\(\)"):
            await publish(*(["room", "x"] if publish == hub.publish else ["x"]))
    with pytest.raises(BackendUnavailable, match=r"await hub\.connect\(\)"):
        hub.publish_nowait("room", "x")
    assert hub.stats().published == before
    peer = await joined(hub)
    hub.publish_nowait("default", "again")
    await until(lambda: peer.got == ["again"])
    await hub.disconnect()


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


def test_the_lifespan_of_an_app():
    hub = Broadcast()
    app = FastAPI(lifespan=hub.lifespan)

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        await hub.serve(websocket)

    with TestClient(app) as client:
        assert hub.stats().open
        with client.websocket_connect("/ws") as websocket:
            websocket.send_text("hello")
            assert websocket.receive_text() == "hello"
    assert not hub.stats().open


async def test_a_backend_of_ones_own():
    backend = Bus()
    hub = Broadcast(backend=backend)
    peer = await joined(hub, "room")
    await hub.publish("room", "hello")
    assert backend.broker.calls[-1] == ("publish", [("default:room", b"hello")])
    await until(lambda: peer.got == ["hello"])
    await hub.disconnect()


class Slow(Bus):
    """A backend that connects slowly, and fails as often as a test wants."""

    def __init__(self, failures: int = 0) -> None:
        super().__init__(on_connect=self.wait)
        self.failures = failures
        self.go = asyncio.Event()

    async def wait(self, bus, proceed):
        await self.go.wait()
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the broker is down")
        return await proceed()


async def test_everybody_waits_for_a_backend_that_connects_slowly():
    backend = Slow()
    hub = Broadcast(backend=backend)
    peer = Peer()
    tasks = [asyncio.create_task(hub.connect()), asyncio.create_task(hub.connect(peer.websocket))]
    await until(lambda: backend.connects)
    publishing = asyncio.create_task(hub.send("hello"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not any(task.done() for task in [*tasks, publishing])
    assert not hub.stats().open
    backend.go.set()
    await asyncio.gather(*tasks, publishing)
    assert backend.connects == 1
    assert hub.stats().open


async def test_a_backend_that_fails_to_connect_is_tried_again():
    backend = Slow(failures=2)
    backend.go.set()
    hub = Broadcast(backend=backend)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await hub.connect()
        assert not hub.stats().open
    await hub.connect()
    assert hub.stats().open


async def test_an_opening_that_is_cancelled_is_taken_over():
    backend = Slow()
    hub = Broadcast(backend=backend)
    first = asyncio.create_task(hub.connect())
    await until(lambda: backend.connects == 1)
    second = asyncio.create_task(hub.connect())
    await asyncio.sleep(0)
    first.cancel()
    await until(lambda: backend.connects == 2)
    backend.go.set()
    await second
    assert hub.stats().open


async def test_all_who_wait_for_an_attempt_share_its_outcome():
    backend = Slow(failures=1)
    hub = Broadcast(backend=backend)
    tasks = [asyncio.create_task(hub.connect()) for _ in range(40)]
    await until(lambda: backend.connects == 1)
    backend.go.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ConnectionError}
    assert backend.connects == 1
    await hub.connect()
    assert hub.stats().open


async def test_opening_waits_until_closing_is_done():
    async def close(connection, proceed):
        stopping.set()
        await go.wait()
        await proceed()

    stopping, go = asyncio.Event(), asyncio.Event()
    backend = Bus(on_close=close)
    hub = Broadcast(backend=backend)
    await hub.connect()
    closing = asyncio.create_task(hub.disconnect())
    await stopping.wait()
    peer = Peer()
    connecting = asyncio.create_task(hub.connect(peer.websocket))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not connecting.done()
    go.set()
    await asyncio.gather(closing, connecting)
    assert list(backend.broker.connections) == [backend.connection]
    await hub.send("hello")
    await until(lambda: peer.got == ["hello"])
    await hub.disconnect()


async def test_clients_are_closed_although_the_connection_fails_to_close(caplog):
    async def close(connection, proceed):
        raise ConnectionError("the broker is down")

    hub = Broadcast(backend=Bus(on_close=close))
    peer = await joined(hub)
    await hub.disconnect()
    assert "the broker is down" in caplog.text
    assert peer.closed == 1001
    assert not hub.stats().open


def test_what_the_garbage_collector_runs_may_publish():
    """Finalizers run wherever memory is allocated, also while the hub's lock is held."""
    registry, dispatcher = parts()

    class Last:
        def __init__(self):
            self.itself = self  # so that only the collector finds it

        def __del__(self):
            dispatcher.publish(Event("default", "last words"))

    with registry.lock:
        Last()
        gc.collect()
    assert dispatcher.published == 1


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


async def test_a_client_that_leaves_while_a_message_to_it_waits_for_room(other, blocked, small):
    hub = Broadcast(tuning=small)
    (there,) = other.run(several(hub, 1))
    release = blocked()
    with contextlib.suppress(PublishQueueFull):
        while True:
            hub.publish_nowait("default", "x")
    sending = asyncio.create_task(hub.send("too late", to=there.websocket))
    await until(lambda: hub.stats().waiting_senders == 1)
    ConnectionManager(hub).disconnect(there.websocket)
    release.set()
    with pytest.raises(NotConnected):
        await sending
    await until(lambda: not hub.stats().pending)
    assert "too late" not in there.got


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


# Origins


@pytest.mark.parametrize("how", ["connect", "serve", "mount"])
async def test_a_page_of_another_host_is_refused_before_accept(how, caplog):
    hub = Broadcast()
    peer = Peer({"origin": "https://evil.example", "host": "good.example"}, {"channel": "x"})
    if how == "mount":
        peer.scope |= {"path": "/x", "root_path": ""}
        await hub(peer.scope, peer.receive, peer.send)
        assert [m["type"] for m in peer.sent] == ["websocket.close"]
    else:
        with pytest.raises(OriginRefused, match=r"evil\.example"):
            await getattr(hub, how)(peer.websocket)
        assert peer.sent == []
    assert len(hub) == 0
    (record,) = caplog.records
    assert "'https://evil.example'" in record.getMessage()
    assert "'good.example'" in record.getMessage()


async def test_a_websocket_that_the_app_accepted_is_not_checked():
    hub = Broadcast()
    peer = Peer({"origin": "https://evil.example", "host": "good.example"})
    await peer.websocket.accept()
    await hub.connect(peer.websocket)
    assert len(hub) == 1


# Serving


async def test_serve_lives_a_clients_whole_life(serve):
    hub = Broadcast()
    codes = []

    async def endpoint(websocket: WebSocket) -> None:
        codes.append(await hub.serve(websocket, channel=websocket.path_params["room"]))

    server = await serve(Starlette(routes=[WebSocketRoute("/{room}", endpoint)]))
    async with server.connect("/a") as one, server.connect("/a") as two, server.connect("/b") as b:
        await one.send("hello")
        assert await one.recv() == await two.recv() == "hello"
        assert hub.channels == {"a": 2, "b": 1}
        await b.close(4321)
        await until(lambda: len(hub) == 2)
    await until(lambda: len(codes) == 3)
    assert sorted(codes) == [1000, 1000, 4321]
    assert len(hub) == 0


@pytest.mark.parametrize(
    ("encoding", "sent", "received"),
    [
        ("text", "ok", "ok"),
        ("bytes", b"ok", b"ok"),
        ("json", '"ok"', '"ok"'),
        ("json", b'{"a": 1}', '{"a":1}'),
        (None, "ok", "ok"),
        (None, b"ok", b"ok"),
    ],
)
async def test_serve_speaks_its_encoding_both_ways(serve, encoding, sent, received):
    hub = Broadcast()
    server = await serve(
        Starlette(routes=[WebSocketRoute("/", functools.partial(hub.serve, encoding=encoding))])
    )
    async with server.connect("/") as client:
        await client.send(sent)
        assert await client.recv() == received


@pytest.mark.parametrize(
    ("encoding", "sent", "code"),
    [("text", b"x", 1003), ("bytes", "x", 1003), ("json", "{", 1007)],
)
async def test_serve_closes_who_sends_something_else(serve, encoding, sent, code, caplog):
    hub = Broadcast()
    codes = []

    async def endpoint(websocket: WebSocket) -> None:
        codes.append(await hub.serve(websocket, encoding=encoding))

    server = await serve(Starlette(routes=[WebSocketRoute("/", endpoint)]))
    async with server.connect("/") as client:
        await client.send(sent)
        with pytest.raises(ConnectionClosed) as caught:
            await client.recv()
        assert caught.value.rcvd.code == code
    await until(lambda: codes == [code])
    lines = [record for record in caplog.records if record.name == "starcast"]
    assert len(lines) == 1
    assert str(code) in lines[0].getMessage()


async def test_what_dumps_cannot_write_closes_who_sent_it():
    def dumps(value):
        if value == 2**70:
            raise OverflowError("a large number")
        return json.dumps(value)

    hub = Broadcast(dumps=dumps)
    peer = Peer()
    peer.say(str(2**70))
    assert await hub.serve(peer.websocket, encoding="json") == 1007


async def test_serve_refuses_an_encoding_that_is_none():
    with pytest.raises(ConfigurationError):
        await Broadcast().serve(Peer().websocket, encoding="morse")


class Watching(Peer):
    """Notes how much waits for its event loop whenever it is read from."""

    def __init__(self, hub: Broadcast) -> None:
        super().__init__()
        self.hub = hub
        self.pending: list[int] = []

    async def receive(self):
        self.pending.append(self.hub.stats().pending)
        return await super().receive()


async def test_a_client_is_not_read_from_while_256_of_its_messages_are_on_their_way():
    hub = Broadcast()
    peer = Watching(hub)
    for number in range(1000):
        peer.say(str(number))
    peer.leave()
    other = await joined(hub)
    await hub.serve(peer.websocket)
    await until(lambda: len(other.got) == 1000)
    assert other.got == [str(number) for number in range(1000)]
    assert max(peer.pending) == 255


async def test_large_messages_of_a_client_are_confirmed_more_often():
    hub = Broadcast()
    peer = Watching(hub)
    for _ in range(100):
        peer.say("x" * 20_000)
    peer.leave()
    await hub.serve(peer.websocket)
    assert hub.stats().published == 100
    assert max(peer.pending) == 3  # one more is 64 KiB


async def test_messages_that_cannot_be_handed_over_are_counted_and_logged_once(caplog):
    broker = Broker()
    hub = Broadcast(backend=Bus(broker), tuning=Tuning(max_queued=1, publish_timeout=0.05))
    peer = Peer()
    stays = lambda *lost: None  # noqa: E731  # by default the first one would close it
    serving = asyncio.create_task(hub.serve(peer.websocket, on_publish_error=stays))
    await until(lambda: len(hub) == 1)
    broker.open.clear()
    for _ in range(2):  # one is under way, and the other fills the queue
        hub.publish_nowait("elsewhere", "x" * 1000)
        await until(lambda: broker.stalled)
    failed = hub.stats().failed
    for number in range(5):
        peer.say(str(number))
    await until(lambda: hub.stats().failed == failed + 5)
    lost = [line for line in caplog.messages if line.startswith("messages of clients are being")]
    assert len(lost) == 1
    broker.open.set()
    peer.say("works")
    await until(lambda: peer.got == ["works"])
    peer.leave()
    await serving
    await hub.disconnect()
    caplog.clear()


async def test_serve_unregisters_when_it_is_cancelled():
    hub = Broadcast()
    peer = Peer()
    serving = asyncio.create_task(hub.serve(peer.websocket))
    await until(lambda: len(hub) == 1)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert len(hub) == 0


async def test_serve_of_a_client_that_has_left_comes_back():
    hub = Broadcast()
    peer = Peer()
    await peer.websocket.accept()
    await peer.websocket.close()
    assert await hub.serve(peer.websocket) == 1006


# Mounting


@pytest.mark.parametrize("framework", [Starlette, FastAPI])
async def test_the_mount_only_lets_listen(serve, framework, caplog):
    hub = Broadcast()
    app = framework()
    app.mount("/live", hub)
    server = await serve(app)
    async with server.connect("/live/a/b%20c") as client:
        await until(lambda: hub.channels == {"a/b c": 1})
        await hub.publish("a/b c", "hello")
        assert await client.recv() == "hello"
        await client.send("me too")
        with pytest.raises(ConnectionClosed) as caught:
            await client.recv()
        assert caught.value.rcvd.code == 1008
    assert [record.name for record in caplog.records if record.levelname == "WARNING"] == [
        "starcast"
    ]
    async with server.connect("/live/x"):
        await until(lambda: hub.channels == {"x": 1})
    await until(lambda: len(hub) == 0)


@pytest.mark.parametrize("framework", [Starlette, FastAPI])
async def test_the_mount_with_publish(serve, framework):
    hub = Broadcast()
    app = framework()
    app.mount("/live", hub.app(publish=True, encoding="json"))
    server = await serve(app)
    async with server.connect("/live/room") as one, server.connect("/live/room") as two:
        await one.send('{"a":1}')
        assert await one.recv() == await two.recv() == '{"a":1}'


async def test_the_hub_served_alone(serve):
    hub = Broadcast()
    server = await serve(hub)
    assert hub.stats().open
    async with server.connect("/room") as client:
        await until(lambda: len(hub) == 1)
        await hub.publish("room", "hello")
        assert await client.recv() == "hello"
    for path in ("/", "/" + "x" * 201, "/a%00b"):
        with pytest.raises(InvalidStatus) as caught:
            await server.connect(path)
        assert caught.value.response.status_code == 403


def deny(websocket, channel):
    return channel != "secret"


async def deny_async(websocket, channel):
    if channel == "secret":
        raise PermissionError
    return True


class Deny:
    async def __call__(self, websocket, channel):
        return channel != "secret"


@pytest.mark.parametrize(
    "authorize", [deny, deny_async, Deny(), functools.partial(deny_async), lambda *a: Deny()(*a)]
)
@pytest.mark.parametrize("framework", [Starlette, FastAPI, None])
async def test_authorize(serve, authorize, framework):
    hub = Broadcast()
    app = hub.app(authorize=authorize)
    if framework is not None:
        inner, app = app, framework()
        app.mount("/live", inner)
    path = "" if framework is None else "/live"
    server = await serve(app)
    with pytest.raises(InvalidStatus) as caught:
        await server.connect(f"{path}/secret")
    assert caught.value.response.status_code == 403
    async with server.connect(f"{path}/open"):
        await until(lambda: hub.channels == {"open": 1})


@pytest.mark.parametrize("answer", [0, "", {}, "alice", object()])
async def test_an_answer_of_authorize_that_is_none_is_a_mistake(answer):
    """A lookup returns somebody or nothing: letting in nothing would let in everybody."""
    app = Starlette(routes=[Mount("/live", Broadcast().app(authorize=lambda *args: answer))])
    with (
        pytest.raises(ConfigurationError, match="authorize returned"),
        TestClient(app).websocket_connect("/live/x"),
    ):
        pass


async def test_the_apps_own_handler_answers_for_the_mount(serve):
    async def teapot(websocket, exc):
        await websocket.send_denial_response(Response(status_code=418))

    app = Starlette(
        routes=[Mount("/live", Broadcast().app(authorize=lambda *args: False))],
        exception_handlers={WebSocketException: teapot},
    )
    with (
        pytest.raises(WebSocketDenialResponse) as caught,
        TestClient(app).websocket_connect("/live/x"),
    ):
        pass
    assert caught.value.status_code == 418


async def test_a_plain_authorize_runs_in_a_thread():
    threads = []

    def authorize(websocket, channel):
        threads.append(threading.current_thread())
        return True

    app = Starlette(routes=[Mount("/live", Broadcast().app(authorize=authorize))])
    with TestClient(app).websocket_connect("/live/x"):
        until_sync(lambda: threads)
    assert threads[0] is not threading.main_thread()


async def test_a_client_that_leaves_while_it_is_authorized():
    async def authorize(websocket, channel):
        await websocket.close()
        return True

    peer = Peer(path_params={"channel": "x"})
    peer.scope |= {"path": "/x", "root_path": ""}
    hub = Broadcast()
    await hub.app(authorize=authorize)(peer.scope, peer.receive, peer.send)
    assert len(hub) == 0


async def test_another_error_in_authorize_takes_its_way():
    def authorize(websocket, channel):
        raise LookupError("a mistake")

    app = Starlette(routes=[Mount("/live", Broadcast().app(authorize=authorize))])
    with (
        pytest.raises(LookupError, match="a mistake"),
        TestClient(app).websocket_connect("/live/x"),
    ):
        pass


async def test_the_mount_knows_encodings():
    with pytest.raises(ConfigurationError):
        Broadcast().app(encoding="morse")


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


# Several event loops


async def test_the_end_of_the_hub_reaches_every_loop(other):
    hub = Broadcast()
    here, there = (await several(hub, 1))[0], other.run(several(hub, 1))[0]
    await hub.send("last words")
    await hub.disconnect()
    assert here.closed == there.closed == 1001
    assert here.got == there.got == ["last words"]


async def listen(hub: Broadcast, subscribed: threading.Event) -> list[str]:
    async with hub.subscribe() as subscriber:
        subscribed.set()
        return [event.message async for event in subscriber]


async def test_a_subscriber_on_another_loop(other):
    hub = Broadcast()
    subscribed = threading.Event()
    listening = asyncio.run_coroutine_threadsafe(listen(hub, subscribed), other.loop)
    await asyncio.to_thread(subscribed.wait, 20)
    await hub.send("hello")
    await hub.disconnect()
    assert await asyncio.wrap_future(listening) == ["hello"]


async def test_the_clients_of_a_closed_loop_are_forgotten(other):
    hub = Broadcast()
    (here,) = await several(hub, 1)
    other.run(several(hub, 3))
    other.run(hub.subscribe().__aenter__())
    assert hub.stats().subscribers == 1
    other.run(hub.send("all"))
    assert len(hub) == 4
    other.close()
    await hub.send("the living")
    assert here.got == ["all", "the living"]
    assert len(hub) == 1
    assert hub.stats().subscribers == 0
    assert hub.stats().delivered == 4 + 1  # the counters of the closed loop stay


async def test_a_loop_that_closes_while_it_is_woken(other, monkeypatch):
    hub = Broadcast()
    other.run(several(hub, 1))
    other.close()
    monkeypatch.setattr(other.loop, "is_closed", lambda: False)  # it still was when that looked

    def wake(*arguments):
        monkeypatch.undo()
        assert len(hub) == 0  # another thread finds it at the same time
        raise RuntimeError("Event loop is closed")

    monkeypatch.setattr(other.loop, "call_soon_threadsafe", wake)
    await hub.send("nobody")
    assert len(hub) == 0


async def test_the_clients_of_a_closed_loop_are_not_counted(other):
    hub = Broadcast()
    other.run(several(hub, 2))
    other.close()
    assert len(hub) == 0
    assert not hub.channels
    assert hub.clients() == []


async def test_the_hubs_end_does_not_wait_for_a_closed_loop(other):
    hub = Broadcast()
    other.run(several(hub, 1))
    other.close()
    await asyncio.wait_for(hub.disconnect(), 5)
    assert len(hub) == 0


@pytest.fixture
def blocked(other):
    """The other loop gets no turn until the test releases it."""
    release, entered = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        release.wait(20)

    def start() -> threading.Event:
        other.loop.call_soon_threadsafe(block)
        assert entered.wait(20)
        return release

    yield start
    release.set()


@pytest.fixture
def small() -> Tuning:
    return Tuning(max_pending=1000)


async def test_what_waits_for_a_loop_is_bounded_and_refused_by_name(other, blocked, small):
    hub = Broadcast(tuning=small)
    (here,) = await several(hub, 1, "room")
    (there,) = other.run(several(hub, 1, "room"))
    release = blocked()
    sent = []
    with pytest.raises(PublishQueueFull, match="waiting") as caught:  # noqa: PT012  # of a loop
        for number in range(100):
            hub.publish_nowait("room", str(number))
            sent.append(str(number))
            await hub.send("somewhere else")  # other channels are untouched
    sent_on = pickle.loads(pickle.dumps(caught.value))
    assert (type(sent_on), str(sent_on)) == (PublishQueueFull, str(caught.value))
    assert 0 < len(sent) < 20
    assert hub.stats().failed == 1
    assert hub.stats().pending == len(sent)
    release.set()
    await until(lambda: len(there.got) == len(sent))
    assert here.got == there.got == sent


async def test_publish_waits_for_room(other, blocked, small):
    hub = Broadcast(tuning=small)
    (there,) = other.run(several(hub, 1))
    release = blocked()
    with contextlib.suppress(PublishQueueFull):
        while True:
            hub.publish_nowait("default", "x")
    sent = hub.stats().pending
    # Room on this loop is not what it waits for.
    (here,) = await several(hub, 1, "here")
    hub.publish_nowait("here", "x")
    publishing = asyncio.create_task(hub.publish("default", "at last"))
    await until(lambda: here.got)
    gone = asyncio.create_task(hub.publish("default", "never"))
    await until(lambda: hub.stats().waiting_senders == 2)
    gone.cancel()
    await asyncio.wait([gone])
    assert hub.stats().waiting_senders == 1
    assert not publishing.done()
    release.set()
    await publishing
    await until(lambda: there.got[-1:] == ["at last"])
    assert len(there.got) == sent + 1


async def test_publish_gives_up_if_there_is_no_space(other, blocked, small):
    hub = Broadcast(tuning=dataclasses.replace(small, publish_timeout=0.05))
    other.run(several(hub, 1))
    blocked()
    with contextlib.suppress(PublishQueueFull):
        while True:
            hub.publish_nowait("default", "x")
    failed = hub.stats().failed
    with pytest.raises(PublishQueueFull):
        await hub.publish("default", "x")
    assert hub.stats().failed == failed + 1
    assert hub.stats().waiting_senders == 0


async def test_a_personal_message_waits_for_room_too(other, blocked, small):
    hub = Broadcast(tuning=small)
    (there,) = other.run(several(hub, 1))
    release = blocked()
    with contextlib.suppress(PublishQueueFull):
        while True:
            hub.publish_nowait("default", "x")
    sending = asyncio.create_task(hub.send("you", to=there.websocket))
    await until(lambda: hub.stats().waiting_senders == 1)
    release.set()
    await sending
    await until(lambda: there.got[-1:] == ["you"])


async def test_room_that_others_have_taken_is_waited_for_again():
    registry, dispatcher = parts()
    queue: BoundedQueue[None] = BoundedQueue(registry.lock, 1000)
    outcomes = [Full("", queue), Full("", queue), None]

    def hand_over():
        if error := outcomes.pop(0):
            raise error

    await dispatcher.retry(hand_over, Full("", queue))
    assert outcomes == []
    assert dispatcher.failed == 0


async def test_what_a_client_sends_opens_the_hub():
    class Chat(BroadcastEndpoint):
        broadcast = Broadcast()

        async def on_connect(self, websocket):
            await websocket.accept()  # and does not register it

    hub, peer = Chat.broadcast, Peer()
    peer.say("hello")
    peer.leave()
    await Chat(peer.scope, peer.receive, peer.send)
    assert hub.stats().open
    assert hub.stats().published == 1


async def test_a_message_larger_than_the_bound_passes_when_nothing_waits(small):
    hub = Broadcast(tuning=small)
    (peer,) = await several(hub, 1)
    await hub.send("x" * 5000)
    assert peer.got == ["x" * 5000]


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
