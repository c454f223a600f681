"""The NATS backend against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import socket
import ssl
import time
import types
from pathlib import Path

import nats
import pytest
import trustme

from backends.nats_server import Flood, NatsServer
from starcast import Broadcast
from starcast.backends.base import MessagesRefused, SubscriptionRevoked
from starcast.backends.nats import NatsBackend
from starcast.backends.nats_names import read
from starcast.exceptions import BackendUnavailable, ConfigurationError, PayloadTooLarge
from support import free_port, starcast_tasks, until

pytestmark = pytest.mark.anyio

ODD = ["*", ">", "a.*", "a.>", ".", "..", "a.b", "a b", "'\"", "\N{GRINNING FACE}" * 200, "%s"]
ODD += ["{}", "\\", "x" * 200, "%2A", "%2a", "a", "A", "-", "_", "~", "a 1", "room\u2028", "é"]
ODD += ["e\u0301", "$SYS.>", "_INBOX", "PUB x 1", "+OK", "%-0123456789abcdef"]


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request):
    """Both loops: their transports differ in what they raise and when."""
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@pytest.fixture(scope="module")
def server():
    server = NatsServer()
    server.start()
    yield server
    server.close()


@pytest.fixture
def own_server():
    """A server that a test may break."""
    servers = []

    def start(config="", scheme="nats"):
        server = NatsServer(config, scheme)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.close()


class Inbox:
    """Records what a backend's connection delivers and reports; one connection at a time."""

    def __init__(self):
        self.got = []
        self.lost = []

    def deliver(self, channel, payload):
        self.got.append((channel, payload))

    async def start(self, backend):
        self.connection = await backend.connect(self.deliver, self.lost.append)
        return self

    async def stop(self):
        await self.connection.close()


@pytest.fixture
async def connect(server, anyio_backend):
    """`connection, inbox = await connect()`, closed at the end."""
    inboxes = []

    async def make(url=None, **options):
        inbox = await Inbox().start(NatsBackend(url or server.url, **options))
        inboxes.append(inbox)
        return inbox.connection, inbox

    yield make
    for inbox in inboxes:
        await inbox.stop()


def sockets():
    """The TCP sockets that this process has open."""
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    tcp = {f"socket:[{row.split()[9]}]" for row in rows}
    names = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            names.add(os.readlink(f"/proc/self/fd/{fd}"))
    return names & tcp


def tasks():
    """The tasks of nats-py and of starcast."""
    names = ("Client.", "Subscription.")
    its = {t for t in asyncio.all_tasks() if t.get_coro().__qualname__.startswith(names)}
    return its | starcast_tasks()


@pytest.fixture(autouse=True)
async def nothing_left(anyio_backend):
    """Neither a task nor a socket, nor an object that complains when it is collected."""
    open_before = sockets()
    yield
    await until(lambda: not tasks() and sockets() <= open_before)
    gc.collect()


def chains(error):
    """The texts of an exception and of all that led to it."""
    while error is not None:
        yield f"{error!r} {error}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


async def refused(backend, *secrets):
    """Start it in vain; return what it says, which holds no secret."""
    inbox, start = Inbox(), time.monotonic()
    with pytest.raises(BackendUnavailable) as raised:
        await inbox.start(backend)
    assert time.monotonic() - start < 15
    texts = " ".join(chains(raised.value))
    assert not any(secret in texts for secret in secrets), texts
    assert "127.0.0.1" in str(raised.value) or ".invalid" in str(raised.value)
    assert inbox.lost == []
    return str(raised.value)


# What it is for


async def test_round_trip(connect):
    sender, _ = await connect()
    receiver, inbox = await connect()
    payloads = [b"text", b"", "\u00e4\N{GRINNING FACE}".encode(), b"\xff\x00\r\n+OK\r\nPUB a 1\r\n"]
    payloads += [b"x" * sender.max_payload]
    assert sender.max_payload == 1024 * 1024
    await receiver.subscribe("room")
    for payload in payloads:
        await sender.publish([("room", payload)])
    await until(lambda: len(inbox.got) == len(payloads))
    assert inbox.got == [("room", payload) for payload in payloads]


async def test_the_sender_gets_it_too(connect):
    connection, inbox = await connect()
    await connection.subscribe("room")
    await connection.publish([("room", b"1")])
    # The answer to the publish is behind the message itself.
    assert inbox.got == [("room", b"1")]
    await connection.publish([])


async def test_order_across_channels(connect):
    sender, _ = await connect()
    receiver, inbox = await connect()
    for channel in "abc":
        await receiver.subscribe(channel)
    messages = [("abc"[number % 3], b"%d" % number) for number in range(1000)]
    for start in range(0, 1000, 64):
        await sender.publish(messages[start : start + 64])
    await until(lambda: len(inbox.got) == 1000)
    assert inbox.got == messages


async def test_what_arrives_together_is_delivered_in_one_turn(server, connect):
    sender, _ = await connect()
    turns, turn = [], 0

    async def count():
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    receiver = await NatsBackend(server.url).connect(
        lambda channel, payload: turns.append(turn), lambda error: None
    )
    for channel in "ab":
        await receiver.subscribe(channel)
    counter = asyncio.create_task(count())
    try:
        await sender.publish([("ab"[number % 2], b"x") for number in range(500)])
        await until(lambda: len(turns) == 500)
        assert len(set(turns)) < 20
    finally:
        counter.cancel()
        await receiver.close()


async def test_channels_are_apart(connect):
    sender, _ = await connect()
    receivers = [await connect() for _ in ODD]
    for channel, (receiver, _) in zip(ODD, receivers, strict=True):
        await receiver.subscribe(channel)
    await sender.publish([(channel, channel.encode()) for channel in ODD])
    for channel, (receiver, inbox) in zip(ODD, receivers, strict=True):
        await receiver.publish([(channel, b"end")])
        await until(lambda inbox=inbox: len(inbox.got) >= 2)
        assert inbox.got == [(channel, channel.encode()), (channel, b"end")]


async def test_the_longest_prefix_and_channel(connect):
    connection, inbox = await connect(prefix="p" * 200)
    channel = "n" * 64 + ":" + "\N{GRINNING FACE}" * 200
    await connection.subscribe(channel)
    await connection.publish([(channel, b"x")])
    assert inbox.got == [(channel, b"x")]


async def test_prefixes_are_apart(connect):
    subscribed = []
    for prefix in ["starcast:", "", "a.b.", "starcast", "app/1,"]:
        connection, inbox = await connect(prefix=prefix)
        await connection.subscribe("room")
        subscribed.append((connection, inbox, prefix.encode()))
    for connection, _, prefix in subscribed:
        await connection.publish([("room", prefix)])
    for connection, inbox, prefix in subscribed:
        await connection.publish([("room", b"end")])
        assert inbox.got == [("room", prefix), ("room", b"end")]


async def test_unsubscribe(connect):
    connection, inbox = await connect()
    await connection.subscribe("a")
    await connection.subscribe("b")
    await connection.unsubscribe("a")
    await connection.unsubscribe("never")
    await connection.publish([("a", b"1"), ("b", b"2")])
    assert inbox.got == [("b", b"2")]
    await connection.subscribe("a")
    await connection.publish([("a", b"3")])
    assert inbox.got == [("b", b"2"), ("a", b"3")]


async def test_many_subscribe_at_once(connect):
    sender, _ = await connect()
    receiver, inbox = await connect()
    channels = [f"room {number}" for number in range(500)]

    async def subscribe_and_ask(channel):
        await receiver.subscribe(channel)
        await sender_lock.acquire()  # one publish at a time
        try:
            await sender.publish([(channel, b"x")])
        finally:
            sender_lock.release()

    sender_lock = asyncio.Lock()
    await asyncio.gather(*(subscribe_and_ask(channel) for channel in channels))
    await until(lambda: len(inbox.got) == len(channels))
    assert sorted(inbox.got) == sorted((channel, b"x") for channel in channels)
    await asyncio.gather(*(receiver.unsubscribe(channel) for channel in channels))


async def test_foreign_programs(server, connect):
    connection, inbox = await connect()
    await connection.subscribe("room 1.b")
    await connection.subscribe("lobby")
    client = await nats.connect(server.url)
    try:
        heard = await client.subscribe("starcast:lobby")
        await client.flush()
        await client.publish("starcast:room%201%2Eb", b"\xfe not text")
        await client.publish("starcast:lobby", b"hello", headers={"a": "b"}, reply="x.y")
        await client.publish("starcast:lobby.more", b"not for us")
        await client.publish("starcast:*", b"not for us")
        await until(lambda: len(inbox.got) == 2)
        assert inbox.got == [("room 1.b", b"\xfe not text"), ("lobby", b"hello")]
        assert (await heard.next_msg()).data == b"hello"
        await connection.publish([("lobby", b"answer")])
        assert (await heard.next_msg()).data == b"answer"
    finally:
        await client.close()


async def test_the_name_of_the_hub_is_a_token(server):
    """So that permissions and wildcards can tell hubs apart."""
    seen: list[tuple[str, bytes]] = []

    async def see(message):
        if "-probe-" not in message.subject:
            seen.append((message.subject, message.data))

    client = await nats.connect(server.url)
    staff = Broadcast(backend=NatsBackend(server.url, prefix="starcast."), name="staff")
    try:
        for subject in ("starcast.staff.*", "starcast:default.*"):
            await client.subscribe(subject, cb=see)
        await client.flush()
        async with Broadcast(server.url) as hub, staff, staff.subscribe("a.b:c") as subscriber:
            await staff.publish("a.b:c", "1")
            await client.publish("starcast.staff.a%2Eb%3Ac", b"2")
            assert [(await anext(subscriber)).message for _ in range(2)] == ["1", "2"]
            await hub.publish("room 1", "3")
            await until(lambda: len(seen) == 3)
        own = "starcast.staff.a%2Eb%3Ac"
        assert sorted(seen) == [(own, b"1"), (own, b"2"), ("starcast:default.room%201", b"3")]
    finally:
        await client.close()


async def test_a_user_with_the_rights_of_one_hub(own_server):
    server = own_server(
        """authorization: {users: [{user: u, password: p, permissions: {
            publish: ["app.*", "app.public.*"], subscribe: ["app.*", "app.public.*"]}}]}"""
    )
    url = server.url.replace("//", "//u:p@")
    public = Broadcast(backend=NatsBackend(url, prefix="app."), name="public")
    async with public, public.subscribe("news") as subscriber:
        await public.publish("news", "1")
        assert (await anext(subscriber)).message == "1"
        assert await public.healthy()
    backend = NatsBackend(url, prefix="app.")
    inbox = await Inbox().start(backend)
    with pytest.raises(BackendUnavailable, match=r"app\.staff\.news"):
        await inbox.connection.subscribe("staff:news")
    with pytest.raises(BackendUnavailable, match=r"app\.staff\.news"):
        await inbox.connection.publish([("staff:news", b"x")])
    assert inbox.got == []
    await inbox.stop()


async def test_answers_that_nobody_waits_for(server, connect):
    connection, inbox = await connect()
    client = await nats.connect(server.url)
    try:
        heard = await client.subscribe(">")
        await client.flush()
        await connection.publish([])
        subject = (await heard.next_msg()).subject
        assert subject.startswith("starcast:%-")
        for payload in [b"", b"0", b"1000000", b"\xff"]:
            await client.publish(subject, payload)
        await client.flush()
    finally:
        await client.close()
    await connection.publish([("x", b"y")])
    assert inbox.lost == []


# Limits


async def test_a_payload_that_is_too_large(own_server):
    server = own_server("max_payload: 1000")
    backend = NatsBackend(server.url)
    inbox = await Inbox().start(backend)
    assert inbox.connection.max_payload == 1000
    await inbox.connection.subscribe("room")
    with pytest.raises(PayloadTooLarge, match=r"1001 bytes .* 1000 .* 127\.0\.0\.1"):
        await inbox.connection.publish([("room", b"fits"), ("room", b"x" * 1001)])
    await inbox.connection.publish([("room", b"x" * 1000)])
    assert inbox.got == [("room", b"x" * 1000)]
    assert inbox.lost == []
    await inbox.stop()


async def test_permissions(own_server):
    server = own_server(
        """authorization: {users: [{user: u, password: p, permissions: {
            publish: {deny: "starcast:mute"}, subscribe: {deny: "starcast:deaf"}}}]}"""
    )
    backend = NatsBackend(server.url.replace("//", "//u:p@"))
    inbox = await Inbox().start(backend)
    results = await asyncio.gather(
        *(inbox.connection.subscribe(channel) for channel in ["a", "deaf", "b"]),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None), BackendUnavailable, type(None)]
    assert 'Subscription to "starcast:deaf"' in str(results[1])
    with pytest.raises(BackendUnavailable, match='Publish to "starcast:mute"'):
        await inbox.connection.publish([("mute", b"x"), ("a", b"1")])
    await inbox.connection.publish([("b", b"2")])
    assert inbox.got == [("a", b"1"), ("b", b"2")]
    assert inbox.lost == []
    await inbox.stop()


async def test_subjects_that_differ_only_in_case(own_server):
    """nats-py itself tells of a refusal in lower case."""
    server = own_server(
        """authorization: {users: [{user: u, password: p, permissions: {
            publish: {deny: ["A\\"\\\\room", "none"]}}}]}"""
    )
    backend = NatsBackend(server.url.replace("//", "//u:p@"), prefix='A"\\')
    inbox = await Inbox().start(backend)
    await inbox.connection.subscribe("Room")
    with pytest.raises(MessagesRefused) as raised:
        await inbox.connection.publish([(name, b"x") for name in ("Room", "room", "Room", "room")])
    assert raised.value.reasons.keys() == {1, 3}
    assert all('to "A\\"\\\\room"' in why for why in raised.value.reasons.values())
    assert inbox.got == [("Room", b"x")] * 2
    await inbox.stop()


@contextlib.asynccontextmanager
async def revoking(port):
    """Yield the port of a proxy that tells a client twice that its subscription is refused."""
    tasks = set()

    async def relay(reader, writer, replies=None):
        while data := await reader.read(2**16):
            if found := re.search(rb"SUB (starcast:room) +(\d+)\r\n", data):
                said = '-ERR \'Permissions Violation for Subscription to "%s" (sid "%s")\'\r\n'
                replies.write(2 * (said % (found[1].decode(), found[2].decode())).encode())
            writer.write(data)
        writer.transport.abort()

    async def accept(reader, writer):
        tasks.add(asyncio.current_task())
        there, back = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(OSError):
            await asyncio.gather(relay(reader, back, replies=writer), relay(there, writer))

    proxy = await asyncio.start_server(accept, "127.0.0.1", 0)
    yield proxy.sockets[0].getsockname()[1]
    proxy.close()
    await asyncio.wait(tasks)


async def test_a_subscription_that_is_taken_away_as_it_is_granted(server):
    async with revoking(server.port) as port:
        inbox = await Inbox().start(NatsBackend(f"nats://127.0.0.1:{port}"))
        with pytest.raises(BackendUnavailable, match="taken away at once"):
            await inbox.connection.subscribe("room")
        revoked = [(type(error), error.channel) for error in inbox.lost]
        assert revoked == [(SubscriptionRevoked, "room")]
        await inbox.connection.subscribe("another")
        await inbox.connection.publish([("room", b"1"), ("another", b"2")])
        assert inbox.got == [("another", b"2")]
        await inbox.stop()


async def test_a_password_that_is_changed_ends_the_connection(own_server):
    config = "authorization: {{users: [{{user: u, password: {}}}]}}"
    server = own_server(config.format("p"))
    backend = NatsBackend(server.url.replace("//", "//u:p@"))
    inbox = await Inbox().start(backend)
    server.reload(config.format("q"))
    await until(lambda: inbox.lost)
    assert "authorization failed" in str(inbox.lost[0])
    await inbox.stop()


async def test_no_permission_for_answers(own_server):
    server = own_server(
        """authorization: {users: [{user: u, password: p,
            permissions: {publish: "a", subscribe: "a"}}]}"""
    )
    text = await refused(NatsBackend(server.url.replace("//", "//u:p@"), connect_timeout=0.5))
    assert "Permissions Violation" in text


async def test_a_slow_loop_loses_nothing_that_the_server_has_sent(server, connect):
    """nats-py drops messages when a queue of its own is full. There is none."""
    connection, inbox = await connect()
    await connection.subscribe("room")
    flood = Flood(server.port, b"starcast:room", b"x" * 1000, 20_000)
    flood.start()
    await until(lambda: inbox.got)
    time.sleep(0.3)  # noqa: ASYNC251  # the loop is to be busy
    await until(lambda: len(inbox.got) == 20_000)
    flood.join()
    assert inbox.lost == []


async def test_a_loop_so_slow_that_the_server_gives_up(own_server):
    server = own_server('max_payload: 65536\nmax_pending: 65536\nwrite_deadline: "200ms"')
    backend = NatsBackend(server.url)
    inbox = await Inbox().start(backend)
    await inbox.connection.subscribe("room")
    flood = Flood(server.port, b"starcast:room", b"x" * 60_000, 2_000)
    flood.start()
    flood.join()  # meanwhile the loop reads nothing
    await until(lambda: inbox.lost)
    assert len(inbox.got) < 2_000
    assert len(inbox.lost) == 1
    await inbox.stop()


# Outages


async def pending_calls(inbox):
    """A call of each kind, waiting for a broker that does not answer."""
    calls = [
        inbox.connection.subscribe("c"),
        inbox.connection.unsubscribe("a"),
        inbox.connection.publish([("a", b"x")]),
    ]
    tasks = [asyncio.ensure_future(call) for call in calls]
    for _ in range(3):  # each task runs until it waits for an answer
        await asyncio.sleep(0)
    return tasks


async def all_raise(tasks, within):
    start = time.monotonic()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, BackendUnavailable), result
    assert time.monotonic() - start < within


async def test_killed_while_calls_wait(own_server):
    server = own_server()
    backend = NatsBackend(server.url)
    inbox = await Inbox().start(backend)
    await inbox.connection.subscribe("a")
    server.freeze()
    tasks = await pending_calls(inbox)
    server.kill()
    for _ in range(1000):  # nats-py has something to send in every turn, also when it closes
        with contextlib.suppress(BackendUnavailable):  # it is closed
            tasks.append(inbox.connection.publish([("a", b"x")]))
        await asyncio.sleep(0)
    await until(lambda: inbox.lost)
    await all_raise(tasks, 10)
    assert len(inbox.lost) == 1
    assert isinstance(inbox.lost[0], BackendUnavailable)
    assert str(server.port) in str(inbox.lost[0])
    for call, argument in [
        (inbox.connection.subscribe, "d"),
        (inbox.connection.unsubscribe, "a"),
        (inbox.connection.publish, [("a", b"")]),
    ]:
        with pytest.raises(BackendUnavailable, match="not connected"):
            await call(argument)
    await inbox.stop()
    assert len(inbox.lost) == 1


async def test_killed_under_load(own_server):
    """Whatever nats-py is doing just then, the end is noticed at once and nothing is logged."""
    for round in range(15):
        server = own_server()
        backend = NatsBackend(server.url)
        inbox = await Inbox().start(backend)
        await inbox.connection.subscribe("a")

        async def load(inbox=inbox):
            while True:
                await inbox.connection.publish([("a", b"x" * 20_000)] * 20)

        async def more(inbox=inbox):
            for number in range(10**9):
                await inbox.connection.subscribe(str(number))

        tasks = [asyncio.create_task(load()), asyncio.create_task(more())]
        await until(lambda inbox=inbox, round=round: len(inbox.got) > 50 + 37 * round)
        server.kill()
        await until(lambda inbox=inbox: inbox.lost)
        await all_raise(tasks, 10)
        await inbox.stop()
        assert len(inbox.lost) == 1
        gc.collect()


async def test_shut_down_and_started_again(own_server):
    server = own_server()
    backend = NatsBackend(server.url)
    inbox = await Inbox().start(backend)
    for restart in range(1, 4):
        await inbox.connection.subscribe("a")
        await inbox.connection.publish([("a", b"x")])
        assert len(inbox.got) == restart
        server.stop()
        await until(lambda restart=restart: len(inbox.lost) == restart)
        await inbox.stop()
        await refused(backend)
        server.start()
        await inbox.start(backend)
    await inbox.stop()
    await inbox.stop()
    assert len(inbox.lost) == 3


async def test_frozen(own_server):
    server = own_server()
    backend = NatsBackend(server.url)
    inbox = await Inbox().start(backend)
    await inbox.connection.subscribe("a")
    server.freeze()
    tasks = await pending_calls(inbox)
    cancelled = tasks.pop()
    cancelled.cancel()
    start = time.monotonic()
    await inbox.stop()
    assert time.monotonic() - start < 4
    await all_raise(tasks, 4)
    assert cancelled.cancelled()
    server.thaw()
    assert inbox.lost == []


async def test_frozen_with_a_full_socket(own_server):
    server = own_server()
    inbox = await Inbox().start(NatsBackend(server.url))
    server.freeze()
    publishing = inbox.connection.publish([("a", b"x" * 1_000_000)] * 20)
    subscribing = asyncio.create_task(inbox.connection.subscribe("a"))
    await asyncio.sleep(0)
    start = time.monotonic()
    await inbox.stop()
    assert time.monotonic() - start < 4
    await all_raise([publishing, subscribing], 4)


async def test_closed_while_it_ends_by_itself(own_server):
    server = own_server()
    for turns in range(30):
        inbox = await Inbox().start(NatsBackend(server.url))
        server.kill()
        for _ in range(turns):
            await asyncio.sleep(0)
        reported = len(inbox.lost)
        await inbox.stop()
        assert len(inbox.lost) == reported
        assert not tasks()
        server.start()


# Connections that do not come about


async def test_wrong_credentials(own_server):
    server = own_server('authorization: {user: "me@x", password: "p:/@,%"}')
    right = server.url.replace("//", "//me%40x:p%3A%2F%40%2C%25@")
    await refused(NatsBackend(server.url))
    text = await refused(NatsBackend(right.replace("%25", "SECRET")), "SECRET", "me%40x", "me@x")
    assert "authorization violation" in text.lower()
    backend = NatsBackend(right)
    inbox = await Inbox().start(backend)
    await inbox.stop()
    assert "p:/@" not in backend.address


@pytest.mark.parametrize("by", ["url", "option"])
async def test_a_token(own_server, by):
    server = own_server('authorization: {token: "s3cr%t"}')
    await refused(NatsBackend(server.url.replace("//", "//SECRET@")), "SECRET")
    if by == "url":
        backend = NatsBackend(server.url.replace("//", "//s3cr%25t@"))
    else:
        backend = NatsBackend(server.url, token="s3cr%t")
    inbox = await Inbox().start(backend)
    await inbox.stop()


async def test_refused_and_unknown():
    port = free_port()
    text = await refused(NatsBackend(f"nats://u:SECRET@127.0.0.1:{port}"), "SECRET")
    assert str(port) in text
    await refused(NatsBackend("nats://u:SECRET@broker.invalid"), "SECRET")
    await refused(NatsBackend(f"nats://SECRET@{'x' * 70}.invalid"), "SECRET")
    with pytest.raises(BackendUnavailable):
        await Inbox().start(NatsBackend("nats://none"))


async def test_several_servers(server, connect):
    url = f"nats://127.0.0.1:{free_port()},127.0.0.1:{server.port}"
    for _ in range(5):  # in any order
        connection, inbox = await connect(url)
        await connection.subscribe("a")
        await connection.publish([("a", b"x")])
        assert inbox.got == [("a", b"x")]


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        (b"", "empty response"),
        (b"SSH-2.0\r\n", "expecting INFO"),
        (b"INFO {\r\n", "json parse error"),
        (b"INFO\r\n", ""),
        (b"INFO {}\r\n", "unexpected EOF"),
    ],
)
async def test_something_else_listens_there(says, expected):
    async def answer(reader, writer):
        writer.write(says)
        if says:
            await reader.readline()
        writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    assert expected in await refused(NatsBackend(f"nats://127.0.0.1:{port}"))
    listener.close()
    await listener.wait_closed()


async def test_nobody_answers_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        backend = NatsBackend(f"nats://127.0.0.1:{port}", connect_timeout=0.5)
        assert "no answer in time" in await refused(backend)


# TLS


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def tls_server(own_server, authority, tmp_path):
    issued = authority.issue_cert("127.0.0.1")
    (tmp_path / "key.pem").write_bytes(issued.private_key_pem.bytes())
    (tmp_path / "cert.pem").write_bytes(issued.cert_chain_pems[0].bytes())
    files = f'cert_file: "{tmp_path}/cert.pem", key_file: "{tmp_path}/key.pem"'
    return own_server(f"tls: {{{files}}}\nauthorization: {{user: u, password: p}}", "tls")


@pytest.fixture
def trusting(authority):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.mark.parametrize("scheme", ["nats", "tls"])
async def test_tls(tls_server, trusting, scheme, caplog):
    url = tls_server.url.replace("tls://", f"{scheme}://u:p@")
    backend = NatsBackend(url, tls=trusting)
    inbox = await Inbox().start(backend)
    await inbox.connection.subscribe("a")
    await inbox.connection.publish([("a", b"x" * 1_000_000)])
    assert inbox.got == [("a", b"x" * 1_000_000)]
    await inbox.stop()
    await inbox.start(backend)
    tls_server.freeze()
    start = time.monotonic()
    await inbox.stop()
    assert time.monotonic() - start < 4
    tls_server.thaw()
    await inbox.start(backend)
    tls_server.stop()
    await until(lambda: inbox.lost)
    await inbox.stop()
    assert len(inbox.lost) == 1
    assert not caplog.records


async def test_a_certificate_of_nobody_we_know(tls_server):
    text = await refused(NatsBackend(tls_server.url.replace("//", "//u:SECRET@")), "SECRET")
    assert "certificate verify failed" in text


async def test_tls_that_the_server_does_not_have(own_server):
    server = own_server()
    text = await refused(NatsBackend(server.url.replace("nats://", "tls://u:SECRET@")), "SECRET")
    assert "secure connection not available" in text
    assert "SECRET" not in server.log


# Cancellation


@types.coroutine
def cancelled_at(number, when, coroutine, cancelled):
    """Run a coroutine in this task, and cancel the task when it suspends for the nth time.

    `cancelled` gets what `Task.cancel` returns.
    """
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    send, argument = coroutine.send, None
    for step in range(10**6):
        try:
            future = send(argument)
        except StopIteration as stop:
            return stop.value
        if step == number:
            if when == "done" and future is not None:
                # With the result there, but the task not resumed.
                future.add_done_callback(lambda _: cancelled.append(task.cancel()))
            else:
                loop.call_soon(lambda: cancelled.append(task.cancel()))
        try:
            send, argument = coroutine.send, (yield future)
        except BaseException as error:
            send, argument = coroutine.throw, error


async def starting(backend, inbox):
    await inbox.stop()
    await inbox.start(backend)


async def subscribing(backend, inbox):
    await inbox.connection.subscribe("b")


async def unsubscribing(backend, inbox):
    await inbox.connection.unsubscribe("a")


async def publishing(backend, inbox):
    await inbox.connection.publish([("c", b"1"), ("c", b"2")])


async def stopping(backend, inbox):
    await inbox.stop()


@pytest.mark.parametrize("when", ["waiting", "done"])
@pytest.mark.parametrize("call", [starting, subscribing, unsubscribing, publishing, stopping])
async def test_cancelled_at_every_await(server, call, when, monkeypatch):
    open_before = sockets()
    for number in range(1000):
        backend = NatsBackend(server.url)
        inbox = await Inbox().start(backend)
        await inbox.connection.subscribe("a")

        cancelled = []

        async def run(backend=backend, inbox=inbox, number=number, cancelled=cancelled):
            await cancelled_at(number, when, call(backend, inbox), cancelled)

        task = asyncio.create_task(run())
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled() == (cancelled == [True]), "swallowed"
        if call in (starting, stopping):
            if task.cancelled():
                await until(lambda: sockets() <= open_before)
                assert not tasks()
            await inbox.stop()
            await inbox.start(backend)
        await inbox.connection.publish([("b", b"b")])
        await inbox.connection.subscribe("d")
        await inbox.connection.publish([("d", b"d")])
        assert inbox.got[-1] == ("d", b"d")
        assert (("b", b"b") in inbox.got) == (call is subscribing and not task.cancelled())
        await inbox.stop()
        assert inbox.lost == []
        if not task.cancelled():
            break
    assert 1 <= number < 1000


# What makes no sense


@pytest.mark.parametrize(
    "url",
    [
        "nats:", "nats://", "nats://:4222", "redis://h", "h:4222", "nats://h:SECRET", "nats://h/x",
        "nats://u:SEC/RET@h", "nats://u:SEC#RET@h", "nats://u:SEC?RET@h", "nats://h:99999",
        "nats://a,", "nats://u:SECRET@a,v:SECRET@b", "nats://u:SECRET@a,tls://b", "nats://[::1",
    ],
)  # fmt: skip
def test_urls_that_make_no_sense(url):
    with pytest.raises(ConfigurationError) as raised:
        NatsBackend(url)
    assert not any(secret in " ".join(chains(raised.value)) for secret in ["SEC", "RET"])


def test_urls():
    assert read("nats://h") == (["nats://h:4222"], {})
    assert read("tls://[::1]:1/") == (["tls://[::1]:1"], {})
    assert read("nats://:p@h") == (["nats://h:4222"], {"user": "", "password": "p"})
    several = read("nats://u:p@a,nats://u:p@b:1,c")
    login = {"user": "u", "password": "p"}
    assert several == (["nats://a:4222", "nats://b:1", "nats://c:4222"], login)


@pytest.mark.parametrize(
    "prefix", ["*", "a.>", ">", "a b", ".", "a..", ".a", "a\n", "a\r\nPUB x 1", "ä", "p" * 201]
)
def test_prefixes_that_make_no_sense(prefix):
    with pytest.raises(ConfigurationError, match="prefix"):
        NatsBackend("nats://h", prefix=prefix)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), "5", None])
def test_a_timeout_that_makes_no_sense(seconds):
    with pytest.raises(ConfigurationError, match="connect_timeout must be a number above 0"):
        NatsBackend("nats://h", connect_timeout=seconds)


def test_options_that_are_not_the_users():
    with pytest.raises(ConfigurationError, match="allow_reconnect, error_cb"):
        NatsBackend("nats://h", error_cb=print, allow_reconnect=True, name="x")
