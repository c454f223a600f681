"""The NATS backend against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import ssl
import time
import types
import weakref
from pathlib import Path

import nats
import pytest
import trustme

from backends.front import SlowLine, front
from backends.nats_server import Flood, NatsServer
from starcast import Broadcast
from starcast.backends.base import LoginRefused, MessagesRefused, SubscriptionRevoked
from starcast.backends.nats import NatsBackend
from starcast.backends.nats_names import parse_url
from starcast.exceptions import BackendUnavailable, ConfigurationError, PayloadTooLarge
from starcast.testing import Inbox
from support import BUSY, free_port, listening, starcast_tasks, until

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


@pytest.fixture
async def connect(server, anyio_backend):
    """`connection, inbox = await connect()`, closed at the end."""
    connections = []

    async def make(url=None, **options):
        backend, inbox = NatsBackend(url or server.url, **options), Inbox()
        connections.append(await backend.connect(inbox.deliver, inbox.lost))
        return connections[-1], inbox

    yield make
    for connection in connections:
        await connection.close()


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
    """Connect in vain; return what the error says, which holds no secret."""
    inbox, start = Inbox(), time.monotonic()
    with pytest.raises(BackendUnavailable) as raised:
        await backend.connect(inbox.deliver, inbox.lost)
    assert time.monotonic() - start < 15
    texts = " ".join(chains(raised.value))
    assert not any(secret in texts for secret in secrets), texts
    assert "127.0.0.1" in str(raised.value) or ".invalid" in str(raised.value)
    assert inbox.errors == []
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


async def test_unsubscribe(server, connect):
    connection, inbox = await connect(name="leaves")
    await connection.subscribe("a")
    await connection.subscribe("b")
    await connection.unsubscribe("a")
    await connection.unsubscribe("never")
    await connection.publish([("a", b"1"), ("b", b"2")])
    assert inbox.got == [("b", b"2")]
    await connection.subscribe("a")
    await connection.publish([("a", b"3")])
    assert inbox.got == [("b", b"2"), ("a", b"3")]
    answers, *subjects = server.subjects("leaves")
    assert answers.startswith("starcast:%-")
    assert subjects == ["starcast:a", "starcast:b"]


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


async def test_a_user_with_the_rights_of_one_hub(own_server, connect):
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
    connection, inbox = await connect(url, prefix="app.")
    with pytest.raises(BackendUnavailable, match=r"app\.staff\.news"):
        await connection.subscribe("staff:news")
    with pytest.raises(BackendUnavailable, match=r"app\.staff\.news"):
        await connection.publish([("staff:news", b"x")])
    assert inbox.got == []


async def test_answers_that_nobody_waits_for(server, connect):
    connection, _ = await connect(name="answered")
    (answers,) = server.subjects("answered")
    client = await nats.connect(server.url)
    try:
        for payload in [b"", b"0", b"1000000", b"\xff"]:
            await client.publish(answers, payload)
        await client.flush()
    finally:
        await client.close()
    await connection.publish([("x", b"y")])


async def test_all_channels_of_a_hub(connect):
    sender, _ = await connect(prefix="a.")
    receiver, inbox = await connect(prefix="a.")
    await receiver.subscribe_all("staff")
    channels = [*(f"staff:{name}" for name in ODD), "staff:a:b"]
    await sender.publish([("other:a", b"x"), ("staff", b"x"), *((name, b"x") for name in channels)])
    assert await inbox.until(len(channels)) == [(name, b"x") for name in channels]


async def test_a_part_of_a_message_is_a_sign_of_life(server, connect):
    sender, _ = await connect()
    async with SlowLine(server.port) as line:
        receiver, inbox = await connect(f"nats://127.0.0.1:{line.port}")
        await receiver.subscribe("room")
        assert receiver.heard_at == 0  # confirmations do not count
        line.rate = 200_000
        await sender.publish([("room", b"x" * 50_000)])
        heard = {0}
        while not inbox.got:
            heard.add(receiver.heard_at)
            await asyncio.sleep(0.001)
        assert len(heard) > 5
        assert receiver.heard_at >= max(heard)
        await receiver.close()


# Limits


async def test_a_payload_that_is_too_large(own_server, connect):
    server = own_server("max_payload: 1000")
    connection, inbox = await connect(server.url)
    assert connection.max_payload == 1000
    await connection.subscribe("room")
    with pytest.raises(PayloadTooLarge, match=r"1001 bytes .* 1000 .* 127\.0\.0\.1"):
        await connection.publish([("room", b"fits"), ("room", b"x" * 1001)])
    await connection.publish([("room", b"x" * 1000)])
    assert inbox.got == [("room", b"x" * 1000)]
    assert inbox.errors == []


async def test_permissions(own_server, connect):
    server = own_server(
        """authorization: {users: [{user: u, password: p, permissions: {
            publish: {deny: "starcast:mute"}, subscribe: {deny: "starcast:deaf"}}}]}"""
    )
    connection, inbox = await connect(server.url.replace("//", "//u:p@"))
    results = await asyncio.gather(
        *(connection.subscribe(channel) for channel in ["a", "deaf", "b"]), return_exceptions=True
    )
    assert [type(result) for result in results] == [type(None), BackendUnavailable, type(None)]
    assert 'Subscription to "starcast:deaf"' in str(results[1])
    with pytest.raises(BackendUnavailable, match='Publish to "starcast:mute"'):
        await connection.publish([("mute", b"x"), ("a", b"1")])
    await connection.publish([("b", b"2")])
    assert inbox.got == [("a", b"1"), ("b", b"2")]
    assert inbox.errors == []


async def test_too_many_subscriptions(own_server, connect):
    """The server does not say which one it refuses."""
    server = own_server("max_subscriptions: 2")  # one of them is for answers
    connection, inbox = await connect(server.url)
    await connection.subscribe("a")
    with pytest.raises(BackendUnavailable, match="maximum subscriptions exceeded"):
        await connection.subscribe("b")
    await connection.publish([("a", b"x")])
    await connection.unsubscribe("a")
    await connection.subscribe("b")
    assert inbox.got == [("a", b"x")]
    assert inbox.errors == []


async def test_permissions_that_are_taken_away(own_server, connect):
    config = """authorization: {{users: [{{user: u, password: p, permissions: {{
        publish: ">", subscribe: {{allow: "app.*", deny: [{}]}}}}}}]}}"""
    server = own_server(config.format('"none"'))
    connection, inbox = await connect(server.url.replace("//", "//u:p@"), prefix="app.")
    await connection.subscribe("a")
    await connection.subscribe("b")
    server.reload(config.format('"app.a"'))
    await until(lambda: inbox.errors)
    assert [(type(error), error.channel) for error in inbox.errors] == [(SubscriptionRevoked, "a")]
    await connection.publish([("a", b"x"), ("b", b"y")])
    assert inbox.got == [("b", b"y")]
    server.reload(config.format('"app.*"'))  # that for answers, too
    await until(lambda: not isinstance(inbox.errors[-1], SubscriptionRevoked))
    assert 'Permissions Violation for Subscription to "app.%-' in str(inbox.errors[-1])
    with pytest.raises(BackendUnavailable, match="not connected"):
        await connection.subscribe("a")


async def test_subjects_that_differ_only_in_case(own_server, connect):
    """nats-py itself tells of a refusal in lower case."""
    server = own_server(
        """authorization: {users: [{user: u, password: p, permissions: {
            publish: {deny: ["A\\"\\\\room", "none"]}}}]}"""
    )
    connection, inbox = await connect(server.url.replace("//", "//u:p@"), prefix='A"\\')
    await connection.subscribe("Room")
    with pytest.raises(MessagesRefused) as raised:
        await connection.publish([(name, b"x") for name in ("Room", "room", "Room", "room")])
    assert raised.value.reasons.keys() == {1, 3}
    assert all('to "A\\"\\\\room"' in why for why in raised.value.reasons.values())
    assert inbox.got == [("Room", b"x")] * 2


async def test_a_subscription_that_is_taken_away_as_it_is_granted(server, connect):
    said = b""
    # nats-py numbers them: 1 is the one for answers.
    revoked = b"""-ERR 'Permissions Violation for Subscription to "starcast:room" (sid "2")'\r\n"""
    async with front(server.port, change=lambda data: said + data) as port:
        connection, inbox = await connect(f"nats://127.0.0.1:{port}")
        said = revoked
        with pytest.raises(BackendUnavailable, match="taken away at once"):
            await connection.subscribe("room")
        # The same is said again, of a subscription that is not there any more.
        await connection.publish([])
        await connection.subscribe("room")
        await connection.publish([("room", b"x")])
        assert inbox.got == [("room", b"x")]
        await connection.close()
    assert [type(error) for error in inbox.errors] == [SubscriptionRevoked]
    assert inbox.errors[0].channel == "room"


async def test_a_password_that_is_changed_ends_the_connection(own_server, connect):
    config = "authorization: {{users: [{{user: u, password: {}}}]}}"
    server = own_server(config.format("p"))
    _, inbox = await connect(server.url.replace("//", "//u:p@"))
    server.reload(config.format("q"))
    await until(lambda: inbox.errors)
    assert "authorization failed" in str(inbox.errors[0])


async def test_no_permission_for_answers(own_server):
    server = own_server(
        """authorization: {users: [{user: u, password: p,
            permissions: {publish: "a", subscribe: "a"}}]}"""
    )
    text = await refused(NatsBackend(server.url.replace("//", "//u:p@")))
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
    assert inbox.errors == []


async def test_a_loop_so_slow_that_the_server_gives_up(own_server, connect):
    server = own_server('max_payload: 65536\nmax_pending: 65536\nwrite_deadline: "200ms"')
    connection, inbox = await connect(server.url)
    await connection.subscribe("room")
    flood = Flood(server.port, b"starcast:room", b"x" * 60_000, 2_000)
    flood.start()
    flood.join()  # meanwhile the loop reads nothing
    await until(lambda: inbox.errors)
    assert len(inbox.got) < 2_000
    assert len(inbox.errors) == 1


# Outages


async def pending_calls(connection):
    """A call of each kind, waiting for a broker that does not answer."""
    calls = [
        connection.subscribe("c"),
        connection.unsubscribe("a"),
        connection.publish([("a", b"x")]),
    ]
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0)  # they send at once
    assert not any(task.done() for task in tasks)
    return tasks


async def all_raise(tasks, within):
    start = time.monotonic()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, BackendUnavailable), result
    assert time.monotonic() - start < within


async def test_killed_while_calls_wait(own_server, connect):
    server = own_server()
    connection, inbox = await connect(server.url)
    await connection.subscribe("a")
    server.freeze()
    tasks = await pending_calls(connection)
    server.kill()
    for _ in range(1000):  # nats-py has something to send in every turn, also when it closes
        with contextlib.suppress(BackendUnavailable):  # it is closed
            tasks.append(connection.publish([("a", b"x")]))
        await asyncio.sleep(0)
    await until(lambda: inbox.errors)
    await all_raise(tasks, 10)
    assert len(inbox.errors) == 1
    assert isinstance(inbox.errors[0], BackendUnavailable)
    assert str(server.port) in str(inbox.errors[0])
    for call, argument in [
        (connection.subscribe, "d"),
        (connection.unsubscribe, "a"),
        (connection.publish, [("a", b"")]),
    ]:
        with pytest.raises(BackendUnavailable, match="not connected"):
            await call(argument)
    assert len(inbox.errors) == 1


async def test_killed_under_load(own_server, connect):
    """Whatever nats-py is doing just then, the end is noticed at once and nothing is logged."""
    for round in range(15):
        server = own_server()
        connection, inbox = await connect(server.url)
        await connection.subscribe("a")

        async def load(connection=connection):
            while True:
                await connection.publish([("a", b"x" * 20_000)] * 20)

        async def more(connection=connection):
            for number in range(10**9):
                await connection.subscribe(str(number))

        tasks = [asyncio.create_task(load()), asyncio.create_task(more())]
        await until(lambda inbox=inbox, round=round: len(inbox.got) > 50 + 37 * round)
        server.kill()
        await until(lambda inbox=inbox: inbox.errors)
        await all_raise(tasks, 10)
        await connection.close()
        assert len(inbox.errors) == 1
        gc.collect()


async def test_shut_down_and_started_again(own_server):
    """One backend makes all the connections, which know nothing of each other."""
    server = own_server()
    backend = NatsBackend(server.url)
    made = []
    for _ in range(3):
        inbox = Inbox()
        connection = await backend.connect(inbox.deliver, inbox.lost)
        made.append((connection, inbox))
        for gone, _ in made[:-1]:
            await gone.close()
            with pytest.raises(BackendUnavailable, match="not connected"):
                await gone.subscribe("a")
        await connection.subscribe("a")
        await connection.publish([("a", b"x")])
        server.stop()
        await until(lambda inbox=inbox: inbox.errors)
        await refused(backend)
        server.start()
    await connection.close()
    for _, inbox in made:
        assert inbox.got == [("a", b"x")]
        assert len(inbox.errors) == 1


async def test_two_connections_of_one_backend(server):
    backend, inboxes = NatsBackend(server.url), [Inbox(), Inbox()]
    one, two = [await backend.connect(inbox.deliver, inbox.lost) for inbox in inboxes]
    await one.subscribe("a")
    await two.subscribe("b")
    await two.publish([("a", b"1"), ("b", b"1")])
    assert await inboxes[0].until(1) == [("a", b"1")]
    await one.close()
    await two.publish([("a", b"2"), ("b", b"2")])
    assert inboxes[1].got == [("b", b"1"), ("b", b"2")]
    await two.close()
    assert [inbox.errors for inbox in inboxes] == [[], []]


async def test_frozen(own_server, connect):
    server = own_server()
    connection, inbox = await connect(server.url)
    await connection.subscribe("a")
    server.freeze()
    tasks = await pending_calls(connection)
    cancelled = tasks.pop()
    cancelled.cancel()
    start = time.monotonic()
    await connection.close()
    assert time.monotonic() - start < BUSY
    await all_raise(tasks, BUSY)
    assert cancelled.cancelled()
    server.thaw()
    assert inbox.errors == []


async def test_frozen_with_a_full_socket(own_server, connect):
    server = own_server()
    connection, _ = await connect(server.url)
    server.freeze()
    batch = [("a", b"x" * 1_000_000)] * 9
    publishes = []
    with pytest.raises(BackendUnavailable, match="does not take what is sent"):  # noqa: PT012  # the last of a loop
        for _ in range(10):
            publishes.append(connection.publish(batch))
    start = time.monotonic()
    await connection.close()
    assert time.monotonic() - start < BUSY
    await all_raise(publishes, BUSY)


async def test_an_answer_after_its_call_was_cancelled(own_server, connect):
    server = own_server()
    connection, inbox = await connect(server.url)
    server.freeze()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await connection.subscribe("a")
    server.thaw()
    await connection.subscribe("a")
    await connection.publish([("a", b"x")])
    assert inbox.got == [("a", b"x")]
    assert inbox.errors == []


async def test_closed_while_it_ends_by_itself(own_server, connect):
    """In each turn of the loop from the end of the connection until that is reported."""
    server = own_server()
    for turns in range(100):
        connection, inbox = await connect(server.url)
        server.kill()
        for _ in range(turns):
            await asyncio.sleep(0)
        reported = len(inbox.errors)
        await connection.close()
        assert len(inbox.errors) == reported
        assert not tasks()
        if reported:
            break
        server.start()
    assert 1 < turns < 99


# Connections that do not come about


async def test_wrong_credentials(own_server, connect):
    server = own_server('authorization: {user: "me@x", password: "p:/@,%"}')
    right = server.url.replace("//", "//me%40x:p%3A%2F%40%2C%25@")
    await refused(NatsBackend(server.url))
    text = await refused(NatsBackend(right.replace("%25", "SECRET")), "SECRET", "me%40x", "me@x")
    assert "authorization violation" in text.lower()
    with pytest.raises(LoginRefused):
        await connect(server.url)
    await connect(right)
    assert "p:/@" not in NatsBackend(right).address


@pytest.mark.parametrize("by", ["url", "option"])
async def test_a_token(own_server, connect, by):
    server = own_server('authorization: {token: "s3cr%t"}')
    await refused(NatsBackend(server.url.replace("//", "//SECRET@")), "SECRET")
    if by == "url":
        await connect(server.url.replace("//", "//s3cr%25t@"))
    else:
        await connect(server.url, token="s3cr%t")


async def password():
    return "p"


@pytest.mark.parametrize("given", ["p", lambda: "p", password])
async def test_a_password_as_an_option(own_server, connect, given):
    server = own_server("authorization: {user: u, password: p}")
    connection, inbox = await connect(server.url.replace("//", "//u@"), password=given)
    await connection.subscribe("a")
    await connection.publish([("a", b"x")])
    assert inbox.got == [("a", b"x")]


async def test_a_function_that_has_no_password(server):
    def fail():
        raise KeyError("SECRET")

    assert "password= raised KeyError" in await refused(
        NatsBackend(server.url, user="u", password=fail), "SECRET"
    )
    never = asyncio.Event().wait
    backend = NatsBackend(server.url, user="u", password=never, connect_timeout=0.2)
    assert "no answer in time" in await refused(backend)


async def test_refused_and_unknown(connect):
    port = free_port()
    text = await refused(NatsBackend(f"nats://u:SECRET@127.0.0.1:{port}"), "SECRET")
    assert str(port) in text
    await refused(NatsBackend("nats://u:SECRET@broker.invalid"), "SECRET")
    await refused(NatsBackend(f"nats://SECRET@{'x' * 70}.invalid"), "SECRET")
    with pytest.raises(BackendUnavailable):
        await connect("nats://none")


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

    async with listening(answer) as port:
        assert expected in await refused(NatsBackend(f"nats://127.0.0.1:{port}"))


@pytest.mark.parametrize("says", [b"", b"-ERR 'Stale Connection'\r\n"])
async def test_a_connection_that_ends_as_it_is_made(says):
    """Either there is none, or its end is reported."""

    async def answer(reader, writer):
        writer.write(b"INFO {}\r\n")
        await reader.readuntil(b"PING\r\n")
        writer.write(b"PONG\r\n")
        subject = (await reader.readuntil(b"\r\n")).split()[1]
        await reader.readuntil(b"\r\n0\r\n")
        writer.write(b"MSG %b 1 1\r\n0\r\n%b" % (subject, says))
        writer.close()

    async with listening(answer) as port:
        backend, inbox = NatsBackend(f"nats://127.0.0.1:{port}"), Inbox()
        if says:
            assert "connection closed" in await refused(backend)
        else:
            connection = await backend.connect(inbox.deliver, inbox.lost)
            await until(lambda: inbox.errors)
            await connection.close()
            assert len(inbox.errors) == 1


async def test_nobody_answers_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        backend = NatsBackend(f"nats://127.0.0.1:{port}", connect_timeout=0.5)
        start = time.monotonic()
        assert "no answer in time" in await refused(backend)
        assert 0.4 < time.monotonic() - start < 0.5 + BUSY


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
async def test_tls(tls_server, connect, trusting, scheme, caplog):
    url = tls_server.url.replace("tls://", f"{scheme}://u:p@")
    connection, inbox = await connect(url, tls=trusting)
    await connection.subscribe("a")
    await connection.publish([("a", b"x" * 1_000_000)])
    assert inbox.got == [("a", b"x" * 1_000_000)]
    tls_server.freeze()
    start = time.monotonic()
    await connection.close()
    assert time.monotonic() - start < BUSY
    tls_server.thaw()
    connection, inbox = await connect(url, tls=trusting)
    tls_server.stop()
    await until(lambda: inbox.errors)
    await connection.close()
    assert len(inbox.errors) == 1
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


async def run_cancelled(number, when, coroutine):
    """Return whether that cancelled it; if not, it was over before."""
    cancelled = []

    async def run():
        await cancelled_at(number, when, coroutine, cancelled)

    task = asyncio.create_task(run())
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled() == (cancelled == [True]), "swallowed"
    return task.cancelled()


@pytest.fixture(params=["waiting", "done"])
def when(request):
    return request.param


async def test_connecting_cancelled_at_every_await(server, when):
    """Nothing is left behind."""
    open_before = sockets()
    backend, inbox = NatsBackend(server.url), Inbox()

    async def connect_and_close():
        await (await backend.connect(inbox.deliver, inbox.lost)).close()

    for number in range(1000):
        cancelled = await run_cancelled(number, when, connect_and_close())
        await until(lambda: sockets() <= open_before)
        assert not tasks()
        if not cancelled:
            break
    assert 1 <= number < 1000
    assert inbox.errors == []


async def test_closing_cancelled_at_every_await(server, connect, when):
    """The next call completes it."""
    open_before = sockets()
    for number in range(1000):
        connection, inbox = await connect()
        cancelled = await run_cancelled(number, when, connection.close())
        start = time.monotonic()
        await connection.close()
        assert time.monotonic() - start < 0.9  # the limit of a close is a second
        assert not tasks()
        await until(lambda: sockets() <= open_before)
        assert inbox.errors == []
        if not cancelled:
            break
    assert 1 <= number < 1000


CALLS = {
    "subscribe": lambda connection: connection.subscribe("b"),
    "unsubscribe": lambda connection: connection.unsubscribe("a"),
    "publish": lambda connection: connection.publish([("c", b"1"), ("c", b"2")]),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_cancelled_at_every_await(server, connect, call, when):
    """The connection goes on as before."""
    for number in range(1000):
        connection, inbox = await connect(name="cancelled")
        await connection.subscribe("a")

        async def run(connection=connection):
            await CALLS[call](connection)

        cancelled = await run_cancelled(number, when, run())
        subscribed = [] if call == "unsubscribe" else ["starcast:a"]
        if call == "subscribe" and not cancelled:
            subscribed.append("starcast:b")
        await connection.publish([("b", b"b")])
        assert server.subjects("cancelled")[1:] == subscribed
        await connection.subscribe("d")
        await connection.publish([("d", b"d")])
        assert inbox.got[-1] == ("d", b"d")
        assert (("b", b"b") in inbox.got) == ("starcast:b" in subscribed)
        await connection.close()
        assert inbox.errors == []
        if not cancelled:
            break
    assert 1 <= number < 1000


async def test_a_cancelled_call_is_forgotten(connect):
    connection, _ = await connect()
    publishing = connection.publish([("a", b"x")])
    publishing.cancel()
    left = weakref.ref(publishing)
    del publishing
    await connection.publish([("a", b"y")])
    gc.collect()
    assert left() is None


# What makes no sense


@pytest.mark.parametrize(
    "url",
    [
        "nats:", "nats://", "nats://:4222", "redis://h", "h:4222", "nats://h:SECRET", "nats://h/x",
        "nats://u:SEC/RET@h", "nats://u:SEC#RET@h", "nats://u:SEC?RET@h", "nats://h:99999",
        "nats://a,", "nats://u:SECRET@a,v:SECRET@b", "nats://u:SECRET@a,tls://b", "nats://[::1",
        "nats://h?tls=SECRET", "nats://h?&",
    ],
)  # fmt: skip
def test_urls_that_make_no_sense(url):
    with pytest.raises(ConfigurationError) as raised:
        NatsBackend(url)
    assert not any(secret in " ".join(chains(raised.value)) for secret in ["SEC", "RET"])


def test_urls():
    assert parse_url("nats://h") == (["nats://h:4222"], {})
    assert parse_url("tls://[::1]:1/") == (["tls://[::1]:1"], {})
    assert parse_url("nats://:p@h") == (["nats://h:4222"], {"user": "", "password": "p"})
    several = parse_url("nats://u:p@a,nats://u:p@b:1,c")
    login = {"user": "u", "password": "p"}
    assert several == (["nats://a:4222", "nats://b:1", "nats://c:4222"], login)


@pytest.mark.parametrize(
    "prefix", ["*", "a.>", ">", "a b", ".", "a..", ".a", "a\n", "a\r\nPUB x 1", "ä", "p" * 201]
)
def test_prefixes_that_make_no_sense(prefix):
    with pytest.raises(ConfigurationError, match="prefix"):
        NatsBackend("nats://h", prefix=prefix)


def test_options_that_are_not_the_users():
    with pytest.raises(ConfigurationError, match="sets these options: allow_reconnect, error_cb"):
        NatsBackend("nats://h", error_cb=print, allow_reconnect=True, name="x")
    with pytest.raises(ConfigurationError, match="does not know: odd"):
        NatsBackend("nats://h", odd=1, name="x")


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_timeouts_that_make_no_sense(seconds):
    with pytest.raises(ConfigurationError, match="connect_timeout must be a number above 0"):
        NatsBackend("nats://h", connect_timeout=seconds)
