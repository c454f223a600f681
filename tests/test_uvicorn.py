"""The fast path on uvicorn: ready-made frames on real sockets.

Clients are adopted from uvicorn's own protocol when they connect to the hub, or have
`starcast.uvicorn:BroadcastProtocol` from the beginning.

The promises are those of the hub everywhere; what is looked at here is what could go wrong when
frames are written past ASGI: compression, order, backpressure, the ends of a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import shutil
import socket
import ssl
import struct
import subprocess
import time
import tracemalloc
import types
import zlib

import pytest
import uvloop
import websockets
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.protocols.websockets import websockets_sansio_impl as sansio
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.extensions.permessage_deflate import (
    ClientPerMessageDeflateFactory,
    ServerPerMessageDeflateFactory,
)
from websockets.protocol import State

from starcast import Broadcast, Tuning, frames
from starcast.uvicorn import Wire
from support import BUSY, Served, examples, listening, starcast_tasks, until
from test_frames import CLOSE, CONTINUATION, PING, PONG, SIZES, WINDOWS, Frame, Reader, content

pytestmark = pytest.mark.anyio

KIB = 1024
PROTOCOL = "starcast.uvicorn:BroadcastProtocol"


class App:
    """A hub behind `/ws/{channel}`; with `counting`, behind middleware that wraps `send`.

    Attributes:
        through_asgi: How many messages that middleware has seen.
    """

    def __init__(self, hub: Broadcast | None = None, *, counting: bool = False) -> None:
        self.hub = hub or Broadcast()
        self._counting = counting
        self.websockets: list[WebSocket] = []  # in the order of their connections
        self.asked: list[str] = []  # what clients sent
        self.ended: list[int] = []
        self.through_asgi = 0
        self._app = Starlette(routes=[WebSocketRoute("/ws/{channel}", self._endpoint)])

    async def __call__(self, scope, receive, send):
        async def counting(message):
            self.through_asgi += message["type"] == "websocket.send"
            await send(message)

        await self._app(scope, receive, counting if self._counting else send)

    async def _endpoint(self, websocket: WebSocket) -> None:
        await self.hub.connect(websocket, websocket.path_params["channel"])
        self.websockets.append(websocket)
        try:
            while True:
                self.asked.append(await websocket.receive_text())
        except WebSocketDisconnect as exc:
            self.ended.append(exc.code)
        finally:
            await self.hub.disconnect(websocket)


@pytest.fixture(params=["auto", PROTOCOL], ids=["adopted", "protocol"])
def start(serve, request):
    """`server = await start(app)`, where clients are adopted or have the protocol at once."""
    return functools.partial(serve, ws=request.param)


@pytest.fixture
async def back(anyio_backend):
    """After the test, no task of starcast is left."""
    yield
    await until(lambda: not starcast_tasks())


@pytest.fixture
def any_window(monkeypatch):
    """uvicorn agrees on 12 bits at most; here it takes what the client offers."""

    def factory(**options):
        return ServerPerMessageDeflateFactory(**{**options, "server_max_window_bits": None})

    monkeypatch.setattr(sansio, "ServerPerMessageDeflateFactory", factory)


def window(bits: int, **options) -> dict[str, object]:
    """Options of a `websockets` client with this window."""
    factory = ClientPerMessageDeflateFactory(server_max_window_bits=bits, **options)
    return {"compression": None, "extensions": [factory]}


class Client:
    """A client that sends and reads bytes as the test wants, with a small inflater of its own."""

    def __init__(self, sock: socket.socket, reader: Reader) -> None:
        self.sock = sock
        self._reader = reader
        self._frames: list[Frame] = []
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def connect(
        cls,
        server: Served,
        path: str = "/ws/x",
        window: int = 0,
        offer: str = "",
        small: bool = False,
    ) -> Client:
        sock = socket.socket()
        if small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", server.port))
        extensions = f"permessage-deflate; server_max_window_bits={window}{offer}"
        request = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            + f"Sec-WebSocket-Extensions: {extensions}\r\n" * bool(window)
            + "Sec-WebSocket-Version: 13\r\n\r\n"
        )
        await loop.sock_sendall(sock, request.encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += await loop.sock_recv(sock, 1)
        assert head.startswith(b"HTTP/1.1 101 ")
        assert (f"server_max_window_bits={window}".encode() in head) == bool(window)
        return cls(sock, Reader(window))

    async def frame(self) -> Frame:
        while not self._frames:
            async with asyncio.timeout(20):  # Python 3.11's `wait_for` may miss a cancellation
                data = await self._loop.sock_recv(self.sock, 64 * KIB)
            if not data:
                raise EOFError
            self._frames += self._reader.feed(data)
        return self._frames.pop(0)

    async def recv(self) -> str | bytes:
        """The next message; pings are answered."""
        while True:
            frame = await self.frame()
            if frame.opcode == PING:
                await self.send(frame.payload, PONG)
            elif frame.opcode == CLOSE:
                raise EOFError(struct.unpack("!H", frame.payload[:2])[0])
            elif frame.opcode != PONG:
                return self._reader.message(frame)

    async def send(self, payload: bytes, opcode: int = frames.TEXT, bits: int = 0x80) -> None:
        await self._loop.sock_sendall(self.sock, masked(payload, opcode, bits))

    async def rest(self) -> list[Frame]:
        """Everything until the connection ends, in whatever way."""
        got = []
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                got.append(await self.frame())
        return got

    def close(self) -> None:
        self.sock.close()


def masked(payload: bytes, opcode: int, bits: int = 0x80) -> bytes:
    """A client's frame, with a mask that changes nothing."""
    head = bytearray(frames.header(opcode, len(payload)))
    head[0] = bits | opcode
    head[1] |= 0x80
    return bytes(head) + bytes(4) + payload


async def read(client, count: int) -> list[str | bytes]:
    return [await asyncio.wait_for(client.recv(), 20) for _ in range(count)]


async def read_all(client: websockets.ClientConnection) -> tuple[list[str | bytes], int]:
    """Everything until the close, and its code."""
    got = []
    try:
        while True:
            got.append(await asyncio.wait_for(client.recv(), 20))
    except ConnectionClosed as exc:
        return got, exc.rcvd.code


def message(size: int, kind: type, seed: int = 0) -> str | bytes:
    return content(size, seed).decode() if kind is str else content(size, seed)


# What arrives

CLIENTS = [
    {"compression": None},
    {},  # as `websockets` offers it
    window(9),
    window(12, server_no_context_takeover=True),
    window(15, client_no_context_takeover=True),
]


@pytest.mark.parametrize("kind", [str, bytes])
async def test_every_size_for_clients_of_every_kind_on_one_hub(start, any_window, back, kind):
    app = App()
    server = await start(app)
    sent = [message(size, kind) for size in SIZES]
    sent.insert(3, random.Random(7).randbytes(5000) if kind is bytes else "\U0001f7e2" * 100)
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(server.connect("/ws/x", max_size=None, **options))
            for options in CLIENTS
        ]
        raw = [await Client.connect(server, window=bits) for bits in (0, *WINDOWS)]
        everybody = [*clients, *raw]
        await until(lambda: len(app.hub) == len(everybody))
        readers = [asyncio.create_task(read(client, len(sent))) for client in everybody]
        for each in sent:
            await app.hub.publish("x", each)
        for got in await asyncio.gather(*readers):
            assert got == sent
        assert app.hub.stats().fast_path == len(everybody)
        for client in raw:
            client.close()
    await until(lambda: len(app.hub) == 0)


@pytest.mark.parametrize("bits", [0, *WINDOWS])
async def test_ordinary_messages_before_between_and_after(start, any_window, back, bits):
    """The connection's own compressor must not refer back over a frame it did not make."""
    app = App()
    server = await start(app)
    client = await Client.connect(server, window=bits)
    await until(lambda: app.websockets)
    (websocket,) = app.websockets
    text = message(3000, str)
    expected = []
    for number in range(8):
        await websocket.send_text(f"own {number} {text}")
        await app.hub.publish("x", f"hub {number} {text}")
        await websocket.send_bytes(content(2000, number))
        app.hub.publish_nowait("x", f"joined {number} {text}")
        app.hub.publish_nowait("x", random.Random(number).randbytes(300))  # not compressed
        await websocket.send_text(text)
        expected += [f"own {number} {text}", f"hub {number} {text}", content(2000, number)]
        expected += [f"joined {number} {text}", random.Random(number).randbytes(300), text]
    assert await read(client, len(expected)) == expected
    client.close()


async def test_ordinary_messages_sent_before_the_hub_had_the_client(start, any_window, back):
    """The compressor has a past then, and must forget it."""
    hub = Broadcast()
    text = message(3000, str)

    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        await websocket.send_text(text)
        await websocket.send_text(text)
        await hub.connect(websocket)
        await hub.send(text)
        await websocket.send_text(text)
        await hub.disconnect(websocket)
        await websocket.send_text(text)
        await hub.connect(websocket)
        await hub.send(text)
        await websocket.send_text(text)
        with contextlib.suppress(WebSocketDisconnect):
            await websocket.receive_text()

    server = await start(Starlette(routes=[WebSocketRoute("/ws", endpoint)]))
    for bits in (9, 15):
        client = await Client.connect(server, "/ws", window=bits)
        assert await read(client, 7) == [text] * 7
        client.close()
        await until(lambda: not server.server.server_state.tasks)
        await hub.send("x")
        assert len(hub) == 0


async def test_a_client_that_fragments_and_pings_in_between(start, any_window, back):
    hub = Broadcast()

    async def endpoint(websocket: WebSocket):
        await hub.serve(websocket)

    server = await start(Starlette(routes=[WebSocketRoute("/ws", endpoint)]))
    client = await Client.connect(server, "/ws", window=10)
    other = await Client.connect(server, "/ws", window=9)
    await until(lambda: len(hub) == 2)
    big = message(2000, str)
    compressor = zlib.compressobj(wbits=-15)
    parts = [compressor.compress(big.encode()), compressor.flush(zlib.Z_SYNC_FLUSH)[:-4]]
    await client.send(parts[0], frames.TEXT, 0x40)  # the first fragment, compressed
    await hub.send(big)
    assert await client.recv() == big
    await client.send(b"ping", PING)
    assert (await client.frame()).opcode == PONG
    await client.send(b"", CONTINUATION, 0)
    hub.publish_nowait("default", "joined 1")
    hub.publish_nowait("default", big)
    await client.send(parts[1], CONTINUATION)
    assert await read(client, 3) == ["joined 1", big, big]
    assert await read(other, 4) == [big, "joined 1", big, big]
    for one in (client, other):
        one.close()
    await until(lambda: len(hub) == 0)


# Order, whatever comes in whatever way

SENT_SIZES = [0, 1, 125, 126, 127, 128, 1000, 8000, 65_535, 65_536, 100_000]


class Listener:
    """A client of the fuzz, what it should get, and what it got; it may pause reading."""

    def __init__(self, client) -> None:
        self.client = client
        self.reading = asyncio.Event()
        self.reading.set()
        self.expected: list[str | bytes] = []
        self.got: list[str | bytes] = []
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            await self.reading.wait()
            self.got.append(await self.client.recv())


Step = tuple[str, int, tuple[str, int, int]]  # what happens, to which client, with which data
# Hypothesis makes steps simpler by taking what stands further left.
ACTIONS = ["turn"] * 4 + ["nowait"] * 5 + ["publish"] * 4 + ["own", "personal", "exclude"] * 3
ACTIONS += ["settle", "ping", "pause", "resume"]
KINDS = ["str", "bytes", "noise"]
DATA = st.tuples(st.sampled_from(KINDS), st.sampled_from(SENT_SIZES), st.integers(0, 2))
STEPS = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(0, 20), DATA), min_size=60, max_size=150
)


@functools.cache
def made(kind: str, size: int, seed: int) -> str | bytes:
    if kind == "noise":
        return random.Random(seed).randbytes(size % 9000)
    return message(size, str if kind == "str" else bytes, seed)


async def interleave(server: Served, app: App, steps: list[Step], windows: list[int]) -> None:
    """Do all this, and see what everybody got."""
    hub = app.hub
    app.websockets.clear()
    listeners: list[Listener] = []
    sending: list[asyncio.Task] = []

    async def own(index: int, data: str | bytes) -> None:
        listeners[index].expected.append(data)
        if isinstance(data, str):
            await app.websockets[index].send_text(data)
        else:
            await app.websockets[index].send_bytes(data)

    async def personal(index: int, data: str | bytes) -> None:
        listeners[index].expected.append(data)
        await hub.send(data, to=app.websockets[index])

    async def publish(data: str | bytes, *excluded: int) -> None:
        for index, listener in enumerate(listeners):
            if index not in excluded:
                listener.expected.append(data)
        await hub.publish("x", data, exclude=[app.websockets[index] for index in excluded])

    async def settle() -> None:
        for listener in listeners:
            listener.reading.set()  # what is awaited may wait for any of them
        await asyncio.gather(*sending)

    async with asyncio.timeout(60), contextlib.AsyncExitStack() as stack:
        for offered in CLIENTS:
            offered = {"max_queue": 1, "ping_interval": None, **offered}
            client = await stack.enter_async_context(server.connect("/ws/x", **offered))
            listeners.append(Listener(client))
        for bits in windows:
            client = await Client.connect(server, window=bits, small=True)
            stack.callback(client.close)
            listeners.append(Listener(client))
        await until(lambda: len(hub) == len(listeners))
        try:
            for action, which, (kind, size, seed) in steps:
                data = made(kind, size, seed)
                index = which % len(listeners)
                if action == "turn":
                    await asyncio.sleep(0)
                elif action == "publish":
                    sending.append(asyncio.create_task(publish(data)))
                elif action == "exclude":
                    others = index, which % 4
                    sending.append(asyncio.create_task(publish(data, *others)))
                elif action == "own":
                    sending.append(asyncio.create_task(own(index, data)))
                elif action == "personal":
                    sending.append(asyncio.create_task(personal(index, data)))
                elif action == "nowait":
                    for listener in listeners:
                        listener.expected.append(data)
                    hub.publish_nowait("x", data)
                elif action == "settle":
                    await settle()
                elif action == "ping":
                    await listeners[which % len(CLIENTS)].client.ping()
                elif action == "pause":
                    listeners[index].reading.clear()
                else:
                    listeners[index].reading.set()
            await settle()
            await publish("the last")  # so what is missing before it is not waited for
            for listener in listeners:
                await until(lambda: listener.task.done() or "the last" in listener.got)  # noqa: B023  # awaited here
                assert listener.got == listener.expected
                assert not listener.task.done()
            assert hub.stats().dropped == 0
        finally:
            tasks = [*sending, *(listener.task for listener in listeners)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for listener in listeners[: len(CLIENTS)]:
                listener.client.transport.abort()  # a close would wait until all is read
    await until(lambda: len(hub) == 0)


@pytest.mark.timeout(400)  # a failure is made as short as possible, which takes a while
@pytest.mark.parametrize(
    ("ws", "loop", "send_buffer"),
    [
        ("auto", None, 4 * KIB),
        ("auto", None, 256 * KIB),
        ("auto", None, 0),
        ("auto", uvloop.new_event_loop, 0),
        (PROTOCOL, None, 4 * KIB),
        (PROTOCOL, uvloop.new_event_loop, 0),
    ],
    ids=["4 KiB", "256 KiB", "as it comes", "uvloop", "protocol, 4 KiB", "protocol, uvloop"],
)
def test_everybody_gets_what_was_published_in_order(any_window, ws, loop, send_buffer):
    app = App(Broadcast(max_buffer=64 * KIB * KIB))
    with asyncio.Runner(loop_factory=loop) as runner:

        async def start() -> Served:
            server = Served(app, send_buffer=send_buffer, ws=ws, ws_ping_interval=0.05)
            await server.start()
            return server

        server = runner.run(start())

        @settings(max_examples=examples(5))
        @given(STEPS, st.lists(st.sampled_from([0, *WINDOWS]), min_size=1, max_size=4))
        def check(steps: list[Step], windows: list[int]) -> None:
            runner.run(interleave(server, app, steps, windows))

        try:
            check()
        finally:
            runner.run(server.stop())


async def test_a_burst_goes_out_in_few_writes(start, back, monkeypatch):
    writes = []
    write = Wire.write

    def counting(wire, data):
        writes.append(len(data))
        write(wire, data)

    monkeypatch.setattr(Wire, "write", counting)
    app = App()
    server = await start(app)
    async with server.connect("/ws/x", compression=None) as one, server.connect("/ws/x") as two:
        await until(lambda: len(app.hub) == 2)
        sent = [str(number) for number in range(1000)]
        for number in sent:
            app.hub.publish_nowait("x", number)
        assert await read(one, 1000) == await read(two, 1000) == sent
        assert len(writes) == 4  # 1,000 messages count for a little more than 64 KiB
        assert app.hub.stats().delivered == 2000


async def test_what_was_awaited_comes_before_the_handlers_own(start, back):
    app = App()
    server = await start(app)
    async with server.connect("/ws/x") as client, server.connect("/ws/x") as other:
        await until(lambda: len(app.websockets) == 2)
        first, second = app.websockets
        await app.hub.publish("x", "1")
        await first.send_text("2")
        await app.hub.publish("x", "3", exclude=second)
        await app.hub.publish("x", "4", exclude=first)
        await app.hub.send("5", to=first)
        await app.hub.publish("x", "bye")
        await first.close(4000)
        assert await read_all(client) == (["1", "2", "3", "5", "bye"], 4000)
        await app.hub.publish("x", "still here")
        assert await read(other, 4) == ["1", "4", "bye", "still here"]


# Ends


@pytest.mark.parametrize("who", ["client", "client vanishes", "handler", "hub"])
@pytest.mark.parametrize("options", CLIENTS[:2], ids=["plain", "deflate"])
async def test_closes_in_mid_stream(start, back, who, options):
    app = App(Broadcast(max_buffer=64 * KIB * KIB))
    server = await start(app)
    sent = []
    async with server.connect("/ws/x", **options) as other:
        await until(lambda: len(app.hub) == 1)
        client = await server.connect("/ws/x", max_queue=None, **options)
        await until(lambda: len(app.hub) == 2)

        async def publish() -> None:
            for number in range(300):
                sent.append(f"{number} ".ljust(20 * KIB, "x"))
                await app.hub.publish("x", sent[-1])

        reading = asyncio.create_task(read(other, 300))
        publishing = asyncio.create_task(publish())
        await until(lambda: len(sent) > 100)
        if who == "client":
            await client.close()
        elif who == "client vanishes":
            client.transport.abort()
            await client.wait_closed()
        else:
            its = app.websockets[1]
            before = len(sent)
            closing = asyncio.create_task(
                its.close(4000) if who == "handler" else app.hub.close(its, 4000)
            )
            got, code = await read_all(client)
            assert code == 4000
            assert got == sent[: len(got)]
            assert len(got) >= before
            await closing
        await publishing
        assert await reading == sent
        await until(lambda: len(app.hub) == 1)
        await until(lambda: len(app.ended) == 1)
    await until(lambda: len(app.hub) == 0)


async def test_a_client_that_stops_reading_is_cut_off(start, back):
    app = App(Broadcast(max_buffer=256 * KIB, tuning=Tuning(close_timeout=0.5)))
    server = await start(app)
    dead = await Client.connect(server, small=True)
    await until(lambda: len(app.hub) == 1)
    (protocol,) = server.server.server_state.connections
    async with server.connect("/ws/x", compression=None) as healthy:
        await until(lambda: len(app.hub) == 2)
        most = 0
        while len(app.hub) == 2:
            await app.hub.publish("x", "x" * 32 * KIB)
            most = max(most, protocol.transport.get_write_buffer_size())
            assert await healthy.recv() == "x" * 32 * KIB
        assert len(app.hub) == 1
        cut_off = time.monotonic()
        assert most <= 2 * 64 * KIB + 32 * KIB  # the transport's own bound and one write more
        await until(lambda: protocol.transport.get_write_buffer_size() == 0)
        await until(lambda: protocol not in server.server.server_state.connections)
        assert time.monotonic() - cut_off < 0.5 + BUSY
        await until(lambda: app.ended == [1013])
        assert not any(frame.opcode == CLOSE for frame in await dead.rest())  # it was cut off
    dead.close()
    assert app.hub.stats().slow_clients == 1


async def test_a_client_that_stops_reading_the_handlers_own_messages(start, back):
    """The hub has nothing in flight then, and must drop the connection all the same."""
    app = App(Broadcast(max_buffer=64 * KIB, tuning=Tuning(close_timeout=0.3)))
    server = await start(app)
    dead = await Client.connect(server, small=True)
    await until(lambda: app.websockets)
    (websocket,) = app.websockets

    async def own() -> None:
        while True:
            await websocket.send_bytes(bytes(64 * KIB))

    sending = asyncio.create_task(own())
    await until(lambda: not next(iter(server.server.server_state.connections)).writable.is_set())
    for _ in range(3):  # one may be in flight, between two of the handler's, and one waits
        await app.hub.publish("x", "x" * 64 * KIB)
    with pytest.raises(WebSocketDisconnect):
        await sending
    await until(lambda: app.ended == [1013])
    await until(lambda: not server.server.server_state.connections, BUSY)
    dead.close()


async def test_a_close_that_is_never_read_ends_the_connection(start, back):
    """The close frame fits into the buffer, so nothing is stuck, but the client reads nothing."""
    app = App(Broadcast(tuning=Tuning(close_timeout=0.3)))
    server = await start(app)
    dead = await Client.connect(server, small=True)
    await until(lambda: app.websockets)
    (protocol,) = server.server.server_state.connections
    protocol.close_timeout = 0.3
    while not protocol.transport.get_write_buffer_size():
        await app.hub.publish("x", "x" * 8 * KIB)
    assert protocol.writable.is_set()
    await app.hub.close(app.websockets[0], 4000)
    try:
        await until(lambda: not server.server.server_state.connections, BUSY)
    finally:
        dead.close()


@pytest.mark.parametrize("stalled", [False, True])
async def test_shutdown_with_open_clients(start, back, stalled):
    app = App()
    server = await start(app, timeout_graceful_shutdown=None)
    clients = [await server.connect("/ws/x", **options) for options in CLIENTS]
    dead = await Client.connect(server, small=True)
    await until(lambda: len(app.hub) == 6)
    protocol = next(
        its
        for its in server.server.server_state.connections
        if its.client == dead.sock.getsockname()
    )
    if stalled:
        protocol.close_timeout = 0.3
        while protocol.writable.is_set():
            await app.websockets[-1].send_bytes(bytes(64 * KIB))
    stopping = asyncio.create_task(server.stop())
    for client in clients:
        assert await read_all(client) == ([], 1012)
    done, _ = await asyncio.wait([stopping], timeout=BUSY)
    dead.close()
    await stopping
    assert done
    assert len(app.hub) == 0


# docs/reference/faults.md, 2 to 4


class Proxy:
    """Stands between client and server; may stop forwarding, as a cut cable does."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.cut = asyncio.Event()

    def run(self) -> contextlib.AbstractAsyncContextManager[int]:
        return listening(self._connected)

    async def _connected(self, reader, writer) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(
            "127.0.0.1", self._port, limit=4 * KIB
        )
        sock = upstream_writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
        both = self._forward(reader, upstream_writer), self._forward(upstream_reader, writer)
        try:
            await asyncio.gather(*both)
        finally:
            upstream_writer.transport.abort()

    async def _forward(self, reader, writer) -> None:
        while data := await reader.read(4 * KIB):
            if self.cut.is_set():
                await asyncio.Event().wait()
            writer.write(data)
            await writer.drain()
        await asyncio.Event().wait()


@pytest.mark.parametrize("unsent", [False, True])
async def test_a_client_that_vanishes_without_a_word(start, back, unsent):
    """Nothing comes back from it, not even that its TCP connection is gone."""
    app = App()
    server = await start(app, ws_ping_interval=0.2, ws_ping_timeout=0.2)
    proxy = Proxy(server.port)
    async with proxy.run() as port, server.connect("/ws/x") as healthy:
        await until(lambda: len(app.hub) == 1)
        client = await websockets.connect(
            f"ws://127.0.0.1:{port}/ws/x", proxy=None, compression=None, ping_interval=None
        )
        await until(lambda: len(app.hub) == 2)
        proxy.cut.set()
        if unsent:
            connections = server.server.server_state.connections
            reading = asyncio.create_task(read_until(healthy, "the last"))
            while not app.ended and all(its.writable.is_set() for its in connections):
                await app.hub.publish("x", random.randbytes(64 * KIB))
            await app.hub.publish("x", "the last")
            await reading
        await until(lambda: len(app.ended) == 1, 2)
        assert len(app.hub) == 1
        assert len(server.server.server_state.connections) == 1
        await app.hub.publish("x", "alive")
        assert await healthy.recv() == "alive"
        client.transport.abort()
        await client.wait_closed()


async def read_until(client, last: str) -> None:
    while await client.recv() != last:
        pass


@pytest.mark.parametrize("how", ["plain", "fragments", "compressed", "bomb", "bomb in fragments"])
async def test_an_oversize_message_gets_1009_and_the_handler_is_not_called(start, back, how):
    limit = 1024 * KIB
    app = App()
    server = await start(app, ws_max_size=limit)
    bad = await Client.connect(server, window=12)
    compressor = zlib.compressobj(9, wbits=-12)
    count = 64 if how.startswith("bomb") else 1
    zeros = bytes(limit)
    deflated = b"".join(compressor.compress(zeros) for _ in range(count))
    deflated += compressor.compress(b"x") + compressor.flush(zlib.Z_SYNC_FLUSH)[:-4]
    if how == "plain":
        sent = [masked(bytes(limit + 1), frames.TEXT)]
    elif how == "fragments":
        sent = [masked(bytes(limit // 2), frames.TEXT, 0)]
        sent += [masked(bytes(limit // 2), CONTINUATION, 0), masked(b"x", CONTINUATION)]
    elif how == "bomb in fragments":
        pieces = [deflated[at : at + 500] for at in range(0, len(deflated), 500)]
        sent = [masked(pieces[0], frames.TEXT, 0x40)]
        sent += [masked(piece, CONTINUATION, 0) for piece in pieces[1:]]
    else:
        sent = [masked(deflated, frames.TEXT, 0xC0)]
    del zeros
    async with server.connect("/ws/x") as good:
        await until(lambda: len(app.hub) == 2)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            with contextlib.suppress(ConnectionError):
                await asyncio.get_running_loop().sock_sendall(bad.sock, b"".join(sent))
            got = await bad.rest()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert [frame.payload[:2] for frame in got] == [struct.pack("!H", 1009)]
        if how.startswith("bomb"):
            assert peak - before < 2 * limit + 512 * KIB
        await until(lambda: app.ended == [1009])
        assert app.asked == []
        await app.hub.publish("x", "alive")
        assert await good.recv() == "alive"
        assert len(app.hub) == 1
        await good.send("as large as may be")
        await until(lambda: app.asked == ["as large as may be"])
    bad.close()


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
        + [
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ]
        + ["-keyout", str(key), "-out", str(cert)],
        check=True,
        capture_output=True,
    )
    return cert, key


async def test_tls(start, back, certificate):
    cert, key = certificate
    app = App(Broadcast(max_buffer=512 * KIB, tuning=Tuning(close_timeout=0.5)))
    server = await start(app, ssl_certfile=cert, ssl_keyfile=key)
    trusting = ssl.create_default_context(cafile=cert)
    url = f"wss://127.0.0.1:{server.port}/ws/x"
    connect = functools.partial(websockets.connect, url, ssl=trusting, proxy=None)
    async with connect(compression=None) as plain, connect() as deflated:
        await until(lambda: len(app.hub) == 2)
        sent = [message(size, str, size) for size in (0, 300, 70_000)]
        for each in sent:
            app.hub.publish_nowait("x", each)
        await app.websockets[0].send_text("own")
        await app.websockets[1].send_text("own")
        assert await read(plain, 4) == await read(deflated, 4) == [*sent, "own"]
        dead = await connect(max_queue=1, compression=None)
        await until(lambda: len(app.hub) == 3)
        while len(app.hub) == 3:
            await app.hub.publish("x", "x" * 64 * KIB)
            assert await plain.recv() == await deflated.recv() == "x" * 64 * KIB
        await until(lambda: app.ended == [1013])
        dead.transport.abort()
        await dead.wait_closed()
    assert app.ended[0] == 1013


async def test_a_client_that_stalls_over_tls_is_aborted(start, back, certificate, monkeypatch):
    """asyncio's SSL transport keeps more than a plain one, and must not wait until it is read."""
    cert, key = certificate
    app = App(Broadcast(tuning=Tuning(close_timeout=0.5)))
    config = {"ssl_certfile": cert, "ssl_keyfile": key, "loop": "asyncio"}
    server = await start(app, send_buffer=4 * KIB, **config)
    trusting = ssl.create_default_context(cafile=cert)
    url = f"wss://127.0.0.1:{server.port}/ws/x"
    options = {"ssl": trusting, "proxy": None, "compression": None}
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
    sock.connect(("127.0.0.1", server.port))
    dead = await websockets.connect(url, sock=sock, ping_interval=None, **options)
    dead.transport.pause_reading()
    await until(lambda: len(app.hub) == 1)
    (protocol,) = server.server.server_state.connections
    transport = protocol.transport
    assert transport.get_extra_info("ssl_object") is not None
    its_socket = transport.get_extra_info("socket")
    async with websockets.connect(url, **options) as healthy:
        await until(lambda: len(app.hub) == 2)
        while len(app.hub) == 2:
            await app.hub.publish("x", "x" * 32 * KIB)
            assert await healthy.recv() == "x" * 32 * KIB
        cut_off = time.monotonic()
        assert app.hub.stats().slow_clients == 1
        assert not protocol.writable.is_set()
        assert transport.get_write_buffer_size()
        await until(lambda: protocol not in server.server.server_state.connections)
        assert time.monotonic() - cut_off < 0.5 + BUSY
        await until(lambda: app.ended == [1013])
        await until(lambda: its_socket.fileno() == -1)
        await app.hub.publish("x", "alive")
        assert await healthy.recv() == "alive"
    dead.transport.abort()
    await dead.wait_closed()

    # Around it


async def test_without_ready_frames_middleware_sees_every_message(start, back):
    app = App(Broadcast(ready_frames=False), counting=True)
    server = await start(app)
    async with server.connect("/ws/x") as one, server.connect("/ws/x") as two:
        await until(lambda: len(app.hub) == 2)
        sent = [message(size, str) for size in (0, 200, 3000)] * 2
        for each in sent:
            await app.hub.publish("x", each)
        assert await read(one, 6) == await read(two, 6) == sent
        assert app.through_asgi == 12


async def test_the_protocol_bypasses_middleware_that_wraps_send(serve, back):
    app = App(counting=True)
    server = await serve(app, ws=PROTOCOL)
    async with server.connect("/ws/x") as client:
        await until(lambda: len(app.hub) == 1)
        await app.hub.publish("x", "hello")
        assert await client.recv() == "hello"
        assert app.through_asgi == 0
        assert app.hub.stats().fast_path == 1


async def test_extensions_may_be_missing(start, back, monkeypatch):
    connected = sansio.WebSocketsSansIOProtocol.handle_connect

    def without(self, event):
        connected(self, event)
        del self.scope["extensions"]

    monkeypatch.setattr(sansio.WebSocketsSansIOProtocol, "handle_connect", without)
    app = App()
    server = await start(app)
    async with server.connect("/ws/x") as client:
        await until(lambda: len(app.hub) == 1)
        await app.hub.publish("x", "hello")
        assert await client.recv() == "hello"
        assert app.hub.stats().fast_path == 1


async def test_a_uvicorn_that_is_not_understood(start, back, caplog):
    """It keeps its clients on ASGI, and there is one line in the log."""
    hub = Broadcast()

    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        for protocol in server.server.server_state.connections:
            vars(protocol).pop("request", None)  # which uvicorn itself is done with
        await hub.connect(websocket)
        with contextlib.suppress(WebSocketDisconnect):
            await websocket.receive_text()

    server = await start(Starlette(routes=[WebSocketRoute("/ws", endpoint)]))
    async with server.connect("/ws") as one, server.connect("/ws") as two:
        await until(lambda: len(hub) == 2)
        sent = [message(3000, str, number) for number in range(3)]
        for each in sent:
            await hub.send(each)
        assert await read(one, 3) == await read(two, 3) == sent
        assert hub.stats().asgi == {"this version of uvicorn is not supported": 2}
    (line,) = [record for record in caplog.records if record.name == "starcast"]
    assert line.levelname == "WARNING"
    assert "this version of uvicorn is not supported" in line.getMessage()
    assert "request" in line.getMessage()


# The wire by itself


async def test_a_wire_knows_what_is_buffered_and_when_it_is_over(serve, back):
    app = App()
    server = await serve(app, ws=PROTOCOL)
    dead = await Client.connect(server, small=True)
    await until(lambda: app.websockets)
    wire = app.websockets[0].scope["extensions"]["starcast"].open()
    assert isinstance(wire, Wire)
    assert wire.wire_format == 0
    assert wire.buffered == 0
    assert await wire.drain()
    frame = frames.make(frames.BINARY, bytes(64 * KIB))
    written = 0
    told = []
    wire.changed = lambda: told.append(wire.ready)
    while wire.ready:
        wire.write(frame)
        written += 1
    assert written > 1
    assert told == [False]
    assert 0 < wire.buffered <= 64 * KIB + len(frame)
    draining = asyncio.create_task(wire.drain())
    await asyncio.sleep(0)
    assert not draining.done()
    for _ in range(written):
        assert await dead.recv() == bytes(64 * KIB)
    assert await draining
    assert told == [False, True]
    wire.abort()
    await until(lambda: told == [False, True, False])
    assert not wire.ready
    assert not await wire.drain()
    assert await dead.rest() == []
    dead.close()


async def test_nothing_is_written_after_a_close_frame(serve, back):
    app = App()
    server = await serve(app, ws=PROTOCOL)
    client = await Client.connect(server)
    await until(lambda: app.websockets)
    wire = app.websockets[0].scope["extensions"]["starcast"].open()
    await client.send(struct.pack("!H", 1000), CLOSE)
    await until(lambda: app.ended)
    assert not wire.ready
    assert not await wire.drain()
    wire.changed = None
    wire.write(frames.make(frames.TEXT, b"too late"))
    assert [frame.opcode for frame in await client.rest()] == [CLOSE]
    client.close()


async def test_an_abort_comes_too_late(serve, back):
    """The client has closed, then read what the socket still had: asyncio's transport is over."""
    app = App()
    server = await serve(app, ws=PROTOCOL, send_buffer=4 * KIB)
    client = await Client.connect(server, small=True)
    await until(lambda: app.websockets)
    (protocol,) = server.server.server_state.connections
    while not protocol.transport.get_write_buffer_size():
        await app.hub.publish("x", "x" * 8 * KIB)
    wire = app.websockets[0].scope["extensions"]["starcast"].open()
    await client.send(struct.pack("!H", 1000), CLOSE)
    await until(lambda: wire.closed)
    assert (await client.rest())[-1].opcode == CLOSE
    await until(lambda: protocol.disconnected)
    wire.abort()  # the transport's own would raise AttributeError, on Python 3.11 at least
    client.close()


async def test_a_message_that_finds_the_socket_full_again_is_not_lost(start, back):
    """uvicorn's pongs fill the buffer between the word that there is room and the write."""
    app = App()
    server = await start(app)
    client = await Client.connect(server, small=True)
    await until(lambda: app.websockets)
    (protocol,) = server.server.server_state.connections
    while protocol.writable.is_set():
        await app.hub.publish("x", "x" * 64 * KIB)
    await app.hub.publish("x", "not to be lost")
    resume, pending = protocol.resume_writing, [True]

    def resume_writing() -> None:
        resume()
        if pending and pending.pop():
            protocol.transport.write(frames.header(PONG, 125) + bytes(125))
            protocol.pause_writing()
            asyncio.get_running_loop().call_later(0.05, resume)

    protocol.resume_writing = resume_writing

    async def reading() -> None:
        while await client.recv() != "not to be lost":
            pass

    await asyncio.wait_for(reading(), 5)
    await app.hub.publish("x", "alive")
    assert await client.recv() == "alive"
    client.close()


async def test_a_refusal_before_the_handshake(start, back):
    async def refuse(websocket):
        await websocket.close()

    server = await start(Starlette(routes=[WebSocketRoute("/ws", refuse)]))
    with pytest.raises(InvalidStatus) as caught:
        await server.connect("/ws")
    assert caught.value.response.status_code == 403


async def test_an_extension_that_does_not_compress_changes_no_frame():
    loop = asyncio.get_running_loop()
    one, two = socket.socketpair()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=one)
    protocol = types.SimpleNamespace(
        transport=transport,
        conn=types.SimpleNamespace(state=State.OPEN, extensions=[object()]),
        writable=asyncio.Event(),
    )
    wire = Wire(protocol)
    assert wire.wire_format == 0
    assert wire.buffered == 0
    assert not wire.ready
    transport.abort()
    two.close()


@pytest.mark.parametrize("by_client", [False, True])
async def test_a_shutdown_while_a_client_is_being_closed(start, back, by_client):
    """It has not read everything: of what it was sent, or even of the closing handshake."""
    app = App()
    server = await start(app)
    dead = await Client.connect(server, small=True)
    await until(lambda: len(app.hub) == 1)
    (protocol,) = server.server.server_state.connections
    protocol.close_timeout = 0.3
    while not protocol.transport.get_write_buffer_size():
        await app.hub.publish("x", "x" * 8 * KIB)
    if by_client:
        await dead.send(struct.pack("!H", 1000), CLOSE)
        await until(protocol.transport.is_closing)
    else:
        await app.hub.close(app.websockets[0], 4000)
    await asyncio.wait_for(server.stop(), 10)
    dead.close()
