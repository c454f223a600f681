"""The publisher for code without an event loop, with real brokers, processes and threads."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backends.redis_server import RedisServer
from starcast import (
    BackendUnavailable,
    Broadcast,
    ConfigurationError,
    EncodingError,
    Event,
    InvalidChannel,
    PayloadTooLarge,
    Publisher,
)
from starcast import publisher as module
from support import BUSY, Broker, Bus, until, until_sync

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[1]

# What is left open is told. So is each fork beside a thread since 3.12, but that is what is tested.
FLAGS = ["-W", "default", "-W", "ignore:This process:DeprecationWarning"]


@pytest.fixture(autouse=True)
def all_ended():
    """After the test, no thread of a publisher is left."""
    yield
    until_sync(lambda: not threads())


@pytest.fixture
def redis(urls):
    return urls("redis")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "starcast-publisher"]


@contextlib.asynccontextmanager
async def listening(url: str, channel: str = "room"):
    """What arrives on a channel, as a list that grows."""
    got: list[str | bytes] = []

    async def listen() -> None:
        async for event in subscriber:
            got.append(event.message)

    async with Broadcast(url) as hub, hub.subscribe(channel) as subscriber:
        listener = asyncio.create_task(listen())
        yield got
    await listener


class Program:
    """A Python program in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def end(self) -> str:
        """Wait for it, and return what it printed, if it has nothing to complain about."""
        out, error = await asyncio.wait_for(self.process.communicate(), 30)
        assert not error, error.decode()
        assert self.process.returncode == 0
        return out.decode()


async def start(code: str, *arguments: str) -> Program:
    return Program(
        await asyncio.create_subprocess_exec(
            *[sys.executable, *FLAGS, "-c", code, *arguments],
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    )


async def run(code: str, *arguments: str) -> str:
    return await (await start(code, *arguments)).end()


# Publish


async def test_a_message_arrives_as_from_a_hub(url):
    async with listening(url) as got:
        with Publisher(url.replace("127.0.0.1", "localhost")) as publisher:
            for message in ("text", b"bytes", {"as": "JSON"}):
                await asyncio.to_thread(publisher.publish, "room", message)
            await asyncio.to_thread(publisher.publish, "room", "quoted", encoding="json")
            await until(lambda: len(got) == 4)
    assert got == ["text", b"bytes", '{"as":"JSON"}', '"quoted"']


async def test_it_publishes_to_the_hubs_of_its_name(redis):
    staff = Broadcast(redis, name="staff")
    async with staff, listening(redis) as others, staff.subscribe("room") as subscriber:
        with Publisher(redis, name="staff") as publisher, Publisher(redis) as another:
            await asyncio.to_thread(publisher.publish, "room", "for staff")
            await asyncio.to_thread(another.publish, "room", "for all")
            await until(lambda: others == ["for all"])
        assert (await anext(subscriber)).message == "for staff"


async def test_a_channel_may_be_a_number(redis):
    async with listening(redis, "7") as got:
        with Publisher(redis) as publisher:
            await asyncio.to_thread(publisher.publish, 7, "hello")
            await until(lambda: got == ["hello"])


async def test_each_thread_keeps_its_order(url):
    def publish(thread: int) -> None:
        for number in range(50):
            publisher.publish("room", f"{thread} {number}")

    async with listening(url) as got:
        with Publisher(url) as publisher, ThreadPoolExecutor(8) as pool:
            list(pool.map(publish, range(8)))
            assert len(threads()) == 1
        await until(lambda: len(got) == 400)
    of: defaultdict[str, list[int]] = defaultdict(list)
    for message in got:
        thread, _, number = message.partition(" ")
        of[thread].append(int(number))
    assert of == {str(thread): list(range(50)) for thread in range(8)}


async def test_a_thousand_calls_use_one_connection():
    with RedisServer() as server, Publisher(server.url) as publisher:

        def publish() -> None:
            for number in range(1000):
                publisher.publish("room", str(number))

        def connections() -> set[str]:
            # Those of a hub: one publishes, the other hears the probe.
            return {client["id"] for client in server.clients()}

        assert connections() == set()  # nothing is opened before it is needed
        await asyncio.to_thread(publisher.publish, "room", "first")
        before = connections()
        assert len(before) == 2
        await asyncio.to_thread(publish)
        assert connections() == before


async def test_a_model_is_written_on_the_thread_that_publishes(redis):
    seen = []

    def dumps(value: object) -> str:
        seen.append(threading.current_thread())
        return "{}"

    def publish() -> None:
        with Publisher(redis, dumps=dumps) as publisher:
            publisher.publish("room", {})
        seen.append(threading.current_thread())

    await asyncio.to_thread(publish)
    assert seen[0] is seen[1]


async def test_errors_are_raised_where_it_was_called(redis, monkeypatch):
    with Publisher(redis) as publisher:

        def publish(channel: str, message: object) -> None:
            publisher.publish(channel, message)

        with pytest.raises(InvalidChannel):
            await asyncio.to_thread(publish, "", "hello")
        with pytest.raises(EncodingError):
            await asyncio.to_thread(publish, "room", object())
        with pytest.raises(ConfigurationError):
            await asyncio.to_thread(publisher.publish, "room", "x", encoding="xml")
        with pytest.raises(PayloadTooLarge) as info:
            await asyncio.to_thread(publish, "room", "x" * (8 * 1024 * 1024 + 1))
    files = {Path(frame.filename).name for frame in traceback.extract_tb(info.tb)}
    assert "publisher.py" in files
    assert not files & {"broadcast.py", "link.py", "base_events.py"}  # of the other thread


@pytest.mark.parametrize(
    "cls", [BackendUnavailable, EncodingError, InvalidChannel, PayloadTooLarge]
)
def test_errors_reach_another_process(cls):
    """Celery pickles what a task raises."""
    error = pickle.loads(pickle.dumps(cls("what was wrong")))
    assert type(error) is cls
    assert str(error) == "what was wrong"


async def test_on_an_event_loop_it_says_what_to_call(redis):
    with Publisher(redis) as publisher, pytest.raises(RuntimeError, match=r"await hub\.publish"):
        publisher.publish("room", "hello")


# Settings


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"url": "memory://"}, "nobody outside of this process"),
        ({"url": None}, "is not set"),
        ({"url": "redis://localhost", "backend": Bus}, "or backend="),
        ({"backend": Bus()}, "backend=lambda: Bus"),
        ({"url": "http://localhost"}, "starts with"),
        ({"url": "redis://localhost", "timeout": 0}, "seconds"),
        ({"url": "redis://localhost", "timeout": math.nan}, "not nan"),
        ({"url": "redis://localhost", "timeout": "5"}, "timeout is a number of seconds"),
        ({"url": "redis://localhost", "idle": 0}, "seconds"),
        ({"url": "redis://localhost", "idle": math.nan}, "not nan"),
    ],
)
def test_settings_that_make_no_sense(arguments, says):
    with pytest.raises(ConfigurationError, match=says):
        Publisher(**arguments)


@pytest.mark.parametrize("timeout", [0, -1, math.nan, "5"])
def test_a_timeout_that_makes_no_sense(timeout):
    broker = Broker()
    publisher = Publisher(backend=lambda: Bus(broker))
    with pytest.raises(ConfigurationError, match="timeout is a number of seconds above 0"):
        publisher.publish("room", "hello", timeout=timeout)
    assert broker.calls == []


@pytest.mark.parametrize("timeout", [math.inf, 1e12])
def test_a_timeout_longer_than_a_thread_can_wait(timeout):
    with Publisher(backend=Bus, timeout=timeout) as publisher:
        publisher.publish("room", "hello")
        publisher.publish("room", "hello", timeout=timeout)


def test_a_backend_of_ones_own():
    broker = Broker()
    with Publisher(backend=lambda: Bus(broker)) as publisher:
        publisher.publish("room", "hello")
    assert ("publish", [("default:room", b"hello")]) in broker.calls


# When the broker is away


async def test_a_broker_that_was_restarted_between_two_calls(server):
    with Publisher(server.url) as publisher:
        async with listening(server.url) as got:
            await asyncio.to_thread(publisher.publish, "room", "before")
            await until(lambda: got == ["before"])
        server.kill()
        server.start()
        async with listening(server.url) as got:
            await asyncio.to_thread(publisher.publish, "room", "after")
            await until(lambda: got == ["after"])


async def test_a_broker_that_was_restarted_while_the_program_stood_still(server):
    """The program cannot have noticed when it publishes again."""
    code = """
import os, signal, sys
from starcast import Publisher

publisher = Publisher(sys.argv[1], timeout=20)
publisher.publish("room", "before")
os.kill(os.getpid(), signal.SIGSTOP)
publisher.publish("room", "after")
"""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-c", code, server.url],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    stopped = os.WSTOPPED | os.WNOWAIT
    await asyncio.to_thread(os.waitid, os.P_PID, process.pid, stopped)
    server.kill()
    server.start()
    async with listening(server.url) as got:
        process.send_signal(signal.SIGCONT)
        await until(lambda: got == ["after"])
    assert await process.wait() == 0


async def test_a_publish_waits_for_the_broker_to_come_back(server, caplog):
    with Publisher(server.url, timeout=30) as publisher:
        await asyncio.to_thread(publisher.publish, "room", "before")
        server.kill()
        await until(lambda: "lost the connection" in caplog.text)
        publishing = asyncio.create_task(asyncio.to_thread(publisher.publish, "room", "after"))
        done, _ = await asyncio.wait([publishing], timeout=2.5)  # longer than a hub waits
        assert not done
        server.start()
        await publishing


async def test_a_first_publish_waits_for_the_broker_to_start(server):
    server.kill()
    with Publisher(server.url, timeout=30) as publisher:
        publishing = asyncio.create_task(asyncio.to_thread(publisher.publish, "room", "hello"))
        done, _ = await asyncio.wait([publishing], timeout=0.5)
        assert not done
        server.start()
        await publishing


async def test_without_a_broker_it_raises_in_time_and_says_why(server, caplog):
    with Publisher(server.url, timeout=0.5) as publisher:
        await asyncio.to_thread(publisher.publish, "room", "before", timeout=20)
        server.kill()
        await until(lambda: "lost the connection" in caplog.text)
        began = time.monotonic()
        with pytest.raises(BackendUnavailable, match=r"within 0.5 seconds: "):
            await asyncio.to_thread(publisher.publish, "room", "in vain")
        assert time.monotonic() - began < 0.5 + BUSY
    with Publisher(server.url) as another:
        began = time.monotonic()
        with pytest.raises(BackendUnavailable, match=r"within 0.2 seconds: .*\d"):
            await asyncio.to_thread(another.publish, "room", "in vain", timeout=0.2)
        assert time.monotonic() - began < 0.2 + BUSY


async def test_what_was_given_up_is_not_published_later(server, caplog):
    with Publisher(server.url) as publisher:
        await asyncio.to_thread(publisher.publish, "room", "before")
        server.kill()
        await until(lambda: "lost the connection" in caplog.text)
        with pytest.raises(BackendUnavailable):
            await asyncio.to_thread(publisher.publish, "room", "given up", timeout=0.2)
        server.start()
        async with listening(server.url) as got:
            await asyncio.to_thread(publisher.publish, "room", "after", timeout=20)
            await until(lambda: got)
            assert got == ["after"]


async def test_whoever_is_interrupted_does_not_publish_later():
    code = """
import signal, sys, threading
from starcast import BackendUnavailable, Publisher

publisher = Publisher(sys.argv[1], timeout=20)

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
signal.setitimer(signal.ITIMER_REAL, 0.3)
try:
    publisher.publish("room", "interrupted")
except KeyboardInterrupt:
    print("interrupted", flush=True)
input()
publisher.publish("room", "after")
"""
    with RedisServer() as server:
        server.kill()
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", code, server.url],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert await asyncio.wait_for(process.stdout.readline(), 20) == b"interrupted\n"
        server.start()
        async with listening(server.url) as got:
            await process.communicate(b"\n")
            await until(lambda: got)
            assert got == ["after"]
        assert process.returncode == 0


# Processes


FORK = """
import os, sys
from starcast import Publisher

publisher = Publisher(sys.argv[1])
publisher.publish("room", "parent before")
for number in range(3):
    child = os.fork()
    if child == 0:
        publisher.publish("room", f"child {number}")
        if number == 1:
            sys.exit()  # with everything that a program does at its end
        publisher.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    publisher.publish("room", f"parent {number}")
"""


async def test_parent_and_child_publish_after_a_fork(url):
    async with listening(url) as got:
        await run(FORK, url)
        await until(lambda: len(got) == 7)
    assert got == [
        "parent before",
        *[f"{who} {number}" for number in range(3) for who in ("child", "parent")],
    ]


async def test_a_child_leaves_the_parents_connections_alone():
    """Neither what the child collects nor that it lives on makes a difference to the parent's."""
    code = """
import gc, os, signal, sys
from starcast import Publisher, publisher as module

publisher = Publisher(sys.argv[1])
publisher.publish("room", "before")
child = os.fork()
if child == 0:
    module.inherited.clear()
    del publisher
    gc.collect()
    print("child", flush=True)
    signal.pause()
input()
publisher.publish("room", "after")
print("published", flush=True)
input()
publisher.close()
print("closed", flush=True)
input()
os.kill(child, signal.SIGKILL)
"""
    with RedisServer() as server:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", code, server.url],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

        async def printed() -> bytes:
            return await asyncio.wait_for(process.stdout.readline(), 20)

        assert await printed() == b"child\n"
        connections = {client["id"] for client in server.clients()}
        assert len(connections) == 2
        process.stdin.write(b"\n")
        assert await printed() == b"published\n"
        assert {client["id"] for client in server.clients()} == connections
        process.stdin.write(b"\n")
        assert await printed() == b"closed\n"
        await until(lambda: not server.clients())  # although the child lives
        await process.communicate(b"\n")
        assert process.returncode == 0


async def test_a_fork_that_python_does_not_hear_of(redis):
    """As in uWSGI, unless it is told otherwise."""
    code = """
import ctypes, os, sys
from starcast import Publisher

publisher = Publisher(sys.argv[1])
publisher.publish("room", "before")
if child := ctypes.PyDLL(None).fork():
    assert os.waitpid(child, 0)[1] == 0
    publisher.publish("room", "parent")
    publisher.close()
else:
    publisher.publish("room", "child")
    publisher.close()
    os._exit(0)
"""
    async with listening(redis) as got:
        await run(code, redis)
        await until(lambda: len(got) == 3)
    assert got == ["before", "child", "parent"]


async def test_what_a_child_does_with_its_parents_connections():
    """The steps of a fork without a child, whose lines nobody would count."""
    with RedisServer() as server:
        with Publisher(server.url, idle=0.2) as pub:
            await asyncio.to_thread(pub.publish, "room", "parent")
            module.after_fork()
            parents = module.inherited.pop()
            await until(lambda: not server.clients())  # here they are the only copies
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "getpid", lambda: -1)
                await asyncio.to_thread(pub.publish, "room", "child")
                assert len(module.inherited) == 0
                pub.close()
                parents.stop()
                parents.join(0)
                assert len(threads()) == 1  # that of the parent is the parent's business
        parents.stop()
        parents.join(20)


SPAWN = """
import math
import multiprocessing, sys
from starcast import Publisher

publisher = Publisher(sys.argv[1])

def work(number):
    publisher.publish("room", f"child {number}")

if __name__ == "__main__":
    publisher.publish("room", "parent")
    with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
        pool.map(work, range(10))
        pool.close()
        pool.join()
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
async def test_multiprocessing(url, method, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SPAWN)
    async with listening(url) as got:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, *FLAGS, str(program), url, method],
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        _, error = await asyncio.wait_for(process.communicate(), 60)
        assert (process.returncode, error) == (0, b"")
        await until(lambda: len(got) == 11)
    assert sorted(got) == sorted(["parent", *[f"child {number}" for number in range(10)]])


# The end


EXITS = {
    "at once": "publisher.publish('room', 'last')",
    "by sys.exit": "publisher.publish('room', 'last'); sys.exit(0)",
    "with a thread that is still at work": """
def work():
    threading.main_thread().join()
    for number in range(20):
        publisher.publish("room", str(number))
    publisher.publish("room", "last")

publisher.publish("room", "first")
threading.Thread(target=work).start()
""",
    "in a handler of the end": """
import atexit
publisher.publish("room", "first")
atexit.register(publisher.publish, "room", "last")
""",
    "without the publisher": """
publisher.publish("room", "last")
del publisher
""",
    "with a daemon that never stops": """
def work():
    with contextlib.suppress(BackendUnavailable):
        while True:
            publisher.publish("other", "again")

publisher.publish("room", "first")
threading.Thread(target=work, daemon=True).start()
publisher.publish("room", "last")
""",
}
PROGRAM = """
import contextlib, sys, threading, time
from starcast import BackendUnavailable, Publisher

publisher = Publisher(sys.argv[1])
"""


@pytest.mark.parametrize("how", EXITS)
async def test_a_program_ends_and_nothing_is_lost(url, how):
    async with listening(url) as got:
        program = await start(PROGRAM + EXITS[how], url)
        await until(lambda: got[-1:] == ["last"])
        began = time.monotonic()
        await program.end()
        assert time.monotonic() - began < 2 + BUSY


async def done_or_refused(code: str, url: str) -> None:
    """Python 3.11 starts threads to the end; some later versions do not."""
    async with listening(url) as got:
        printed = await run(PROGRAM + code, url.replace("127.0.0.1", "localhost"))
        if printed:
            assert sys.version_info >= (3, 12)
            assert "cannot start its thread" in printed
        else:
            await until(lambda: got == ["last"])


async def test_a_thread_may_publish_first_when_the_main_thread_has_ended(redis):
    """Then asyncio would not find anybody any more to resolve the host's name."""
    code = """
def work():
    threading.main_thread().join()
    try:
        publisher.publish("room", "last")
    except BackendUnavailable as exc:
        print(exc)

threading.Thread(target=work).start()
"""
    await done_or_refused(code, redis)


async def test_publishers_are_closed_at_the_end(redis):
    pub, another = Publisher(redis), Publisher(redis)
    for each in pub, another:
        await asyncio.to_thread(each.publish, "room", "hello")
    module.at_exit()
    assert threads() == []
    # A later function of the end may still want to publish.
    await asyncio.to_thread(pub.publish, "room", "hello")
    assert len(threads()) == 1
    pub.close()


async def test_a_first_publish_at_the_end_is_done_or_refused(redis):
    code = """
import atexit

@atexit.register
def publish():
    try:
        publisher.publish("room", "last")
    except BackendUnavailable as exc:
        print(exc)
"""
    await done_or_refused(code, redis)


async def test_a_program_ends_while_its_broker_is_frozen(server):
    code = "publisher.publish('room', 'last'); print(flush=True); input()"
    program = await asyncio.create_subprocess_exec(
        *[sys.executable, "-c", PROGRAM + code, server.url],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    await asyncio.wait_for(program.stdout.readline(), 20)
    server.freeze()
    try:
        began = time.monotonic()
        await asyncio.wait_for(program.communicate(b"\n"), 20)
        assert time.monotonic() - began < module.CLOSE_TIMEOUT + BUSY
    finally:
        server.thaw()


async def test_no_thread_can_be_started(redis, monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def publish() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            pub.publish("room", "hello")

    with Publisher(redis) as pub:
        with pytest.raises(BackendUnavailable, match="can't start new thread"):
            await asyncio.to_thread(publish)
        await asyncio.to_thread(pub.publish, "room", "hello")


def test_green_threads_are_refused(redis, monkeypatch):
    with Publisher(redis) as pub:
        with monkeypatch.context() as patch:
            patch.setattr(threading, "get_native_id", lambda: 1)  # a greenlet's is its maker's
            for _ in range(2):
                with pytest.raises(RuntimeError, match="gevent or eventlet"):
                    pub.publish("room", "hello")
        until_sync(lambda: not threads())


# Close


async def test_close_twice_and_publish_after_it(url):
    pub = Publisher(url)
    await asyncio.to_thread(pub.publish, "room", "hello")
    assert len(threads()) == 1
    worker = pub._worker
    pub.close()
    assert threads() == []
    pub.close()
    with pytest.raises(BackendUnavailable, match="the publisher is closed"):
        worker.publish("room", "hello", 5)  # on another thread, in this very moment
    with pytest.raises(BackendUnavailable, match="the publisher is closed"):
        await asyncio.to_thread(pub.publish, "room", "hello")
    assert threads() == []


def test_close_before_anything_was_published(redis):
    with Publisher(redis) as pub:
        pass
    with pytest.raises(BackendUnavailable, match="the publisher is closed"):
        pub.publish("room", "hello")


async def test_close_waits_for_what_is_being_published():
    broker = Broker()
    pub = Publisher(backend=lambda: Bus(broker))
    await asyncio.to_thread(pub.publish, "room", "first")
    broker.open.clear()
    publishing = asyncio.create_task(asyncio.to_thread(pub.publish, "room", "second"))
    await until(lambda: broker.stalled)
    worker = pub._worker
    closing = asyncio.create_task(asyncio.to_thread(pub.close))
    await until(worker._stop.is_set)
    with pytest.raises(BackendUnavailable, match="the publisher is closed"):  # it had the worker
        await asyncio.to_thread(
            worker.publish, Event("room", "third"), 5
        )  # it had the worker already
    worker._loop.call_soon_threadsafe(broker.open.set)  # where it is waited for
    await closing
    await publishing


async def test_close_tells_whoever_waits_for_a_connection():
    with RedisServer() as server:
        server.kill()
        pub = Publisher(server.url, timeout=60)
        publishing = asyncio.create_task(asyncio.to_thread(pub.publish, "room", "hello"))
        await until(lambda: pub._worker is not None and pub._worker._error)
        await asyncio.to_thread(pub.close)
        with pytest.raises(BackendUnavailable, match="the publisher is closed"):
            await publishing


async def test_close_while_it_connects():
    """To a server that takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pub = Publisher(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout=60)
        publishing = asyncio.create_task(asyncio.to_thread(pub.publish, "room", "hello"))
        connection, _ = await asyncio.to_thread(silent.accept)
        with connection:
            await asyncio.to_thread(pub.close)
            assert threads() == []
            with pytest.raises(BackendUnavailable, match="the publisher is closed"):
                await publishing


async def test_close_while_many_threads_publish(url):
    pub = Publisher(url)
    begun = []

    def publish(thread: int) -> str:
        try:
            while True:
                pub.publish("room", "again")
                begun.append(thread)
        except BackendUnavailable as exc:
            return str(exc)

    with ThreadPoolExecutor(8) as pool:
        ends = [pool.submit(publish, thread) for thread in range(8)]
        await until(lambda: len(set(begun)) == 8)
        await asyncio.to_thread(pub.close)
        began = time.monotonic()
        for end in ends:
            assert "closed" in await asyncio.wrap_future(end)
        assert time.monotonic() - began < module.TIMEOUT - 1


async def test_a_publisher_that_nobody_has_any_more(redis):
    pub = Publisher(redis)
    await asyncio.to_thread(pub.publish, "room", "hello")
    gone = weakref.ref(pub)
    del pub
    gc.collect()
    assert gone() is None
    await until(lambda: not threads())


async def test_an_idle_connection_is_closed_and_opened_again():
    with RedisServer() as server, Publisher(server.url, idle=0.2) as pub:
        async with listening(server.url) as got:
            mine = {client["id"] for client in server.clients()}
            for message in ("first", "second"):
                await asyncio.to_thread(pub.publish, "room", message)
                assert len(server.clients()) == 4
                await until(lambda: {client["id"] for client in server.clients()} == mine)
            await until(lambda: got == ["first", "second"])
        assert len(threads()) == 1


async def test_a_connection_that_is_waited_for_is_not_idle():
    broker, buses = Broker(), []

    def make() -> Bus:
        buses.append(Bus(broker))
        return buses[-1]

    with Publisher(backend=make, idle=1) as pub:
        await asyncio.to_thread(pub.publish, "room", "first")
        broker.open.clear()
        publishing = asyncio.create_task(asyncio.to_thread(pub.publish, "room", "second"))
        done, _ = await asyncio.wait([publishing], timeout=1.3)
        assert broker.stalled
        assert not done
        pub._worker._loop.call_soon_threadsafe(broker.open.set)
        await publishing
        await asyncio.to_thread(pub.publish, "room", "third")
    assert [bus.connects for bus in buses] == [0, 1]  # the first only had its settings checked


async def test_a_connection_that_is_never_idle():
    with RedisServer() as server, Publisher(server.url, idle=None) as pub:
        await asyncio.to_thread(pub.publish, "room", "hello")
        assert len(server.clients()) == 2
