"""A client that is adopted onto the fast path in the middle of its life loses nothing.

It has talked to its handler before that connects it to the hub: over uvicorn's own protocol, whose
object becomes another one then, whatever is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
import time

import pytest
import uvloop
import websockets
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from starcast import Broadcast, frames
from starcast.exceptions import ClientGone
from support import BUSY, Served, examples, starcast_tasks, until
from test_frames import CLOSE, CONTINUATION, PING, PONG, WINDOWS
from test_uvicorn import KIB, Client, any_window, masked, message, read

pytestmark = pytest.mark.anyio
__all__ = ["any_window"]  # a fixture


class Late:
    """An app that accepts its one client at once, and connects it to the hub when it is told to.

    What the client says is read from then on.
    """

    def __init__(self, hub: Broadcast | None = None) -> None:
        self.hub = hub or Broadcast(max_buffer=16 * KIB * KIB)
        self.websocket: WebSocket | None = None
        self.may_connect = asyncio.Event()
        self.connected = asyncio.Event()
        self.got: list[str | bytes] = []
        self.ended: list[int] = []
        self.reads = asyncio.Event()  # reads while that is set
        self.reads.set()
        self.after: asyncio.Event | None = None  # sends by itself while that is set, and then ends
        self.starlette = Starlette(routes=[WebSocketRoute("/ws", self._endpoint)])

    async def _endpoint(self, websocket: WebSocket) -> None:
        await websocket.accept()
        self.websocket = websocket
        await self.may_connect.wait()
        try:
            await self.hub.connect(websocket)
            self.connected.set()
            while True:
                await self.reads.wait()
                received = await websocket.receive()
                if received["type"] == "websocket.disconnect":
                    raise WebSocketDisconnect(received["code"])
                text = received.get("text")
                if text == "leave":
                    await self.hub.disconnect(websocket)
                    while self.after is not None and self.after.is_set():
                        await websocket.send_bytes(bytes(16 * KIB))
                    return
                self.got.append(received["bytes"] if text is None else text)
        except (WebSocketDisconnect, ClientGone) as exc:
            self.ended.append(exc.code)
        finally:
            await self.hub.disconnect(websocket)
            self.websocket = None

    async def adopt(self) -> None:
        self.may_connect.set()
        await asyncio.wait_for(self.connected.wait(), 20)
        assert self.hub.stats().fast_path == 1


@pytest.fixture
async def app(anyio_backend):
    yield Late()
    await until(lambda: not starcast_tasks())


def protocol_of(server: Served):
    (protocol,) = server.server.server_state.connections
    return protocol


async def connected(server: Served, app: Late, **options) -> Client:
    client = await Client.connect(server, "/ws", **options)
    await until(lambda: app.websocket is not None)
    return client


async def test_messages_that_are_queued(serve, app):
    server = await serve(app.starlette)
    client = await connected(server, app)
    sent = [f"queued {number}" for number in range(300)]  # more than the adopted one would parse
    for text in sent:
        await client.send(text.encode())
    await until(lambda: protocol_of(server).read_paused)
    await app.adopt()
    await client.send(b"the last")
    await until(lambda: app.got == [*sent, "the last"])
    client.close()


async def test_a_fragmented_message_under_way(serve, app):
    server = await serve(app.starlette)
    client = await connected(server, app)
    await client.send(b"one ", frames.TEXT, 0)
    await client.send(b"two ", CONTINUATION, 0)
    await client.send(b"?", PING)
    assert (await client.frame()).opcode == PONG
    await app.adopt()
    await app.hub.send("in between")
    await client.send(b"three ", CONTINUATION, 0)
    await client.send(b"four", CONTINUATION)
    await until(lambda: app.got == ["one two three four"])
    assert await client.recv() == "in between"
    client.close()


async def test_a_frame_under_way(serve, app):
    server = await serve(app.starlette)
    client = await connected(server, app)
    frame = bytes([0x81, 0x80 | 126]) + struct.pack("!H", 5000) + bytes(4) + b"x" * 5000
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client.sock, frame[:3000])
    await until(lambda: len(protocol_of(server).conn.reader.buffer) > 2000)
    await app.adopt()
    await loop.sock_sendall(client.sock, frame[3000:])
    await until(lambda: app.got == ["x" * 5000])
    client.close()


@pytest.mark.parametrize("answers", [True, False])
async def test_a_ping_under_way(serve, app, answers):
    """The answer counts; without one, the client is given up in the time that it had."""
    server = await serve(app.starlette, ws_ping_interval=0.1, ws_ping_timeout=1)
    client = await connected(server, app)
    ping = await client.frame()
    assert ping.opcode == PING
    asked = time.monotonic()
    await app.adopt()
    if answers:
        await client.send(ping.payload, PONG)
        for _ in range(3):  # and so it goes on
            ping = await client.frame()
            assert ping.opcode == PING
            await client.send(ping.payload, PONG)
        await app.hub.send("hello")
        assert await client.recv() == "hello"
    else:
        frame = await client.frame()
        assert (frame.opcode, frame.payload[:2]) == (CLOSE, struct.pack("!H", 1011))
        assert 0.5 < time.monotonic() - asked < 1 + BUSY, "the timer began anew"
        await until(lambda: not server.server.server_state.connections)
        await until(lambda: app.ended)
    client.close()


async def test_a_ping_that_is_due(serve, app):
    server = await serve(app.starlette, ws_ping_interval=0.4, ws_ping_timeout=5)
    client = await connected(server, app)
    await app.adopt()
    for _ in range(2):
        ping = await client.frame()
        assert ping.opcode == PING
        await client.send(ping.payload, PONG)
    client.close()


async def test_no_pings_at_all(serve, app):
    server = await serve(app.starlette, ws_ping_interval=None)
    client = await connected(server, app)
    await app.adopt()
    await app.hub.send("hello")
    assert await client.recv() == "hello"
    client.close()


@pytest.mark.parametrize("bits", [0, *WINDOWS])
async def test_a_client_that_has_not_read_everything(serve, app, any_window, bits):
    server = await serve(app.starlette, send_buffer=4 * KIB)
    client = await connected(server, app, window=bits, small=True)
    sent = []
    writable = protocol_of(server).writable
    while writable.is_set():
        noise = random.Random(len(sent)).randbytes(16 * KIB)
        await app.websocket.send_bytes(noise)
        sent.append(noise)
    assert app.hub.stats().fast_path == 0
    await app.adopt()
    assert not writable.is_set()
    for number in range(3):
        await app.hub.send(message(3000, str, number))
        sent.append(message(3000, str, number))
    assert await read(client, len(sent)) == sent
    client.close()


@pytest.mark.parametrize("who", ["client", "client vanishes", "handler", "hub"])
async def test_a_close_after_it(serve, app, who):
    server = await serve(app.starlette)
    client = await connected(server, app)
    await app.adopt()
    await app.hub.send("hello")
    if who == "client":
        await client.send(struct.pack("!H", 4001), CLOSE)
        await until(lambda: app.ended)
    elif who == "client vanishes":
        assert await client.recv() == "hello"
        client.close()
    elif who == "handler":
        await app.websocket.close(4001)
    else:
        await app.hub.close(app.websocket, code=4001)
    await app.hub.send("too late")
    await until(lambda: app.ended)
    await until(lambda: not server.server.server_state.connections)
    assert app.ended == [1005 if who == "client vanishes" else 4001]
    if who != "client vanishes":
        rest = await client.rest()
        assert [frame.opcode for frame in rest] == [frames.TEXT, CLOSE]
        client.close()


@pytest.mark.parametrize("how", ["close", "end"])
async def test_a_client_that_left_before_it(serve, app, how):
    server = await serve(app.starlette)
    client = await connected(server, app)
    if how == "close":
        await client.send(struct.pack("!H", 4001), CLOSE)
    else:
        client.close()
    await until(lambda: not server.server.server_state.connections)
    app.may_connect.set()
    await until(lambda: app.ended)
    assert len(app.hub) == 0
    client.close()


@pytest.mark.parametrize("reads", [True, False])
async def test_a_shutdown_after_it(serve, app, reads):
    server = await serve(app.starlette, send_buffer=4 * KIB)
    client = await connected(server, app, small=not reads)
    await app.adopt()
    protocol_of(server).close_timeout = 0.2
    if reads:
        await app.hub.send("hello")
    else:
        while protocol_of(server).writable.is_set():
            await app.hub.send(bytes(16 * KIB))
    began = time.monotonic()
    stopping = asyncio.create_task(server.stop())
    if reads:
        rest = await client.rest()
        assert [frame.opcode for frame in rest] == [frames.TEXT, CLOSE]
        assert rest[-1].payload[:2] == struct.pack("!H", 1012)
    await stopping
    assert time.monotonic() - began < 15
    assert app.ended == [1012]
    client.close()


async def test_the_handler_goes_on_alone_and_the_client_reads_nothing(serve, app):
    """The end of an adopted client's app has a bound, as that of any other."""
    server = await serve(app.starlette, send_buffer=4 * KIB)
    client = await connected(server, app, small=True)
    await app.adopt()
    protocol = protocol_of(server)
    protocol.close_timeout = 0.2
    app.after = protocol.writable
    await client.send(b"leave")
    await until(lambda: not server.server.server_state.connections)
    client.close()


async def test_a_reader_that_waits_already(serve, app):
    """A task may be in `receive_text` while another one connects the client."""
    hub, got = app.hub, []
    go_on = asyncio.Event()

    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        first = asyncio.create_task(websocket.receive_text())
        await asyncio.sleep(0)  # it waits
        await hub.connect(websocket)
        go_on.set()
        got.append(await first)
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                got.append(await websocket.receive_text())

    server = await serve(Starlette(routes=[WebSocketRoute("/ws", endpoint)]))
    async with server.connect("/ws") as client:
        await go_on.wait()
        assert hub.stats().fast_path == 1
        for number in range(5):
            await client.send(f"{number}" * 3000)
        await until(lambda: got == [f"{number}" * 3000 for number in range(5)])


@pytest.mark.parametrize("ended", [False, True])
async def test_a_task_beside_the_handlers_connects(serve, app, ended):
    """It may come too late, when the handler has returned and the connection is being closed."""
    hub, returned, tasks = app.hub, asyncio.Event(), []

    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        tasks.append(asyncio.create_task(connect(websocket)))
        with contextlib.suppress(WebSocketDisconnect):
            while not ended:
                await websocket.receive_text()

    async def connect(websocket: WebSocket):
        if ended:
            await until(lambda: not server.server.server_state.tasks)
        await hub.connect(websocket)
        returned.set()

    server = await serve(Starlette(routes=[WebSocketRoute("/ws", endpoint)]))
    client = await Client.connect(server, "/ws")
    await until(lambda: tasks and tasks[0].done())
    if ended:
        with contextlib.suppress(ClientGone):
            await tasks[0]
    else:
        assert hub.stats().fast_path == 1
        await hub.send("hello")
        assert await client.recv() == "hello"
    client.close()
    await until(lambda: len(hub) == 0)


async def test_middleware_that_closes_behind_the_hubs_back(serve, app):
    """What it was given as `send` is uvicorn's own still. Nothing may follow the close frame."""
    hub, closed = app.hub, asyncio.Event()

    async def endpoint(websocket: WebSocket):
        await hub.connect(websocket)
        await websocket.receive_text()

    def closing(inner):
        async def middleware(scope, receive, send):
            await inner(scope, receive, send)
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 4002})
                await hub.send("too late")
                closed.set()

        return middleware

    routes = [WebSocketRoute("/ws", endpoint)]
    server = await serve(Starlette(routes=routes, middleware=[Middleware(closing)]))
    client = await Client.connect(server, "/ws")
    await until(lambda: len(hub) == 1)
    await client.send(b"now")
    await closed.wait()
    await client.send(struct.pack("!H", 4002), CLOSE)
    rest = await client.rest()
    assert [frame.opcode for frame in rest] == [CLOSE]
    assert rest[0].payload[:2] == struct.pack("!H", 4002)
    await until(lambda: len(hub) == 0)
    client.close()


# At any moment

SIZES = [0, 1, 126, 1000, 5000, 20_000]
ACTIONS = ["own", "hub", "said", "begin", "continue", "end", "ping", "turn"]
STEPS = st.lists(st.tuples(st.sampled_from(ACTIONS), st.sampled_from(SIZES)), max_size=25)


class Talk:
    """What is said in both directions, before and after."""

    def __init__(self, app: Late, client: Client) -> None:
        self.app = app
        self.client = client
        self.said: list[str | bytes] = []  # by the client
        self.heard: list[str | bytes] = []  # what it should get
        self.part: str | None = None  # of a fragmented message

    async def step(self, action: str, size: int, adopted: bool) -> None:
        text = message(size, str, len(self.said) + len(self.heard))
        if action == "hub" and adopted:
            self.heard.append(text)
            await self.app.hub.send(text)
        elif action in ("own", "hub"):
            self.heard.append(text)
            await self.app.websocket.send_text(text)
        elif action == "said" and self.part is None:
            self.said.append(text)
            await self.client.send(text.encode())
        elif action == "begin" and self.part is None:
            self.part = text
            await self.client.send(text.encode(), frames.TEXT, 0)
        elif action in ("continue", "end") and self.part is not None:
            self.part += text
            await self.client.send(text.encode(), CONTINUATION, 0x80 if action == "end" else 0)
            if action == "end":
                self.said.append(self.part)
                self.part = None
        elif action == "ping":
            await self.client.send(b"?", PING)
        else:
            await asyncio.sleep(0)


async def adopt_amid(steps, then, window: int, send_buffer: int) -> None:
    app = Late()
    server = Served(app.starlette, send_buffer=send_buffer, ws_ping_interval=0.02)
    await server.start()
    client = await connected(server, app, window=window)
    reading: list[str | bytes] = []

    async def read_on() -> None:
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                reading.append(await client.recv())

    reader = asyncio.create_task(read_on())
    try:
        talk = Talk(app, client)
        async with asyncio.timeout(60):
            for action, size in steps:
                await talk.step(action, size, False)
            await app.adopt()
            for action, size in then:
                await talk.step(action, size, True)
            if talk.part is not None:
                await talk.step("end", 1, True)
            await until(lambda: app.got == talk.said)
            await until(lambda: reading == talk.heard)
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        client.close()
        await server.stop()


@pytest.mark.timeout(400)  # a failure is made as short as possible, which takes a while
@pytest.mark.parametrize("loop", [None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_whatever_is_under_way(any_window, loop):
    with asyncio.Runner(loop_factory=loop) as runner:

        @settings(max_examples=examples(15))
        @given(STEPS, STEPS, st.sampled_from([0, *WINDOWS]), st.sampled_from([0, 4 * KIB]))
        def check(steps, then, window: int, send_buffer: int) -> None:
            runner.run(adopt_amid(steps, then, window, send_buffer))

        check()


@pytest.mark.parametrize("loop", [None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_what_is_read_from_then_on_has_a_bound(loop):
    """The event loop itself may hold a method of the class that the object had before."""

    async def flood() -> None:
        app = Late()
        server = Served(app.starlette)
        await server.start()
        client = await connected(server, app)
        protocol = protocol_of(server)
        await app.adopt()
        app.reads.clear()
        await client.send(b"the first")
        many = masked(b"x", frames.TEXT) * 2000
        await asyncio.get_running_loop().sock_sendall(client.sock, many)
        await until(lambda: protocol.queue.qsize() >= 32)
        assert protocol.queue.qsize() < 2000
        app.reads.set()
        await until(lambda: len(app.got) == 2001)
        client.close()
        await server.stop()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(flood())


async def test_a_clients_own_compression_goes_on(serve, app):
    """Its messages refer back over the moment of its adoption."""
    server = await serve(app.starlette)
    async with websockets.connect(server.url("/ws"), proxy=None) as client:
        await until(lambda: app.websocket is not None)
        text = message(5000, str)
        await client.send(text)
        await app.adopt()
        await client.send(text)
        await client.send(text[:300])
        await until(lambda: app.got == [text, text, text[:300]])
