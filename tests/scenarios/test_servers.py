"""Other ASGI servers than uvicorn: each in a process of its own, with real clients.

Nothing here knows a server. What is promised must hold wherever ASGI is spoken.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from server_process import ServerProcess
from starcast import close_codes
from starcast.servers.daphne import OFFSET
from support import DEADLINE

pytestmark = pytest.mark.anyio

APP = "served_app:app"
SERVERS = {
    "hypercorn": ["hypercorn", "--graceful-timeout", "1", "--bind", "127.0.0.1:{port}", APP],
    "granian": ["granian", "--interface", "asgi", "--port", "{port}", APP],
    "daphne": ["daphne", "--bind", "127.0.0.1", "--port", "{port}", APP],
}

# What the servers themselves do not do.
TELLS_NO_CODE = {"hypercorn"}  # what a client closes with; the app is told 1006
SENDS_NO_REASON = {"daphne"}  # of a close
# From Python 3.12 on, hypercorn 0.18 never ends while a client is there, whatever the app.
END = [name for name in SERVERS if name != "hypercorn" or sys.version_info < (3, 12)]
# All that the library itself sends.
CLOSE_CODES = sorted(
    code
    for name, code in vars(close_codes).items()
    if name.isupper() and name not in ("NO_STATUS", "ABNORMAL")  # which are never sent
)
NEVER_SUSPENDS = {"daphne"}  # a send, whoever does not read: it keeps everything itself


class Process(ServerProcess):
    """A server with the app."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        super().__init__(SERVERS[name], log)

    async def until(self, channel: str, **expected) -> None:
        """Wait until the hub is in this state: see `served_app.state`."""
        said: dict = {}
        with contextlib.suppress(TimeoutError):
            async with self.connect("/state") as asking, asyncio.timeout(DEADLINE):
                while said != expected:
                    await asking.send(channel)
                    everything = json.loads(await asking.recv())
                    said = {name: everything[name] for name in expected}
        assert said == expected


@pytest.fixture(params=SERVERS, scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory) -> Iterator[Process]:
    """One for all tests: each has channels of its own and leaves nobody behind."""
    process = Process(request.param, tmp_path_factory.mktemp("server") / "log")
    yield process
    process.kill()
    assert "Traceback" not in process.log, process.log


# Of a client that takes one message and no more.
NOT_READING = {"max_queue": 1, "compression": None, "ping_interval": None}


def small_socket(server: Process) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    return sock


async def read(client, count: int) -> list[str | bytes]:
    return [await asyncio.wait_for(client.recv(), DEADLINE) for _ in range(count)]


async def read_all(client) -> tuple[list[str | bytes], int, str]:
    """Everything until the end, and the close code and reason; 1006 if there was no close frame."""
    got: list[str | bytes] = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            got += await read(client, 1)
    return got, client.close_code, client.close_reason


async def test_what_is_published_arrives_in_order(server):
    async with (
        server.connect("/ws/a") as one,
        server.connect("/ws/a") as two,
        server.connect("/ws/a", compression=None) as three,
        server.connect("/ws/b") as elsewhere,
    ):
        await server.until("", channels={"a": 3, "b": 1})
        await one.send("others but not me")
        await one.send("me alone")
        await one.send("own message")
        await one.send(b"\0\xff")
        await one.send("x" * 70_000)
        assert await read(one, 5) == [
            "me alone",
            "before it",
            "own message",
            b"\0\xff",
            "x" * 70_000,
        ]
        everybody = [one, two, three]
        for other in everybody[1:]:
            expected = ["others but not me", "before it", b"\0\xff", "x" * 70_000]
            assert await read(other, 4) == expected
        await one.send("burst 1000")
        for client in everybody:
            assert await read(client, 1000) == [str(number) for number in range(1000)]

        for number in range(100):  # three publishers at once
            for name, client in zip("123", everybody, strict=True):
                await client.send(f"{name} {number}")
        first = await read(one, 300)
        assert await read(two, 300) == first
        assert await read(three, 300) == first
        for name in "123":
            its = [text for text in first if text[0] == name]
            assert its == [f"{name} {number}" for number in range(100)]

        await elsewhere.send("nobody else")
        assert await read(elsewhere, 1) == ["nobody else"]
    await server.until("a", channels={})


async def test_clients_come_and_go(server):
    async with server.connect("/ws/come") as healthy:
        says_goodbye = await server.connect("/ws/come")
        vanishes = await server.connect("/ws/come")
        is_closed = await server.connect("/ws/come")
        await server.until("come", here=4)

        await says_goodbye.close(4001)
        codes = [1006 if server.name in TELLS_NO_CODE else 4001, 4000]
        await server.until("come", here=3, ended=codes[:1])
        await is_closed.send("close me")
        reason = "" if server.name in SENDS_NO_REASON else "enough"
        assert await read_all(is_closed) == (["bye"], 4000, reason)
        await server.until("come", here=2, ended=codes)
        vanishes.transport.abort()
        await vanishes.wait_closed()
        await healthy.send("hello")
        assert await read(healthy, 2) == ["bye", "hello"]
        await server.until("come", here=1)

        with pytest.raises(InvalidStatus) as caught:
            await server.connect("/ws/come", origin="https://elsewhere.example")
        assert caught.value.response.status_code == 403
        await healthy.send("still here")
        assert await read(healthy, 1) == ["still here"]
    await server.until("come", here=0, channels={})


async def test_clients_whose_handlers_end_are_forgotten(server):
    clients = [await server.connect(f"/dies/user-{number}") for number in range(50)]
    lives = await server.connect("/dies/user-lives")
    users = {f"user-{number}": 1 for number in range(50)}
    await server.until("user-lives", channels={**users, "user-lives": 1})
    for number, client in enumerate(clients):
        if number % 2:
            await client.send("go")
        else:
            await client.close()
    await server.until("user-lives", channels={"user-lives": 1})
    await lives.close()
    await server.until("user-lives", channels={})
    await asyncio.gather(*(client.close() for client in clients))


async def test_every_close_code_closes(server):
    for code in CLOSE_CODES:
        expected = code + OFFSET if server.name == "daphne" and code > 1000 else code
        async with server.connect("/ws/codes") as client:
            await client.send(f"code {code}")
            assert await read_all(client) == ([], expected, "")
        async with server.connect(f"/never/{code}") as client:
            assert await read_all(client) == ([], expected, "")
    await server.until("codes", here=0, ended=CLOSE_CODES)
    async with server.connect("/members") as client:  # refused with a close frame
        expected = (4008, "") if server.name == "daphne" else (1008, "log in")
        assert await read_all(client) == ([], *expected)


async def test_a_client_that_does_not_read_delays_nobody(server):
    dead = await server.connect("/ws/slow", sock=small_socket(server), **NOT_READING)
    async with server.connect("/ws/slow", compression=None) as healthy:
        await server.until("slow", here=2)
        message = "x" * 256 * 1024
        for _ in range(40):  # more than the sockets and its outbox in the hub hold
            await healthy.send(message)
            assert await read(healthy, 1) == [message]
        if server.name not in NEVER_SUSPENDS:
            await server.until("slow", here=1, ended=[1013])
    dead.transport.abort()
    await dead.wait_closed()
    await server.until("slow", here=0, channels={})


async def test_a_client_that_does_not_read_is_gone_although_its_channel_is_silent(server):
    """The servers give nobody up who stays; the hub does, after a while without progress."""
    if server.name in NEVER_SUSPENDS:
        pytest.skip("this server keeps everything itself")
    dead = await server.connect("/impatient/silent", sock=small_socket(server), **NOT_READING)
    async with server.connect("/impatient/silent", compression=None) as healthy:
        await server.until("silent", here=2)
        async with server.connect("/state") as asking:
            for _ in range(80):
                await healthy.send("x" * 128 * 1024)
                await read(healthy, 1)
                await asking.send("silent")
                if json.loads(await asking.recv())["behind"]:
                    break
        await server.until("silent", here=1, ended=[1006])
        await healthy.send("still here")
        assert await read(healthy, 1) == ["still here"]
    dead.transport.abort()
    await dead.wait_closed()


@pytest.mark.parametrize("name", END)
async def test_shutdown_with_open_clients(name, tmp_path):
    server = Process(name, tmp_path / "log")
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(server.kill)
        clients = [await stack.enter_async_context(server.connect("/ws/a")) for _ in range(5)]
        await server.until("a", here=5)
        await clients[0].send("the last")
        for client in clients:
            assert await read(client, 1) == ["the last"]
        readers = asyncio.gather(*map(read_all, clients))
        await asyncio.to_thread(server.stop)
        assert [got for got, _, _ in await readers] == [[]] * 5
