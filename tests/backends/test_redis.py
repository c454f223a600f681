"""The Redis backend, against a real server that is killed, frozen and misused."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import ssl
import time
import traceback

import pytest
import redis.asyncio
import trustme
from redis.asyncio.connection import ConnectionPool, _AsyncRESP2Parser

from backends.front import front
from backends.redis_server import RedisServer
from starcast import Broadcast
from starcast.backends.base import MessagesRefused
from starcast.backends.redis import RedisBackend
from starcast.backends.redis_connection import REPORT_DELAY
from starcast.exceptions import BackendUnavailable, ConfigurationError, PayloadTooLarge
from support import BUSY, DEADLINE, listening, starcast_tasks, until

pytestmark = pytest.mark.anyio

PASSWORD = "p@ss:w/rd#1?"
ESCAPED = "p%40ss%3Aw%2Frd%231%3F"

ODD_CHANNELS = [
    "*",
    "n*",
    "news",
    "n?ws",
    "n[e]ws",
    "\\*",
    ">",
    "a.b",
    "a b",
    " ",
    "'",
    '"',
    "%s",
    "{0}",
    "{}",
    "$5",
    "starcast:",
    "starcast:news",
    "\N{GRINNING FACE}",
    "e\N{COMBINING ACUTE ACCENT}",
    "\N{LATIN SMALL LETTER E WITH ACUTE}",
    "\N{LATIN SMALL LETTER E WITH ACUTE}" * 200,
    "x" * 200,
    "x" * 199,
    "\u2028",
]


@pytest.fixture(
    params=[("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)
def anyio_backend(request):
    return request.param


@pytest.fixture(scope="module")
def shared():
    with RedisServer() as server:
        yield server


@pytest.fixture
def server(shared):
    """A server for tests that do it no harm."""
    yield shared
    assert not shared.clients(), "connections were left open"


@pytest.fixture
def own():
    """A server for tests that do."""
    with RedisServer() as server:
        yield server


class Inbox:
    """What a hub is to a backend."""

    def __init__(self, backend: RedisBackend) -> None:
        self.backend = backend
        self.got: list[tuple[str, bytes]] = []
        self.lost: list[Exception] = []
        self._tasks: set[asyncio.Task[object]] = set()

    async def __aenter__(self) -> Inbox:
        self._tasks = starcast_tasks()
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()
        assert starcast_tasks() <= self._tasks
        gc.collect()  # where redis-py warns of a connection that nobody closed
        await asyncio.sleep(0)

    async def start(self) -> None:
        self.connection = await self.backend.connect(self.deliver, self.lose)

    async def stop(self) -> None:
        await self.connection.close()

    def deliver(self, channel: str, payload: bytes) -> None:
        self.got.append((channel, payload))

    def lose(self, error: Exception) -> None:
        self.lost.append(error)

    async def probe(self) -> None:
        """Fail if a message does not come back."""
        await self.connection.subscribe("probe")
        await self.connection.publish([("probe", b"?")])
        await until(lambda: ("probe", b"?") in self.got)


def sockets() -> int:
    """How many this process has. Other descriptors come and go with uvloop."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return count


def text_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


# Messages


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
@pytest.mark.parametrize(
    "payload",
    [
        b"hello",
        "g\N{LATIN SMALL LETTER U WITH DIAERESIS}n \N{GRINNING FACE}".encode(),
        b"",
        b"\xff\x00\r\n$-1\r\n",
        bytes(range(256)) * 4096,
        b"x" * 8 * 2**20,
    ],
    ids=["text", "unicode", "empty", "binary", "1MiB", "limit"],
)
async def test_a_message_arrives_as_it_is(server, payload, scheme):
    url = server.url if scheme == "tcp" else server.unix_url
    async with Inbox(RedisBackend(url)) as inbox:
        await inbox.connection.subscribe("room")
        await inbox.connection.publish([("room", payload)])
        await until(lambda: inbox.got)
    assert inbox.got == [("room", payload)]
    assert not inbox.lost


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
async def test_batches_keep_their_order_across_channels(server, size):
    messages = [("ab"[number % 2], b"%d" % number) for number in range(1000)]
    async with Inbox(RedisBackend(server.url)) as first, Inbox(RedisBackend(server.url)) as second:
        for inbox in (first, second):
            await inbox.connection.subscribe("a")
            await inbox.connection.subscribe("b")
        for start in range(0, len(messages), size):
            await first.connection.publish(messages[start : start + size])
        await until(lambda: len(first.got) >= 1000 and len(second.got) >= 1000)
    assert first.got == second.got == messages


async def test_nothing_to_publish(server):
    async with Inbox(RedisBackend(server.url)) as inbox:
        await inbox.connection.publish([])
        await inbox.probe()


async def test_channels_are_left(server):
    async with Inbox(RedisBackend(server.url)) as inbox:
        await inbox.connection.subscribe("a")
        await inbox.connection.subscribe("b")
        await inbox.connection.unsubscribe("a")
        await inbox.connection.publish([("a", b"1"), ("b", b"2"), ("c", b"3")])
        await until(lambda: inbox.got)
        await inbox.connection.subscribe("a")
        await inbox.connection.publish([("a", b"4")])
        await until(lambda: len(inbox.got) > 1)
    assert inbox.got == [("b", b"2"), ("a", b"4")]


@pytest.mark.parametrize("prefix", ["starcast:", "", "*", "a b\r\n"])
async def test_odd_names_are_names_and_nothing_else(server, prefix):
    async with Inbox(RedisBackend(server.url, prefix=prefix)) as inbox:
        for channel in ODD_CHANNELS:
            await inbox.connection.subscribe(channel)
        assert server.command("PUBSUB", "NUMPAT") == 0
        assert set(server.command("PUBSUB", "CHANNELS")) == {
            (prefix + channel).encode() for channel in ODD_CHANNELS
        }
        messages = [(channel, channel.encode()) for channel in ODD_CHANNELS]
        await inbox.connection.publish(messages)
        await inbox.connection.publish([("other", b"")])
        await until(lambda: len(inbox.got) >= len(messages))
        await inbox.probe()
        assert inbox.got[:-1] == messages
        for channel in ODD_CHANNELS:
            await inbox.connection.unsubscribe(channel)
        assert server.command("PUBSUB", "CHANNELS") == [(prefix + "probe").encode()]


async def test_prefixes_keep_apps_apart(server):
    one, two = RedisBackend(server.url, prefix="1:"), RedisBackend(server.url, prefix="2:")
    async with Inbox(one) as first, Inbox(two) as second:
        for inbox in (first, second):
            await inbox.connection.subscribe("room")
        await first.connection.publish([("room", b"1")])
        await second.connection.publish([("room", b"2")])
        await until(lambda: first.got and second.got)
    assert first.got == [("room", b"1")]
    assert second.got == [("room", b"2")]


async def test_an_injection_is_a_message(server):
    """Nothing of a name or a payload can end what it stands in."""
    attack = "x\r\n*1\r\n$8\r\nFLUSHALL\r\n"
    server.command("SET", "key", "value")
    async with Inbox(RedisBackend(server.url, prefix=attack)) as inbox:
        await inbox.connection.subscribe(attack)
        await inbox.connection.publish([(attack, attack.encode())])
        await until(lambda: inbox.got)
    assert inbox.got == [(attack, attack.encode())]
    assert server.command("GET", "key") == b"value"


async def test_other_programs_write(server):
    async with Inbox(RedisBackend(server.url)) as inbox:
        await inbox.connection.subscribe("room")
        for payload in (b"hello", b"", b"\xfe\x80", b"\xff?"):
            assert server.command("PUBLISH", "starcast:room", payload) == 1
        await until(lambda: len(inbox.got) == 4)
    assert [payload for _, payload in inbox.got] == [b"hello", b"", b"\xfe\x80", b"\xff?"]


async def test_other_programs_read(server):
    async with (
        Inbox(RedisBackend(server.url)) as inbox,
        redis.asyncio.from_url(server.url) as raw,
        raw.pubsub() as pubsub,
    ):
        await pubsub.subscribe("starcast:room")
        await pubsub.get_message(timeout=DEADLINE)
        await inbox.connection.publish([("room", b"hello")])
        message = await pubsub.get_message(timeout=DEADLINE)
    assert message["channel"] == b"starcast:room"
    assert message["data"] == b"hello"


async def test_what_is_published_after_the_confirmation_arrives(server):
    """With many who subscribe at the same time."""
    async with Inbox(RedisBackend(server.url)) as inbox, Inbox(RedisBackend(server.url)) as other:

        async def subscribe(channel):
            await inbox.connection.subscribe(channel)
            assert server.command("PUBLISH", f"starcast:{channel}", channel) == 1

        channels = [f"room {number}" for number in range(100)]
        await asyncio.gather(*map(subscribe, channels))
        await until(lambda: len(inbox.got) == 100)
        await asyncio.gather(*map(inbox.connection.unsubscribe, channels))
        assert server.command("PUBSUB", "CHANNELS") == []
        assert not other.got
    assert sorted(inbox.got) == sorted((channel, channel.encode()) for channel in channels)


async def test_what_arrived_together_is_delivered_in_one_turn(server):
    class Turns(Inbox):
        now = 0

        def turn(self):
            self.now += 1
            self.handle = asyncio.get_running_loop().call_soon(self.turn)

        def deliver(self, channel, payload):
            self.got.append((payload.decode(), self.now))

    async with Turns(RedisBackend(server.url)) as inbox:
        await inbox.connection.subscribe("room")
        inbox.turn()
        with redis.Redis(unix_socket_path=server.path) as raw:  # the loop stands still meanwhile
            pipeline = raw.pipeline(transaction=False)
            for number in range(1000):
                pipeline.publish("starcast:room", str(number))
            pipeline.execute()
        await until(lambda: len(inbox.got) == 1000)
        inbox.handle.cancel()
    assert [number for number, _ in inbox.got] == [str(number) for number in range(1000)]
    assert len({turn for _, turn in inbox.got}) <= 4  # what the kernel hands over at once


# Outages


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_server_that_dies(own, how):
    async with Inbox(RedisBackend(own.url)) as inbox:
        await inbox.probe()
        getattr(own, how)()
        await until(lambda: inbox.lost)
        for _ in range(2):
            for call in (
                lambda: inbox.connection.subscribe("a"),
                lambda: inbox.connection.unsubscribe("probe"),
                lambda: inbox.connection.publish([("a", b"")]),
            ):
                with pytest.raises(BackendUnavailable, match=f"127.0.0.1:{own.port}"):
                    await call()
            await asyncio.sleep(0)
        assert len(inbox.lost) == 1
        assert isinstance(inbox.lost[0], BackendUnavailable)
        assert f"127.0.0.1:{own.port}" in str(inbox.lost[0])
        with pytest.raises(BackendUnavailable):
            await inbox.start()
    assert len(inbox.lost) == 1


async def pending(inbox):
    calls = [
        inbox.connection.subscribe("a"),
        inbox.connection.subscribe("b"),
        inbox.connection.unsubscribe("probe"),
        inbox.connection.publish([("a", b"1"), ("b", b"2")]),
    ]
    tasks = [asyncio.ensure_future(call) for call in calls]
    done, _ = await asyncio.wait(tasks, timeout=0.05)
    assert not done
    return tasks


async def all_raise(tasks):
    done, waiting = await asyncio.wait(tasks, timeout=DEADLINE)
    assert not waiting
    assert all(isinstance(task.exception(), BackendUnavailable) for task in done)


async def test_calls_that_wait_raise_when_the_server_dies(own):
    async with Inbox(RedisBackend(own.url)) as inbox:
        await inbox.probe()
        own.freeze()
        tasks = await pending(inbox)
        own.kill()
        await all_raise(tasks)
        await until(lambda: inbox.lost)
    assert len(inbox.lost) == 1


async def test_cancelled_when_the_server_dies(own):
    class Hub(Inbox):
        def lose(self, error):
            super().lose(error)
            self.task.cancel()

    async with Hub(RedisBackend(own.url)) as inbox:
        own.freeze()
        inbox.task = asyncio.create_task(inbox.connection.subscribe("a"))
        await asyncio.sleep(0)
        own.kill()
        with pytest.raises(asyncio.CancelledError):
            await inbox.task
    assert len(inbox.lost) == 1


async def test_a_frozen_server_does_not_hold_stop(own):
    before = sockets()
    async with Inbox(RedisBackend(own.url)) as inbox:
        await inbox.probe()
        own.freeze()
        tasks = await pending(inbox)
        # More than the kernel takes: a close that waits for it to be sent would not come back.
        tasks.append(asyncio.ensure_future(inbox.connection.publish([("a", b"x" * 2**23)] * 4)))
        await asyncio.sleep(0)
        began = time.monotonic()
        await inbox.stop()
        assert time.monotonic() - began < BUSY
        await all_raise(tasks)
        await until(lambda: sockets() <= before)
        own.thaw()
        await inbox.start()
        await inbox.probe()
    assert not inbox.lost


async def test_a_server_that_comes_back(own):
    async with Inbox(RedisBackend(own.url)) as inbox:
        for times in range(1, 4):
            await inbox.probe()
            inbox.got.clear()
            own.kill()
            await until(lambda times=times: len(inbox.lost) == times)
            await inbox.stop()
            own.start()
            await inbox.start()
            assert own.command("PUBSUB", "CHANNELS") == []
        await inbox.probe()
    assert len(inbox.lost) == 3


async def test_stopped_and_started_without_a_gap_in_between(server):
    async with Inbox(RedisBackend(server.url)) as inbox:
        await inbox.stop()  # before its tasks have had a turn
        await inbox.stop()
        with pytest.raises(BackendUnavailable):
            await inbox.connection.publish([("a", b"")])
        await inbox.start()
        await inbox.probe()
    assert not inbox.lost


@pytest.mark.parametrize("kind", ["pubsub", "normal"])
async def test_a_connection_that_the_server_closes(server, kind):
    async with Inbox(RedisBackend(server.url)) as inbox:
        await inbox.probe()
        server.command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        await until(lambda: inbox.lost)
        with pytest.raises(BackendUnavailable):
            await inbox.connection.publish([("a", b"")])
        await inbox.stop()
        await inbox.start()
        await inbox.probe()
    assert len(inbox.lost) == 1


async def test_a_subscriber_that_lags_is_cut_off(own):
    own.command("CONFIG", "SET", "client-output-buffer-limit", "pubsub 1mb 0 0")
    async with Inbox(RedisBackend(own.url)) as inbox:
        await inbox.connection.subscribe("room")
        for _ in range(1000):  # MiB, while the loop stands still; a kernel may take many
            if own.command("PUBLISH", "starcast:room", b"x" * 2**20) == 0:
                break
        else:
            pytest.fail("was not cut off")
        await until(lambda: inbox.lost)
        await inbox.stop()
        await inbox.start()
        await inbox.probe()
    assert len(inbox.lost) == 1


async def test_the_loop_comes_to_its_end(server):
    """All tasks are cancelled, and the connection is closed on another loop."""
    inbox = Inbox(RedisBackend(server.url))
    tasks = []

    async def on_a_loop_of_its_own():
        await inbox.start()
        await inbox.probe()
        tasks.extend(starcast_tasks())

    await asyncio.to_thread(asyncio.run, on_a_loop_of_its_own())
    assert len(tasks) == 2
    assert all(task.cancelled() for task in tasks)
    await inbox.stop()
    assert not inbox.lost  # nobody is there who would want to know
    await until(lambda: not server.clients())
    async with inbox:
        await inbox.probe()


# Rights


async def test_somebody_cancels_its_tasks(server):
    """And the loop lives on: then nobody reads from the connection any more."""
    async with Inbox(RedisBackend(server.url)) as inbox:
        await inbox.probe()
        for task in starcast_tasks():
            task.cancel()
        await until(lambda: inbox.lost)
        with pytest.raises(BackendUnavailable):
            await inbox.connection.subscribe("room")
    assert len(inbox.lost) == 1


async def test_it_is_stopped_before_it_is_told(server):
    async with Inbox(RedisBackend(server.url)) as inbox:
        await inbox.probe()
        cancelled = starcast_tasks()
        for task in cancelled:
            task.cancel()
        await asyncio.wait(cancelled)
        with pytest.raises(BackendUnavailable):
            await inbox.connection.subscribe("room")
        await inbox.stop()
        await asyncio.sleep(REPORT_DELAY)  # the timer that would report it fires before this one
    assert not inbox.lost


async def test_the_servers_own_limit(own):
    own.command("CONFIG", "SET", "proto-max-bulk-len", "1mb")
    async with Inbox(RedisBackend(own.url)) as inbox:
        await inbox.connection.publish([("probe", b"x" * 1024 * 1024)])
        await inbox.probe()
    async with Broadcast(own.url) as hub:
        with pytest.raises(PayloadTooLarge, match="at most 1048576"):
            await hub.publish("room", "x" * 2_000_000)
        await hub.publish("room", "x")
        assert hub.stats().backend.gaps == 0
    assert not inbox.lost


async def test_a_user_with_few_rights(own):
    rights = "+ping +publish +subscribe +unsubscribe"
    own.command("ACL", "SETUSER", "app", "on", f">{PASSWORD}", "&starcast:*", *rights.split())
    own.command("ACL", "SETUSER", "default", "off")
    own.url = own.url.replace("//", f"//app:{ESCAPED}@")
    async with Inbox(RedisBackend(own.url)) as inbox:
        await inbox.probe()
    assert not inbox.lost


async def test_what_a_user_may_not_do(server):
    """The call raises; the connection is as good as before."""
    server.command("ACL", "SETUSER", "some", "on", "nopass", "resetchannels", "+@all")
    server.command("ACL", "SETUSER", "some", "&starcast:room", "&starcast:probe")
    url = server.url.replace("//", "//some:x@")
    async with Inbox(RedisBackend(url)) as inbox:
        await inbox.connection.subscribe("room")
        with pytest.raises(BackendUnavailable, match=r"(?i)no permission"):
            await inbox.connection.subscribe("other")
        with pytest.raises(MessagesRefused, match=r"(?i)no permission") as raised:
            await inbox.connection.publish([("room", b"1"), ("other", b"2"), ("room", b"3")])
        assert list(raised.value.reasons) == [1]
        with pytest.raises(MessagesRefused, match=r"(?i)no permission") as raised:
            await inbox.connection.publish([("other", b"4"), ("other", b"5")])
        assert list(raised.value.reasons) == [0, 1]
        await inbox.probe()
        assert not inbox.lost
        server.command("ACL", "DELUSER", "some")
        await until(lambda: inbox.lost)
    assert inbox.got[:2] == [("room", b"1"), ("room", b"3")]


# What can go wrong at the start


@pytest.mark.parametrize("user", ["", "app:wrong" + ESCAPED, ":wrong" + ESCAPED, "nobody:x"])
@pytest.mark.parametrize("unix", [False, True])
async def test_wrong_credentials(own, user, unix):
    own.command("ACL", "SETUSER", "app", "on", f">{PASSWORD}", "+@all", "&*")
    own.command("ACL", "SETUSER", "default", "resetpass", f">{PASSWORD}")
    url = own.unix_url if unix else own.url
    backend = RedisBackend(url.replace("//", f"//{user}@" if user else "//"))
    began = time.monotonic()
    with pytest.raises(BackendUnavailable) as caught:
        await Inbox(backend).start()
    assert time.monotonic() - began < BUSY
    assert (own.path if unix else f"127.0.0.1:{own.port}") in str(caught.value)
    assert "uthentication" in str(caught.value) or "invalid username-password" in str(caught.value)
    assert PASSWORD not in text_of(caught.value)
    assert ESCAPED not in text_of(caught.value)
    gc.collect()


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("redis://u:secret@127.0.0.1:1", "127.0.0.1:1:"),
        ("redis://u:secret@no-such-host.invalid:6380/3", "no-such-host.invalid:6380:"),
        ("redis://u:secret@no-such-host.invalid", "no-such-host.invalid:6379:"),
        ("rediss://u:secret@[::1]:1", "::1:1:"),
        ("unix://u:secret@/no/such.sock", "/no/such.sock:"),
        ("rediss://u:secret@127.0.0.1:1?ssl_ca_certs=/no/such.pem", "127.0.0.1:1:"),
    ],
)
async def test_no_server_there(url, where):
    inbox = Inbox(RedisBackend(url))
    began = time.monotonic()
    with pytest.raises(BackendUnavailable) as caught:
        await inbox.start()
    assert time.monotonic() - began < 10
    assert f"Redis at {where}" in str(caught.value)
    assert "secret" not in text_of(caught.value)
    assert not inbox.lost


async def test_a_frozen_server_at_the_start(own):
    backend = RedisBackend(own.url, connect_timeout=0.2)
    own.freeze()
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match=r"127.0.0.1:\d+: no answer within 0.2 seconds"):
        await Inbox(backend).start()
    assert time.monotonic() - began < BUSY
    gc.collect()
    own.thaw()
    async with Inbox(backend) as inbox:
        await inbox.probe()


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), "5", None])
def test_a_timeout_that_makes_no_sense(seconds):
    with pytest.raises(ConfigurationError, match="connect_timeout must be a number above 0"):
        RedisBackend("redis://", connect_timeout=seconds)


@pytest.mark.parametrize(
    "client", [None, 5, redis.Redis()], ids=lambda client: type(client).__name__
)
def test_neither_a_url_nor_a_client(client):
    with pytest.raises(ConfigurationError, match=r"a URL or a redis\.asyncio\.Redis"):
        RedisBackend(client=client)


def test_both_a_url_and_a_client():
    with pytest.raises(ConfigurationError, match=r"a URL or a redis\.asyncio\.Redis"):
        RedisBackend("redis://", client=redis.asyncio.Redis())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "secret",
        "http://u:secret@host",
        "redis://u:sec/ret@host:6379",
        "redis://u:12/secret@host:6379",
        "redis://u:12?secret@host:6379",
        "redis://u:12#secret@host:6379",
        "redis://u:secret@host:port",
        "redis://u:secret@[host",
        "redis://u:secret@host?protocol=9",
    ],
)
def test_a_url_that_makes_no_sense(url):
    with pytest.raises(ConfigurationError) as caught:
        RedisBackend(url)
    assert "redis://user:password@host:6379" in str(caught.value)
    assert "sec" not in text_of(caught.value).replace(__file__, "").split("Error: ", 1)[1]


# TLS


def tls_in_front_of(port, authority):
    """A port that speaks TLS and goes on to the other one."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return front(port, tls=context)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


async def test_tls(server, authority, tmp_path):
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with tls_in_front_of(server.port, authority) as port:
        url = f"rediss://localhost:{port}?ssl_ca_certs={tmp_path}/ca.pem"
        async with Inbox(RedisBackend(url)) as inbox:
            await inbox.connection.subscribe("room")
            await inbox.connection.publish([("room", b"x" * 2**20)] * 3)
            await until(lambda: len(inbox.got) == 3)
            await inbox.probe()
    assert not inbox.lost


async def test_tls_with_a_certificate_that_nobody_knows(server, authority):
    async with tls_in_front_of(server.port, authority) as port:
        backend = RedisBackend(f"rediss://u:secret@localhost:{port}")
        with pytest.raises(BackendUnavailable, match=f"localhost:{port}: .*(?i:certificate)"):
            await Inbox(backend).start()


async def test_tls_against_a_port_that_speaks_none(server):
    # It may wait for the end of a line.
    backend = RedisBackend(server.url.replace("redis", "rediss"), connect_timeout=0.5)
    with pytest.raises(BackendUnavailable, match=f"127.0.0.1:{server.port}: "):
        await Inbox(backend).start()
    await until(lambda: not server.clients())


async def test_no_tls_against_a_port_that_speaks_it(server, authority):
    async with tls_in_front_of(server.port, authority) as port:
        backend = RedisBackend(f"redis://127.0.0.1:{port}")
        began = time.monotonic()
        with pytest.raises(BackendUnavailable, match=f"127.0.0.1:{port}: "):
            await Inbox(backend).start()
        assert time.monotonic() - began < BUSY


# A client that the app has already


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decode_responses": True},
        {"decode_responses": True, "protocol": 2, "encoding": "latin-1"},
        {"socket_timeout": 0.05, "health_check_interval": 1, "max_connections": 1},
        {"single_connection_client": True, "client_name": "app", "db": 3},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
async def test_a_client_of_the_app(server, options):
    async with redis.asyncio.Redis(port=server.port, **options) as client:
        async with Inbox(RedisBackend(client=client)) as inbox:
            await inbox.connection.subscribe("room")
            await asyncio.sleep(0.2)  # longer than its socket_timeout
            await inbox.connection.publish([("room", b"\xfe\xff"), ("room", b"text")])
            await until(lambda: len(inbox.got) == 2)
            assert await client.ping()
        assert await client.ping()
    assert inbox.got == [("room", b"\xfe\xff"), ("room", b"text")]
    assert not inbox.lost


async def test_a_client_that_retries_does_not_hide_a_gap(own):
    async with (
        redis.asyncio.Redis(unix_socket_path=own.path) as client,
        Inbox(RedisBackend(client=client)) as inbox,
    ):
        await inbox.probe()
        own.kill()
        own.start()
        await until(lambda: inbox.lost)
        assert own.command("PUBSUB", "CHANNELS") == []
        assert own.path in str(inbox.lost[0])
    assert len(inbox.lost) == 1


async def test_without_hiredis(own):
    pool = ConnectionPool.from_url(own.url, parser_class=_AsyncRESP2Parser, decode_responses=True)
    async with Inbox(RedisBackend(client=redis.asyncio.Redis(connection_pool=pool))) as inbox:
        await inbox.connection.subscribe("room")
        messages = [("room", b"\xff%d" % number) for number in range(200)]
        await inbox.connection.publish([*messages, ("room", b"x" * 2**20)])
        await until(lambda: len(inbox.got) == 201)
        assert inbox.got[:-1] == messages
        own.kill()
        await until(lambda: inbox.lost)
    assert len(inbox.lost) == 1


# Servers that say odd things


@contextlib.asynccontextmanager
async def scripted(*answers, second=()):
    """Yield the URL of a server that gives the answers, one for each read, to each client.

    The second client may get others.
    """
    numbers = itertools.count(1)

    async def accept(reader, writer):
        with contextlib.suppress(OSError):
            for answer in (second or answers) if next(numbers) == 2 else answers:
                if not await reader.read(2**16):
                    break
                writer.write(answer)
            await reader.read()
        writer.transport.abort()

    async with listening(accept) as port:
        yield f"redis://u:{ESCAPED}@127.0.0.1:{port}"


async def test_a_server_that_repeats_the_password():
    answer = f"-ERR unknown command 'AUTH', with args beginning with: 'u' '{PASSWORD}' \r\n"
    async with scripted(answer.encode()) as url:
        with pytest.raises(BackendUnavailable, match="unknown command 'AUTH'") as caught:
            await Inbox(RedisBackend(url)).start()
    assert PASSWORD not in text_of(caught.value)


class Credentials(redis.CredentialProvider):
    def get_credentials(self):
        raise RuntimeError(f"can't read {PASSWORD}")


async def test_credentials_that_cannot_be_had(server):
    client = redis.asyncio.Redis(port=server.port, credential_provider=Credentials())
    with pytest.raises(BackendUnavailable, match="RuntimeError") as caught:
        await Inbox(RedisBackend(client=client)).start()
    assert PASSWORD not in text_of(caught.value)
    await client.aclose()


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (b":1\r\n", "IndexError"),
        (b"-ERR something\r\n", "something"),
        (b"-LOADING the dataset\r\n", "the dataset"),
        (b"?\r\n", "rotocol"),
        (b"*0\r\n", "IndexError"),
    ],
    ids=repr,
)
async def test_an_answer_that_nobody_waits_for(server, odd, reason):
    # The answers to AUTH, two times CLIENT SETINFO and PING, then the odd one.
    answers = [b"+OK\r\n", b"+OK\r\n+OK\r\n", b"+PONG\r\n" + odd]
    # The publishing connection also asks for the server's role and a limit.
    second = [*answers[:2], b"+PONG\r\n", b"-NOPERM\r\n", b"-NOPERM\r\n"]
    async with scripted(*answers, second=second) as url, Inbox(RedisBackend(url)) as inbox:
        await until(lambda: inbox.lost)
        with pytest.raises(BackendUnavailable):
            await inbox.connection.subscribe("room")
    assert len(inbox.lost) == 1
    assert reason in str(inbox.lost[0])


# Cancellation


async def start(inbox):
    await inbox.stop()
    await inbox.start()


async def subscribe(inbox):
    await inbox.connection.subscribe("room")


async def unsubscribe(inbox):
    await inbox.connection.subscribe("room")
    await inbox.connection.unsubscribe("room")


async def publish(inbox):
    await inbox.connection.publish([("probe", b"1"), ("probe", b"2" * 2**17)] * 5)
    await inbox.connection.publish([("probe", b"3")])


async def stop(inbox):
    await inbox.stop()


@pytest.mark.parametrize(
    "call", [start, subscribe, unsubscribe, publish, stop], ids=lambda call: call.__name__
)
async def test_cancelled_after_any_number_of_steps(server, call):
    steps, cancelled = 0, True
    before = sockets()
    while cancelled:
        inbox = Inbox(RedisBackend(server.url))
        await inbox.start()
        task = asyncio.ensure_future(call(inbox))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        cancelled = task.cancelled()
        if call in (start, stop):
            await until(lambda: len(starcast_tasks()) in (0, 2))
            await inbox.stop()
            await inbox.start()
        await inbox.probe()  # all before it is done with too
        if call in (subscribe, unsubscribe):
            await inbox.connection.subscribe("room")
            await inbox.connection.publish([("room", b"again")])
            await until(lambda inbox=inbox: ("room", b"again") in inbox.got)
        await inbox.stop()
        assert not starcast_tasks()
        assert not inbox.lost
        steps += 1 + steps // 20
    assert steps > 1  # it was cancelled somewhere
    gc.collect()
    await until(lambda: not server.clients())
    await until(lambda: sockets() <= before)


async def test_a_connection_says_when_it_was_heard_and_how_many_others_got_a_message(server):
    async with Inbox(RedisBackend(server.url)) as inbox, Inbox(RedisBackend(server.url)) as other:
        before = inbox.connection.heard_at
        await inbox.connection.publish([("room", b"x")])
        assert inbox.connection.receivers == 0
        for each in (inbox, other):
            await each.connection.subscribe("room")
        await inbox.connection.publish([("room", b"x")])
        assert inbox.connection.receivers == 2
        await until(lambda: inbox.got)
        assert before < inbox.connection.heard_at <= time.monotonic()
