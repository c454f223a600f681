"""Tests of what is kept of a channel, and of joining with a part of the past, on every backend."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute

from history.conftest import HISTORY
from history.keeping import TUNING, KeepingBroker, KeepingBus
from starcast import (
    Broadcast,
    BroadcastEndpoint,
    ConfigurationError,
    Event,
    History,
    Past,
    PublishQueueFull,
    Resumed,
    Tuning,
)
from support import Peer, joined, until

pytestmark = pytest.mark.anyio

KEEPING = ["memory", "bus"]


@pytest.fixture(params=KEEPING)
async def room(request: pytest.FixtureRequest):
    """A hub of each kind, with a history of ten messages for its rooms."""
    if request.param == "memory":
        hub = Broadcast(history=HISTORY)
    else:
        hub = Broadcast(backend=KeepingBus(KeepingBroker()), history=HISTORY, tuning=TUNING)
    async with hub:
        yield hub


async def publish(hub: Broadcast, *messages: object, channel: str = "room") -> list[str]:
    """Publish messages, and return their ids."""
    ids = [await hub.publish(channel, message) for message in messages]
    assert all(isinstance(id, str) for id in ids)
    return ids


def offsets(ids: list[str]) -> list[int]:
    return [int(id.partition("-")[2]) for id in ids]


def messages(events: list[Event]) -> list[str | bytes]:
    return [event.message for event in events]


async def test_each_event_has_an_id_with_an_offset_that_grows_by_one(room):
    async with room.subscribe("room") as subscriber:
        ids = await publish(room, *range(12))
        got = [await subscriber.get() for _ in range(12)]
    assert [event.id for event in got] == ids
    assert offsets(ids) == list(range(1, 13))
    assert len({id.partition("-")[0] for id in ids}) == 1


async def test_a_channel_without_a_history_has_no_ids(room):
    async with room.subscribe("other") as subscriber:
        assert await room.publish("other", "text") is None
        event = await subscriber.get()
        assert event.id is event.position is None
        assert subscriber.resumed is None
    with pytest.raises(ConfigurationError, match=r"'other' has no history: name it in Broadcast"):
        await room.history("other")
    for wish in ({"since": "a-1"}, {"history": 1}):
        with pytest.raises(ConfigurationError, match="'other' has no history"):
            room.subscribe("other", **wish)
    with pytest.raises(ConfigurationError, match="'other' has no history"):
        await room.publish("other", "text", idempotency_key="key")


async def test_history_returns_what_is_kept(room):
    ids = await publish(room, *map(str, range(12)))
    past = await room.history("room")
    assert past == Past(past.events, ids[-1], True)
    assert messages(past.events) == list(map(str, range(2, 12)))
    assert [event.id for event in past.events] == ids[2:]
    assert messages((await room.history("room", limit=2)).events) == ["2", "3"]
    assert messages((await room.history("room", limit=2, reverse=True)).events) == ["11", "10"]
    assert (await room.history("room", limit=0)).events == []


async def test_history_since_an_id(room):
    ids = await publish(room, *map(str, range(12)))
    past = await room.history("room", since=ids[8])
    assert (messages(past.events), past.complete) == (["9", "10", "11"], True)
    past = await room.history("room", since=ids[8], reverse=True, limit=3)
    assert (messages(past.events), past.complete) == (["7", "6", "5"], True)
    past = await room.history("room", since=ids[0], reverse=True)
    assert (past.events, past.complete) == ([], True)
    past = await room.history("room", since=ids[0])  # the next one is not kept any more
    assert (messages(past.events), past.complete) == (list(map(str, range(2, 12))), False)
    past = await room.history("room", since=ids[1])
    assert (messages(past.events), past.complete) == (list(map(str, range(2, 12))), True)
    past = await room.history("room", since=ids[-1])
    assert (past.events, past.complete) == ([], True)


@pytest.mark.parametrize(
    "since", ["", "nonsense", "a-1", "a-01", "-5", "🎈-1", "{epoch}-99", "{epoch}--1", "{epoch}-"]
)
async def test_an_id_that_is_none_of_this_history(room, since):
    ids = await publish(room, "0", "1")
    since = since.format(epoch=ids[0].partition("-")[0])
    past = await room.history("room", since=since)
    assert (messages(past.events), past.complete) == (["0", "1"], False)
    past = await room.history("room", since=since, reverse=True)
    assert (messages(past.events), past.complete) == (["1", "0"], False)
    async with room.subscribe("room", since=since) as subscriber:
        assert subscriber.resumed == Resumed(ids[-1], False)
        await publish(room, "live")
        assert (await subscriber.get()).message == "live"
    async with room.subscribe("room", since=since, history=1) as subscriber:
        assert subscriber.resumed == Resumed(f"{ids[0].partition('-')[0]}-3", False)
        assert (await subscriber.get()).message == "live"


async def test_a_history_that_is_empty(room):
    past = await room.history("room")
    assert (past.events, past.complete) == ([], True)
    assert past.id.endswith("-0")
    async with room.subscribe("room", since=past.id) as subscriber:
        assert subscriber.resumed == Resumed(past.id, True)
        (id,) = await publish(room, "first")
        assert (await subscriber.get()).id == id == past.id[:-1] + "1"
    async with room.subscribe("room", since=past.id) as subscriber:
        assert subscriber.resumed.recovered
        assert (await subscriber.get()).message == "first"


async def test_a_subscriber_gets_the_past_and_then_what_is_published(room):
    ids = await publish(room, *map(str, range(5)))
    async with room.subscribe("room", since=ids[2]) as subscriber:
        assert subscriber.resumed == Resumed(ids[-1], True)
        await publish(room, "live")
        assert [(await subscriber.get()).message for _ in range(3)] == ["3", "4", "live"]
    async with room.subscribe("room", history=2) as subscriber:
        assert subscriber.resumed.recovered is None
        assert [(await subscriber.get()).message for _ in range(2)] == ["4", "live"]
    async with room.subscribe("room", since=ids[-1], history=3) as subscriber:  # it is recovered
        assert (await subscriber.get()).message == "live"
    async with room.subscribe("room", history=100) as subscriber:
        assert [(await subscriber.get()).message for _ in range(6)] == [*"01234", "live"]


async def test_a_client_gets_the_past_and_then_what_is_published(room, road):
    ids = await publish(room, *map(str, range(5)))
    peer = Peer()
    assert await room.connect(peer.websocket, "room", since=ids[2]) == Resumed(ids[-1], True)
    await publish(room, "live")
    await until(lambda: peer.got == ["3", "4", "live"])
    late = Peer()
    resumed = await room.connect(late.websocket, "room", since="old-1", history=2)
    assert resumed.recovered is False
    await until(lambda: late.got == ["4", "live"])
    new = Peer()
    assert await room.connect(new.websocket, "room") == Resumed(resumed.id)
    assert await room.connect(new.websocket, "room", history=2) is None  # it was there before
    assert await room.connect(new.websocket, "other") is None
    await publish(room, "last")
    await until(lambda: new.got == ["last"])


async def test_a_channel_that_a_client_joins_later(room, road):
    ids = await publish(room, "0", "1", "2")
    peer = await joined(room, "room1")
    await publish(room, "a", channel="room1")
    resumed = await room.connect(peer.websocket, "room", since=ids[0], history=1)
    assert resumed == Resumed(ids[-1], True)
    await publish(room, "b", channel="room1")
    await until(lambda: peer.got == ["a", "1", "2", "b"])


async def test_messages_of_every_kind_come_back_as_they_were(room):
    sent = ["text", b"\xff\x00", {"a": [1]}, "", "{}", b"", "🎈"]
    await publish(room, *sent)
    events = (await room.history("room")).events
    assert messages(events) == ["text", b"\xff\x00", '{"a":[1]}', "", "{}", b"", "🎈"]
    kinds = ["text", "bytes", "text", "text", "text", "bytes", "text"]
    assert [event.kind for event in events] == kinds


async def test_who_was_excluded_does_not_get_it_from_the_past_either(room):
    one, two = Peer(), Peer()
    for peer in (one, two):
        await room.connect(peer.websocket, "other")
    await room.publish("room", "for two", exclude=one.websocket)
    for peer in (one, two):
        await room.connect(peer.websocket, "room", history=10)
    await publish(room, "for both")
    await until(lambda: two.got == ["for two", "for both"])
    await until(lambda: one.got == ["for both"])


async def test_the_past_is_counted_without_what_a_client_is_excluded_from(room):
    peer = Peer()
    await room.connect(peer.websocket, "other", ids=True)
    excluded = await room.publish("room", "for others", exclude=peer.websocket)
    (last,) = await publish(room, "for all")
    before = excluded.replace("-1", "-0")
    await room.connect(peer.websocket, "room", history=10)
    await until(lambda: len(peer.got) == 2)
    assert list(map(json.loads, peer.got)) == [
        {"channel": "room", "id": before, "past": 1},
        {"id": last, "channel": "room", "data": "for all"},
    ]


async def test_who_comes_back_is_no_longer_excluded(room):
    """It is another connection."""
    peer = Peer()
    resumed = await room.connect(peer.websocket, "room")
    await room.publish("room", "not for you", exclude=peer.websocket)
    await publish(room, "for all")
    await until(lambda: peer.got == ["for all"])
    await room.disconnect(peer.websocket)
    again = Peer()
    await room.connect(again.websocket, "room", since=resumed.id)
    await until(lambda: again.got == ["not for you", "for all"])


async def test_a_publish_that_is_tried_again_is_published_once(room):
    async with room.subscribe("room") as subscriber:
        first = await room.publish("room", "one", idempotency_key="a")
        assert await room.publish("room", "one", idempotency_key="a") == first
        second = await room.publish("room", "two", idempotency_key="b")
        other = await room.publish("room1", "one", idempotency_key="a")  # of another channel
        assert await room.publish("room", "one", idempotency_key="a") == first
        assert first != second
        assert other.endswith("-1")
        assert [(await subscriber.get()).message for _ in range(2)] == ["one", "two"]
    assert messages((await room.history("room")).events) == ["one", "two"]


@pytest.mark.parametrize("key", ["", "x" * 201, 5, b"key", "\ud800"])
async def test_an_idempotency_key_that_is_none(room, key):
    with pytest.raises(ConfigurationError, match="an idempotency key is a str of 1 to 200"):
        await room.publish("room", "text", idempotency_key=key)


@pytest.mark.parametrize("key", ["x", "x" * 200, "🎈 \n\x00", "*"])
async def test_an_idempotency_key_is_any_text(room, key):
    assert await room.publish("room", "text", idempotency_key=key)


async def test_publish_nowait_keeps_too(room):
    async with room.subscribe("room") as subscriber:
        room.publish_nowait("room", "soon")
        event = await subscriber.get()
    assert event.id.endswith("-1")
    assert messages((await room.history("room")).events) == ["soon"]


async def test_kept_and_other_messages_keep_their_order(room):
    async with room.subscribe("room") as subscriber:
        for number in range(50):
            room.publish_nowait("room" if number % 3 else "other", str(number))
        room.publish_nowait("room", "last")
        got = []
        while not got or got[-1] != "last":
            got.append((await subscriber.get()).message)
    assert got == [str(number) for number in range(50) if number % 3] + ["last"]


@pytest.mark.parametrize("limit", [-1, 1.5, "3", True, None])
async def test_a_number_that_is_none(room, limit):
    with pytest.raises(ConfigurationError, match="limit is a number of events"):
        await room.history("room", limit=limit)
    with pytest.raises(ConfigurationError, match="history is a number of events"):
        room.subscribe("room", history=limit)
    with pytest.raises(ConfigurationError, match="history is a number of events"):
        await room.connect(Peer().websocket, "room", history=limit)
    with pytest.raises(ConfigurationError, match="history is a number of events"):
        room.app(history=limit)


# Ids for clients


async def test_a_client_with_ids(room, road):
    ids = await publish(room, "old")
    peer = Peer()
    await room.connect(peer.websocket, "room", ids=True, since="gone-4", history=1)
    ids += await publish(room, 'say "hi"', b"\xff", {"a": 1})
    await room.send("for you", to=peer.websocket)
    await room.connect(peer.websocket, "other", ids=True)
    await room.publish("other", "plain")
    await until(lambda: len(peer.got) == 7)
    assert list(map(json.loads, peer.got)) == [
        {"channel": "room", "id": ids[0].replace("-1", "-0"), "past": 1, "recovered": False},
        {"id": ids[0], "channel": "room", "data": "old"},
        {"id": ids[1], "channel": "room", "data": 'say "hi"'},
        {"id": ids[2], "channel": "room", "data": "/w==", "encoding": "base64"},
        {"id": ids[3], "channel": "room", "data": '{"a":1}'},
        {"id": None, "channel": "", "data": "for you"},
        {"id": None, "channel": "other", "data": "plain"},
    ]


async def test_clients_with_and_without_ids_on_one_channel(room, road):
    plain, with_ids = Peer(), Peer()
    await room.connect(plain.websocket, "room")
    resumed = await room.connect(with_ids.websocket, "room", ids=True)
    (id,) = await publish(room, "text")
    await until(lambda: plain.got == ["text"])
    await until(lambda: len(with_ids.got) == 2)
    assert list(map(json.loads, with_ids.got)) == [
        {"channel": "room", "id": resumed.id, "past": 0},
        {"id": id, "channel": "room", "data": "text"},
    ]


# Endpoints and mounts


async def test_an_endpoint_and_a_mount_resume(serve):
    hub = Broadcast(history=HISTORY)

    class Chat(BroadcastEndpoint):
        broadcast = hub
        history = 2
        ids = True

    routes = [
        WebSocketRoute("/chat/{channel}", Chat),
        Mount("/live", hub.app(history=1)),
    ]
    server = await serve(Starlette(routes=routes, lifespan=hub.lifespan))
    ids = await publish(hub, *"abcd")
    async with server.connect("/chat/room") as client:
        assert [json.loads(await client.recv()).get("data") for _ in range(3)] == [None, "c", "d"]
    async with server.connect(f"/chat/room?last_event_id={ids[0]}") as client:
        assert json.loads(await client.recv()) == {
            "channel": "room",
            "id": ids[0],
            "past": 3,
            "recovered": True,
        }
        assert [json.loads(await client.recv())["data"] for _ in range(3)] == [*"bcd"]
        await client.send("e")
        assert json.loads(await client.recv())["data"] == "e"
    async with server.connect(f"/live/room?last_event_id={ids[2]}") as client:
        assert [await client.recv() for _ in range(2)] == ["d", "e"]
    async with server.connect("/live/room?last_event_id=nonsense") as client:
        assert await client.recv() == "e"
    async with server.connect(f"/live/other?last_event_id={ids[2]}") as client:
        await hub.publish("other", "no history here")
        assert await client.recv() == "no history here"


def test_what_an_endpoint_calls_history_is_a_number():
    with pytest.raises(ConfigurationError, match=r"it belongs in Broadcast\(history=...\)"):
        type("Chat", (BroadcastEndpoint,), {"history": History()})


# Clients that are slow or leave


async def test_the_past_does_not_count_in_a_buffer_but_what_is_published_does(room, road):
    await publish(room, *["x" * 1000] * 10)
    peer = Peer()
    await room.connect(peer.websocket, "room", history=10, max_buffer=2500)
    peer.open.clear()
    await until(lambda: peer.stalled or peer.got)
    await publish(room, "live 1", "live 2")
    assert room.stats().slow_clients == 0
    peer.open.set()
    await until(lambda: peer.got == ["x" * 1000] * 10 + ["live 1", "live 2"])


async def test_a_client_that_does_not_catch_up_is_cut_off(room):
    await publish(room, *["x" * 1000] * 10)
    peer = Peer()
    await peer.websocket.accept()
    peer.open.clear()
    await room.connect(peer.websocket, "room", history=10, max_buffer=2500)
    await until(lambda: peer.stalled)
    await publish(room, *["y" * 1000] * 4)
    await until(lambda: room.stats().slow_clients == 1)
    peer.open.set()
    await until(lambda: peer.closed == 1013)
    assert "y" * 1000 not in peer.got  # a part that would pass for the whole


async def test_a_client_that_leaves_in_the_middle_of_its_past(room):
    await publish(room, *map(str, range(10)))
    peer = Peer()
    await peer.websocket.accept()
    peer.open.clear()
    await room.connect(peer.websocket, "room", history=10)
    await until(lambda: peer.stalled)
    peer.fail = OSError("gone")
    peer.open.set()
    await until(lambda: len(room) == 0)
    assert peer.got == []


async def test_a_subscriber_whose_past_is_longer_than_its_buffer(room):
    await publish(room, *["x" * 1000] * 10)
    async with room.subscribe("room", history=10, max_buffer=1500) as subscriber:
        await publish(room, "live")
        got = [(await subscriber.get()).message for _ in range(11)]
    assert got == ["x" * 1000] * 10 + ["live"]


async def test_a_message_that_is_not_delivered_is_not_kept():
    hub = Broadcast(history=HISTORY, tuning=Tuning(max_pending=1000, publish_timeout=0.05))
    async with hub, hub.subscribe("room") as subscriber:
        hub.publish_nowait("room", "x" * 500)
        with pytest.raises(PublishQueueFull):
            hub.publish_nowait("room", "y" * 500)
        id = await hub.publish("room", "z")
        assert id.endswith("-2")
        assert [(await subscriber.get()).message for _ in range(2)] == ["x" * 500, "z"]
    assert messages((await hub.history("room")).events) == ["x" * 500, "z"]


# The seam


async def test_nothing_is_missing_or_doubled_at_the_seam(room):
    """Clients and subscribers join while others publish."""
    done = asyncio.Event()
    published: list[str] = []

    async def publisher(name: str) -> None:
        number = 0
        while not done.is_set():
            published.append(await room.publish("room", f"{name}{number}"))
            number += 1
            await asyncio.sleep(0)

    async def member() -> None:
        await until(lambda: len(published) > 3)
        since = published[-2]
        async with room.subscribe("room", since=since) as subscriber:
            if subscriber.resumed.recovered:
                start = int(since.partition("-")[2])
                got = [(await subscriber.get()).position.offset for _ in range(20)]
                assert got == list(range(start + 1, start + 21))

    publishers = [asyncio.create_task(publisher(name)) for name in "ab"]
    await asyncio.gather(*(member() for _ in range(50)))
    done.set()
    await asyncio.gather(*publishers)
