"""What several test modules need: a real server, a client in memory, waiting on conditions."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import random
import socket
import threading
import time
import traceback
import types
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import uvicorn
import websockets
from starlette.types import Message
from starlette.websockets import WebSocket

import starcast

DEADLINE = 30.0  # seconds that a test waits for something before it fails

# Seconds that a busy machine may take longer for what a test times. The timeouts that tests make
# short have defaults of 5 and 10 seconds, so this still tells one from the other.
BUSY = 4.0


def examples(count: int) -> int:
    """Return how many examples Hypothesis tries: so many, or a multiple of that in `.ci/slow`."""
    return count * int(os.environ.get("STARCAST_EXAMPLES", "1"))


def said(error: BaseException | None) -> str:
    """Return what an error says, with everything that a log or a reporter finds behind it."""
    if error is None:
        return ""
    lines = "".join(traceback.format_exception(error)).splitlines()
    own = [line for line in lines if not line.startswith("    ")]  # not the lines of source
    behind = said(error.__cause__) + said(error.__context__)
    return "\n".join([*own, str(error), repr(error), repr(error.args), behind])


async def until(condition: Callable[[], object], deadline: float = DEADLINE) -> None:
    """Wait on the event loop until the condition is true; fail after `deadline` seconds."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not true within {deadline} seconds; {starcast_tasks()}")
        await asyncio.sleep(0.002)


def until_sync(condition: Callable[[], object], deadline: float = DEADLINE) -> None:
    """The same in a thread without an event loop."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"did not become true within {deadline} seconds"
        time.sleep(0.002)


def free_port() -> int:
    """Return a port of loopback for a server that is to be started, maybe again and again.

    It is none of those that a system gives to outgoing connections: one of those could take it
    before the server does, and a client that keeps trying to reach it could connect to itself.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def starcast_tasks() -> set[asyncio.Task[Any]]:
    """The tasks of this loop that starcast has made and that have not ended."""
    ours = str(Path(starcast.__file__).parent)
    return {t for t in asyncio.all_tasks() if t.get_coro().cr_code.co_filename.startswith(ours)}


def program(path: Path) -> Any:
    """Run a program, wherever it is, and return its module, which no import finds afterwards."""
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    exec(compile(path.read_text(), path, "exec"), module.__dict__)
    return module


async def by_another(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Await it in a task that has nothing to do with this one: in a third party."""
    return await asyncio.create_task(coroutine, context=contextvars.Context())


@contextlib.asynccontextmanager
async def listening(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]],
    port: int = 0,
    **options: Any,
) -> AsyncIterator[int]:
    """Yield a port of loopback on which `handle` is called for each connection.

    At the end, those that have not returned are cancelled, and every connection is dropped. That
    includes the ones that are being made at that moment. With `asyncio.start_server` alone, such a
    socket is left to the garbage collector, which makes another test fail, whichever runs then.
    """
    connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
    over = False

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if over:  # only now has it shaken hands in TLS
            writer.transport.abort()
        else:
            connections[asyncio.create_task(handle(reader, writer))] = writer

    server = await asyncio.start_server(connected, "127.0.0.1", port, **options)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop = asyncio.get_running_loop()
        for sock in server.sockets:
            loop.remove_reader(sock.fileno())  # nothing more is accepted
        # What has been accepted gets a transport in the next iteration, or breaks if the server is
        # closed by then (python/cpython#109564); and `connected` is called in the one after that.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        over = True
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        for writer in connections.values():
            writer.transport.abort()
        await asyncio.sleep(0)  # the sockets are closed
        for task in connections:
            if not task.cancelled():
                task.result()


class Served:
    """A uvicorn server for one app, on the event loop of the test."""

    def __init__(
        self, app: Any, send_buffer: int = 0, sock: socket.socket | None = None, **config: Any
    ) -> None:
        self._socket = sock or socket.create_server(("127.0.0.1", 0))
        if send_buffer:  # bytes, of each connection; how much a kernel takes by itself varies
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.host, self.port = self._socket.getsockname()
        # An HTTP client of a slow test may use its connection again after more than five seconds.
        waits = {"timeout_graceful_shutdown": 5, "timeout_keep_alive": 60}
        config = {"log_config": None, **waits, **config}
        self.server = uvicorn.Server(uvicorn.Config(app, **config))
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self.server.serve([self._socket]))
        await until(lambda: self.server.started or self._task.done())
        assert self.server.started

    async def stop(self) -> None:
        self.server.should_exit = True
        if self._task is not None:
            await asyncio.wait_for(self._task, DEADLINE)
        self._socket.close()

    def url(self, path: str) -> str:
        return f"ws://{self.host}:{self.port}{path}"

    def connect(self, path: str, **options: Any) -> Any:
        """Return `websockets.connect(...)`: to be awaited or entered."""
        return websockets.connect(self.url(path), **{"proxy": None, **options})


def read_frames(data: bytes) -> list[str | bytes]:
    """Take apart frames of a server that are whole and not compressed."""
    messages: list[str | bytes] = []
    while data:
        opcode, size, start = data[0] & 15, data[1], 2
        assert data[0] & 0xF0 == 0x80, "final, and no extension"
        if size > 125:
            start = 4 if size == 126 else 10
            size = int.from_bytes(data[2:start])
        payload, data = data[start : start + size], data[start + size :]
        assert len(payload) == size, "cut off"
        messages.append(payload.decode() if opcode == 1 else payload)
    return messages


class PeerWire(dict[str, Any]):
    """What `starcast.uvicorn` announces, for a `Peer`."""

    wire_format = 0

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.changed: Callable[[], None] | None = None
        self.writes: list[int] = []  # messages in each write
        self.aborted = False

    @property
    def closed(self) -> bool:
        return self.peer.gone

    @property
    def ready(self) -> bool:
        peer = self.peer
        return peer.open.is_set() and not peer.gone and peer.fail is None

    def look(self) -> None:
        if self.changed is not None:
            self.changed()

    def open(self) -> PeerWire:
        return self

    async def receive(self) -> Message:
        """That of a server whose app is behind middleware."""
        raise AssertionError("not called")

    def stop_receiving(self, code: int) -> None:
        raise AssertionError("not called")

    def write(self, frames: bytes) -> None:
        assert self.ready
        messages = read_frames(frames)
        for message in messages:
            kind = "text" if isinstance(message, str) else "bytes"
            self.peer.sent.append({"type": "websocket.send", kind: message})
        self.writes.append(len(messages))

    async def drain(self) -> bool:
        if not self.peer.open.is_set():
            self.peer.stalled += 1
            try:
                await self.peer.open.wait()
            finally:
                self.peer.stalled -= 1
        return self.peer.fail is None and not self.peer.gone

    def abort(self) -> None:
        self.aborted = True


class Gate(asyncio.Event):
    """An event whose every change is looked at."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self._look = look

    def set(self) -> None:
        super().set()
        self._look()

    def clear(self) -> None:
        super().clear()
        self._look()


class Peer:
    """The ASGI side of a real Starlette `WebSocket`: takes what is sent, says what it is told to.

    For what a server on a socket can't be made to do at a given moment: to suspend in a certain
    send, to break in another.
    """

    frames = False  # whether it takes ready-made frames

    def __init__(self, headers: dict[str, str] | None = None, path_params: Any = None) -> None:
        self.sent: list[Message] = []
        self.wire = PeerWire(self)
        self._fail: BaseException | None = None
        self.gone = False  # the app was told that it has left
        self.open = Gate(self.wire.look)  # while it is clear, a send suspends
        self.open.set()
        self.stalled = 0  # sends that are suspended now
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._inbox.put_nowait({"type": "websocket.connect"})
        self.scope: dict[str, Any] = {
            "type": "websocket",
            "path": "/",
            "path_params": path_params or {},
            "query_string": b"",
            "client": ("192.0.2.1", 4711),
            "subprotocols": [],
            "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
        }
        if self.frames:
            self.scope["extensions"] = {"starcast": self.wire}
        self.websocket = WebSocket(self.scope, self.receive, self.send)

    @property
    def fail(self) -> BaseException | None:
        """What the next sends raise."""
        return self._fail

    @fail.setter
    def fail(self, error: BaseException | None) -> None:
        self._fail = error
        self.wire.look()

    async def receive(self) -> Message:
        message = await self._inbox.get()
        self.gone = message["type"] == "websocket.disconnect"
        self.wire.look()
        return message

    async def send(self, message: Message) -> None:
        if not self.open.is_set():
            self.stalled += 1
            try:
                await self.open.wait()
            finally:
                self.stalled -= 1
        if self.fail is not None:
            raise self.fail
        self.sent.append(dict(message))

    def say(self, text: str) -> None:
        self._inbox.put_nowait({"type": "websocket.receive", "text": text})

    def say_bytes(self, content: bytes) -> None:
        self._inbox.put_nowait({"type": "websocket.receive", "bytes": content})

    def leave(self, code: int = 1000) -> None:
        self._inbox.put_nowait({"type": "websocket.disconnect", "code": code})

    @property
    def got(self) -> list[str | bytes]:
        """The messages, without the handshake and the close."""
        messages = [message for message in self.sent if message["type"] == "websocket.send"]
        return [m["text"] if m.get("text") is not None else m["bytes"] for m in messages]

    @property
    def closed(self) -> int | None:
        """The code that it was closed with."""
        for message in self.sent:
            if message["type"] == "websocket.close":
                return int(message.get("code", 1000))
        return None


async def _ended(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.wait(tasks)


class OtherLoop:
    """An event loop in a thread of its own, with clients on it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(20)

    def close(self) -> None:
        """End as `asyncio.run` does: with every task cancelled."""
        self.stop()
        if tasks := asyncio.all_tasks(self.loop):
            for task in tasks:
                task.cancel()
            ending = threading.Thread(target=self.loop.run_until_complete, args=[_ended(tasks)])
            ending.start()
            ending.join(20)
        self.loop.close()


class Broker:
    """What several `Bus`es share: a broker that does what a test wants when it wants it.

    The real ones are in `tests/backends`. This one can suspend in a given call.
    """

    def __init__(self) -> None:
        self.up = True
        self.open = asyncio.Event()  # while it is clear, every call suspends
        self.open.set()
        self.connections: dict[BusConnection, set[str]] = {}  # and their channels
        self.calls: list[tuple[str, Any]] = []
        self.refused: set[str] = set()  # channels that nobody may have
        self.stalled = 0

    def kill(self, error: Exception | None = None) -> None:
        """Break every connection, and accept none until `up` is True."""
        self.up = False
        for connection in list(self.connections):
            connection.lose(error or ConnectionError("the broker was killed"))

    def restart(self) -> None:
        """Break every connection, and accept new ones."""
        self.kill()
        self.up = True

    async def called(self, name: str, what: Any = None) -> None:
        self.calls.append((name, what))
        if not self.open.is_set():
            self.stalled += 1
            try:
                await self.open.wait()
            finally:
                self.stalled -= 1

    def asked(self, *names: str) -> list[tuple[str, Any]]:
        """The calls with one of these names, without those for a hub's probes."""
        calls = [(name, what) for name, what in self.calls if name in names]
        return [call for call in calls if "starcast-probe-" not in str(call[1])]

    @property
    def probe_channel(self) -> str:
        """The channel of the probes of the hub that has connected last."""
        names = [what for name, what in self.calls if name == "subscribe"]
        return next(name for name in reversed(names) if "starcast-probe-" in name)

    @property
    def probes(self) -> int:
        """How many probes were published."""
        batches = [what for name, what in self.calls if name == "publish"]
        return sum("starcast-probe-" in batch[0][0] for batch in batches)


class Bus:
    """A backend whose broker is in this process.

    A test that wants a call to do something else passes a hook, `async def hook(it, proceed)` with
    the connection and what does the usual thing. `on_subscribe`, `on_unsubscribe` and `on_publish`
    get the channel or the messages in between. `on_connect` gets the bus. A hook of `publish` may
    be a plain function that returns a future.
    """

    def __init__(
        self,
        broker: Broker | None = None,
        max_payload: int = 1024 * 1024,
        *,
        on_connect: Callable[..., Any] | None = None,
        on_subscribe: Callable[..., Any] | None = None,
        on_unsubscribe: Callable[..., Any] | None = None,
        on_publish: Callable[..., Any] | None = None,
        on_close: Callable[..., Any] | None = None,
    ) -> None:
        self.broker = broker or Broker()
        self.max_payload = max_payload
        self.connects = 0
        self.on_connect = on_connect
        self.on_subscribe = on_subscribe
        self.on_unsubscribe = on_unsubscribe
        self.on_publish = on_publish
        self.on_close = on_close
        self.connection: BusConnection | None = None  # the last one

    async def connect(self, deliver: Callable[[str, bytes], None], lost: Any) -> BusConnection:
        self.connects += 1

        async def proceed() -> BusConnection:
            await self.broker.called("connect")
            if not self.broker.up:
                raise starcast.BackendUnavailable("the broker is down")
            self.connection = BusConnection(self, deliver, lost)
            return self.connection

        return await (proceed() if self.on_connect is None else self.on_connect(self, proceed))


class BusConnection:
    """A connection of a `Bus`."""

    def __init__(self, bus: Bus, deliver: Callable[[str, bytes], None], lost: Any) -> None:
        self.bus, self.broker = bus, bus.broker
        self.deliver, self.lost = deliver, lost
        self.max_payload = bus.max_payload
        self.broker.connections[self] = set()

    @property
    def channels(self) -> set[str]:
        """What it is subscribed to."""
        try:
            return self.broker.connections[self]
        except KeyError:
            raise ConnectionError("there is no connection") from None

    def lose(self, error: Exception) -> None:
        """Break."""
        if self.broker.connections.pop(self, None) is not None:
            self.lost(error)

    async def close(self) -> None:
        async def proceed() -> None:
            self.broker.connections.pop(self, None)

        await (proceed() if self.bus.on_close is None else self.bus.on_close(self, proceed))

    async def subscribe(self, channel: str) -> None:
        async def proceed() -> None:
            await self.broker.called("subscribe", channel)
            self.check(channel)
            self.channels.add(channel)

        hook = self.bus.on_subscribe
        await (proceed() if hook is None else hook(self, channel, proceed))

    async def unsubscribe(self, channel: str) -> None:
        async def proceed() -> None:
            await self.broker.called("unsubscribe", channel)
            self.channels.discard(channel)

        hook = self.bus.on_unsubscribe
        await (proceed() if hook is None else hook(self, channel, proceed))

    def publish(self, messages: list[tuple[str, bytes]]) -> Any:
        async def proceed() -> None:
            await self.broker.called("publish", list(messages))
            assert self.channels is not None  # or it raises
            for channel, data in messages:
                self.check(channel)
                for connection, channels in list(self.broker.connections.items()):
                    if channel in channels:
                        connection.deliver(channel, data)

        hook = self.bus.on_publish
        return proceed() if hook is None else hook(self, messages, proceed)

    def check(self, channel: str) -> None:
        if channel in self.broker.refused:
            raise PermissionError(f"nobody may have {channel}")


class Changed:
    """A real backend whose connections a test changes when they are made."""

    def __init__(self, backend: Any, change: Callable[[Any], object]) -> None:
        self.backend = backend
        self.change = change
        self.connection: Any = None  # the last one
        self.delivered: list[str] = []  # the channel of each message

    async def connect(self, deliver: Callable[[str, bytes], None], lost: Any) -> Any:
        def count(channel: str, payload: bytes) -> None:
            self.delivered.append(channel)
            deliver(channel, payload)

        self.connection = await self.backend.connect(count, lost)
        self.change(self.connection)
        return self.connection


async def joined(
    hub: starcast.Broadcast, *channels: str, peer: type[Peer] = Peer, **options: Any
) -> Peer:
    """A client of these channels; by default, of the default channel."""
    client = peer()
    for channel in channels or ("default",):
        await hub.connect(client.websocket, channel, **options)
    return client


async def several(
    hub: starcast.Broadcast, count: int, channel: str = "default", peer: type[Peer] = Peer
) -> list[Peer]:
    """So many clients of a channel."""
    return [await joined(hub, channel, peer=peer) for _ in range(count)]


def subscribed(broker: Broker) -> set[str]:
    names = set().union(*broker.connections.values())
    return {name for name in names if "starcast-probe-" not in name}


async def stalled(server: Served, path: str) -> socket.socket:
    """A client that has shaken hands and reads nothing any more."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", server.port))
    await loop.sock_sendall(
        sock,
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode(),
    )
    assert b" 101 " in await loop.sock_recv(sock, 100)
    return sock
