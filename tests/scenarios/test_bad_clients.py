"""What one client does to the others on `starcast.uvicorn:BroadcastProtocol`: nothing.

docs/reference/faults.md, 28 and 29, and what a client may send that is no WebSocket. Raw sockets,
real servers; a server that is to be ended runs in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import random
import signal
import socket
import ssl
import struct
import sys
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import websockets
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from server_process import ServerProcess
from starcast import Broadcast, frames
from starcast.servers import reading
from support import DEADLINE, starcast_tasks, until
from test_frames import CLOSE, CONTINUATION, PING, PONG
from test_uvicorn import KIB, PROTOCOL, App, Client, certificate, masked, read, read_all

pytestmark = pytest.mark.anyio
__all__ = ["certificate"]  # a fixture

# Seconds that one client may keep the event loop from all others: twice the 50 ms of a quiet
# machine, because a busy one takes longer for the same work. It is several times more where each
# line is traced, and in asyncio's debug mode.
# Slices of 2 ms make this about 5 ms; without them it was 50 to 200.
MAX_LAG = 0.1 if sys.gettrace() or os.environ.get("PYTHONASYNCIODEBUG") else 0.03
MAX_MEMORY = 2048 * KIB
EMPTY_PING = masked(b"", PING)
FRAGMENT = masked(b"", frames.TEXT, 0)
EMPTY_FRAGMENT = masked(b"", CONTINUATION, 0)
NORMAL = struct.pack("!H", 1000)


@pytest.fixture(params=["auto", PROTOCOL], ids=["adopted", "protocol"])
async def start(serve, anyio_backend, request):
    yield functools.partial(serve, ws=request.param)
    await until(lambda: not starcast_tasks())


def protocol_of(server, client: Client):
    """uvicorn's protocol object of the client."""
    address = client.sock.getsockname()
    (protocol,) = (p for p in server.server.server_state.connections if p.client == address)
    return protocol


async def leave_unsent(app: App, protocol, full: bool = False) -> None:
    """Let something wait for a client that does not read, or more than its buffer takes."""
    while not protocol.transport.get_write_buffer_size() or (full and protocol.writable.is_set()):
        await app.hub.publish("x", "x" * 8 * KIB)


# Row 28: a client that leaves with bytes unsent


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("how", ["half-closes", "closes"])
async def test_a_client_that_leaves_without_having_read_everything(start, how, full):
    app = App()
    server = await start(app)
    async with server.connect("/ws/y") as healthy:
        dead = await Client.connect(server, small=True)
        await until(lambda: len(app.hub) == 2)
        protocol = protocol_of(server, dead)
        protocol.close_timeout = 0.3
        its_socket = protocol.transport.get_extra_info("socket")
        await leave_unsent(app, protocol, full)
        if how == "closes":
            await dead.send(NORMAL, CLOSE)
        else:
            dead.sock.shutdown(socket.SHUT_WR)
        await until(lambda: app.hub.channels == {"y": 1}, 2)
        assert app.ended == [1000 if how == "closes" else 1005]
        await until(lambda: its_socket.fileno() == -1, 3)
        await app.hub.publish("y", "alive")
        assert await healthy.recv() == "alive"
    dead.close()


async def test_a_client_that_half_closes_and_reads_on_gets_everything(start):
    app = App()
    server = await start(app)
    client = await Client.connect(server, small=True)
    await until(lambda: app.websockets)
    protocol = protocol_of(server, client)
    await leave_unsent(app, protocol)
    sent = app.hub.stats().delivered
    client.sock.shutdown(socket.SHUT_WR)
    await until(lambda: app.ended)
    assert len(await client.rest()) == sent
    await until(lambda: not server.server.server_state.connections)
    client.close()


@pytest.mark.parametrize("how", ["half-closes", "closes"])
async def test_it_over_tls(start, certificate, how):
    cert, key = certificate
    app = App()
    server = await start(app, send_buffer=4 * KIB, ssl_certfile=str(cert), ssl_keyfile=str(key))
    raw = socket.create_connection(("127.0.0.1", server.port))
    context = ssl.create_default_context(cafile=str(cert))
    url = f"wss://127.0.0.1:{server.port}/ws/x"
    dead = await websockets.connect(url, sock=raw, ssl=context, compression=None, proxy=None)
    dead.transport.pause_reading()
    await until(lambda: len(app.hub) == 1)
    (protocol,) = server.server.server_state.connections
    protocol.close_timeout = 0.3
    its_socket = protocol.transport.get_extra_info("socket")
    while protocol.writable.is_set():
        await app.hub.publish("x", "x" * 64 * KIB)
    if how == "closes":
        dead.transport.write(masked(NORMAL, CLOSE))
    else:
        dead.transport.get_extra_info("socket").shutdown(socket.SHUT_WR)
    await until(lambda: len(app.hub) == 0, 2)
    await until(lambda: its_socket.fileno() == -1, 3)
    dead.transport.abort()
    await dead.wait_closed()


def handshake(path: str) -> str:
    """A request without its last line."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        "Sec-WebSocket-Version: 13\r\n"
    )


class Bad:
    """A client of a server process, with a plain or a TLS socket, which never reads by itself."""

    def __init__(self, process: ServerProcess, tls: ssl.SSLContext | None) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
        sock.settimeout(DEADLINE)
        sock.connect(("127.0.0.1", process.port))
        self.sock = tls.wrap_socket(sock, server_hostname="127.0.0.1") if tls else sock

    def request(self, path: str, more: str = "", after: bytes = b"") -> None:
        head = handshake(path) + more
        self.sock.sendall(head.encode() + b"\r\n" + after)

    def opens(self, path: str) -> None:
        self.request(path)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self.sock.recv(1)
        assert answer.startswith(b"HTTP/1.1 101 ")
        if path != "/ws/nothing":  # something has come that is not read
            self.sock.recv(1)

    def half_closes(self, unread: str = "little") -> None:
        self.opens(f"/ws/{unread}")
        socket.socket.shutdown(self.sock, socket.SHUT_WR)

    def half_closes_with_a_full_buffer(self) -> None:
        self.half_closes("much")

    def closes(self, unread: str = "little") -> None:
        self.opens(f"/ws/{unread}")
        self.sock.sendall(masked(NORMAL, CLOSE))

    def closes_with_a_full_buffer(self) -> None:
        self.closes("much")

    def says_nothing(self) -> None:
        self.opens("/ws/much")

    def pings(self) -> None:
        self.opens("/ws/nothing")
        self.sock.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while True:
                self.sock.sendall(masked(bytes(125), PING) * 1000)

    def breaks_the_protocol(self) -> None:
        self.opens("/ws/little")
        self.sock.sendall(b"no frame")

    def is_closed_and_does_not_read(self) -> None:
        self.opens("/closes")

    def outlives_its_app(self) -> None:
        self.opens("/ends")

    def waits_to_be_accepted(self) -> None:
        self.request("/waits")

    def speaks_before_it_is_accepted(self) -> None:
        self.request("/waits", after=b"no frame")

    def has_too_many_headers(self) -> None:
        self.request("/ws/nothing", "".join(f"X-{number}: y\r\n" for number in range(200)))


BAD = [name for name in vars(Bad) if not name.startswith("_") and name not in ("request", "opens")]


@pytest.mark.parametrize("how", ["asyncio", "uvloop", "tls"])
async def test_a_shutdown_is_orderly_whatever_the_clients_do(certificate, how, tmp_path):
    cert, key = map(str, certificate)
    command = ["uvicorn", "--port", "{port}", "--ws", "bad_clients_app:Protocol"]
    tls = None
    if how == "tls":
        command += ["--ssl-certfile", cert, "--ssl-keyfile", key]
        tls = ssl.create_default_context(cafile=cert)
    command += ["--loop", "uvloop" if how == "uvloop" else "asyncio", "bad_clients_app:app"]
    # In debug mode asyncio logs a TLS handshake that is broken off, as by who looks at the port.
    process = ServerProcess(command, tmp_path / "log", PYTHONASYNCIODEBUG="")
    bad = []
    try:
        url = f"{'wss' if tls else 'ws'}://127.0.0.1:{process.port}/ws/nothing"
        options = {"proxy": None, **({"ssl": tls} if tls else {})}
        healthy = [await websockets.connect(url, **options) for _ in range(5)]
        for name in BAD:
            client = await asyncio.to_thread(Bad, process, tls)
            bad.append(client)
            await asyncio.to_thread(getattr(client, name))
        process.process.send_signal(signal.SIGTERM)
        for client in healthy:
            assert await read_all(client) == ([], 1012)
        await until(lambda: process.process.poll() is not None, 5)
        assert process.process.returncode == -signal.SIGTERM
    finally:
        process.kill()
        for client in bad:
            client.sock.close()
    assert "the lifespan has ended" in process.log
    assert "Traceback" not in process.log
    assert "ERROR" not in process.log


# Row 29: a client that asks for more than it reads, or sends what costs more than it weighs


class Lag:
    """Time of the processor between two turns of the event loop, at most, in seconds."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def __aenter__(self) -> Lag:
        gc.disable()  # it would look at all that other tests have left in this process
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        gc.enable()

    async def _watch(self) -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0)
            self.worst = max(self.worst, time.thread_time() - before)


@contextlib.asynccontextmanager
async def flooding(server, app: App) -> AsyncIterator[tuple[Client, Any]]:
    """A client that sends pings and reads nothing, once the server reads no more of it."""
    dead = await Client.connect(server, small=True)
    await until(lambda: len(app.hub) == 1)
    protocol = protocol_of(server, dead)
    flood = masked(bytes(125), PING) * 200_000  # 25 MiB: more than the sockets take
    sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(dead.sock, flood))
    await until(lambda: not protocol.writable.is_set() or sending.done())
    await until(lambda: not protocol.transport.is_reading() or sending.done())
    assert not sending.done()
    try:
        yield dead, protocol
    finally:
        sending.cancel()
        dead.close()


async def test_a_client_that_floods_pings_and_reads_nothing_is_not_read_either(start):
    app = App()
    server = await start(app)
    async with flooding(server, app) as (dead, protocol):
        held = protocol.transport.get_write_buffer_size() + len(protocol.conn.reader.buffer)
        assert held < MAX_MEMORY / 2
        async with server.connect("/ws/x") as healthy:
            await until(lambda: len(app.hub) == 2)
            await app.hub.publish("x", "alive")
            assert await healthy.recv() == "alive"
        while not protocol.transport.is_reading():  # until it has read its pongs
            assert (await dead.frame()).opcode in (PONG, frames.TEXT)
    await until(lambda: len(app.hub) == 0)


async def test_a_client_whose_pongs_wait_keeps_alive_by_reading(start):
    """Its answer to the server's ping may stand behind its own pings, which are not read."""
    app = App()
    server = await start(app, send_buffer=4 * KIB, ws_ping_interval=1000, ws_ping_timeout=1000)
    async with flooding(server, app) as (slow, protocol):
        protocol.send_keepalive_ping()
        for _ in range(2):
            unsent = protocol.transport.get_write_buffer_size()
            while protocol.transport.get_write_buffer_size() == unsent:
                await slow.frame()
            assert not protocol.transport.is_reading()
            protocol.pong_timer.cancel()
            protocol.keepalive_timeout()
            assert not protocol.transport.is_closing()
        protocol.pong_timer.cancel()
        protocol.keepalive_timeout()  # it has read nothing more
        assert protocol.transport.is_closing()
        await until(lambda: not server.server.server_state.connections)


async def test_a_client_whose_messages_are_taken_slowly_keeps_alive_by_them(start):
    """Its answer to the server's ping stands behind messages for which its room has no space."""
    app = App()
    server = await start(app, ws_ping_interval=1000, ws_ping_timeout=1000)
    client = await Client.connect(server)
    await until(lambda: app.websockets)
    protocol = protocol_of(server, client)
    protocol.send_keepalive_ping()
    for _ in range(2):
        await client.send(b"hello")
        await until(lambda: app.asked == ["hello"])
        app.asked.clear()
        protocol.pong_timer.cancel()
        protocol.keepalive_timeout()
        assert not protocol.transport.is_closing()
    protocol.pong_timer.cancel()
    protocol.keepalive_timeout()  # nothing more has come
    assert protocol.transport.is_closing()
    await until(lambda: not server.server.server_state.connections)
    client.close()


async def test_a_client_that_does_not_read_messages_is_heard_all_the_same(start):
    """Else a client that sends all it has before it reads would wait for ever."""
    app = App()
    server = await start(app)
    client = await Client.connect(server, small=True)
    await until(lambda: app.websockets)
    await leave_unsent(app, protocol_of(server, client), full=True)
    await client.send(b"hello")
    await until(lambda: app.asked == ["hello"])
    await client.send(NORMAL, CLOSE)
    await until(lambda: app.ended == [1000])
    await client.rest()
    client.close()


TEXTS = [str(number) for number in range(5_000)]
SMALL: dict[str, tuple[bytes, list[str], int]] = {  # what is sent, what the app gets of it, its end
    "pings": (EMPTY_PING * 40_000, [], 1000),
    "messages": (b"".join(masked(text.encode(), frames.TEXT) for text in TEXTS), TEXTS, 1000),
    "a large one first": (
        masked(b"x" * 30 * KIB, frames.TEXT) + EMPTY_PING * 35_000,
        ["x" * 30 * KIB],
        1000,
    ),
    "fragments": (FRAGMENT + EMPTY_FRAGMENT * 20_000, [], 1002),
    "fragments and pings": (FRAGMENT + (EMPTY_FRAGMENT + EMPTY_PING) * 10_000, [], 1002),
    "fragments of a byte": (FRAGMENT + masked(b"x", CONTINUATION, 0) * 20_000, [], 1002),
}


async def discard(sock: socket.socket) -> None:
    """Take what comes, without the time that it would take to look at it."""
    with contextlib.suppress(ConnectionError):
        while await asyncio.get_running_loop().sock_recv(sock, 64 * KIB):
            pass


@pytest.mark.parametrize("what", SMALL)
async def test_many_small_frames_do_not_stop_the_loop(start, what):
    sent, asked, code = SMALL[what]
    app = App()
    server = await start(app)
    bad = await Client.connect(server)
    await until(lambda: app.websockets)
    reading = asyncio.create_task(discard(bad.sock))
    async with Lag() as lag:
        with contextlib.suppress(ConnectionError):
            sent += masked(NORMAL, CLOSE)
            await asyncio.get_running_loop().sock_sendall(bad.sock, sent)
        await until(lambda: app.ended)
    assert lag.worst < MAX_LAG
    assert app.asked == asked
    assert app.ended == [code]
    await reading
    bad.close()


async def test_a_large_message_is_parsed_in_few_pieces(start, monkeypatch):
    """However many reads a large frame takes, the parser of websockets gets it once."""
    calls: list[type] = []

    def count(cls: type) -> None:
        received = vars(cls)["data_received"]

        def data_received(self: Any, data: bytes) -> None:
            calls.append(cls)
            received(self, data)

        monkeypatch.setattr(cls, "data_received", data_received)

    app = App()
    client = await Client.connect(await start(app))
    await until(lambda: app.websockets)
    uvicorns = reading.WebSocketsSansIOProtocol
    count(reading.ReadingProtocol)
    count(uvicorns)
    sent = FRAGMENT + masked(b"x" * 400 * KIB, CONTINUATION)
    await asyncio.get_running_loop().sock_sendall(client.sock, sent)
    await until(lambda: app.asked)
    assert app.asked == ["x" * 400 * KIB]
    assert calls.count(reading.ReadingProtocol) > 2
    assert calls.count(uvicorns) == 2
    client.close()


async def test_a_message_in_many_fragments_with_pings_in_between(start):
    app = App()
    server = await start(app)
    client = await Client.connect(server)
    part = masked("\u20ac".encode()[:2], CONTINUATION, 0) + masked(b"", PING)
    part += masked("\u20ac".encode()[2:], CONTINUATION, 0)
    count = 5000  # more fragments than are kept apart
    sent = FRAGMENT + part * count + masked(b"!", CONTINUATION)
    await asyncio.get_running_loop().sock_sendall(client.sock, sent)
    await until(lambda: app.asked)
    assert app.asked == ["\u20ac" * count + "!"]
    for _ in range(count):
        assert (await client.frame()).opcode == PONG
    client.close()


async def test_fragments_after_a_close_are_discarded(start):
    app = App()
    server = await start(app)
    client = await Client.connect(server)
    await until(lambda: app.websockets)
    await app.websockets[0].close(4000)
    await client.send(b"too ", frames.TEXT, 0)
    await client.send(b"late", CONTINUATION)
    await client.send(struct.pack("!H", 4000), CLOSE)
    assert [frame.opcode for frame in await client.rest()] == [CLOSE]
    await until(lambda: not server.server.server_state.connections)
    assert app.asked == []
    client.close()


async def test_endless_empty_fragments_take_no_memory(start):
    app = App()
    server = await start(app)
    client = await Client.connect(server)
    await until(lambda: app.websockets)
    protocol = protocol_of(server, client)
    for _ in range(10):
        sent = (FRAGMENT if not protocol.frames else b"") + EMPTY_FRAGMENT * 5000 + EMPTY_PING
        await asyncio.get_running_loop().sock_sendall(client.sock, sent)
        assert (await client.frame()).opcode == PONG
        assert 0 < len(protocol.frames) < 5000
    await client.send(b"the end", CONTINUATION)
    await until(lambda: app.asked == ["the end"])
    client.close()


async def test_what_the_app_has_not_received_is_not_parsed_either(start):
    """And once the app closes the client, the rest is read until the client's close frame."""
    hub = Broadcast()
    close = asyncio.Event()

    async def endpoint(websocket: WebSocket) -> None:
        await hub.connect(websocket)
        await close.wait()
        await websocket.close(4000)

    server = await start(Starlette(routes=[WebSocketRoute("/ws", endpoint)]))
    client = await Client.connect(server, "/ws")
    await until(lambda: len(hub) == 1)
    protocol = protocol_of(server, client)
    sent = masked(b"x", frames.TEXT) * 20_000 + masked(NORMAL, CLOSE)
    sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(client.sock, sent))
    await until(lambda: not protocol.transport.is_reading())
    assert protocol.queue.qsize() < 2 * reading.MAX_QUEUED + 100
    close.set()
    assert [frame.payload for frame in await client.rest()] == [struct.pack("!H", 4000)]
    await sending
    await until(lambda: not server.server.server_state.connections)
    client.close()


# What is no WebSocket


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-12)
    return compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)[:-4]


NOT_UTF_8 = deflated(b"\xff" * 100)
FAULTS: dict[str, tuple[bytes, int]] = {
    # Not UTF-8
    "a byte": (masked(b"hell\xff", frames.TEXT), 1007),
    "half a character": (masked(b"\xe2\x82", frames.TEXT), 1007),
    "a surrogate": (masked(b"\xed\xa0\x80", frames.TEXT), 1007),
    "in fragments": (masked(b"\xe2", frames.TEXT, 0) + masked(b"(", CONTINUATION), 1007),
    "compressed": (masked(NOT_UTF_8, frames.TEXT, 0xC0), 1007),
    "compressed fragments": (
        masked(NOT_UTF_8[:3], frames.TEXT, 0x40) + masked(NOT_UTF_8[3:], CONTINUATION),
        1007,
    ),
    "a close reason": (masked(NORMAL + b"\xff", CLOSE), 1007),
    "more behind it": (masked(b"\xff", frames.TEXT) + masked(b"x", frames.TEXT) * 9, 1007),
    # Not the protocol
    "an unknown opcode": (masked(b"", 3), 1002),
    "reserved bits": (masked(b"x", frames.TEXT, 0xB0), 1002),
    "a long control frame": (masked(bytes(126), PING), 1002),
    "a fragmented control frame": (masked(b"", PING, 0), 1002),
    "a compressed control frame": (masked(b"", PING, 0xC0), 1002),
    "half a close code": (masked(b"x", CLOSE), 1002),
    "a close code of nobody": (masked(struct.pack("!H", 1005), CLOSE), 1002),
    "no mask": (frames.make(frames.TEXT, b"x"), 1002),
    "nothing to continue": (masked(b"x", CONTINUATION), 1002),
    "a message inside another": (masked(b"x", frames.TEXT, 0) + masked(b"x", frames.TEXT), 1002),
    "a close inside a message": (masked(b"x", frames.TEXT, 0) + masked(NORMAL, CLOSE), 1002),
    "nothing compressed": (masked(b"nonsense", frames.TEXT, 0xC0), 1002),
    "too large": (b"\x81\xff" + b"\xff" * 12, 1009),
}


@pytest.fixture
def no_traceback(caplog) -> Iterator[None]:
    yield
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


async def test_a_fault_is_a_close_code_and_one_line(start, caplog, no_traceback):
    app = App()
    server = await start(app)
    loop = asyncio.get_running_loop()
    async with server.connect("/ws/x") as healthy:
        for what, (sent, code) in FAULTS.items():
            bad = await Client.connect(server, window=12)
            await until(lambda: len(app.hub) == 2)
            address = ":".join(map(str, bad.sock.getsockname()))
            await loop.sock_sendall(bad.sock, sent)
            got = [(frame.opcode, frame.payload[:2]) for frame in await bad.rest()]
            assert got == [(CLOSE, struct.pack("!H", code))], what
            await until(lambda: len(app.hub) == 1)
            await app.hub.publish("x", what)
            assert await healthy.recv() == what
            (line,) = [record for record in caplog.records if record.name == "starcast"]
            assert line.levelname == "WARNING"
            assert line.getMessage().startswith(f"closed the client {address} with {code}: ")
            assert not line.exc_info
            caplog.clear()
            bad.close()
        assert app.asked == []
        assert app.ended == [code for _, code in FAULTS.values()]
        await until(lambda: len(server.server.server_state.connections) == 1)


async def test_a_fault_right_before_a_close_frame(start, no_traceback):
    """What comes first counts, although both are read at once."""
    app = App()
    server = await start(app)
    bad = await Client.connect(server)
    await until(lambda: app.websockets)
    sent = masked(b"\xff", frames.TEXT) + masked(NORMAL, CLOSE) + masked(b"x", frames.TEXT)
    await asyncio.get_running_loop().sock_sendall(bad.sock, sent)
    assert [frame.payload[:2] for frame in await bad.rest()] == [struct.pack("!H", 1007)]
    await until(lambda: app.ended == [1007])
    await until(lambda: not server.server.server_state.connections)
    bad.close()


async def answer(server, sent: bytes) -> bytes:
    """Everything that a server says to it until it closes the connection."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setblocking(False)
    got = b""
    with contextlib.closing(sock), contextlib.suppress(ConnectionError):
        await loop.sock_connect(sock, ("127.0.0.1", server.port))
        await loop.sock_sendall(sock, sent)
        async with asyncio.timeout(DEADLINE):
            while data := await loop.sock_recv(sock, 64 * KIB):
                got += data
    return got


@pytest.mark.parametrize("start", [PROTOCOL], indirect=True)  # nobody is adopted so early
@pytest.mark.parametrize(
    ("target", "headers", "status"),
    [("/ws/x", 200, 431), ("/ws/x?" + "x" * 9000, 0, 414), ("/ws/x", -1, 400)],
)
async def test_a_handshake_that_cannot_be_parsed_is_answered(
    start, no_traceback, target, headers, status
):
    app = App()
    server = await start(app)
    request = handshake(target) + "X: y\r\n" * headers
    if headers < 0:
        request = request.replace("Sec-WebSocket-Key: AAAA", "Sec-WebSocket-Key: ")
    got = await answer(server, request.encode() + b"\r\n")
    assert got.startswith(f"HTTP/1.1 {status} ".encode())
    await until(lambda: not server.server.server_state.connections)
    assert app.websockets == []


EARLY = {
    "no frame": b"no frame",
    "not UTF-8": masked(b"\xff", frames.TEXT),
    "a close frame": masked(NORMAL, CLOSE),
    "pings whose pongs it does not read": masked(bytes(125), PING) * 200 + masked(NORMAL, CLOSE),
    "an end": b"",
}


def then_set(event, call):
    """Return a function that sets the event after the call, before the loop does anything else."""

    def both(*arguments):
        try:
            return call(*arguments)
        finally:
            event.set()

    return both


@pytest.mark.parametrize("start", [PROTOCOL], indirect=True)  # nobody is adopted so early
@pytest.mark.parametrize("then", ["accepts", "returns", "raises"])
async def test_a_client_that_speaks_before_it_is_accepted(start, caplog, then):
    spoken = asyncio.Event()
    ended = []

    async def endpoint(websocket: WebSocket) -> None:
        await spoken.wait()
        ended.append(websocket)
        if then == "raises":
            raise ValueError("of the app")
        if then == "accepts":
            with contextlib.suppress(WebSocketDisconnect):
                await websocket.accept()
                await websocket.send_text("hello")

    routes = [WebSocketRoute("/ws", endpoint)]
    server = await start(Starlette(routes=routes), send_buffer=4 * KIB)
    loop = asyncio.get_running_loop()
    connections = server.server.server_state.connections
    for count, sent in enumerate(EARLY.values(), 1):
        spoken.clear()
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", server.port))
        await loop.sock_sendall(sock, handshake("/ws").encode() + b"\r\n")
        await until(lambda: [c for c in connections if isinstance(c, reading.ReadingProtocol)])
        (protocol,) = connections
        protocol.close_timeout = 0.1
        for name in ("data_received", "eof_received"):
            setattr(protocol, name, then_set(spoken, getattr(protocol, name)))
        if sent:
            await loop.sock_sendall(sock, sent)
        else:
            sock.shutdown(socket.SHUT_WR)
        await until(lambda: not connections)
        await until(lambda: not server.server.server_state.tasks)
        sock.close()
        assert len(ended) == count
    errors = [str(record.exc_info[1]) for record in caplog.records if record.exc_info]
    assert errors == ["of the app"] * (len(EARLY) * (then == "raises"))
    caplog.clear()  # uvicorn has a line for an app that raises, and one for one that only returns


async def test_whatever_comes_leaves_no_traceback(start, no_traceback):
    app = App()
    server = await start(app)
    rng = random.Random(28)
    pieces = [sent for sent, _ in FAULTS.values()]
    pieces += [masked(b"x", frames.TEXT), EMPTY_PING, masked(NORMAL, CLOSE), EMPTY_FRAGMENT]
    async with server.connect("/ws/x") as healthy:
        await until(lambda: len(app.hub) == 1)
        for number in range(40):
            bad = await Client.connect(server, window=12)
            sent = b"".join(rng.choices(pieces, k=rng.randrange(1, 6)))
            damaged = bytearray(sent)
            for _ in range(rng.randrange(3)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            with contextlib.suppress(ConnectionError):
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(bad.sock, bytes(damaged[: rng.randrange(1, 200)]))
                if rng.random() < 0.5:
                    bad.sock.shutdown(socket.SHUT_WR)
                await app.hub.publish("x", str(number))
            bad.close()
        assert await read(healthy, 40) == [str(number) for number in range(40)]
        await until(lambda: len(server.server.server_state.connections) == 1)
        await until(lambda: len(app.hub) == 1)
