"""The history in PostgreSQL, against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import asyncpg
import pytest

from backends.postgres_server import PASSWORD, PostgresServer
from starcast import BackendUnavailable, Broadcast, History
from starcast.backends import postgres_history, postgres_tables
from starcast.backends.base import Kept, MessagesRefused, Stored
from starcast.backends.postgres import PostgresBackend
from starcast.backends.postgres_connection import PostgresConnection
from starcast.backends.postgres_history import PostgresHistory
from starcast.backends.postgres_messages import MAX_HEAD, MAX_NOTIFY, MAX_PAYLOAD, PIECE_SIZE
from starcast.backends.postgres_session import Session
from starcast.exceptions import PayloadTooLarge
from starcast.history import Position
from support import DEADLINE, starcast_tasks, until

pytestmark = pytest.mark.anyio

HISTORY = History(size=100, ttl=60)


@pytest.fixture(scope="module")
def shared() -> Iterator[PostgresServer]:
    """A server that nobody stops."""
    server = PostgresServer()
    server.start()
    yield server
    server.close()


@pytest.fixture
async def other(shared: PostgresServer) -> AsyncIterator[Any]:
    """What an administrator has: a connection."""
    connection = await asyncpg.connect(shared.url)
    yield connection
    connection.terminate()


@pytest.fixture
async def server(shared: PostgresServer, other: Any) -> PostgresServer:
    """A server without the tables."""
    await other.execute("DROP TABLE IF EXISTS starcast_positions, starcast_messages")
    return shared


class Box:
    """A connection, and what it delivered and reported."""

    def __init__(self) -> None:
        self.got: list[tuple[Any, ...]] = []
        self.lost: list[Exception] = []
        self.connection: PostgresConnection

    async def start(self, url: str, *channels: str, **options: Any) -> Box:
        self.connection = await PostgresBackend(url, **options).connect(
            lambda *message: self.got.append(message), self.lost.append
        )
        for channel in channels:
            await self.connection.subscribe(channel)
        return self

    async def publish(self, *messages: tuple[Any, ...], history: History = HISTORY) -> list[int]:
        """Publish messages, each a channel, a payload and maybe a key; return their offsets."""
        kept = [Kept(channel, payload, history, *key) for channel, payload, *key in messages]
        return [position.offset for position in await self.connection.publish_kept(kept)]

    async def read(
        self,
        channel: str = "a",
        since: int | None = None,
        limit: int = 1000,
        reverse: bool = False,
        history: History = HISTORY,
        known: Position | None = None,
    ) -> Stored:
        return await self.connection.read_kept(channel, history, since, limit, reverse, known)

    async def offsets(self, *arguments: Any, **options: Any) -> list[int]:
        return [message.offset for message in (await self.read(*arguments, **options)).messages]


@pytest.fixture
async def start(anyio_backend: str) -> AsyncIterator[Callable[..., Awaitable[Box]]]:
    """`await start(url, "a", "b")` is a connection that is subscribed to these channels."""
    boxes: list[Box] = []

    async def start(url: str, *channels: str, **options: Any) -> Box:
        boxes.append(Box())
        return await boxes[-1].start(url, *channels, **options)

    yield start
    for box in boxes:
        await box.connection.close()
    assert not starcast_tasks()


@pytest.fixture
async def boxes(server: PostgresServer, start: Callable[..., Awaitable[Box]]) -> list[Box]:
    """Two connections, both of which are subscribed to the channels "a" and "b"."""
    return [await start(server.url, "a", "b") for _ in range(2)]


@pytest.fixture
def box(boxes: list[Box]) -> Box:
    """The first one."""
    return boxes[0]


async def until_it_waits(connection: Any) -> None:
    """Wait until another session waits for a lock."""
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    async with asyncio.timeout(DEADLINE):
        while not await connection.fetchval(waiting):
            pass


# Messages


async def test_messages_arrive_everywhere_with_their_positions(boxes):
    one, two = boxes
    assert (await one.read()).position.offset == 0
    sent = [("a", b"0"), ("b", b"1"), ("a", b"2"), ("b", b"3"), ("b", b"4")]
    assert await one.publish(*sent) == [1, 1, 2, 2, 3]
    assert await two.publish(("a", b"5")) == [3]
    await one.connection.publish([("a", b"not kept")])
    epochs = {name: (await two.read(name)).position.epoch for name in "ab"}
    assert len(set(epochs.values())) == 2
    expected = [
        (name, payload, Position(epochs[name], offset))
        for (name, payload), offset in zip([*sent, ("a", b"5")], [1, 1, 2, 2, 3, 3], strict=True)
    ]
    await until(lambda: len(one.got) == len(two.got) == 7)
    assert one.got == two.got == [*expected, ("a", b"not kept")]
    assert await two.read("b") == (
        Position(epochs["b"], 3),
        [(1, b"1"), (2, b"3"), (3, b"4")],
        True,
    )


PAYLOADS = {
    "empty": b"",
    "unicode": "h\xe9 \N{GRINNING FACE}".encode(),
    "quotes": b"'; \"$1 %s \\ --",
    "nul": b"a\0b",
    "marker": b"\x10",
    "like a head": b"\x10abc-1:text",
    "binary": b"\xff" + bytes(range(256)),
    "longest text": b"x" * (MAX_NOTIFY - MAX_HEAD),
    "too long a text": b"x" * (MAX_NOTIFY - MAX_HEAD + 1),
    "one piece": b"\xff" + bytes(PIECE_SIZE - 1),
    "two pieces": b"\xff" + bytes(PIECE_SIZE),
    "1 MiB": b"\xff" + os.urandom(2**20 - 1),
}


@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1", "SQL_ASCII"])
async def test_messages_of_every_kind(server, start, other, encoding):
    """Twice in one batch, and with text as the name of the channel that not all databases have."""
    name = f"history_{encoding.lower()}"
    await other.execute(f"CREATE DATABASE {name} ENCODING {encoding} TEMPLATE template0")
    channels = ["a", "\N{GRINNING FACE} ' \"", "x" * 200]
    box = await start(server.url_of(name), *channels)
    payloads = list(PAYLOADS.values())
    sent = [(channel, payload) for channel in channels for payload in payloads]
    assert (
        await box.publish(*sent, *sent)
        == [*range(1, len(payloads) + 1)] * 3
        + [*range(len(payloads) + 1, 2 * len(payloads) + 1)] * 3
    )
    await until(lambda: len(box.got) == 2 * len(sent))
    assert [message[:2] for message in box.got] == [*sent, *sent]
    for channel in channels:
        stored = await box.read(channel)
        assert [payload for _, payload in stored.messages] == payloads * 2
        assert [(m[2], m[1]) for m in box.got if m[0] == channel] == [
            (Position(stored.position.epoch, offset), payload)
            for offset, payload in stored.messages
        ]


async def test_text_is_legible_for_other_programs(box, other):
    heard: list[str] = []
    await other.add_listener("starcast:a", lambda *message: heard.append(message[-1]))
    await box.publish(("a", "h\xe9".encode()), ("a", b"\xff"))
    epoch = (await box.read()).position.epoch
    await until(lambda: len(heard) == 2)
    assert heard == [f"\x10{epoch}-1:h\xe9", f"\x10{epoch}-2.1/1:/w=="]


async def test_the_largest_message(box):
    largest = b"\xff" + os.urandom(MAX_PAYLOAD - 1)
    assert await box.publish(("a", largest)) == [1]
    await until(lambda: box.got)
    assert box.got[0][1] == largest == (await box.read()).messages[0].payload


async def test_a_message_that_is_too_large(box):
    with pytest.raises(PayloadTooLarge, match="16777217 bytes"):
        await box.publish(("a", b"before"), ("a", bytes(MAX_PAYLOAD + 1)))
    assert await box.publish() == []
    assert await box.publish(("a", b"after")) == [1]


async def test_a_later_transaction_of_a_batch_is_refused(box):
    """What was committed before has its positions; nothing, if it is the first one."""
    bad = ("\0", b"4")  # no name of PostgreSQL has that
    large = [("a", b"1" * 600_000), ("b", b"2" * 600_000), ("a", b"3" * 600_000)]
    with pytest.raises(MessagesRefused, match="invalid byte sequence") as raised:
        await box.publish(*large, bad, ("a", b"5"))
    error = raised.value
    assert list(error.reasons) == [2, 3, 4]
    assert [position and position.offset for position in error.positions] == [1, 1, *[None] * 3]
    with pytest.raises(BackendUnavailable, match="invalid byte sequence") as first:
        await box.publish(bad, ("a", b"5"))
    assert not isinstance(first.value, MessagesRefused)
    assert await box.publish(("a", b"6")) == [2]


async def test_two_that_publish_in_different_orders(boxes):
    """Neither waits for the other for ever, and offsets grow in the order of arrival."""
    batches, count = 30, 10

    async def publish(box: Box, channels: str) -> None:
        for _ in range(batches):
            await box.publish(*((name, b"x") for name in channels for _ in range(count)))

    await asyncio.gather(publish(boxes[0], "ab"), publish(boxes[1], "ba"))
    total = 2 * batches * count
    for box in boxes:
        await until(lambda box=box: len(box.got) == 2 * total)
        for name in "ab":
            offsets = [message[2].offset for message in box.got if message[0] == name]
            assert offsets == [*range(1, total + 1)]
    assert boxes[0].got == boxes[1].got


# Reading


async def test_what_is_read(box):
    await box.publish(*(("a", b"%d" % number) for number in range(1, 11)))
    every = [*range(1, 11)]
    assert (
        await box.offsets() == await box.offsets(limit=10**30) == await box.offsets("a", 0) == every
    )
    assert await box.offsets("a", 7) == [8, 9, 10]
    assert await box.offsets("a", 3, 2) == [4, 5]
    assert await box.offsets(reverse=True) == every[::-1]
    assert await box.offsets("a", 4, 2, reverse=True) == [3, 2]
    for since in (10, 11, 10**18 - 1):
        assert await box.read("a", since) == ((await box.read()).position, [], True)
    for since in (0, 1):
        assert await box.offsets("a", since, reverse=True) == []
    assert await box.offsets(limit=0) == []
    assert (await box.read(limit=0)).position.offset == 10


async def test_many_reads_at_once(box, monkeypatch):
    await box.publish(*((str(number), b"%d" % number) for number in range(200)))
    reads = [
        box.read(str(number), limit=limit, reverse=reverse)
        for number in range(250)
        for limit, reverse in ((1, False), (0, False), (9_000, number % 2 == 0))
    ]
    answers = await asyncio.gather(*reads)
    for number in range(250):
        first, nothing, every = answers[3 * number : 3 * number + 3]
        assert first == every
        assert [it.payload for it in first.messages] == [b"%d" % number][: number < 200]
        assert nothing == (first.position, [], True)


async def test_the_newest_ones_are_kept(box, other):
    few = History(size=3, ttl=60)
    await box.publish(*(("a", b"x") for _ in range(50)), history=few)
    for since, complete in ((46, False), (47, True), (48, True), (None, True)):
        stored = await box.read("a", since, history=few)
        assert [it.offset for it in stored.messages] == [max(48, (since or 0) + 1), 49, 50][
            -(50 - (since or 0)) :
        ]
        assert stored.complete is complete
    # Who is to keep more does not have it, and who is to keep less does not return it.
    assert not (await box.read("a", 46)).complete
    assert await box.offsets(history=History(size=2)) == [49, 50]
    assert await box.offsets(history=few, reverse=True) == [50, 49, 48]


async def test_tables_do_not_grow(boxes, other):
    """However many publish, and though they do not see what the others do meanwhile."""
    few = History(size=5, ttl=3600)

    async def publish(box: Box) -> None:
        for _ in range(40):
            await box.publish(*(("a", b"x") for _ in range(13)), ("b", b"x"), history=few)

    await asyncio.gather(*map(publish, boxes))
    counts = await other.fetch("SELECT count(*) FROM starcast_messages GROUP BY channel")
    assert max(count for (count,) in counts) <= 5 + 100
    assert await boxes[0].offsets(history=few) == [1036, 1037, 1038, 1039, 1040]


async def test_what_is_too_old(box, other):
    brief = History(size=100, ttl=0.1)
    await box.publish(("a", b"x"), ("a", b"y"))
    await box.publish(("b", b"x"), history=brief)
    await asyncio.sleep(0.15)
    assert await box.offsets(history=brief) == []
    assert not (await box.read("a", 1, history=brief)).complete
    assert (await box.read("a", 2, history=brief)).complete
    assert await box.offsets() == [1, 2]
    assert await box.publish(("a", b"z"), history=brief) == [3]
    assert await box.offsets(history=brief) == [3]
    assert not (await box.read("a", 1, history=brief)).complete
    assert (await box.read("a", 2, history=brief)).complete
    # Rows go when something is published, now and then.
    rows = "SELECT count(*) FROM starcast_messages WHERE channel = 'starcast:b'"
    assert await other.fetchval(rows) == 1
    await box.publish(*(("a", b"x") for _ in range(postgres_history.SWEEP_MESSAGES)))
    assert await other.fetchval(rows) == 0
    assert (await box.read("b", 1)).complete


async def test_a_position_is_kept_for_a_day_after_its_last_use(box, other):
    async def left(channel: str) -> float:
        return await other.fetchval(
            "SELECT extract(epoch FROM expires - now()) FROM starcast_positions WHERE channel = $1",
            f"starcast:{channel}",
        )

    async def become(channel: str, seconds: float) -> None:
        await other.execute(
            "UPDATE starcast_positions SET expires = now() + $2 * interval '1 second' "
            "WHERE channel = $1",
            f"starcast:{channel}",
            seconds,
        )

    day = 24 * 3600 + HISTORY.ttl
    old = (await box.read("a")).position
    assert day < await left("a") <= day + 3600
    await become("a", day - 10)
    assert (await box.read("a")).position == old
    assert day < await left("a")
    await become("a", day - 10)
    await box.publish(("a", b"x"))
    assert day < await left("a")
    await become("a", day + 10)
    await box.publish(("a", b"x"))
    await box.read("a")
    assert await left("a") <= day + 10
    await become("a", -1)
    await box.publish(*(("b", b"x") for _ in range(postgres_history.SWEEP_MESSAGES)))
    stored = await box.read("a")
    assert stored.position.epoch != old.epoch
    assert stored == (stored.position, [], True)
    assert await box.publish(("a", b"x")) == [1]


async def test_times_to_live_without_end(box):
    forever = History(ttl=1e300)
    assert await box.publish(("a", b"x", "key"), ("a", b"x", "key"), history=forever) == [1, 1]
    assert await box.offsets(history=forever) == [1]


# Epochs


async def test_tables_that_were_removed_while_they_are_used(boxes, other):
    one, two = boxes
    epochs = set()
    for drop in ("TABLE starcast_positions, starcast_messages", "TABLE starcast_positions"):
        assert await one.publish(("a", b"x")) == [1]
        epochs.add((await two.read()).position.epoch)
        await other.execute(f"DROP {drop}")
    stored = await two.read()
    assert stored.position.epoch not in epochs
    assert (stored.position.offset, stored.messages) == (0, [])
    assert await one.publish(("a", b"x")) == [1]
    await other.execute("DROP TABLE starcast_messages")
    assert await two.read("a", 0) == ((await one.read()).position, [], False)
    assert len(epochs) == 2


async def test_a_server_that_has_lost_what_is_known(box, other):
    """As after a failover to a standby server that was behind."""
    await box.publish(*[("a", b"x")] * 3)
    old = (await box.read()).position
    assert (await box.read(known=old)).position == old
    await other.execute('UPDATE starcast_positions SET "offset" = 2')
    (new,) = await box.connection.publish_kept([Kept("a", b"y", HISTORY, None, old)])
    assert (new.epoch == old.epoch, new.offset) == (False, 1)
    await other.execute('UPDATE starcast_positions SET "offset" = 0')
    newer = (await box.read(known=new)).position
    assert newer.epoch not in (new.epoch, old.epoch)
    assert newer.offset == 0
    # What is known of another epoch says nothing.
    kept = Kept("a", b"z", HISTORY, None, Position(old.epoch, 100))
    assert await box.connection.publish_kept([kept]) == [Position(newer.epoch, 1)]


# Idempotency keys


async def test_a_message_with_a_key_is_published_once(boxes):
    one, two = boxes
    assert await one.publish(("a", b"x"), ("a", b"y", "key"), ("a", b"z", "key")) == [1, 2, 2]
    assert await two.publish(("a", b"z", "key")) == [2]
    sent = [("a", b"z", "key"), ("b", b"b", "key"), ("a", b"w"), ("a", b"v", "k\0 \xe9")]
    assert await two.publish(*sent) == [2, 1, 3, 4]
    assert await one.publish(*sent) == [2, 1, 5, 4]
    assert [it.payload for it in (await one.read()).messages] == [b"x", b"y", b"w", b"v", b"w"]
    await until(lambda: len(one.got) == len(two.got) == 6)


async def test_keys_expire(box):
    brief = History(size=100, ttl=0.1)
    assert await box.publish(("a", b"x", "key"), history=brief) == [1]
    assert await box.publish(("a", b"x", "key"), history=brief) == [1]
    await asyncio.sleep(0.15)
    assert await box.publish(("a", b"x", "key")) == [2]
    assert await box.publish(("a", b"x", "key")) == [2]


async def test_a_key_is_known_when_its_message_is_gone(box):
    few = History(size=1, ttl=60)
    assert await box.publish(("a", b"x", "key"), history=few) == [1]
    await box.publish(*[("a", b"x")] * 200, history=few)
    assert await box.publish(("a", b"x", "key"), history=few) == [1]


async def test_keys_of_an_epoch_that_was_lost(box, other):
    await box.publish(("a", b"x"), ("a", b"y", "key"))
    old = (await box.read()).position
    await other.execute("""UPDATE starcast_positions SET "offset" = 1 WHERE key = ''""")
    new = (await box.read(known=old)).position
    for _ in range(2):
        kept = Kept("a", b"y", HISTORY, "key", new)
        assert await box.connection.publish_kept([kept]) == [Position(new.epoch, 1)]
    assert [it.payload for it in (await box.read()).messages] == [b"y"]


async def test_a_key_that_is_used_by_another_program_meanwhile(box, other):
    """It is not known when it is looked up, but when the message is to be kept."""
    assert await box.publish(("a", b"x")) == [1]
    row = "('starcast:a', convert_to('key', 'UTF8'), $1, 2, now() + interval '1 hour')"
    async with other.transaction():
        epoch = await other.fetchval(
            """UPDATE starcast_positions SET "offset" = 2 WHERE key = '' RETURNING epoch"""
        )
        publishing = asyncio.create_task(box.publish(("a", b"y", "key"), ("a", b"z")))
        await until_it_waits(other)
        await other.execute(f"INSERT INTO starcast_positions VALUES {row}", epoch)
    assert await publishing == [2, 3]
    assert await box.offsets() == [1, 3]


async def test_many_with_the_same_key_at_once(server):
    async with (
        Broadcast(server.url, name="both", history=HISTORY) as one,
        Broadcast(server.url, name="both", history=HISTORY) as two,
        one.subscribe("room") as subscriber,
    ):
        for number in range(20):
            ids = await asyncio.gather(
                *(hub.publish("room", "x", idempotency_key=f"{number}") for hub in (one, two) * 3)
            )
            assert len(set(ids)) == 1
            event = await subscriber.get()
            assert event.id == ids[0]
            assert event.position.offset == number + 1
        assert len((await two.history("room")).events) == 20


# Hubs


async def test_a_hub_with_a_history(server):
    async with (
        Broadcast(server.url, history={"room*": HISTORY, "*": None}) as hub,
        hub.subscribe("room") as subscriber,
        hub.subscribe("other") as elsewhere,
    ):
        large = "x" * 20_000
        ids = [await hub.publish("room", message) for message in ("0", b"1", large, large, "4")]
        assert await hub.publish("other", "text") is None
        assert (await elsewhere.get()).id is None
        events = [await subscriber.get() for _ in range(5)]
        assert [event.id for event in events] == ids
        past = await hub.history("room")
        assert (past.events, past.id, past.complete) == (events, ids[-1], True)
        assert (await hub.history("room", limit=2)).events == events[:2]
        assert (await hub.history("room", limit=2, reverse=True)).events == events[:2:-1]
        assert (await hub.history("room", since=ids[2])).events == events[3:]
        assert (await hub.history("room", since=ids[2], reverse=True)).events == events[1::-1]
        async with hub.subscribe("room", since=ids[1]) as late:
            assert late.resumed.recovered
            assert [await late.get() for _ in range(3)] == events[2:]
        async with hub.subscribe("room", since="unknown-1", history=2) as late:
            assert late.resumed.recovered is False
            assert [await late.get() for _ in range(2)] == events[3:]
            await hub.publish("room", "new")
            assert (await late.get()).message == "new"


async def test_hubs_that_publish_at_once(server):
    """Each subscriber gets the messages of a channel in the order of their offsets, and all."""
    count = 100
    async with contextlib.AsyncExitStack() as stack:
        made = [Broadcast(server.url, name="both", history=HISTORY) for _ in range(2)]
        hubs = [await stack.enter_async_context(hub) for hub in made]
        subscribers = [
            await stack.enter_async_context(hub.subscribe(name)) for hub in hubs for name in "ab"
        ]
        await asyncio.gather(
            *(hubs[0].publish(name, f"{n}") for n in range(count) for name in "ab"),
            *(hubs[1].publish(name, f"{n}") for n in range(count) for name in "ba"),
        )
        for subscriber in subscribers:
            events = [await subscriber.get() for _ in range(2 * count)]
            assert [event.position.offset for event in events] == [*range(1, 2 * count + 1)]
        assert all(hub.stats().backend.gaps == 0 for hub in hubs)


async def test_what_was_kept_before_the_server_was_killed(server):
    async with (
        Broadcast(server.url, history=HISTORY) as hub,
        hub.subscribe("room", gaps=True) as subscriber,
    ):
        old = await hub.publish("room", "old")
        server.kill()
        await until(lambda: hub.stats().backend.state == "reconnecting")
        server.start()
        await until(lambda: hub.stats().backend.state == "connected")
        new = await hub.publish("room", "new", idempotency_key="key")
        assert [(await subscriber.get()).id for _ in range(2)] == [old, new]
        assert new == old[:-1] + "2"


# Rights, settings and outages


async def test_first_use_by_several_at_once(server):
    async with contextlib.AsyncExitStack() as stack:
        made = [Broadcast(server.url, name="all", history=HISTORY) for _ in range(5)]
        hubs = [await stack.enter_async_context(hub) for hub in made]
        ids = await asyncio.gather(*(hub.publish("room", "x") for hub in hubs))
    assert sorted(id.partition("-")[2] for id in ids) == [*"12345"]
    assert len({id.partition("-")[0] for id in ids}) == 1


async def test_a_user_without_rights(server, other, caplog):
    await other.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    await other.execute(f"CREATE ROLE guest LOGIN PASSWORD '{PASSWORD}'")
    url = server.url.replace("//starcast:", "//guest:")
    async with Broadcast(url, history=HISTORY) as hub:
        with pytest.raises(
            BackendUnavailable, match="permission denied for schema public"
        ) as error:
            await hub.publish("room", "x")
        for word in ("GRANT CREATE ON SCHEMA", "postgres_tables.TABLES", "starcast_messages"):
            assert word in str(error.value)
        with pytest.raises(BackendUnavailable, match="permission denied for schema public"):
            async with hub.subscribe("room"):
                pass
        await other.execute(postgres_tables.TABLES)
        with pytest.raises(
            BackendUnavailable, match=r"permission denied for table .*; let the user"
        ):
            await hub.publish("room", "x")
        rights = str(error.value).partition(" and GRANT ")[2]
        await other.execute(f"GRANT {rights} TO guest")
        async with hub.subscribe("room") as subscriber:
            id = await hub.publish("room", "x", idempotency_key="key")
            assert (await subscriber.get()).id == id
    async with Broadcast(f"{url}?search_path=nowhere", history=HISTORY) as hub:
        with pytest.raises(
            BackendUnavailable, match=r"no schema has been selected.*; let the user"
        ):
            await hub.publish("room", "x")
    assert PASSWORD not in caplog.text
    await other.execute("DROP OWNED BY guest")
    await other.execute("DROP ROLE guest")


async def test_a_user_whose_transactions_are_of_another_kind(server, start):
    settings = {"default_transaction_isolation": "serializable", "synchronous_commit": "off"}
    boxes = [await start(server.url, server_settings=settings) for _ in range(2)]

    async def publish(box: Box) -> None:
        for _ in range(10):
            await box.publish(("a", b"x"))

    await asyncio.gather(*map(publish, boxes))
    assert await boxes[0].offsets() == [*range(1, 21)]


async def test_tables_that_are_not_ours(box, other):
    await box.publish(("a", b"x"))
    await other.execute("TRUNCATE starcast_messages")
    await other.execute("ALTER TABLE starcast_messages ADD COLUMN more text NOT NULL")
    with pytest.raises(BackendUnavailable, match='null value in column "more"'):
        await box.publish(("a", b"x"))
    await other.execute("ALTER TABLE starcast_messages DROP COLUMN payload CASCADE")
    with pytest.raises(BackendUnavailable, match="payload"):
        await box.read()


async def end_reader(other: Any) -> None:
    """End the session that has read."""
    found = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%LATERAL%'"
    assert await other.fetchval(
        f"{found} AND pid <> pg_backend_pid() AND query NOT LIKE '%located%'"
    )


async def test_the_session_that_reads_ends(box, other):
    await box.publish(("a", b"x"))
    assert await box.offsets() == [1]
    await end_reader(other)
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                assert await box.offsets() == [1]
                break
            except BackendUnavailable:  # if it has not been noticed yet
                await asyncio.sleep(0.01)
    async with other.transaction():
        await other.execute("LOCK TABLE starcast_positions")
        reading = asyncio.create_task(box.read())
        await until_it_waits(other)
        await end_reader(other)
        with pytest.raises(BackendUnavailable, match="PostgreSQL at 127"):
            await reading
    assert await box.offsets() == [1]
    assert box.lost == []


async def test_there_is_no_session_to_read_with(server, start, other):
    await other.execute(f"CREATE ROLE two LOGIN PASSWORD '{PASSWORD}' CONNECTION LIMIT 2")
    box = await start(server.url.replace("//starcast:", "//two:"))
    with pytest.raises(BackendUnavailable, match="too many connections for role") as error:
        await box.read()
    assert PASSWORD not in str(error.value)
    await other.execute("ALTER ROLE two CONNECTION LIMIT 3")
    await other.execute(postgres_tables.TABLES)
    await other.execute("GRANT ALL ON starcast_positions, starcast_messages TO two")
    assert (await box.read()).position.offset == 0
    await box.connection.close()  # or its session could not be removed
    await other.execute("DROP OWNED BY two")
    await other.execute("DROP ROLE two")


async def test_reading_takes_too_long(server, other):
    sessions: list[Any] = []

    async def open_session() -> Any:
        sessions.append(await asyncpg.connect(server.url, connection_class=Session))
        return sessions[-1]

    history = PostgresHistory("PostgreSQL", True, await open_session(), open_session, 0.2)
    await history.read("a", HISTORY, None, 0, False, None)
    async with other.transaction():
        await other.execute("LOCK TABLE starcast_positions")
        with pytest.raises(BackendUnavailable, match="PostgreSQL: no answer in time"):
            await history.read("a", HISTORY, None, 0, False, None)
    assert sessions[1].is_closed()
    await history.read("a", HISTORY, None, 0, False, None)
    await history.close()
    assert len(sessions) == 3
    history = PostgresHistory("PostgreSQL", True, sessions[0], asyncio.Event().wait, 0.05)
    with pytest.raises(BackendUnavailable, match="PostgreSQL: no answer in time"):
        await history.read("a", HISTORY, None, 0, False, None)
    sessions[0].terminate()


async def test_calls_end_with_the_connection(server, start, other):
    box = await start(server.url)
    await box.publish(("a", b"x"))
    cancelled = await start(server.url)
    async with other.transaction():
        await other.execute("LOCK TABLE starcast_positions")
        tasks = [
            asyncio.create_task(call)
            for call in (box.read(), box.read(), box.publish(("a", b"y")), cancelled.read())
        ]
        await until_it_waits(other)
        tasks[0].cancel()
        await box.connection.close()
        await cancelled.connection.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert all(isinstance(result, BackendUnavailable) for result in results[1:]), results
    for call in (box.read(), box.publish(("a", b"x"))):
        with pytest.raises(BackendUnavailable, match="not connected to PostgreSQL at 127"):
            await call


async def test_who_is_cancelled_takes_nobody_along(box, other):
    await box.publish(("a", b"x"))
    async with other.transaction():
        await other.execute("LOCK TABLE starcast_positions")
        tasks = [asyncio.create_task(box.read()) for _ in range(3)]
        await until_it_waits(other)
        tasks[0].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1] == results[2] == await box.read()


async def test_a_publish_that_is_not_answered_is_silence(box, other):
    """The hub must notice, though messages of others arrive."""
    await box.publish(("a", b"x"))
    async with other.transaction():
        await other.execute("LOCK TABLE starcast_positions")
        publishing = asyncio.create_task(box.publish(("a", b"y")))
        await until_it_waits(other)
        silent = box.connection.heard_at
        await other.execute("NOTIFY \"starcast:b\", 'x'")
    await publishing
    await until(lambda: len(box.got) == 3)
    assert box.connection.heard_at > silent
