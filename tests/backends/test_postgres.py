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
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import asyncpg
import pytest
import trustme

from backends.front import front
from backends.postgres_server import PASSWORD, QUOTED, USER, PostgresServer
from starcast.backends import postgres
from starcast.backends.base import MessagesRefused
from starcast.backends.postgres import MAX_NOTIFY, MAX_PAYLOAD, PIECE_SIZE, PostgresBackend
from starcast.exceptions import BackendUnavailable, ConfigurationError, PayloadTooLarge
from support import DEADLINE, starcast_tasks, until

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
    """A backend, what it delivered, and how often it was lost."""

    def __init__(self, url: str, **options: Any) -> None:
        self.backend = PostgresBackend(url, **options)
        self.got: list[tuple[str, bytes]] = []
        self.lost: list[Exception] = []

    async def start(self, *channels: str) -> PostgresBackend:
        await self.backend.start(lambda *message: self.got.append(message), self.lost.append)
        for channel in channels:
            await self.backend.subscribe(channel)
        return self.backend

    async def expect(self, *messages: tuple[str, bytes]) -> None:
        await until(lambda: len(self.got) >= len(messages))
        assert self.got == list(messages)


@pytest.fixture
async def box(server):
    box = Box(server.url)
    yield box
    await box.backend.stop()
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
    backend = await box.start("room")
    await backend.publish([("room", payload), ("room", b"after")])
    await box.expect(("room", payload), ("room", b"after"))


async def test_a_later_transaction_of_a_batch_is_refused(box, monkeypatch):
    """What was committed before counts as delivered, and nothing if it is the first one."""
    monkeypatch.setattr(postgres, "MAX_BATCH", 2)
    backend = await box.start("a", "b")
    bad = ("\0", b"4")  # no name of PostgreSQL has that
    with pytest.raises(MessagesRefused, match="invalid byte sequence") as raised:
        await backend.publish([("a", b"1"), ("b", b"2"), ("a", b"3"), bad, ("a", b"5")])
    assert list(raised.value.reasons) == [2, 3, 4]
    with pytest.raises(BackendUnavailable, match="invalid byte sequence") as first:
        await backend.publish([bad, ("a", b"5")])
    assert not isinstance(first.value, MessagesRefused)
    await backend.publish([("a", b"6")])
    await box.expect(("a", b"1"), ("b", b"2"), ("a", b"6"))


async def test_a_larger_message_is_refused_and_nothing_is_sent(box):
    backend = await box.start("room")
    assert backend.max_payload == MAX_PAYLOAD == 16 * 2**20
    with pytest.raises(PayloadTooLarge, match="16777217 bytes"):
        await backend.publish([("room", b"before"), ("room", bytes(MAX_PAYLOAD + 1))])
    await backend.publish([("room", b"after")])
    await box.expect(("room", b"after"))


async def test_order_over_batches_channels_and_pieces(box):
    channels = ["a", "b", "c"]
    backend = await box.start(*channels)
    sent = [
        (channels[number % 3], b"%d" % number + bytes(20_000 if number % 50 == 0 else 0))
        for number in range(1_000)
    ]
    for batch in (sent[start : start + 64] for start in range(0, len(sent), 64)):
        await backend.publish(batch)
    await box.expect(*sent)


async def test_every_process_sees_the_same_order(server, box):
    second = Box(server.url)
    backends = [await box.start("room"), await second.start("room")]

    async def publish(backend, name):
        for number in range(100):
            await backend.publish([("room", b"%s%d" % (name, number))])

    await asyncio.gather(publish(backends[0], b"a"), publish(backends[1], b"b"))
    await until(lambda: len(box.got) == len(second.got) == 200)
    assert box.got == second.got
    for name in (b"a", b"b"):
        own = [payload for _, payload in box.got if payload.startswith(name)]
        assert own == [b"%s%d" % (name, number) for number in range(100)]
    await second.backend.stop()


async def test_a_batch_of_nothing(box):
    backend = await box.start()
    await backend.publish([])


async def test_a_batch_that_is_too_much_for_one_transaction(box):
    backend = await box.start("room")
    sent = [("room", b"%d" % number + bytes(400_000)) for number in range(8)]
    await backend.publish(sent)
    await box.expect(*sent)


@pytest.mark.parametrize(
    "payload", [b"hi", b"", b"\xff\0", b"x" * 20_000], ids=["text", "empty", "bytes", "long"]
)
async def test_equal_messages_of_one_batch_all_arrive(box, payload):
    backend = await box.start("room", "other")
    sent = [("room", payload), ("other", payload)] * 20
    await backend.publish(sent)
    await box.expect(*sent)


async def test_what_arrives_together_is_delivered_in_one_turn(box):
    backend = await box.start("room")
    turns: set[int] = set()
    turn = itertools.count()
    await backend.stop()

    def deliver(channel, payload):
        turns.add(now)

    await backend.start(deliver, box.lost.append)
    await backend.subscribe("room")
    now = next(turn)
    publish = asyncio.create_task(backend.publish([("room", b"%d" % n) for n in range(50)]))
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
    backend = await box.start()
    await asyncio.gather(*map(backend.subscribe, ODD))
    sent = [(channel, f"to {channel}".encode()) for channel in ODD]
    await backend.publish(sent)
    await box.expect(*sent)
    for channel in ODD[::2]:
        await backend.unsubscribe(channel)
    box.got.clear()
    await backend.publish(sent)
    await box.expect(*sent[1::2])
    await backend.stop()


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
    await two.stop()


async def test_what_is_left_is_not_heard_any_more(box):
    backend = await box.start("a", "b")
    await backend.unsubscribe("a")
    await backend.publish([("a", b"1"), ("b", b"2")])
    await box.expect(("b", b"2"))
    await backend.subscribe("a")
    await backend.publish([("a", b"3"), ("b", b"4")])
    await box.expect(("b", b"2"), ("a", b"3"), ("b", b"4"))
    await backend.unsubscribe("never subscribed to")


async def test_what_was_left_a_moment_ago_is_not_delivered(box, other):
    backend = await box.start("room")
    await backend._listener.execute('LISTEN "starcast:left"')  # as if it was still to be undone
    await notify(other, "starcast:left", "1")
    await notify(other, "starcast:room", "2")
    await box.expect(("room", b"2"))


async def test_many_subscribe_at_once(box):
    backend = await box.start()
    channels = [str(number) for number in range(500)]
    await asyncio.gather(*map(backend.subscribe, channels))
    sent = [(channel, channel.encode()) for channel in channels]
    await backend.publish(sent)
    await box.expect(*sent)
    await asyncio.gather(*map(backend.unsubscribe, channels[1:]))
    await backend.publish(sent)
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
    assert len(box.backend._pieces) <= 1
    await notify(other, "starcast:room", "\x104.1/2:aGVs")
    await notify(other, "starcast:room", "\x104.2/2:bG8=")
    await notify(other, "starcast:room", "after")
    await box.expect(("room", b"hello"), ("room", b"after"))
    assert box.backend._pieces == []


async def test_text_travels_bare(box, other):
    heard: list[tuple[str, str]] = []
    await other.add_listener("starcast:room", lambda _, __, *message: heard.append(message))
    backend = await box.start()
    texts = [b"hi", b"", "\N{GRINNING FACE}".encode(), b"x" * MAX_NOTIFY, b" \x10", b"hi"]
    await backend.publish([("room", text) for text in texts])
    await until(lambda: len(heard) == len(texts))
    assert [text.encode() for _, text in heard[:-1]] == texts[:-1]
    assert heard[-1] == ("starcast:room", "\x105.1/1:aGk=")  # else it would have been dropped


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_a_database_of_another_encoding(server, other, encoding):
    name = f"starcast_{encoding.lower()}"
    await other.execute(f"CREATE DATABASE {name} ENCODING {encoding} TEMPLATE template0")
    box = Box(server.url_of(name))
    backend = await box.start()
    await asyncio.gather(*map(backend.subscribe, ODD))
    sent = [(channel, f"to {channel}".encode()) for channel in ODD]
    await backend.publish(sent)
    await box.expect(*sent)
    await backend.publish([("room", payload) for payload in list(PAYLOADS.values())[:-1]])
    await until(lambda: len(box.got) == len(sent) + len(PAYLOADS) - 1)
    assert [payload for _, payload in box.got[len(sent) :]] == list(PAYLOADS.values())[:-1]
    there = await asyncpg.connect(server.url_of(name))
    await notify(there, "starcast:room", "h\xe9")
    await until(lambda: box.got[-1] == ("room", "h\xe9".encode()))
    there.terminate()
    await backend.stop()


# Ends


async def left_alone(backend, other, before):
    """Nothing of a backend that was stopped is left."""
    assert not starcast_tasks()
    await until(lambda: sockets() <= before)
    deadline = time.monotonic() + DEADLINE
    while await ours(other):
        assert time.monotonic() < deadline
    assert backend._listener is backend._publisher is backend._lost is None
    assert (backend._channels, backend._statements, backend._pieces) == ({}, [], [])


async def test_after_the_stop_nothing_is_left_and_a_start_may_follow(box, other):
    before = sockets()
    await box.backend.stop()
    for text in [b"1", b"2"]:
        backend = await box.start("room")
        assert len(await ours(other)) == 2
        await backend.publish([("room", text)])
        await until(lambda text=text: box.got[-1:] == [("room", text)])
        await backend.stop()
        await backend.stop()
        await left_alone(backend, other, before)
    assert len(box.got) == 2
    assert box.lost == []


async def test_while_it_is_stopped_calls_raise(box):
    for _ in range(2):
        for call in calls(box.backend):
            with pytest.raises(BackendUnavailable, match="not connected to PostgreSQL at 127"):
                await call
        backend = await box.start()
        await backend.stop()


def calls(backend) -> list[Coroutine[Any, Any, None]]:
    return [backend.subscribe("x"), backend.unsubscribe("x"), backend.publish([("x", b"y")])]


async def test_the_end_of_the_server_is_told_once(server, box):
    backend = await box.start("room")
    server.kill()
    await until(lambda: box.lost)
    (error,) = box.lost
    assert isinstance(error, BackendUnavailable)
    assert f"127.0.0.1:{server.port}, database postgres" in str(error)
    assert PASSWORD not in str(error)
    assert QUOTED not in str(error)
    for call in calls(backend):
        with pytest.raises(BackendUnavailable):
            await call
    await backend.stop()
    server.start()
    await box.start("room")
    await backend.publish([("room", b"again")])
    await box.expect(("room", b"again"))
    await backend.stop()
    assert len(box.lost) == 1


async def test_an_orderly_end_of_the_server_is_told_too(server, box):
    await box.start("room")
    await asyncio.to_thread(server.stop)
    await until(lambda: box.lost)
    await box.backend.stop()
    assert len(box.lost) == 1


@pytest.mark.parametrize("which", [0, 1], ids=["publisher", "listener"])
async def test_the_end_of_one_connection_is_told_once(box, other, which):
    backend = await box.start("room")
    pid = (await ours(other))[which]
    assert pid == [backend._publisher, backend._listener][which].get_server_pid()
    await other.execute("SELECT pg_terminate_backend($1)", pid)
    await until(lambda: box.lost)
    await backend.stop()
    await asyncio.sleep(0)
    assert len(box.lost) == 1
    await box.start("room")
    await backend.publish([("room", b"again")])
    await box.expect(("room", b"again"))


async def pending(backend) -> list[asyncio.Task[None]]:
    """Calls that wait for a server that does not answer."""
    tasks = [
        asyncio.create_task(backend.publish([("room", b"x")])),
        asyncio.create_task(backend.subscribe("second")),
        asyncio.create_task(backend.subscribe("third")),
        asyncio.create_task(backend.unsubscribe("room")),
    ]
    await until(lambda: backend._worker is not None and not backend._worker.done())
    for _ in range(10):
        await asyncio.sleep(0)
    tasks.append(asyncio.create_task(backend.subscribe("fourth")))
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    return tasks


async def all_raise(tasks) -> None:
    async with asyncio.timeout(DEADLINE):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [BackendUnavailable] * len(tasks)


async def test_the_end_of_the_server_ends_calls_that_wait(server, box):
    backend = await box.start("room")
    server.freeze()
    tasks = await pending(backend)
    assert box.lost == []
    server.kill()
    await all_raise(tasks)
    await until(lambda: box.lost)
    assert len(box.lost) == 1


async def test_stop_of_a_frozen_server(server, box):
    before = sockets()
    backend = await box.start("room")
    server.freeze()
    tasks = await pending(backend)
    started = time.monotonic()
    await backend.stop()
    assert time.monotonic() - started < 4
    await all_raise(tasks)
    assert box.lost == []
    assert not starcast_tasks()
    await until(lambda: sockets() <= before)


async def test_stop_of_a_frozen_server_after_a_cancelled_publish(server, box):
    """asyncpg asks the server to interrupt it, through a connection that nobody answers either."""
    before, tasks = sockets(), asyncio.all_tasks()
    backend = await box.start("room")
    server.freeze()
    publish = asyncio.create_task(backend.publish([("room", b"x")]))
    for _ in range(10):
        await asyncio.sleep(0)
    publish.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publish
    again = asyncio.create_task(backend.publish([("room", b"x")]))
    for _ in range(10):
        await asyncio.sleep(0)
    await asyncio.wait_for(backend.stop(), 0.5)
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
        start = box.backend.start(lambda *message: box.got.append(message), box.lost.append)
        was_cancelled = await cancelled(start, at)
        if not was_cancelled:
            await box.backend.stop()
        await left_alone(box.backend, other, before)
        if not was_cancelled:
            break
    assert at > 5
    assert box.lost == []


SCENARIOS: dict[str, Callable[[PostgresBackend], Coroutine[Any, Any, None]]] = {
    "subscribe": lambda backend: backend.subscribe("second"),
    "unsubscribe": lambda backend: backend.unsubscribe("first"),
    "publish": lambda backend: backend.publish([("third", b"1"), ("third", bytes(3_000_000))]),
    "stop": lambda backend: backend.stop(),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_call_cancelled_at_every_await(box, other, scenario):
    before = sockets()
    for at in itertools.count():
        await box.start("first")
        was_cancelled = await cancelled(SCENARIOS[scenario](box.backend), at)
        if scenario != "stop":
            # It works on.
            await asyncio.wait_for(box.backend.subscribe("room"), DEADLINE)
            await box.backend.publish([("second", b"not heard"), ("room", b"%d" % at)])
            await until(lambda at=at: box.got[-1:] == [("room", b"%d" % at)])
            if was_cancelled:
                assert ("second", b"not heard") not in box.got
                assert "second" not in box.backend._channels
            assert box.lost == []
            if scenario == "subscribe" and was_cancelled:
                assert "starcast:second" not in await listening(box.backend)
        await box.backend.stop()
        await left_alone(box.backend, other, before)
        if not was_cancelled:
            break
    assert at > 0


async def listening(backend) -> list[str]:
    await until(lambda: backend._worker is None or backend._worker.done())
    rows = await backend._listener.fetch("SELECT pg_listening_channels() AS name")
    return [row["name"] for row in rows]


async def test_a_subscribe_that_was_cancelled_and_comes_again(server, box):
    backend = await box.start()
    server.freeze()
    first = asyncio.create_task(backend.subscribe("room"))
    for _ in range(5):
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(backend.subscribe("room"))
    await asyncio.sleep(0)
    server.thaw()
    await second
    assert await listening(backend) == ["starcast:room"]
    await backend.publish([("room", b"x")])
    await box.expect(("room", b"x"))


async def test_who_is_cancelled_takes_nobody_along(server, box):
    backend = await box.start()
    server.freeze()
    tasks = [asyncio.create_task(backend.subscribe(str(number))) for number in range(10)]
    for _ in range(5):
        await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    server.thaw()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError, type(None)] * 5
    await backend.publish([(str(number), b"x") for number in range(10)])
    await box.expect(*((str(number), b"x") for number in range(1, 10, 2)))


async def test_its_task_cancelled_as_at_the_end_of_the_event_loop(server, box):
    backend = await box.start()
    server.freeze()
    tasks = [asyncio.create_task(backend.subscribe("a"))]
    for _ in range(5):
        await asyncio.sleep(0)
    tasks.append(asyncio.create_task(backend.subscribe("b")))
    await asyncio.sleep(0)
    backend._worker.cancel()
    await all_raise(tasks)
    await until(lambda: box.lost)
    assert not starcast_tasks()
    assert len(box.lost) == 1


# Failures of the start


async def refused(url: str, within: float = 10.0) -> str:
    """Return what the error says, after a look for passwords in everything that might be logged."""
    before, box = sockets(), Box(url)
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
    await box.backend.stop()
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
    said = await refused(url, within=postgres.CONNECT_TIMEOUT + 5)
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
        backend = await secure.start("room")
        await backend.publish([("room", b"hello")])
        await secure.expect(("room", b"hello"))
        await backend.stop()


async def test_another_setting_that_makes_no_sense(server):
    url = f"postgresql://{USER}:{QUOTED}@/db?host=127.0.0.1&port=s3cret"
    assert await refused(url) == (
        "no connection to PostgreSQL at 127.0.0.1, database db: ValueError"
    )


async def test_a_server_that_does_not_answer(server, monkeypatch):
    monkeypatch.setattr(postgres, "CONNECT_TIMEOUT", 0.2)
    server.freeze()
    assert (await refused(server.url)).endswith("no answer in time")


async def test_a_standby_server():
    standby = PostgresServer()
    (standby.data / "standby.signal").touch()
    try:
        standby.start()
        assert "primary" in await refused(standby.url)
    finally:
        standby.close()


async def test_a_second_connection_that_fails(server, box, other, monkeypatch):
    before = sockets()
    await only_the_first_connects(box.backend, monkeypatch, OSError("no more"))
    with pytest.raises(BackendUnavailable, match=r"postgres: no more$"):
        await box.start()
    await left_alone(box.backend, other, before)


async def test_a_first_connection_that_is_gone_before_the_second_is_there(box, other, monkeypatch):
    before = sockets()
    connect = box.backend._connect

    async def slowly(deliver):
        if box.backend._publisher is not None:
            pid = box.backend._publisher.get_server_pid()
            await other.execute("SELECT pg_terminate_backend($1)", pid)
            await until(box.backend._publisher.is_closed)
        return await connect(deliver)

    monkeypatch.setattr(box.backend, "_connect", slowly)
    with pytest.raises(BackendUnavailable, match="closed at once"):
        await box.start()
    await left_alone(box.backend, other, before)
    assert box.lost == []


async def only_the_first_connects(backend, monkeypatch, error):
    connect = backend._connect

    async def once(deliver):
        if backend._publisher is not None:
            raise error
        return await connect(deliver)

    monkeypatch.setattr(backend, "_connect", once)


async def test_a_server_that_refuses_a_statement(box, monkeypatch):
    """The error says what the server said, and the connections live."""
    backend = await box.start("room")
    await backend._listener.execute("BEGIN")
    await backend._publisher.execute("BEGIN")
    for connection in (backend._listener, backend._publisher):
        with pytest.raises(asyncpg.PostgresError):
            await connection.execute("SELECT 1/0")
    for call in calls(backend):
        with pytest.raises(BackendUnavailable, match="current transaction is aborted"):
            await call
    await backend._listener.execute("ROLLBACK")
    await backend._publisher.execute("ROLLBACK")
    await backend.publish([("room", b"x")])
    await box.expect(("room", b"x"))
    assert box.lost == []


async def test_it_may_be_idle_as_long_as_it_likes(box, other):
    await other.execute(f"ALTER ROLE {USER} SET idle_session_timeout = '1h'")
    backend = await box.start()
    await other.execute(f"ALTER ROLE {USER} RESET idle_session_timeout")
    for connection in (backend._listener, backend._publisher):
        assert await connection.fetchval("SHOW idle_session_timeout") == "0"


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
    assert PostgresBackend(url)._where == f"PostgreSQL at {where}"


@pytest.mark.parametrize("prefix", ["\0", "a\nb", "\x85", "\ud800"])
def test_a_prefix_that_makes_no_sense(prefix):
    with pytest.raises(ConfigurationError, match="control characters"):
        PostgresBackend("postgresql://", prefix=prefix)
