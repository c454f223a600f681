"""Shortcut: a message for a few members is published where it is read, and nobody can tell."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import json
import threading
import traceback
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.middleware import Middleware
from starlette.routing import Mount, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed

from starcast import Broadcast, BroadcastEndpoint, InvalidChannel
from starcast.event import Event
from starcast.frames import TEXT
from support import Broker, Bus, Served, examples, until
from test_uvicorn import masked

pytestmark = pytest.mark.anyio

tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")


class Tenants:
    """Middleware of an app that sets a context variable."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        tenant.set(scope["path"].rpartition("/")[2])
        await self.app(scope, receive, send)


def callers() -> set[str]:
    """The names of the functions that are being called."""
    return {frame.f_code.co_name for frame, _ in traceback.walk_stack(None)}


class Room(BroadcastEndpoint):
    """Notes its clients, and which messages were published without the client's task."""

    # Of a subclass:
    without_task: list[bool]
    instances: list[Any]
    websockets: list[WebSocket]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.without_task, cls.instances, cls.websockets = [], [], []

    async def on_connect(self, websocket):
        await super().on_connect(websocket)
        self.instances.append(self)
        self.websockets.append(websocket)

    def get_channel(self, websocket):
        self.without_task.append("data_received" in callers())
        return f"{tenant.get()}.{websocket.path_params['room']}"


@contextlib.asynccontextmanager
async def served(endpoint: type[Room], ws: str = "auto", **config: Any):
    app = Starlette(
        routes=[WebSocketRoute("/{room}/{tenant}", endpoint)],
        middleware=[Middleware(Tenants)],
        lifespan=endpoint.broadcast.lifespan,
    )
    server = Served(app, ws=ws, ws_per_message_deflate=False, **config)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def close_of(client: Any) -> tuple[int, str]:
    with contextlib.suppress(ConnectionClosed):
        while True:
            await client.recv()
    return client.close_code, client.close_reason


@pytest.fixture(params=["auto", "starcast.uvicorn:BroadcastProtocol"], ids=["adopted", "protocol"])
def ws(request) -> str:
    return request.param


async def test_neither_the_task_nor_another_turn_is_needed(ws):
    class Plain(Room):
        broadcast = Broadcast()

    async with (
        served(Plain, ws) as server,
        server.connect("/a/x") as one,
        server.connect("/a/x") as two,
    ):
        for number in range(10):
            await one.send(f"{number}")
            assert await two.recv() == await one.recv() == f"{number}"
        assert Plain.without_task == [False, False, *[True] * 10]  # and two that connect
        stats = Plain.broadcast.stats()
        assert (stats.published, stats.delivered, stats.fast_path) == (10, 20, 2)


async def test_context_variables_are_those_of_the_clients_task(ws):
    class Plain(Room):
        broadcast = Broadcast()

    async with (
        served(Plain, ws) as server,
        server.connect("/a/x") as one,
        server.connect("/a/y") as other,
    ):
        await one.send("for x")
        assert await one.recv() == "for x"
        await Plain.broadcast.publish("y.a", "for y")
        assert await other.recv() == "for y"
    assert any(Plain.without_task)


async def test_what_a_subclass_does_with_a_message_is_done(ws):
    class Shouts(Room):
        broadcast = Broadcast()

        async def on_receive(self, websocket, data):
            await super().on_receive(websocket, data.upper())

    class Decodes(Room):
        broadcast = Broadcast()

        async def decode(self, websocket, message):
            return message["text"][::-1]

    class Own(Room):
        broadcast = Broadcast()

        async def on_connect(self, websocket):
            await super().on_connect(websocket)
            self.on_receive = self.shout

        async def shout(self, websocket, data):
            await self.broadcast.publish(self.get_channel(websocket), data + "!")

    for endpoint, answer in ((Shouts, "ABC"), (Decodes, "cba"), (Own, "abc!")):
        async with served(endpoint, ws) as server, server.connect("/a/x") as client:
            await client.send("abc")
            assert await client.recv() == answer
            assert not any(endpoint.without_task)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any):
    """As a tracing library replaces a function, or as a program does with one of an object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


@pytest.mark.parametrize("name", ["on_receive", "decode"])
@pytest.mark.parametrize("where", ["BroadcastEndpoint", "class", "instance"])
@pytest.mark.parametrize("when", ["before", "while connected"])
async def test_a_hook_that_is_replaced_sees_every_message(name, where, when):
    seen: list[Any] = []

    class Plain(Room):
        broadcast = Broadcast()

    original = getattr(BroadcastEndpoint, name)

    async def traced(*args: Any) -> Any:
        seen.append(args[-1])
        return await original(*args[-3:])

    async with served(Plain) as server, contextlib.AsyncExitStack() as stack:

        def replace() -> None:
            owner = {"BroadcastEndpoint": BroadcastEndpoint, "class": Plain}.get(where)
            if owner is not None:
                stack.enter_context(replaced(owner, name, traced))
            elif Plain.instances:
                (instance,) = Plain.instances
                vars(instance)[name] = functools.partial(traced, instance)

        if when == "before":
            replace()
        async with server.connect("/a/x") as client:
            if when == "before":
                replace()
            for _ in range(2):
                await client.send("hello")
                assert await client.recv() == "hello"
            before = len(seen)
            if when == "while connected":
                assert any(Plain.without_task)
                replace()
            for _ in range(3):
                await client.send("hello")
                assert await client.recv() == "hello"
            assert len(seen) == before + 3


@pytest.mark.parametrize("when", ["in on_connect", "while connected"])
async def test_a_receive_that_is_wrapped_returns_every_message(ws, when):
    seen: list[Any] = []

    def wrap(websocket: WebSocket) -> None:
        receive = websocket.receive

        async def wrapped() -> Any:
            message = await receive()
            seen.append(message.get("text"))
            return message

        websocket.receive = wrapped

    class Plain(Room):
        broadcast = Broadcast()

        async def on_connect(self, websocket):
            await super().on_connect(websocket)
            if when == "in on_connect":
                wrap(websocket)

    async with served(Plain, ws) as server, server.connect("/a/x") as client:
        await client.send("first")
        assert await client.recv() == "first"
        if when == "while connected":
            wrap(*Plain.websockets)
            # Its handler has been waiting since before.
            await client.send("second")
            assert await client.recv() == "second"
            seen.append("second")
        await client.send("third")
        assert await client.recv() == "third"
        assert seen[-1] == "third"


async def fall_behind(client: Any, hub: Broadcast, channel: str) -> None:
    """Let something wait for a client, so that a message for it has to be queued."""
    client.transport.pause_reading()
    while hub.stats().buffered == 0:
        await hub.publish(channel, "x" * 100_000)
        for _ in range(5):  # a task may be about to send it
            await asyncio.sleep(0)


async def test_get_channel_is_called_once_for_each_message_and_in_the_task(ws):
    """Also for one that then has to wait, or fails."""
    tasks: list[Any] = []

    class Counts(Room):
        broadcast = Broadcast()
        error: BaseException | None = None

        def get_channel(self, websocket):
            tasks.append(asyncio.current_task())
            if self.error is not None:
                raise self.error
            return super().get_channel(websocket)

    async with (
        served(Counts, ws) as server,
        server.connect("/a/x") as client,
        server.connect("/a/x", max_queue=None) as other,
    ):
        await client.send("hello")
        assert await client.recv() == "hello"
        await fall_behind(other, Counts.broadcast, "x.a")
        await client.send("with one that is behind")
        await until(lambda: len(tasks) == 2 + 2)
        other.transport.resume_reading()
        while await client.recv() != "with one that is behind":
            pass
        # Two that arrive together are left to the task before anybody asks.
        client.transport.write(masked(b"one", TEXT) + masked(b"two", TEXT))
        assert [await client.recv(), await client.recv()] == ["one", "two"]
        Counts.error = WebSocketException(4000, "enough")
        await client.send("hello")
        assert await close_of(client) == (4000, "enough")
        assert len(tasks) == 2 + 5
        assert len({tasks[0], *tasks[2:]}) == 1
        assert tasks[0] is not None
        assert Counts.without_task == [False, False, True, True, False, False]


async def test_a_channel_and_an_encoding_may_change(ws, caplog):
    class Plain(Room):
        broadcast = Broadcast()

    async with (
        served(Plain, ws) as server,
        server.connect("/a/x") as one,
        server.connect("/b/x") as two,
    ):
        await one.send("[1,  2]")
        assert await one.recv() == "[1,  2]"
        first = Plain.instances[0]
        first.encoding = "json"
        await one.send("[1,  2]")
        assert await one.recv() == "[1,2]"
        first.get_channel = lambda websocket: "x.b"
        await one.send("[3,  4]")
        assert await two.recv() == "[3,4]"
        first.get_channel = lambda websocket: setattr(first, "encoding", "text") or "x.a"
        await one.send('"as text"')
        assert await one.recv() == "as text"
        first.get_channel = lambda websocket: setattr(first, "encoding", "json") or "x.a"
        await one.send("as JSON")
        assert await one.recv() == '"as JSON"'
        first.get_channel = lambda websocket: "x.a"
        first.encoding = []  # a mistake, which the task reports
        await one.send("")
        assert (await close_of(one))[0] == 1011
        assert "encoding" in caplog.text
    caplog.clear()


async def test_a_get_channel_that_cancels_its_task(ws, caplog):
    ended: list[str] = []

    class Stops(Room):
        broadcast = Broadcast()
        how = None

        def get_channel(self, websocket):
            if self.how == "cancel":
                asyncio.current_task().cancel()
            elif self.how == "raise":
                raise asyncio.CancelledError
            return super().get_channel(websocket)

        async def on_disconnect(self, websocket, close_code):
            await super().on_disconnect(websocket, close_code)
            ended.append(Stops.how)

    async with served(Stops, ws) as server:
        for how in ("cancel", "raise"):
            Stops.how = None
            async with server.connect("/a/x") as client, server.connect("/a/x") as other:
                Stops.how = how
                await client.send("hello")
                await until(lambda how=how: how in ended)
                Stops.how = None
                await other.send("and on")
                if how == "cancel":  # which takes effect where the task waits next
                    assert await other.recv() == "hello"
                assert await other.recv() == "and on"
    assert "asyncio" not in {record.name for record in caplog.records}  # a fatal error
    caplog.clear()


async def test_a_handler_that_goes_on_to_another_channel_publishes_there(ws):
    hub = Broadcast()

    async def endpoint(websocket: WebSocket) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as timeout:
                move.append(lambda: timeout.reschedule(-1))
                await hub.serve(websocket, "old")
        if "mute" in websocket.query_params:
            await hub.serve(websocket, "new", publish=False)
        else:
            await hub.connect(websocket, "new")
            async for text in websocket.iter_text():
                await hub.publish("new", text.upper())

    move: list[Any] = []
    app = Starlette(routes=[WebSocketRoute("/", endpoint)], lifespan=hub.lifespan)
    server = Served(app, ws=ws)
    await server.start()
    async with server.connect("/") as one, server.connect("/?mute=1") as two:
        for client in (one, two):
            await client.send("hello")
            assert await one.recv() == await two.recv() == "hello"
        for go_on in move:
            go_on()
        await until(lambda: hub.stats().channels == {"new": 2} or len(hub.clients("new")) == 2)
        await one.send("hello")
        assert await one.recv() == await two.recv() == "HELLO"
        await two.send("hello")
        assert (await close_of(two))[0] == 1008
    await server.stop()


@pytest.mark.parametrize("joins", ["in on_connect", "while connected"])
async def test_a_client_that_a_second_hub_closes_publishes_nothing_more(ws, joins):
    other = Broadcast()

    class Plain(Room):
        broadcast = Broadcast()

        async def on_connect(self, websocket):
            await super().on_connect(websocket)
            if joins == "in on_connect" and len(self.websockets) == 1:
                await other.connect(websocket, "room")

    async with (
        served(Plain, ws) as server,
        server.connect("/a/x") as one,
        server.connect("/a/x") as two,
    ):
        await one.send("before")
        assert await two.recv() == await one.recv() == "before"
        if joins == "while connected":
            await other.connect(Plain.websockets[0], "room")
            # Its handler has been waiting since before.
            await one.send("between")
            assert await two.recv() == await one.recv() == "between"
        await fall_behind(one, other, "room")  # so its close frame waits
        closing = asyncio.create_task(other.close(Plain.websockets[0], 4000))
        await until(lambda: len(other) == 0)
        await other.publish("elsewhere", "what was before it has been delivered")
        await one.send("after")
        await two.send("and on")
        assert await two.recv() == "and on"
        one.transport.resume_reading()
        await closing
        assert (await close_of(one))[0] == 4000


class ByShortcut(Room):
    broadcast = Broadcast()
    heartbeats = {"ping": "pong", b"ping": b"pong"}  # noqa: RUF012  # the docs tell people to write it so
    max_message = 300


class ByTask(ByShortcut):
    broadcast = Broadcast()

    async def on_receive(self, websocket, data):
        await super().on_receive(websocket, data)


MESSAGES = st.one_of(
    st.text(max_size=5),
    st.binary(max_size=5),
    st.integers(290, 310).map("x".__mul__),
    st.integers(70, 80).map("\U0001f600".__mul__),
    st.sampled_from(
        [
            "ping",
            b"ping",
            "mute",
            b"mute",
            '"ping"',
            '{"a": [1, "\\u00e9"]}',
            "[NaN]",
            "1e999",
            "{}",
        ]
    ),
)


async def conversation(endpoint: type[Room], encoding: Any, sent: list[str | bytes]) -> Any:
    """What two clients of a room get if one of them says these, and how the first one ends."""
    endpoint.encoding = encoding
    async with (
        served(endpoint) as server,
        server.connect("/a/x") as one,
        server.connect("/a/x") as two,
    ):
        got: list[list[str | bytes]] = [[], []]

        async def read(client: Any, into: list[str | bytes]) -> None:
            with contextlib.suppress(ConnectionClosed):
                while (message := await client.recv()) != "the end":
                    into.append(message)

        clients = zip((one, two), got, strict=True)
        readers = [asyncio.create_task(read(*client)) for client in clients]
        for number, message in enumerate(sent):
            with contextlib.suppress(ConnectionClosed):
                await one.send(message)
            # Nothing follows a message until it has come back, or was a fault.
            await until(lambda count=number: len(got[0]) > count or readers[0].done())
        await endpoint.broadcast.publish("x.a", "the end")
        await asyncio.gather(*readers)
        return got, one.close_code, one.close_reason


@pytest.mark.parametrize("encoding", ["text", "bytes", "json", None])
def test_whatever_is_said_the_outcome_is_the_same(encoding):
    with asyncio.Runner() as runner:

        @settings(max_examples=examples(4))
        @given(st.lists(MESSAGES, max_size=4))
        @example(["hello"])
        @example([b"hello"])
        @example(['"hello"'])
        def check(sent: list[str | bytes]) -> None:
            by_task = runner.run(conversation(ByTask, encoding, sent))
            assert runner.run(conversation(ByShortcut, encoding, sent)) == by_task
            assert not any(ByTask.without_task)

        check()
    assert any(ByShortcut.without_task)


@pytest.mark.parametrize("error", [InvalidChannel("no such room"), RuntimeError("a bug")])
async def test_an_error_in_get_channel_is_raised_in_the_clients_task(ws, error, caplog):
    class Fails(Room):
        broadcast = Broadcast()
        error = None

        def get_channel(self, websocket):
            if self.error is not None:
                raise self.error
            return super().get_channel(websocket)

    async with served(Fails, ws) as server, server.connect("/a/x") as client:
        Fails.error = error
        await client.send("hello")
        code, _ = await close_of(client)
        assert code == (1008 if isinstance(error, InvalidChannel) else 1011)
    logged = [r for r in caplog.records if r.exc_info and r.exc_info[1] is error]
    assert len(logged) == (code == 1011)
    caplog.clear()


@pytest.mark.parametrize("channel", ["", None])
async def test_a_channel_that_is_not_valid_is_refused_in_the_clients_task(ws, channel, caplog):
    class Moves(Room):
        broadcast = Broadcast()
        channel = "a"

        def get_channel(self, websocket):
            super().get_channel(websocket)
            return self.channel

    async with served(Moves, ws) as server, server.connect("/a/x") as client:
        Moves.channel = channel
        await client.send("hello")
        assert (await close_of(client))[0] == 1008
        assert Moves.without_task == [False, True]
    caplog.clear()


async def test_a_mistake_in_a_delivery_is_not_the_senders(ws, caplog, monkeypatch):
    class Plain(Room):
        broadcast = Broadcast()

    async with served(Plain, ws) as server, server.connect("/a/x") as client:
        with monkeypatch.context() as patch:

            def mistaken(event, wire_format):
                raise LookupError("a mistake")

            patch.setattr(Event, "frame", mistaken)
            await client.send("lost")
            await until(lambda: caplog.records)
        await client.send("and on")
        assert await client.recv() == "and on"
    assert [record.getMessage() for record in caplog.records] == ["messages were lost"]
    caplog.clear()


async def test_order_with_all_that_is_sent_in_other_ways(ws):
    """A room's messages keep the order of each of those who publish, whatever way they take."""
    hub = Broadcast()
    other = {}

    class Plain(Room):
        broadcast = hub

        async def on_connect(self, websocket):
            await super().on_connect(websocket)
            other[websocket.path_params["room"]] = websocket

    async with (
        served(Plain, ws) as server,
        server.connect("/a/x", max_queue=None) as one,
        server.connect("/a/x", max_queue=None) as two,
    ):
        count = 300
        got: list[str] = []

        async def read() -> None:
            while True:
                got.append(await two.recv())

        reading = asyncio.create_task(read())

        async def say() -> None:
            for number in range(count):
                await one.send(f"client {number}")
                if number % 10 == 0:  # nothing follows that message
                    await until(lambda text=f"client {number}": text in got)

        async def publish() -> None:
            for number in range(count):
                await hub.publish("x.a", f"task {number}")
                if number % 7 == 0:
                    await asyncio.sleep(0)

        async def send() -> None:
            for number in range(count):
                await other["a"].send_text(f"handler {number}")
                if number % 5 == 0:
                    await asyncio.sleep(0)

        def thread() -> None:
            for number in range(count):
                hub.publish_nowait("x.a", f"thread {number}")

        thread = threading.Thread(target=thread)
        thread.start()
        await asyncio.gather(say(), publish(), send())
        thread.join()
        await until(lambda: len(got) == 4 * count)
        reading.cancel()
        for who in ("client", "task", "handler", "thread"):
            assert [each for each in got if each.startswith(who)] == [
                f"{who} {number}" for number in range(count)
            ]
        assert True in Plain.without_task


async def test_subscribers_and_members_of_other_loops_get_it_too(ws):
    class Plain(Room):
        broadcast = Broadcast()

    got: list[str] = []
    hub = Plain.broadcast
    async with served(Plain, ws) as server, server.connect("/a/x") as one:

        def elsewhere() -> None:
            async def listen() -> None:
                async with hub.subscribe("x.a") as events:
                    async for event in events:
                        got.append(event.message)
                        if event.message == "the end":
                            return

            asyncio.run(listen())

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await until(lambda: hub.stats().subscribers == 1)
        async with hub.subscribe("x.a") as events:
            for text in ("hello", "the end"):
                await one.send(text)
                assert await one.recv() == text
                assert (await anext(events)).message == text
        thread.join(10)
    assert got == ["hello", "the end"]


async def test_a_client_that_was_closed_publishes_nothing_more(ws):
    class Plain(Room):
        broadcast = Broadcast()

    hub = Plain.broadcast
    async with (
        served(Plain, ws) as server,
        server.connect("/a/x") as one,
        server.connect("/a/x") as two,
    ):
        await one.send("before")
        assert await two.recv() == await one.recv() == "before"
        first = Plain.websockets[0]
        await hub.connect(first, "its own")
        await fall_behind(one, hub, "its own")  # so its close frame waits
        closing = asyncio.create_task(hub.close(first, 4000))
        await until(lambda: hub.channels == {"x.a": 1})
        await hub.publish("elsewhere", "what was before it has been delivered")
        await one.send("after")
        await two.send("and on")
        assert await two.recv() == "and on"
        one.transport.resume_reading()
        await closing
        assert await close_of(one) == (4000, "")


async def test_over_a_broker_it_is_the_task_that_publishes(ws):
    class Plain(Room):
        broadcast = Broadcast(backend=Bus(Broker()))

    async with served(Plain, ws) as server, server.connect("/a/x") as one:
        for text in ("one", "two"):
            await one.send(text)
            assert await one.recv() == text
        assert not any(Plain.without_task)


async def test_a_burst_keeps_its_order(ws):
    class Plain(Room):
        broadcast = Broadcast()

    async with served(Plain, ws) as server, server.connect("/a/x", max_queue=None) as one:
        sent = [f"{number}" for number in range(500)]
        for text in sent:
            await one.send(text)
        assert [await one.recv() for _ in sent] == sent


async def test_a_served_channel_and_a_mount(ws):
    hub = Broadcast()

    async def endpoint(websocket: WebSocket) -> None:
        await hub.serve(websocket, "room", encoding="json")

    async def listens(websocket: WebSocket) -> None:
        await hub.serve(websocket, "room", publish=False)

    routes = [
        WebSocketRoute("/serve", endpoint),
        WebSocketRoute("/listen", listens),
        Mount("/m", hub.app(publish=True)),
    ]
    server = Served(Starlette(routes=routes, lifespan=hub.lifespan), ws=ws)
    await server.start()
    async with server.connect("/serve") as one, server.connect("/listen") as two:
        await one.send('{"a":  1}')
        assert await two.recv() == await one.recv() == '{"a":1}'
        await two.send("no")
        assert (await close_of(two))[0] == 1008
        async with server.connect("/m/room") as three:
            await three.send("from the mount")
            assert await three.recv() == await one.recv() == "from the mount"
    await server.stop()


class Proxy:
    """What tracing libraries put in place of a function: it claims to be what it wraps."""

    def __init__(self, wrapped: Any, seen: list[Any]) -> None:
        self.wrapped, self.seen = wrapped, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def __get__(self, instance: object, owner: type) -> Any:
        return self if instance is None else Proxy(self.wrapped.__get__(instance, owner), self.seen)

    def __eq__(self, other: object) -> bool:
        return self.wrapped == other

    __hash__ = None

    def __call__(self, *args: Any) -> Any:
        self.seen.append(args[-1])
        return self.wrapped(*args)


@pytest.mark.parametrize("name", ["on_receive", "decode"])
@pytest.mark.parametrize("when", ["before", "while connected"])
async def test_a_proxy_of_a_hook_sees_every_message(name, when):
    seen: list[Any] = []

    class Plain(Room):
        broadcast = Broadcast()

    async with served(Plain) as server, contextlib.AsyncExitStack() as stack:

        def replace() -> None:
            proxy = Proxy(vars(BroadcastEndpoint)[name], seen)
            stack.enter_context(replaced(BroadcastEndpoint, name, proxy))

        if when == "before":
            replace()
        async with server.connect("/a/x") as client:
            await client.send("hello")
            assert await client.recv() == "hello"
            if when == "while connected":
                replace()
            before = len(seen)
            for _ in range(3):
                await client.send("hello")
                assert await client.recv() == "hello"
            assert len(seen) == before + 3


async def test_context_variables_may_be_set_and_reset(ws):
    """It is the context of the task itself, and no copy."""
    count: contextvars.ContextVar[int] = contextvars.ContextVar("count", default=0)
    tokens: list[Any] = []
    counts: list[int] = []

    class Counts(Room):
        broadcast = Broadcast()

        async def on_connect(self, websocket):
            await super().on_connect(websocket)
            tokens.append(count.set(10))

        def get_channel(self, websocket):
            if tokens:
                count.reset(tokens.pop())
            else:
                count.set(count.get() + 1)
            return super().get_channel(websocket)

        async def on_disconnect(self, websocket, close_code):
            await super().on_disconnect(websocket, close_code)
            counts.append(count.get())

    async with served(Counts, ws) as server:
        async with server.connect("/a/x") as client:
            for _ in range(3):
                await client.send("hello")
                assert await client.recv() == "hello"
        await until(lambda: counts)
    assert any(Counts.without_task)
    assert counts == [1 + 2]  # one for `on_connect`


async def test_two_tasks_that_receive_take_turns(ws):
    others: list[str] = []
    tasks: set[asyncio.Task[None]] = set()

    class Plain(Room):
        broadcast = Broadcast()

        async def on_connect(self, websocket):
            await super().on_connect(websocket)

            async def receive() -> None:
                others.append(await websocket.receive_text())

            tasks.add(asyncio.create_task(receive()))

    async with served(Plain, ws) as server, server.connect("/a/x") as client:
        await client.send("one")
        assert await client.recv() == "one"
        await client.send("two")
        await until(lambda: others)
        await client.send("three")
        assert await client.recv() == "three"
    assert others == ["two"]
    await asyncio.gather(*tasks)


async def test_a_task_that_was_cancelled_publishes_nothing_more(ws, caplog):
    asked: list[str] = []
    tasks: dict[str, Any] = {}

    class Plain(Room):
        broadcast = Broadcast()

        def get_channel(self, websocket):
            room = websocket.path_params["room"]
            asked.append(room)
            tasks[room] = asyncio.current_task()
            return super().get_channel(websocket)

    async with (
        served(Plain, ws) as server,
        server.connect("/a/x") as client,
        Plain.broadcast.subscribe("x.a") as events,
    ):
        (protocol,) = server.server.server_state.connections
        asked.clear()
        tasks["a"].cancel()
        protocol.data_received(masked(b"too late", TEXT))  # before the task has its turn
        await until(lambda: not Plain.broadcast.channels or len(Plain.broadcast) == 0)
        assert asked == []
        await Plain.broadcast.publish("x.a", "the end")
        assert (await anext(events)).message == "the end"
        with contextlib.suppress(ConnectionClosed):
            await client.recv()
    caplog.clear()


async def test_what_a_task_hands_over_is_published_too(ws):
    """As a protocol that limits how fast a client is read may do."""

    class Plain(Room):
        broadcast = Broadcast()

    async with served(Plain, ws) as server, server.connect("/a/x") as client:
        await client.send("hello")
        assert await client.recv() == "hello"
        (protocol,) = server.server.server_state.connections
        protocol.data_received(masked(b"from a task", TEXT))
        assert await client.recv() == "from a task"


async def test_a_channel_that_only_looks_like_one_is_the_tasks_error(ws, caplog):
    class Lazy:
        @property
        def __class__(self):
            return str

    class Plain(Room):
        broadcast = Broadcast()
        channel: Any = "a"

        def get_channel(self, websocket):
            super().get_channel(websocket)
            return self.channel

    async with served(Plain, ws) as server, server.connect("/a/x") as client:
        Plain.channel = Lazy()
        await client.send("hello")
        assert (await close_of(client))[0] == 1011
    assert "Exception in ASGI application" in caplog.text
    caplog.clear()


async def test_a_dumps_of_ones_own_is_called_by_the_task(ws):
    calls: list[Any] = []

    def dumps(data: Any) -> str:
        calls.append((asyncio.current_task(), tenant.get(), "data_received" in callers()))
        return json.dumps(data)

    class Plain(Room):
        broadcast = Broadcast(dumps=dumps)
        encoding = "json"

    async with served(Plain, ws) as server, server.connect("/a/x") as client:
        for _ in range(2):
            await client.send("[1,2]")
            assert await client.recv() == "[1, 2]"
    assert len(calls) == 2
    ((task, name, without_task),) = set(calls)
    assert task is not None
    assert (name, without_task) == ("x", False)


async def test_heartbeats_that_are_added_while_a_client_is_connected(ws):
    class Plain(Room):
        broadcast = Broadcast()
        heartbeats: dict[str, str] = {}  # noqa: RUF012  # likewise

    async with served(Plain, ws) as server, server.connect("/a/x") as client:
        await client.send("ping")
        assert await client.recv() == "ping"
        Plain.heartbeats["ping"] = "pong"
        await client.send("ping")
        assert await client.recv() == "pong"
