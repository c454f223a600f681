"""Tests of what the history in NATS does in ways of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import nats
import pytest
from nats.aio.msg import Msg

from backends.front import front
from backends.nats_server import NatsServer
from starcast import BackendUnavailable, Broadcast, Gap, History, Resumed
from starcast.backends.base import Kept, MessagesRefused, StoredMessage
from starcast.backends.nats import NatsBackend
from starcast.backends.nats_history import NatsHistory
from starcast.backends.nats_jetstream import EXISTS, NOT_FOUND, JetStreamError
from starcast.backends.nats_streams import stream_of
from starcast.history import Position
from starcast.testing import ODD_NAMES
from support import DEADLINE, starcast_tasks, until

pytestmark = pytest.mark.anyio

HISTORY = History(size=5, ttl=60)
STREAM = "starcast%3Adefault-5-60000"


class Inbox:
    """Records what a connection delivers, with positions."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes, Position | None, int | None]] = []
        self.errors: list[Exception] = []

    def deliver(
        self,
        channel: str,
        payload: bytes,
        position: Position | None = None,
        previous: int | None = None,
    ) -> None:
        self.got.append((channel, payload, position, previous))

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, payload, _, _ in self.got]


def kept(payload: object, channel: str = "default:room", **more: Any) -> Kept:
    return Kept(channel, str(payload).encode(), **{"history": HISTORY, **more})


@pytest.fixture(scope="module")
def shared() -> Iterator[NatsServer]:
    """A server that nobody stops."""
    server = NatsServer(jetstream=True)
    server.start()
    yield server
    server.close()


@pytest.fixture
async def admin(shared: NatsServer, anyio_backend: str):
    """Somebody else's JetStream client. There is no stream when the test begins."""
    client = await nats.connect(shared.url)
    manager = client.jsm()
    for info in await manager.streams_info():
        await manager.delete_stream(info.config.name)
    # Otherwise a stream of the same name may have messages of the one that was deleted.
    folder = shared.store / "jetstream/$G/streams"
    await until(lambda: not (folder.exists() and any(folder.iterdir())))
    yield manager
    await client.close()


@pytest.fixture
def server(shared: NatsServer, admin: Any) -> NatsServer:
    return shared


@pytest.fixture
def own_server() -> Iterator[Any]:
    """`own_server("max_payload: 1000")` starts one that a test may break."""
    with contextlib.ExitStack() as stack:

        def start(config: str = "", jetstream: bool = True) -> NatsServer:
            server = NatsServer(config, jetstream=jetstream)
            stack.callback(server.close)
            server.start()
            return server

        yield start


@pytest.fixture
async def connect(shared: NatsServer, anyio_backend: str):
    """`connection, inbox = await connect()`, closed at the end."""
    connections = []

    async def make(url: str = shared.url, **options: Any) -> tuple[Any, Inbox]:
        inbox = Inbox()
        connection = await NatsBackend(url, **options).connect(inbox.deliver, inbox.errors.append)
        connections.append(connection)
        return connection, inbox

    yield make
    for connection in connections:
        await connection.close()
    await until(lambda: not starcast_tasks())


async def publish(connection: Any, *payloads: object, **more: Any) -> list[Position]:
    """Publish messages one after the other, and return their positions."""
    return [(await connection.publish_kept([kept(it, **more)]))[0] for it in payloads]


async def read(
    connection: Any,
    since: int | None = None,
    limit: int = 100,
    reverse: bool = False,
    *,
    channel: str = "default:room",
    history: History = HISTORY,
    known: Position | None = None,
) -> Any:
    return await connection.read_kept(channel, history, since, limit, reverse, known)


async def expired(connection: Any, **more: Any) -> None:
    """Wait until nothing is kept of a channel."""
    async with asyncio.timeout(DEADLINE):
        while True:
            if not (await read(connection, **more)).messages:
                return
            await asyncio.sleep(0.02)


# What it is for


async def test_what_is_in_nats(server, admin, connect):
    connection, inbox = await connect()
    await connection.subscribe("default:room 1")
    (position,) = await publish(connection, "text", channel="default:room 1", key="key")
    info = await admin.stream_info(STREAM)
    subject = f"starcast:default.%h-5-60000-{position.epoch}"
    assert info.config.subjects == [f"{subject}.*"]
    assert (info.config.max_age, info.config.max_msgs_per_subject) == (60, 6)
    assert info.config.storage == "file"
    stored = await admin.get_last_msg(STREAM, f"{subject}.room%201")
    assert (stored.data, stored.seq, position.offset) == (b"text", 1, 1)
    assert "key" not in stored.headers["Nats-Msg-Id"]
    assert inbox.got == [("default:room 1", b"text", position, 0)]


async def test_what_is_kept_and_what_is_not_arrive_over_one_subscription(server, connect):
    sender, _ = await connect()
    receiver, inbox = await connect(name="receives")
    await receiver.subscribe("default:room")
    (first,) = await publish(sender, "kept")
    await sender.publish([("default:room", b"not kept")])
    second, third = await sender.publish_kept([kept("other", "default:b"), kept("kept too")])
    await until(lambda: len(inbox.got) == 3)
    assert inbox.got == [
        ("default:room", b"kept", first, 0),
        ("default:room", b"not kept", None, None),
        ("default:room", b"kept too", third, first.offset),
    ]
    assert (first.offset, second.offset, third.offset) == (1, 2, 3)
    assert server.subjects("receives")[1:] == ["starcast:default.room"]


async def test_order_across_channels_streams_and_what_is_not_kept(server, connect):
    sender, _ = await connect()
    receiver, inbox = await connect()
    other = History(size=3, ttl=60)
    for name in "abc":
        await receiver.subscribe(f"default:{name}")
    expected = []
    for turn in range(20):
        batch = [
            kept(f"{turn} {n}", f"default:{'ab'[n % 2]}", history=(HISTORY, other)[n // 10 % 2])
            for n in range(40)
        ]
        await sender.publish_kept(batch)
        await sender.publish([("default:c", b"plain")])
        expected += [*(message.payload for message in batch), b"plain"]
    await until(lambda: len(inbox.got) == len(expected))
    assert inbox.payloads == expected


async def test_reading(server, connect):
    connection, _ = await connect()
    empty = await read(connection)
    assert (empty.messages, empty.position.offset) == ([], 0)
    assert (await read(connection, 0)).complete
    await publish(connection, "x", channel="default:other")
    positions = await publish(connection, *range(4))
    messages = [StoredMessage(n + 2, b"%d" % n) for n in range(4)]
    stored = await read(connection)
    assert stored == (positions[-1], messages, True)
    assert (await read(connection, limit=0)).messages == []
    assert (await read(connection, limit=3)).messages == messages[:3]
    assert await read(connection, 3) == (positions[-1], messages[2:], True)
    assert await read(connection, 3, 1) == (positions[-1], messages[2:3], True)
    assert await read(connection, 5) == (positions[-1], [], True)
    assert (await read(connection, 6)).complete is False
    newest_first = messages[::-1]
    assert (await read(connection, reverse=True)).messages == newest_first
    assert (await read(connection, limit=2, reverse=True)).messages == newest_first[:2]
    assert (await read(connection, 4, 1, reverse=True)).messages == newest_first[2:3]
    assert (await read(connection, 99, 1, reverse=True)).messages == newest_first[:1]
    for before in (0, 1, 2):
        assert (await read(connection, before, reverse=True)).messages == []
    assert (await read(connection, limit=0, reverse=True)).messages == []


async def test_what_is_too_much_is_removed(server, connect):
    connection, _ = await connect()
    positions = await publish(connection, *range(8))
    stored = await read(connection)
    assert [message.payload for message in stored.messages] == [b"3", b"4", b"5", b"6", b"7"]
    assert (await read(connection, limit=2)).messages == stored.messages[:2]
    assert (await read(connection, reverse=True)).messages == stored.messages[::-1]
    for position in positions[2:]:
        assert (await read(connection, position.offset)).complete
    for since in (0, 1, 2):
        lost = await read(connection, since, 2)
        assert lost.complete is False
        assert [message.payload for message in lost.messages] == [b"3", b"4"]


async def test_whether_something_is_missing_is_known_from_the_stream(server, connect):
    """Even if what `since` names is a message of another channel."""
    connection, _ = await connect()
    (first,) = await publish(connection, "x", channel="default:other")
    await publish(connection, *range(3))
    assert (await read(connection, first.offset)).complete
    assert (await read(connection, 0)).complete
    await publish(connection, *range(9), channel="default:other")
    assert (await read(connection, first.offset)).complete  # the stream begins after that
    await publish(connection, *range(3))
    assert (await read(connection, first.offset)).complete is False  # five are kept


async def test_a_channel_whose_messages_have_expired(server, admin, connect):
    connection, inbox = await connect()
    await connection.subscribe("default:room")
    history = History(size=5, ttl=0.3)
    (old,) = await publish(connection, "old", history=history)
    assert await read(connection, old.offset, history=history) == (old, [], True)
    await expired(connection, history=history)
    assert (await read(connection, history=history)).position == old
    (other,) = await publish(connection, "x", channel="default:other", history=history)
    stored = await read(connection, old.offset, history=history)
    assert stored == (other, [], True)  # nothing expired that came after it
    await expired(connection, channel="default:other", history=history)
    await publish(connection, "y", channel="default:other", history=history)
    assert (await read(connection, old.offset, history=history)).complete is None
    assert (await read(connection, 99, history=history)).complete is False
    (new,) = await publish(connection, "new", history=history)
    assert inbox.got[-1] == ("default:room", b"new", new, 0)
    info = await admin.stream_info("starcast%3Adefault-5-300")
    await admin.update_stream(info.config.evolve(max_bytes=1_000_000))
    assert (await read(connection, old.offset, history=history)).complete is False


async def test_a_large_history_is_read_from_its_end(server, connect):
    connection, _ = await connect()
    history = History(size=5000, ttl=60)
    room = [kept(number, history=history) for number in range(60)]
    crowd = [kept("x", "default:crowd", history=history) for _ in range(999)]
    for message in room[:30]:
        await connection.publish_kept([message, *crowd[:50]])
    await connection.publish_kept([*crowd, *room[30:]])
    expected = [b"%d" % number for number in reversed(range(60))]
    for limit in (1, 7, 45, 60, 99):
        stored = await read(connection, None, limit, reverse=True, history=history)
        assert [message.payload for message in stored.messages] == expected[:limit]


async def test_more_than_the_server_sends_at_once(own_server, connect):
    server = own_server("max_pending: 3000000")
    connection, _ = await connect(server.url)
    history = History(size=40, ttl=60)
    message = kept("x" * 100_000, history=history)
    for _ in range(8):
        await connection.publish_kept([message] * 5)
    stored = await read(connection, history=history)
    assert [len(message.payload) for message in stored.messages] == [100_000] * 40
    assert connection.heard_at > 0


@pytest.mark.parametrize("prefix", ["starcast:", "a.b.", "", "p" * 200])
async def test_odd_names(server, connect, prefix):
    connection, inbox = await connect(prefix=prefix)
    names = [f"default:{name}" for name in ODD_NAMES] + ["room", f"{'n' * 64}:{'🎈' * 200}"]
    for name in names:
        await connection.subscribe(name)
    messages = [kept(number, name) for number, name in enumerate(names)]
    await connection.publish_kept(messages)
    assert [(channel, payload) for channel, payload, _, _ in inbox.got] == [
        message[:2] for message in messages
    ]
    for number, name in enumerate(names):
        stored = await read(connection, channel=name)
        assert [message.payload for message in stored.messages] == [b"%d" % number]


async def test_two_hubs_are_two_streams(server, admin):
    async with (
        Broadcast(server.url, name="a", history=HISTORY) as a,
        Broadcast(server.url, name="b", history=HISTORY) as b,
        a.subscribe("room") as subscriber,
    ):
        await b.publish("room", "for b")
        await a.publish("room", "for a", idempotency_key="key")
        assert (await subscriber.get()).message == "for a"
        assert [event.message for event in (await a.history("room")).events] == ["for a"]
    names = {info.config.name for info in await admin.streams_info()}
    assert names == {"starcast%3Aa-5-60000", "starcast%3Ab-5-60000"}


# Hubs


async def test_a_message_that_is_published_twice(server):
    async with (
        Broadcast(server.url, name="both", history=HISTORY) as one,
        Broadcast(server.url, name="both", history=HISTORY) as two,
        one.subscribe("room") as subscriber,
    ):
        ids = await asyncio.gather(
            *(hub.publish("room", "x", idempotency_key="k\r\n 🎈") for hub in (one, two) * 10)
        )
        assert len(set(ids)) == 1
        other = await two.publish("b", "x", idempotency_key="k\r\n 🎈")
        await two.publish("room", "y")
        assert other not in ids
        assert [(await subscriber.get()).message for _ in range(2)] == ["x", "y"]
        assert len((await one.history("room")).events) == 2


async def test_two_hubs_publish_at_once(server):
    """Everybody gets everything in one order."""
    history = History(size=1000, ttl=60)
    async with (
        Broadcast(server.url, name="both", history=history) as one,
        Broadcast(server.url, name="both", history=history) as two,
        one.subscribe("room", gaps=True) as ones,
        two.subscribe("room", gaps=True) as twos,
    ):
        await asyncio.gather(
            *(hub.publish("room", str(number)) for number in range(200) for hub in (one, two))
        )
        async with asyncio.timeout(DEADLINE):
            first = [await ones.get() for _ in range(400)]
            second = [await twos.get() for _ in range(400)]
        assert [event.id for event in first] == [event.id for event in second]
        offsets = [event.position.offset for event in first]
        assert offsets == sorted(set(offsets))
        assert len((await one.history("room", limit=1000)).events) == 400
        assert one.stats().backend.gaps == two.stats().backend.gaps == 0


async def test_first_use_by_several_calls_at_once(server, connect):
    connection, _ = await connect()
    results = await asyncio.gather(*(publish(connection, str(n)) for n in range(3)))
    assert {position.offset for (position,) in results} == {1, 2, 3}
    epoch = results[0][0].epoch
    known = Position(epoch, 9)
    reads = await asyncio.gather(*(read(connection, known=known) for _ in range(3)))
    assert {stored.position.epoch for stored in reads} == {reads[0].position.epoch} != {epoch}


async def test_first_use_by_several_hubs_at_once(server, admin):
    async with contextlib.AsyncExitStack() as stack:
        hubs = [
            await stack.enter_async_context(Broadcast(server.url, name="many", history=HISTORY))
            for _ in range(5)
        ]
        ids = await asyncio.gather(*(hub.publish("room", "x") for hub in hubs))
        assert len({id.partition("-")[0] for id in ids}) == 1
        assert {id.partition("-")[2] for id in ids} == set("12345")
    assert len(await admin.streams_info()) == 1


async def test_a_hub_with_another_size_gets_messages_without_an_id(server):
    """As long as an app is being replaced by one with another setting."""
    async with (
        Broadcast(server.url, name="both", history=History(size=5)) as old,
        Broadcast(server.url, name="both", history=History(size=6)) as new,
        old.subscribe("room", gaps=True) as olds,
        new.subscribe("room", gaps=True) as news,
    ):
        ids = []
        for number in range(4):
            ids.append(await (old, new)[number % 2].publish("room", str(number)))
        for subscriber, own in ((olds, 0), (news, 1)):
            got = [await subscriber.get() for _ in range(4)]
            assert [event.message for event in got] == [*"0123"]
            assert [event.id for event in got] == [
                id if number % 2 == own else None for number, id in enumerate(ids)
            ]


async def test_a_resume(server):
    async with Broadcast(server.url, history=HISTORY) as hub:
        ids = [await hub.publish("room", str(number)) for number in range(4)]
        async with hub.subscribe("room", since=ids[1]) as subscriber:
            assert subscriber.resumed == Resumed(ids[-1], True)
            assert [(await subscriber.get()).id for _ in range(2)] == ids[2:]
        past = await hub.history("room", reverse=True, limit=2)
        assert [event.id for event in past.events] == [ids[3], ids[2]]
        assert (await hub.history("room", since=ids[0])).complete
        for number in range(5):
            await hub.publish("room", str(number))
        async with hub.subscribe("room", since=ids[1], history=1) as subscriber:
            assert subscriber.resumed.recovered is False
            assert (await subscriber.get()).message == "4"


# Outages


async def test_a_server_that_comes_back_with_an_older_state(own_server, tmp_path):
    """As after a power cut: it would give the same offsets to other messages."""
    server = own_server()
    async with (
        Broadcast(server.url, history=HISTORY) as hub,
        hub.subscribe("room", gaps=True) as subscriber,
    ):
        await hub.publish("room", "0")
        server.stop()
        await until(lambda: hub.stats().backend.state == "reconnecting")
        shutil.copytree(server.store, tmp_path / "copy")
        server.start()
        await until(lambda: hub.stats().backend.state == "connected")
        old = [await hub.publish("room", str(number)) for number in range(1, 4)]
        got = [(await subscriber.get()).message for _ in range(4)]
        assert got == [*"0123"]
        server.kill()
        shutil.rmtree(server.store)
        shutil.copytree(tmp_path / "copy", server.store)
        server.start()
        assert isinstance(await subscriber.get(), Gap)
        new = await hub.publish("room", "new")
        assert (await subscriber.get()).message == "new"
        assert new.partition("-")[0] != old[0].partition("-")[0]
        async with hub.subscribe("room", since=old[0]) as another:
            assert another.resumed.recovered is False


async def test_a_publisher_that_knows_more_than_the_stream(server, connect):
    connection, _ = await connect()
    reader, _ = await connect()
    listener, inbox = await connect()
    await listener.subscribe("default:room")
    (old,) = await publish(connection, "old")
    (same,) = await publish(connection, "same", known=old)
    assert same == (old.epoch, 2)
    for each in (reader, listener):
        assert (await read(each)).position == same
    ahead = Position(old.epoch, 9)
    (new,) = await publish(connection, "new", known=ahead)
    assert new == (new.epoch, 3)
    assert new.epoch != old.epoch
    await until(lambda: len(inbox.got) == 3)
    assert inbox.got[-1][2:] == (new, 0)
    for each in (reader, listener):
        assert (await read(each)).position == new
    assert (await publish(connection, "newer", known=ahead))[0].epoch == new.epoch
    assert len((await read(connection, known=ahead)).messages) == 2
    later = Position(new.epoch, 99)
    assert (await read(connection, known=later)).position.epoch != new.epoch


async def test_a_stream_that_is_deleted(server, admin, connect):
    """Nothing is missing for who is subscribed."""
    connection, inbox = await connect()
    other, _ = await connect()
    await connection.subscribe("default:room")
    (old,) = await publish(connection, "old")
    assert (await read(other)).position == old
    for call in (admin.purge_stream, admin.delete_stream):
        await call(STREAM)
    new, newer = await connection.publish_kept([kept("new"), kept("newer")])
    assert new.epoch == newer.epoch != old.epoch
    stored = await read(other)  # which still has the old epoch
    assert (stored.position, len(stored.messages)) == (newer, 2)
    for call in (admin.purge_stream, admin.delete_stream):
        await call(STREAM)
    stored = await read(connection)
    assert stored.position.epoch != new.epoch
    assert stored.messages == []
    assert inbox.payloads == [b"old", b"new", b"newer"]
    assert inbox.got[1][3] == 0


class Scripted:
    """Answers instead of JetStream."""

    name = "NATS"

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.epochs = itertools.cycle("abcdef")
        self.last = 0
        self.stored_answers = itertools.repeat([message(Status="404")])

    async def publish(self, base: str, requests: list[Any]) -> list[Any]:
        return [self.answers.pop(0) for _ in requests]

    async def api(self, base: str, what: str, body: Any) -> dict[str, Any]:
        if "INFO" in what:
            raise JetStreamError("not found", NOT_FOUND)
        if self.epochs is None:
            raise JetStreamError("exists", EXISTS)
        stream, _ = stream_of("", "default:room", HISTORY)
        state = {"first_seq": 0, "last_seq": self.last}
        return {"config": stream.config(next(self.epochs)), "state": state}

    async def stored(self, base: str, stream: str, body: Any) -> list[Any]:
        return next(self.stored_answers)


def message(data: object = "", **headers: str) -> Msg:
    return Msg(None, data=json.dumps(data).encode(), headers=headers)


NOBODY = message(Status="503")


async def test_a_message_that_was_overtaken_is_not_tried_again():
    """So that the messages of a publisher keep their order."""
    scripted = Scripted(NOBODY, message({"seq": 1}), NOBODY, message({"seq": 2}))
    history = NatsHistory("", scripted)
    with pytest.raises(MessagesRefused) as raised:
        await history.publish([kept(number) for number in range(3)], 1000)
    assert [it and it.offset for it in raised.value.positions] == [None, 1, None]
    assert raised.value.reasons.keys() == {0, 2}
    assert "is not there" in raised.value.reasons[0]
    (position,) = await history.publish([kept("x")], 1000)
    assert position.offset == 2


async def test_a_message_that_expires_while_it_is_read():
    scripted = Scripted()
    scripted.last, scripted.epochs = 1, itertools.repeat("a")
    first = [message(**{"Nats-Sequence": "1"})]
    scripted.stored_answers = itertools.chain([first], scripted.stored_answers)
    stored = await NatsHistory("", scripted).read("default:room", HISTORY, None, 1, False, None)
    assert stored == (("a", 1), [], True)


@pytest.mark.parametrize("known", [Position("a", 2), Position("old", 9), None])
async def test_a_replica_that_is_behind(known):
    scripted = Scripted()
    scripted.last, scripted.epochs = 2, itertools.repeat("a")
    older = [message(**{"Nats-Sequence": "1"})]
    newer = [message(**{"Nats-Sequence": "2"})]
    scripted.stored_answers = iter([older, older, newer])
    history = NatsHistory("", scripted)
    stored = await history.read("default:room", HISTORY, 2, 1, False, known)
    assert stored == (("a", 2), [], True)
    scripted.stored_answers = itertools.repeat([message(**{"Nats-Sequence": "1"})])
    stored = await history.read("default:room", HISTORY, 2, 1, False, known)
    assert stored == (("a", 1), [], False)  # somebody has deleted it
    end = message(Status="204", **{"Nats-Num-Pending": "0"})
    for reverse in (False, True):
        scripted.stored_answers = iter([newer, [*older, end], newer, [*newer, end]])
        stored = await history.read("default:room", HISTORY, None, 1, reverse, None)
        assert stored == (("a", 2), [(2, newer[0].data)], True)


async def test_a_stream_that_keeps_changing():
    history = NatsHistory("", Scripted(*[NOBODY] * 9))
    with pytest.raises(MessagesRefused, match="is not there"):
        await history.publish([kept("x")], 1000)
    with pytest.raises(BackendUnavailable, match="keeps changing"):
        await history.read("default:room", HISTORY, None, 1, False, None)
    scripted = Scripted()
    scripted.epochs = None  # others have created it each time
    with pytest.raises(BackendUnavailable, match="keeps changing"):
        await NatsHistory("", scripted).read("default:room", HISTORY, None, 1, False, None)


# What is refused


NEEDED = r"a history needs JetStream, which is not enabled there .*nats-server with -js"


async def test_a_server_without_jetstream(own_server, caplog):
    server = own_server(jetstream=False)
    async with Broadcast(server.url, history={"room": HISTORY, "*": None}) as hub:
        with pytest.raises(BackendUnavailable, match=NEEDED):
            await hub.publish("room", "text")
        with pytest.raises(BackendUnavailable, match=NEEDED):
            async with hub.subscribe("room"):
                pass
        with pytest.raises(BackendUnavailable, match=NEEDED):
            await hub.history("room")
        async with hub.subscribe("other") as subscriber:
            await hub.publish("other", "text")
            assert (await subscriber.get()).message == "text"
        assert await hub.healthy()


ACCOUNTS = """accounts: {
    without: {users: [{user: without, password: secret}]},
    with: {jetstream: {max_streams: 1, max_file: 3000}, users: [{user: with, password: secret}]},
}"""


async def test_accounts(own_server):
    server = own_server(ACCOUNTS)

    def url(user: str) -> str:
        return server.url.replace("//", f"//{user}:secret@")

    async with Broadcast(url("without"), history=HISTORY) as hub:
        with pytest.raises(BackendUnavailable, match=NEEDED) as raised:
            await hub.publish("room", "text")
        assert "secret" not in str(raised.value)
    async with Broadcast(url("with"), history={"big": History(size=9), "*": HISTORY}) as hub:
        await hub.publish("room", "x" * 1000)
        with pytest.raises(BackendUnavailable, match="refuses: maximum number of streams reached"):
            await hub.publish("big", "text")
        results = await asyncio.gather(
            *(hub.publish("room", "x" * 900) for _ in range(9)), return_exceptions=True
        )
        assert "refuses: resource limits exceeded for account" in str(results[-1])
        assert isinstance(results[0], str)


async def test_a_server_that_is_too_old(server, connect):
    old = re.compile(rb'"version":"[^"]*"')
    async with front(
        server.port, change=lambda data: old.sub(b'"version":"2.10.29"', data)
    ) as port:
        connection, _ = await connect(f"nats://127.0.0.1:{port}")
        with pytest.raises(BackendUnavailable, match=r"needs nats-server 2\.11 .* is 2\.10\.29"):
            await read(connection)
        await connection.close()


async def test_a_read_that_is_refused(server, connect):
    """The server sees nothing wrong in ours, so it is made to say so."""

    def refuse(data: bytes) -> bytes:
        return data.replace(b"404 Message Not Found", b"408 Bad Request, no!!")

    async with front(server.port, change=refuse) as port:
        connection, _ = await connect(f"nats://127.0.0.1:{port}")
        with pytest.raises(BackendUnavailable, match="refuses: Bad Request, no!!"):
            await read(connection)
        await connection.close()


async def test_a_message_that_is_too_large_with_its_headers(own_server, connect):
    server = own_server("max_payload: 1000")
    connection, _ = await connect(server.url)
    with pytest.raises(MessagesRefused) as raised:
        await connection.publish_kept([kept("x"), kept("x" * 950, key="a"), kept("x" * 1000)])
    assert [it and it.offset for it in raised.value.positions] == [1, None, 2]
    assert raised.value.reasons.keys() == {1}
    assert "takes 1015 bytes" not in str(raised.value)
    assert re.search(r"takes 10\d\d bytes of 1000", str(raised.value))


async def test_a_stream_that_somebody_else_has_changed(server, admin, connect):
    connection, _ = await connect()
    await publish(connection, "x")
    info = await admin.stream_info(STREAM)
    await admin.update_stream(info.config.evolve(description="mine", max_bytes=10_000))
    other, _ = await connect()
    assert (await publish(other, "x"))[0].offset == 2
    await admin.update_stream(info.config.evolve(max_msgs_per_subject=3))
    another, _ = await connect()
    with pytest.raises(BackendUnavailable, match="it is not as starcast makes it; delete it"):
        await read(another)
    await admin.delete_stream(STREAM)
    await admin.add_stream(name=STREAM, subjects=["starcast:default.x.*"])
    with pytest.raises(MessagesRefused, match="it is not as starcast makes it; delete it"):
        await publish(another, "x")


@pytest.mark.parametrize("prefix", ["$1.", "a.{{wildcard(1)}}."])
async def test_a_prefix_with_a_placeholder(server, connect, prefix):
    connection, _ = await connect(prefix=prefix)
    with pytest.raises(MessagesRefused, match="takes for a placeholder; choose another one"):
        await publish(connection, "x")


async def test_jetstream_does_not_answer(server, admin, connect):
    connection, _ = await connect()
    (first,) = await publish(connection, "x")
    info = await admin.stream_info(STREAM)
    await admin.update_stream(info.config.evolve(no_ack=True))
    answers = re.compile(rb"(MSG \S+\.%-\.[0-9a-f]+\.)\d+")
    is_deaf = False

    def change(data: bytes) -> bytes:
        return answers.sub(rb"\1x", data) if is_deaf else data

    async with front(server.port, change=change) as port:
        deaf, _ = await connect(f"nats://127.0.0.1:{port}")
        leaving, _ = await connect(f"nats://127.0.0.1:{port}")
        for each in (deaf, leaving):
            await read(each)
        is_deaf = True
        calls = [publish(connection, "y"), read(deaf), read(leaving)]
        tasks = [asyncio.create_task(call) for call in calls]
        await asyncio.sleep(0.1)
        await leaving.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await deaf.close()
    assert isinstance(results[0], MessagesRefused)
    for result in results[:2]:
        assert "JetStream did not answer in time" in str(result)
    assert "the connection was closed" in str(results[2])
    assert len((await read(connection, first.offset)).messages) == 1  # it may have been stored


async def test_a_connection_that_breaks_while_it_is_asked(own_server, connect):
    server = own_server()
    connection, inbox = await connect(server.url)
    unused, _ = await connect(server.url)
    await publish(connection, "x")
    server.freeze()
    calls = (publish(connection, "y"), read(connection), read(unused))
    asking = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0.01)
    server.kill()
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(result, BackendUnavailable) for result in results)
    assert len(inbox.errors) == 1
    for call in (publish(connection, "z"), read(connection)):
        with pytest.raises(BackendUnavailable, match="not connected"):
            await call


async def test_a_call_that_is_cancelled(server, connect):
    connection, inbox = await connect()
    for call in (publish(connection, "x"), read(connection)):
        task = asyncio.create_task(call)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    (position,) = await publish(connection, "y")
    assert (await read(connection)).position == position
    assert inbox.errors == []


# Rights


def users(publish: list[str], subscribe: list[str]) -> str:
    rights = json.dumps({"publish": publish, "subscribe": subscribe})
    user = f"{{user: u, password: secret, permissions: {rights}}}"
    return f"authorization: {{users: [{user}, {{user: admin, password: secret}}]}}"


def named_rights() -> tuple[list[str], list[str]]:
    """What the docs say that a user needs."""
    text = NatsBackend.__doc__.partition("these rights")[2].partition("Everybody")[0]
    text = text.replace("NAME`, `", "NAME` `").partition("for the stream")[2]
    to_subscribe, _, to_publish = text.partition("and to publish to")
    names = [re.findall(r"`([^`]+)`", part) for part in (to_publish, to_subscribe)]
    names = [[it.replace("NAME", "starcast%2Estaff-5-60000") for it in part] for part in names]
    return names[0], names[1]


def staff(server: NatsServer) -> Broadcast:
    url = server.url.replace("//", "//u:secret@")
    return Broadcast(backend=NatsBackend(url, prefix="starcast."), name="staff", history=HISTORY)


async def test_a_user_with_the_rights_that_the_docs_name(own_server):
    server = own_server(users(*named_rights()))
    async with staff(server) as hub, hub.subscribe("room") as subscriber:
        ids = [await hub.publish("room", str(n), idempotency_key=str(n)) for n in range(4)]
        assert [(await subscriber.get()).id for _ in range(4)] == ids
        assert (await hub.history("room", since=ids[0])).complete
    connection = await NatsBackend(
        server.url.replace("//", "//u:secret@"), prefix="starcast."
    ).connect(Inbox().deliver, lambda error: None)
    epoch, _, offset = ids[-1].partition("-")
    known = Position(epoch, int(offset) + 1)
    assert (await connection.publish_kept([kept("x", "staff:room", known=known)]))[0].epoch != epoch
    for name in ("other:room", "staff"):
        with pytest.raises(BackendUnavailable, match="Permissions Violation"):
            await connection.publish_kept([kept("x", name)])
    await connection.close()


@pytest.mark.parametrize("missing", ["$JS.API.STREAM.INFO", "$JS.API.DIRECT.GET", "starcast.staff"])
async def test_a_user_without_a_right(own_server, missing, caplog):
    to_publish, to_subscribe = named_rights()
    rights = [it for it in to_publish if not it.startswith(missing)]
    server = own_server(users([*rights, "starcast.staff.*"], to_subscribe))
    async with staff(server) as hub:
        use = hub.history("room") if "DIRECT" in missing else hub.publish("room", "text")
        with pytest.raises(BackendUnavailable, match=r"Permissions Violation for Publish to .*"):
            await use
    assert "secret" not in caplog.text


async def test_a_user_who_may_not_listen_for_answers(own_server, connect):
    to_publish, _ = named_rights()
    server = own_server(users(to_publish, ["starcast.*", "starcast.staff.*"]))
    url = server.url.replace("//", "//u:secret@")
    connection, inbox = await connect(url, prefix="starcast.")
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match=r"Permissions Violation for Subscription"):
            await read(connection, channel="staff:room")
    await connection.subscribe("staff:room")
    assert inbox.errors == []
    server.reload(users(to_publish, ["starcast.*", "starcast.staff.>"]))
    connection, inbox = await connect(url, prefix="starcast.")
    await read(connection, channel="staff:room")
    server.reload(users(to_publish, ["starcast.*", "starcast.staff.*"]))
    await until(lambda: inbox.errors)
    assert "Permissions Violation for Subscription" in str(inbox.errors[0])


# What arrives


async def test_headers_that_are_not_from_jetstream(server, connect):
    """Somebody else may publish to the subject of a channel what he wants."""
    connection, inbox = await connect()
    await connection.subscribe("default:room")
    subject = "starcast:default.%h-5-60000-abc.room"
    good = {"Nats-Subject": subject, "Nats-Sequence": "7", "Nats-Last-Sequence": "0"}
    client = await nats.connect(server.url)
    for change in (
        {"Nats-Subject": "x"},
        {"Nats-Sequence": "-1"},
        {"Nats-Sequence": "9" * 19},
        {"Nats-Last-Sequence": "x"},
        {},
    ):
        await client.publish("starcast:default.room", b"x", headers={**good, **change})
    await client.publish("starcast:default.room", b"x", headers={"a": "b"})
    await client.publish("starcast:default.room", b"last")
    await client.close()
    await until(lambda: b"last" in inbox.payloads)
    positions = [position for _, _, position, _ in inbox.got]
    assert positions == [None] * 4 + [Position("abc", 7)] + [None] * 2


async def test_answers_that_nobody_waits_for(server, connect):
    connection, _ = await connect(name="asks")
    await publish(connection, "x")
    (answers,) = [it for it in server.subjects("asks") if it.endswith(".*")]
    client = await nats.connect(server.url)
    for token in ("0", "99", "x"):
        await client.publish(answers.replace("*", token), b"{}")
    await client.flush()
    await client.close()
    await publish(connection, "y")


def test_streams_have_names_of_their_own():
    def name(prefix: str, channel: str, history: History = HISTORY) -> str:
        return stream_of(prefix, channel, history)[0].name

    names = [name(prefix, channel) for prefix in ("a.", "a") for channel in ("b:c", "b", "B:c")]
    names += [name("p" * 200, f"{hub}:x") for hub in ("a" * 64, "b" * 64)]
    names += [name("a", "b:c", History(size=6, ttl=60)), name("a", "b:c", History(size=5, ttl=61))]
    assert len(set(names)) == len(names)
    assert all(len(each) <= 255 and "." not in each for each in names)
    assert name("", "a:b", History(ttl=0.001)) == "a-100-100"
    assert name("", "a:b", History(ttl=1e300)) == "a-100-9000000000000"
