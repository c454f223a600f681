"""The PostgreSQL backend, against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import itertools
import os
import ssl
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import asyncpg
import pytest
import trustme

from backends.front import SlowLine, front
from backends.postgres_server import PASSWORD, QUOTED, USER, PostgresServer
from starcast.backends.base import MessagesRefused
from starcast.backends.postgres import PostgresBackend
from starcast.backends.postgres_connection import PostgresConnection
from starcast.backends.postgres_messages import MAX_NOTIFY, MAX_PAYLOAD, PIECE_SIZE
from starcast.backends.postgres_url import Server
from starcast.exceptions import BackendUnavailable, ConfigurationError, PayloadTooLarge
from support import BUSY, DEADLINE, listening, starcast_tasks, until

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="session")
def one_server() -> Iterator[PostgresServer]:
    server = PostgresServer()
    server.start()
    yield server
    server.close()


@pytest.fixture
def server(one_server) -> Iterator[PostgresServer]:
    """A server that runs, whatever the test before did to it."""
    if not one_server.running:
        one_server.start()
    yield one_server
    one_server.thaw()


class Box:
    """A backend, its connection, and what that delivered and reported."""

    def __init__(self, url: str, **options: Any) -> None:
        self.backend = PostgresBackend(url, **options)
        self.got: list[tuple[str, bytes]] = []
        self.lost: list[Exception] = []
        self.connection: PostgresConnection | None = None

    async def start(self, *channels: str) -> PostgresConnection:
        self.connection = await self.backend.connect(
            lambda *message: self.got.append(message), self.lost.append
        )
        for channel in channels:
            await self.connection.subscribe(channel)
        return self.connection

    async def expect(self, *messages: tuple[str, bytes]) -> None:
        await until(lambda: len(self.got) >= len(messages))
        assert self.got == list(messages)


@pytest.fixture
async def box(server):
    box = Box(server.url)
    yield box
    if box.connection is not None:
        await box.connection.close()
    assert not starcast_tasks()


@pytest.fixture
async def other(server):
    """What another program has: a connection."""
    connection = await asyncpg.connect(server.url)
    yield connection
    connection.terminate()


async def notify(connection: Any, name: str, text: str) -> None:
    await connection.execute("SELECT pg_notify($1, $2)", name, text)


def sockets() -> int:
    """How many this process has open."""
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of the folder is closed by now
            found += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return found


async def ours(connection: Any) -> list[int]:
    """Process ids of the server for backends, the oldest connection first."""
    rows = await connection.fetch(
        "SELECT pid FROM pg_stat_activity WHERE usename = $1 AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend' ORDER BY backend_start",
        USER,
    )
    return [row["pid"] for row in rows]


# Messages

PAYLOADS = {
    "text": b"hello",
    "empty": b"",
    "unicode": "h\xe9 \N{GRINNING FACE}".encode(),
    "quotes": b"'; \"$1 %s \\ --",
    "newlines": b"a\r\nb\x01",
    "nul": b"a\0b",
    "nul alone": b"\0",
    "marker": b"\x10",
    "like a piece": b"\x100.1/1:aGVsbG8=",
    "binary": b"\xff" + bytes(range(256)),
    "one byte": b"\xff",
    "longest text": b"x" * MAX_NOTIFY,
    "too long a text": b"x" * (MAX_NOTIFY + 1),
    "longest text in bytes": "\xe9".encode() * (MAX_NOTIFY // 2),
    "cut in a character": "x\N{GRINNING FACE}".encode() * 5_000,
    "one piece": b"\xff" + bytes(PIECE_SIZE - 1),
    "two pieces": b"\xff" + bytes(PIECE_SIZE),
    "1 MiB text": b"0123456789abcdef" * 65_536,
    "1 MiB binary": b"\xff" + os.urandom(2**20 - 1),
    "the limit": b"\xff" + os.urandom(MAX_PAYLOAD - 1),
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
async def test_a_message_arrives_as_it_was(box, payload):
    connection = await box.start("room")
    await connection.publish([("room", payload), ("room", b"after")])
    await box.expect(("room", payload), ("room", b"after"))


async def test_a_later_transaction_of_a_batch_is_refused(box):
    """What was committed before counts as delivered, and nothing if it is the first one."""
    connection = await box.start("a", "b")
    bad = ("\0", b"4")  # no name of PostgreSQL has that
    one, two, three = (digit * 600_000 for digit in (b"1", b"2", b"3"))  # a transaction each
    with pytest.raises(MessagesRefused, match="invalid byte sequence") as raised:
        await connection.publish([("a", one), ("b", two), ("a", three), bad, ("a", b"5")])
    assert list(raised.value.reasons) == [2, 3, 4]
    with pytest.raises(BackendUnavailable, match="invalid byte sequence") as first:
        await connection.publish([bad, ("a", b"5")])
    assert not isinstance(first.value, MessagesRefused)
    await connection.publish([("a", b"6")])
    await box.expect(("a", one), ("b", two), ("a", b"6"))


async def test_a_larger_message_is_refused_and_nothing_is_sent(box):
    connection = await box.start("room")
    assert connection.max_payload == MAX_PAYLOAD == 16 * 2**20
    with pytest.raises(PayloadTooLarge, match="16777217 bytes"):
        await connection.publish([("room", b"before"), ("room", bytes(MAX_PAYLOAD + 1))])
    await connection.publish([("room", b"after")])
    await box.expect(("room", b"after"))


async def test_order_over_batches_channels_and_pieces(box):
    channels = ["a", "b", "c"]
    connection = await box.start(*channels)
    sent = [
        (channels[number % 3], b"%d" % number + bytes(20_000 if number % 50 == 0 else 0))
        for number in range(1_000)
    ]
    for batch in (sent[start : start + 64] for start in range(0, len(sent), 64)):
        await connection.publish(batch)
    await box.expect(*sent)


async def test_every_process_sees_the_same_order(server, box):
    second = Box(server.url)
    connections = [await box.start("room"), await second.start("room")]

    async def publish(connection, name):
        for number in range(100):
            await connection.publish([("room", b"%s%d" % (name, number))])

    await asyncio.gather(publish(connections[0], b"a"), publish(connections[1], b"b"))
    await until(lambda: len(box.got) == len(second.got) == 200)
    assert box.got == second.got
    for name in (b"a", b"b"):
        own = [payload for _, payload in box.got if payload.startswith(name)]
        assert own == [b"%s%d" % (name, number) for number in range(100)]
    await second.connection.close()


async def test_a_batch_of_nothing(box):
    connection = await box.start()
    await connection.publish([])


async def test_a_batch_that_is_too_much_for_one_transaction(box):
    connection = await box.start("room")
    sent = [("room", b"%d" % number + bytes(400_000)) for number in range(8)]
    await connection.publish(sent)
    await box.expect(*sent)


@pytest.mark.parametrize(
    "payload", [b"hi", b"", b"\xff\0", b"x" * 20_000], ids=["text", "empty", "bytes", "long"]
)
async def test_equal_messages_of_one_batch_all_arrive(box, payload):
    connection = await box.start("room", "other")
    sent = [("room", payload), ("other", payload)] * 20
    await connection.publish(sent)
    await box.expect(*sent)


async def test_what_arrives_together_is_delivered_in_one_turn(box):
    connection = await box.start("room")
    turns: set[int] = set()
    turn = itertools.count()
    await connection.close()

    def deliver(channel, payload):
        turns.add(now)

    connection = box.connection = await box.backend.connect(deliver, box.lost.append)
    await connection.subscribe("room")
    now = next(turn)
    publish = asyncio.create_task(connection.publish([("room", b"%d" % n) for n in range(50)]))
    while not (turns and publish.done()):
        await asyncio.sleep(0)
        now = next(turn)
    assert len(turns) == 1


# Channels

LONG = "\N{GRINNING FACE}" * 14  # with the prefix and "x" it has 66 bytes
ODD = [
    "*",
    ">",
    "a.b",
    "a b",
    " a",
    "A",
    "a",
    '"',
    '""',
    "'",
    "a'b",
    "%s",
    "%",
    "{}",
    "$1",
    "\\",
    "\\'",
    "starcast:a",
    "sha256:",
    "sha256:" + hashlib.sha256(f"starcast:{LONG}x".encode()).hexdigest()[:56],
    "room",
    'room"',
    'room"; NOTIFY "starcast:room"; --',
    "room\N{NO-BREAK SPACE}",
    "\xe9",
    "e\N{COMBINING ACUTE ACCENT}",
    "\N{GRINNING FACE}",
    LONG + "x",
    LONG + "y",
    "x" * 53,
    "x" * 54,
    "x" * 55,
    "x" * 56,
    "x" * 199,
    "x" * 200,
    "\N{GRINNING FACE}" * 200,
]


@pytest.mark.parametrize("prefix", ["starcast:", "", 'a"b', "p" * 80])
async def test_odd_channels_are_kept_apart(server, prefix):
    box = Box(server.url, prefix=prefix)
    connection = await box.start()
    await asyncio.gather(*map(connection.subscribe, ODD))
    sent = [(channel, f"to {channel}".encode()) for channel in ODD]
    await connection.publish(sent)
    await box.expect(*sent)
    for channel in ODD[::2]:
        await connection.unsubscribe(channel)
    box.got.clear()
    await connection.publish(sent)
    await box.expect(*sent[1::2])
    await connection.close()


@pytest.mark.parametrize("channel", ["room", "x" * 54, "x" * 55, "\xe9" * 100, "sha256:x"])
async def test_the_mapping_of_the_docstring_in_sql(box, other, channel):
    await box.start(channel)
    name = await other.fetchval(
        """
        SELECT CASE WHEN octet_length('starcast:' || $1) <= 63 THEN 'starcast:' || $1 ELSE
        'sha256:' || left(encode(sha256(convert_to('starcast:' || $1, 'UTF8')), 'hex'), 56) END
        """,
        channel,
    )
    await notify(other, name, "hi")
    await box.expect((channel, b"hi"))


async def test_two_prefixes_are_apart(server, box):
    second = Box(server.url, prefix="other:")
    one, two = await box.start("room", "x" * 100), await second.start("room", "x" * 100)
    await one.publish([("room", b"1"), ("x" * 100, b"2")])
    await two.publish([("room", b"3"), ("x" * 100, b"4")])
    await box.expect(("room", b"1"), ("x" * 100, b"2"))
    await second.expect(("room", b"3"), ("x" * 100, b"4"))
    await two.close()


async def test_what_is_left_is_not_heard_any_more(box):
    connection = await box.start("a", "b")
    await connection.unsubscribe("a")
    await connection.publish([("a", b"1"), ("b", b"2")])
    await box.expect(("b", b"2"))
    await connection.subscribe("a")
    await connection.publish([("a", b"3"), ("b", b"4")])
    await box.expect(("b", b"2"), ("a", b"3"), ("b", b"4"))
    await connection.unsubscribe("never subscribed to")


async def test_what_was_left_a_moment_ago_is_not_delivered(server, other):
    async with SlowLine(server.port) as line:
        box = Box(server.url.replace(str(server.port), str(line.port)) + "?sslmode=disable")
        connection = await box.start("room", "left")
        line.silent.update(range(line.made))
        await notify(other, "starcast:left", "1")
        await notify(other, "starcast:room", "2")
        leaving = asyncio.create_task(connection.unsubscribe("left"))
        await asyncio.sleep(0)
        line.silent.clear()
        await leaving
        await box.expect(("room", b"2"))
        await connection.close()


async def test_many_subscribe_at_once(box):
    connection = await box.start()
    channels = [str(number) for number in range(500)]
    await asyncio.gather(*map(connection.subscribe, channels))
    sent = [(channel, channel.encode()) for channel in channels]
    await connection.publish(sent)
    await box.expect(*sent)
    await asyncio.gather(*map(connection.unsubscribe, channels[1:]))
    await connection.publish(sent)
    await box.expect(*sent, sent[0])


# Other programs


async def test_another_program_reaches_us_as_text(box, other):
    await box.start("room")
    texts = ["hi", "h\xe9 \N{GRINNING FACE}", "", '{"a": 1}', "x" * 7_999]
    for text in texts:
        await notify(other, "starcast:room", text)
    await other.execute("""NOTIFY "starcast:room", 'it''s me'""")
    await other.execute("""NOTIFY "starcast:room" """)
    await box.expect(*(("room", text.encode()) for text in [*texts, "it's me", ""]))


@pytest.mark.parametrize(
    "text",
    [
        "\x10",
        "\x10text",
        "\x101.1/1",
        "\x101.1/1:not base64",
        "\x101.1/1:aGVsbG8",
        "\x101.1/1:h\xe9",
        "\x101.0/1:aGVsbG8=",
        "\x101.2/1:aGVsbG8=",
        "\x101.1/0:aGVsbG8=",
        "\x101.1/9999:aGVsbG8=",
        "\x10\N{ARABIC-INDIC DIGIT ONE}.1/1:aGVsbG8=",
        " \x101.1/1:aGVsbG8=",
        "\x10abc-01:hello",
        "\x10abc-\N{ARABIC-INDIC DIGIT ONE}:hello",
        "\x10abc-1",
        "\x101:hello",
    ],
)
async def test_text_that_only_looks_like_ours_arrives_as_text(box, other, text):
    await box.start("room")
    await notify(other, "starcast:room", text)
    await notify(other, "starcast:room", "after")
    await box.expect(("room", text.encode()), ("room", b"after"))


async def test_pieces_that_do_not_belong_together_are_dropped(box, other):
    await box.start("room", "side")
    pieces = [
        ("room", "1.2/2"),  # without a beginning
        ("room", "1.1/3"),  # without an end
        ("room", "2.1/2"),
        ("room", "1.2/2"),  # of another message
        ("side", "2.2/2"),  # of another channel
        ("room", "3.1/3"),
        ("room", "3.3/3"),  # one is missing
    ]
    for channel, head in pieces:
        await notify(other, f"starcast:{channel}", f"\x10{head}:aGVsbG8=")
    await notify(other, "starcast:room", "\x104.1/2:aGVs")
    await notify(other, "starcast:room", "\x104.2/2:bG8=")
    await notify(other, "starcast:room", "after")
    await box.expect(("room", b"hello"), ("room", b"after"))


async def test_text_travels_bare(box, other):
    heard: list[tuple[str, str]] = []
    await other.add_listener("starcast:room", lambda _, __, *message: heard.append(message))
    connection = await box.start()
    texts = [b"hi", b"", "\N{GRINNING FACE}".encode(), b"x" * MAX_NOTIFY, b" \x10", b"hi"]
    await connection.publish([("room", text) for text in texts])
    await until(lambda: len(heard) == len(texts))
    assert [text.encode() for _, text in heard[:-1]] == texts[:-1]
    assert heard[-1] == ("starcast:room", "\x105.1/1:aGk=")  # else it would have been dropped


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_a_database_of_another_encoding(server, other, encoding):
    name = f"starcast_{encoding.lower()}"
    await other.execute(f"CREATE DATABASE {name} ENCODING {encoding} TEMPLATE template0")
    box = Box(server.url_of(name))
    connection = await box.start()
    await asyncio.gather(*map(connection.subscribe, ODD))
    sent = [(channel, f"to {channel}".encode()) for channel in ODD]
    await connection.publish(sent)
    await box.expect(*sent)
    await connection.publish([("room", payload) for payload in list(PAYLOADS.values())[:-1]])
    await until(lambda: len(box.got) == len(sent) + len(PAYLOADS) - 1)
    assert [payload for _, payload in box.got[len(sent) :]] == list(PAYLOADS.values())[:-1]
    there = await asyncpg.connect(server.url_of(name))
    await notify(there, "starcast:room", "h\xe9")
    await until(lambda: box.got[-1] == ("room", "h\xe9".encode()))
    there.terminate()
    await connection.close()


# Ends


async def left_alone(other, before):
    """Nothing of a connection that was closed is left."""
    assert not starcast_tasks()
    await until(lambda: sockets() <= before)
    deadline = time.monotonic() + DEADLINE
    while await ours(other):
        assert time.monotonic() < deadline


async def test_after_the_stop_nothing_is_left_and_a_start_may_follow(box, other):
    before = sockets()
    for text in [b"1", b"2"]:
        connection = await box.start("room")
        assert len(await ours(other)) == 2
        await connection.publish([("room", text)])
        await until(lambda text=text: box.got[-1:] == [("room", text)])
        await connection.close()
        await connection.close()
        await left_alone(other, before)
    assert len(box.got) == 2
    assert box.lost == []


async def test_once_it_is_closed_calls_raise(box):
    connection = await box.start()
    await connection.close()
    for call in calls(connection):
        with pytest.raises(BackendUnavailable, match="not connected to PostgreSQL at 127"):
            await call


def calls(connection) -> list[Coroutine[Any, Any, None]]:
    return [
        connection.subscribe("x"),
        connection.unsubscribe("x"),
        connection.publish([("x", b"y")]),
    ]


async def test_the_end_of_the_server_is_told_once(server, box):
    connection = await box.start("room")
    server.kill()
    await until(lambda: box.lost)
    (error,) = box.lost
    assert isinstance(error, BackendUnavailable)
    assert f"127.0.0.1:{server.port}, database postgres" in str(error)
    assert PASSWORD not in str(error)
    assert QUOTED not in str(error)
    for call in calls(connection):
        with pytest.raises(BackendUnavailable):
            await call
    await connection.close()
    server.start()
    connection = await box.start("room")
    await connection.publish([("room", b"again")])
    await box.expect(("room", b"again"))
    await connection.close()
    assert len(box.lost) == 1


async def test_an_orderly_end_of_the_server_is_told_too(server, box):
    await box.start("room")
    await asyncio.to_thread(server.stop)
    await until(lambda: box.lost)
    await box.connection.close()
    assert len(box.lost) == 1


@pytest.mark.parametrize("which", [0, 1], ids=["listener", "publisher"])
async def test_the_end_of_one_connection_is_told_once(box, other, which):
    connection = await box.start("room")
    pid = (await ours(other))[which]
    await other.execute("SELECT pg_terminate_backend($1)", pid)
    await until(lambda: box.lost)
    await connection.close()
    await asyncio.sleep(0)
    assert len(box.lost) == 1
    connection = await box.start("room")
    await connection.publish([("room", b"again")])
    await box.expect(("room", b"again"))


async def pending(connection) -> list[asyncio.Task[None]]:
    """Calls that wait for a server that does not answer."""
    tasks = [
        asyncio.create_task(connection.publish([("room", b"x")])),
        asyncio.create_task(connection.subscribe("second")),
        asyncio.create_task(connection.subscribe("third")),
        asyncio.create_task(connection.unsubscribe("room")),
    ]
    for _ in range(10):
        await asyncio.sleep(0)
    tasks.append(asyncio.create_task(connection.subscribe("fourth")))
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    return tasks


async def all_raise(tasks) -> None:
    async with asyncio.timeout(DEADLINE):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [BackendUnavailable] * len(tasks)


async def test_the_end_of_the_server_ends_calls_that_wait(server, box):
    connection = await box.start("room")
    server.freeze()
    tasks = await pending(connection)
    assert box.lost == []
    server.kill()
    await all_raise(tasks)
    await until(lambda: box.lost)
    assert len(box.lost) == 1


async def test_stop_of_a_frozen_server(server, box):
    before = sockets()
    connection = await box.start("room")
    server.freeze()
    tasks = await pending(connection)
    started = time.monotonic()
    await connection.close()
    assert time.monotonic() - started < BUSY
    await all_raise(tasks)
    assert box.lost == []
    assert not starcast_tasks()
    await until(lambda: sockets() <= before)


async def test_stop_of_a_frozen_server_after_a_cancelled_publish(server, box):
    """asyncpg asks the server to interrupt it, through a connection that nobody answers either."""
    before, tasks = sockets(), asyncio.all_tasks()
    connection = await box.start("room")
    server.freeze()
    publish = asyncio.create_task(connection.publish([("room", b"x")]))
    for _ in range(10):
        await asyncio.sleep(0)
    publish.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publish
    again = asyncio.create_task(connection.publish([("room", b"x")]))
    for _ in range(10):
        await asyncio.sleep(0)
    await asyncio.wait_for(connection.close(), 0.5)
    await all_raise([again])
    await until(lambda: asyncio.all_tasks() == tasks and sockets() <= before)


# Cancellation


class CancelledAt:
    """Runs a coroutine, and cancels its task at one of the awaits that suspend it."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], at: int) -> None:
        self.coroutine = coroutine
        self.at = at

    def __await__(self):
        steps = self.coroutine.__await__()
        step = functools.partial(steps.send, None)
        for number in itertools.count():
            try:
                future = step()
            except StopIteration as end:
                return end.value
            if number == self.at:
                asyncio.current_task().cancel()
            try:
                yield future
            except BaseException as error:
                step = functools.partial(steps.throw, error)
            else:
                step = functools.partial(steps.send, None)


async def cancelled(coroutine: Coroutine[Any, Any, Any], at: int) -> bool:
    async def run() -> None:
        await CancelledAt(coroutine, at)

    task = asyncio.create_task(run())
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return task.cancelled()


@pytest.mark.parametrize("tls", ["disable", "prefer"])
async def test_start_cancelled_at_every_await(server, other, tls):
    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # asyncpg, cancelled in the one turn between the connection and its question about TLS,
        # leaves a future behind that nobody will look at: a line in the log, and no more.
        if "unexpected connection_lost() call" not in str(context.get("exception")):
            loop.default_exception_handler(context)

    asyncio.get_running_loop().set_exception_handler(handle)
    box = Box(f"{server.url}?sslmode={tls}")
    before = sockets()
    for at in itertools.count():
        was_cancelled = await cancelled(box.start(), at)
        if not was_cancelled:
            await box.connection.close()
        await left_alone(other, before)
        if not was_cancelled:
            break
    assert at > 5
    assert box.lost == []


SCENARIOS: dict[str, Callable[[PostgresConnection], Coroutine[Any, Any, None]]] = {
    "subscribe": lambda connection: connection.subscribe("second"),
    "unsubscribe": lambda connection: connection.unsubscribe("first"),
    "publish": lambda connection: connection.publish(
        [("third", b"1"), ("third", bytes(3_000_000))]
    ),
    "close": lambda connection: connection.close(),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_call_cancelled_at_every_await(box, other, scenario):
    before = sockets()
    for at in itertools.count():
        await box.start("first")
        was_cancelled = await cancelled(SCENARIOS[scenario](box.connection), at)
        if scenario != "close":
            # It works on.
            await asyncio.wait_for(box.connection.subscribe("room"), DEADLINE)
            await box.connection.publish([("room", b"%d" % at)])
            await until(lambda at=at: box.got[-1:] == [("room", b"%d" % at)])
            assert box.lost == []
        await box.connection.close()
        await left_alone(other, before)
        if not was_cancelled:
            break
    assert at > 0


async def test_a_subscribe_that_was_cancelled_and_comes_again(server, box):
    connection = await box.start()
    server.freeze()
    first = asyncio.create_task(connection.subscribe("room"))
    for _ in range(5):
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(connection.subscribe("room"))
    await asyncio.sleep(0)
    server.thaw()
    await second
    await connection.publish([("room", b"x")])
    await box.expect(("room", b"x"))


async def test_who_is_cancelled_takes_nobody_along(server, box):
    connection = await box.start()
    server.freeze()
    tasks = [asyncio.create_task(connection.subscribe(str(number))) for number in range(10)]
    for _ in range(5):
        await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    server.thaw()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError, type(None)] * 5
    sent = [(str(number), b"x") for number in range(1, 10, 2)]
    await connection.publish(sent)
    await box.expect(*sent)


async def test_its_task_cancelled_as_at_the_end_of_the_event_loop(server, box):
    connection = await box.start()
    server.freeze()
    tasks = [asyncio.create_task(connection.subscribe("a"))]
    for _ in range(5):
        await asyncio.sleep(0)
    tasks.append(asyncio.create_task(connection.subscribe("b")))
    await asyncio.sleep(0)
    for task in starcast_tasks() - set(tasks):
        task.cancel()
    await all_raise(tasks)
    await until(lambda: box.lost)
    assert not starcast_tasks()
    assert len(box.lost) == 1


# Failures of the start


async def refused(url: str, within: float = 10.0, **options: Any) -> str:
    """Return what the error says, after a look for passwords in everything that might be logged."""
    before, box = sockets(), Box(url, **options)
    started = time.monotonic()
    with pytest.raises(BackendUnavailable) as raised:
        await box.start()
    assert time.monotonic() - started < within
    text = "".join(traceback.format_exception(raised.value)) + repr(raised.value)
    for secret in (PASSWORD, QUOTED, "wrong", "s3cret"):
        assert secret not in text.replace("wrong_database", "")
    assert raised.value.__cause__ is None
    assert box.lost == []
    await until(lambda: sockets() <= before)
    assert not starcast_tasks()
    return str(raised.value)


async def test_a_wrong_password(server):
    said = await refused(server.url_of("postgres", "wrong"))
    where = f"no connection to PostgreSQL at 127.0.0.1:{server.port}, database postgres: "
    assert said == where + f'password authentication failed for user "{USER}"'


async def test_a_database_that_is_not_there(server):
    said = await refused(server.url_of("wrong_database"))
    assert 'database "wrong_database" does not exist' in said


async def test_nobody_listens_there(server):
    server.kill()
    assert f"127.0.0.1:{server.port}" in await refused(server.url)


async def test_an_unknown_host():
    url = f"postgresql://{USER}:{QUOTED}@nowhere.invalid:5433/db"
    said = await refused(url)
    assert "PostgreSQL at nowhere.invalid:5433, database db: " in said


async def test_tls_that_the_server_does_not_have(server):
    assert "rejected SSL upgrade" in await refused(server.url + "?sslmode=require")


async def test_tls_settings_that_make_no_sense(server):
    assert "`sslnegotiation` parameter must be one of" in await refused(
        server.url + "?sslnegotiation=maybe"
    )


@pytest.mark.parametrize("mode", ["verify-ca", "verify-full"])
async def test_row_27_a_certificate_that_nobody_knows(server, tmp_path, mode):
    # The server of the wheel is built without TLS, so that is in front of it.
    known, unknown = trustme.CA(), trustme.CA()
    known.cert_pem.write_to_path(tmp_path / "known.pem")
    unknown.cert_pem.write_to_path(tmp_path / "unknown.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    known.issue_cert("localhost").configure_cert(context)
    async with front(server.port, tls=context, asked=True) as port:
        url = server.url.replace(f"127.0.0.1:{server.port}", f"localhost:{port}")
        url += f"?sslmode={mode}&sslrootcert={tmp_path}"
        said = await refused(f"{url}/unknown.pem")
        assert said.startswith(f"no connection to PostgreSQL at localhost:{port}, ")
        assert "certificate verify failed" in said
        # It is the certificate: with the right authority all is well.
        secure = Box(f"{url}/known.pem")
        connection = await secure.start("room")
        await connection.publish([("room", b"hello")])
        await secure.expect(("room", b"hello"))
        await connection.close()


async def test_another_setting_that_makes_no_sense(server):
    url = f"postgresql://{USER}:{QUOTED}@/db?host=127.0.0.1&port=s3cret"
    assert await refused(url) == (
        "no connection to PostgreSQL at 127.0.0.1, database db: ValueError"
    )


async def test_a_server_that_does_not_answer(server):
    server.freeze()
    assert (await refused(server.url, connect_timeout=0.2)).endswith("no answer in time")


async def test_a_standby_server():
    standby = PostgresServer()
    (standby.data / "standby.signal").touch()
    try:
        standby.start()
        assert "primary" in await refused(standby.url)
    finally:
        standby.close()


@contextlib.asynccontextmanager
async def gate(server: PostgresServer, second: Callable[[], Awaitable[bool]]):
    """Yield the URL of a proxy that asks whether to admit its second connection."""
    numbers, tasks = itertools.count(1), set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                writer.write(data)
        writer.transport.abort()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        if next(numbers) == 2 and not await second():
            writer.transport.abort()
            return
        there, back = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            await asyncio.gather(copy(reader, back), copy(there, writer))
        finally:
            back.transport.abort()

    async with listening(accept) as port:
        yield server.url.replace(str(server.port), str(port)) + "?sslmode=disable"
        await asyncio.wait(tasks)


async def test_a_second_session_that_fails(server, other):
    before = sockets()

    async def refuse() -> bool:
        return False

    async with gate(server, refuse) as url:
        with pytest.raises(BackendUnavailable, match=r"database postgres: .*connection"):
            await Box(url).start()
    await left_alone(other, before)


async def test_a_first_session_that_is_gone_before_the_second_is_there(server, other):
    before = sockets()
    await left_alone(other, before)  # the server may still end the sessions of an earlier test

    async def end_the_first() -> bool:
        (pid,) = await ours(other)
        await other.execute("SELECT pg_terminate_backend($1)", pid)
        return True

    async with gate(server, end_the_first) as url:
        box = Box(url)
        with pytest.raises(BackendUnavailable, match="closed at once"):
            await box.start()
    await left_alone(other, before)
    assert box.lost == []


async def test_it_may_be_idle_as_long_as_it_likes(box, other):
    await other.execute(f"ALTER ROLE {USER} SET idle_session_timeout = '100ms'")
    try:
        connection = await box.start("room")
    finally:
        await other.execute(f"ALTER ROLE {USER} RESET idle_session_timeout")
    await asyncio.sleep(0.3)  # longer than the limit that the role had
    await connection.publish([("room", b"x")])
    await box.expect(("room", b"x"))
    assert box.lost == []


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "",
        "postgresql",
        "postgresql:/",
        "mysql://user:s3cret@host/db",
        "postgresql+asyncpg://user:s3cret@host/db",
        "POSTGRESQL://user:s3cret@host/db",
        "postgresql://user:s3@cret@host/db",
        "postgresql://user:s3/cret@host/db",
        "postgresql://user:s3?cret@host/db",
        "postgresql://user:s3#cret@host/db",
        "postgresql://user:s3[cret@host/db",
        "postgresql://user:s3]cret@host/db",
        "postgresql://user:s3?a=cret@host/db",
        "postgresql://user:s3cret",
        "postgresql://user:s3cret/db",
        "postgresql://user:s3cret@host:port/db",
        "postgresql://user:s3cret@host:5432:5432/db",
        "postgresql://user:123456",
        "postgresql://user:s3cret@host/db?s3cret",
        "postgresql://user:s3cret@host/db?=s3cret",
        "postgresql://user:s3cret@host/db?a=b&s3cret",
        "postgresql://user:s3cret@[::1/db",
        "postgresql://user:s3cret@host/db#s3cret",
        "postgresql://user:s3cret@host,,other/db",
        "postgresql://user:s3cret@" + "a" * 50_000 + ":x",
    ],
    ids=lambda url: url[:50],
)
def test_a_url_that_makes_no_sense(url):
    with pytest.raises(ConfigurationError, match="percent-encoded") as raised:
        PostgresBackend(url)
    assert "cret" not in "".join(traceback.format_exception(raised.value))
    assert "s3" not in str(raised.value)
    assert "123456" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("postgresql://user:s3cret@host:5433/db", "host:5433, database db"),
        ("postgres://user:s3:cret@host/db", "host, database db"),
        ("postgresql://user:s3%40cret@host/db?sslmode=require&a=b=c", "host, database db"),
        ("postgresql://user:s3cret@[::1]:5433/db", "[::1]:5433, database db"),
        ("postgresql://user:s3cret@a:1,b:2/db", "a:1,b:2, database db"),
        ("postgresql://user:s3cret@a,[::1],b/db", "a,[::1],b, database db"),
        ("postgresql://host", "host, database (default)"),
        ("postgresql://host/?a=b", "host, database (default)"),
        ("postgresql://user@/db?host=/run/pg&port=1", "/run/pg, database db"),
        ("postgresql://%2Frun%2Fpg/db", "%2Frun%2Fpg, database db"),
        ("postgresql://", "its default host, database (default)"),
        ("postgresql:///db", "its default host, database db"),
        ("postgresql:///db?", "its default host, database db"),
    ],
)
def test_a_url_is_named_without_its_password(url, where):
    assert Server(url, {}).where == f"PostgreSQL at {where}"


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), "5", None])
def test_a_timeout_that_makes_no_sense(seconds):
    with pytest.raises(ConfigurationError, match="connect_timeout must be a number above 0"):
        PostgresBackend("postgresql://", connect_timeout=seconds)


@pytest.mark.parametrize("prefix", ["\0", "a\nb", "\x85", "\ud800"])
def test_a_prefix_that_makes_no_sense(prefix):
    with pytest.raises(ConfigurationError, match="control characters"):
        PostgresBackend("postgresql://", prefix=prefix)


async def test_a_connection_says_when_it_was_heard(box):
    connection = await box.start("room")
    before = connection.heard_at
    await connection.publish([("room", b"x")])
    await box.expect(("room", b"x"))
    assert before < connection.heard_at <= time.monotonic()
