"""BroadcastEndpoint: its hooks, what a client sends, what a hook raises."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.exceptions import HTTPException, WebSocketException
from starlette.routing import Mount, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed, InvalidStatus

from starcast import Broadcast, BroadcastEndpoint
from support import Peer, until, until_sync

pytestmark = pytest.mark.anyio


class Recorded(BroadcastEndpoint):
    """Writes down what happens; `raising` says which hook raises what, after its own work."""

    events: list  # of a subclass
    raising: dict[str, BaseException] = {}  # noqa: RUF012  # replaced, never changed

    def __init_subclass__(cls) -> None:
        cls.events = []

    async def on_connect(self, websocket):
        await super().on_connect(websocket)
        self.events.append("connect")
        self.raise_for("on_connect")

    async def on_receive(self, websocket, data):
        self.events.append(("receive", data))
        self.raise_for("on_receive")
        await super().on_receive(websocket, data)

    async def on_disconnect(self, websocket, close_code):
        self.events.append(("disconnect", close_code))
        await super().on_disconnect(websocket, close_code)
        self.raise_for("on_disconnect")

    def raise_for(self, hook):
        if hook in self.raising:
            raise self.raising[hook]


def app_of(endpoint, **options) -> Starlette:
    return Starlette(routes=[WebSocketRoute("/ws", endpoint)], **options)


async def code_of(client) -> int:
    """Read until the server closes, and return its code."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            await client.recv()
    await client.wait_closed()
    return client.close_code  # 1006 if there was no close frame


def take_errors(caplog) -> list[str]:
    """The errors in the log, which are then no surprise any more."""
    errors = [repr(r.exc_info and r.exc_info[1]) for r in caplog.records if r.levelno >= 40]
    caplog.clear()
    return errors


# Where it goes


async def test_under_starlette_and_under_fastapi_alike(serve):
    class Chat(BroadcastEndpoint):
        pass

    fastapi = FastAPI()
    fastapi.router.routes.append(WebSocketRoute("/a", Chat))
    fastapi.websocket_route("/b")(Chat)
    fastapi.mount("/c", Starlette(routes=[WebSocketRoute("/ws", Chat)]))
    starlette = Starlette(routes=[WebSocketRoute("/a", Chat), Mount("/m", fastapi)])
    server = await serve(starlette)
    paths = ["/a", "/m/a", "/m/b", "/m/c/ws"]
    clients = [await server.connect(path) for path in paths]
    for number, client in enumerate(clients):
        await client.send(str(number))
        assert [await other.recv() for other in clients] == [str(number)] * 4
    for client in clients:
        await client.close()


@pytest.mark.parametrize("how", ["decorator", "call", "router"])
async def test_fastapi_takes_the_class_where_it_wants_a_function(serve, how):
    checked = []

    async def check(websocket: WebSocket, room: str):
        checked.append(room)
        if room == "closed":
            raise WebSocketException(1008)

    app = FastAPI()

    class Chat(Recorded):
        def get_channel(self, websocket):
            return websocket.path_params["room"]

    if how == "decorator":
        assert app.websocket("/ws/{room}", dependencies=[Depends(check)])(Chat) is Chat
    elif how == "call":
        app.add_api_websocket_route("/ws/{room}", Chat, dependencies=[Depends(check)])
    else:
        router = APIRouter(dependencies=[Depends(check)])
        router.websocket("/{room}")(Chat)
        app.include_router(router, prefix="/ws")
    server = await serve(app)
    async with server.connect("/ws/a") as one, server.connect("/ws/a") as two:
        await until(lambda: Chat.broadcast.channels == {"a": 2})
        await one.send("hello")
        assert await one.recv() == await two.recv() == "hello"
    await until(lambda: Chat.events.count(("disconnect", 1000)) == 2)
    assert len(Chat.broadcast) == 0
    with pytest.raises(InvalidStatus):
        await server.connect("/ws/closed")
    assert checked == ["a", "a", "closed"]


async def test_it_is_an_asgi_app_by_itself(serve):
    class Chat(BroadcastEndpoint):
        encoding = "json"

    server = await serve(Chat, lifespan="off")
    async with server.connect("/") as client:
        await client.send("[1]")
        assert await client.recv() == "[1]"


async def test_classes_that_set_no_hub_have_one_each():
    class One(BroadcastEndpoint):
        pass

    class Two(BroadcastEndpoint):
        pass

    class Three(One):
        pass

    hubs = [cls.broadcast for cls in (BroadcastEndpoint, One, Two, Three)]
    assert len(set(hubs)) == 4
    assert One.broadcast is One.broadcast

    async def receive(): ...

    assert One({"type": "websocket"}, receive, receive).broadcast is One.broadcast


async def test_classes_may_share_a_hub():
    hub = Broadcast()

    class One(BroadcastEndpoint):
        broadcast = hub

    class Two(One):
        pass

    assert One.broadcast is Two.broadcast is hub


async def test_the_channel_is_the_path_parameter_or_what_get_channel_says(serve):
    hub = Broadcast()

    class Chat(BroadcastEndpoint):
        broadcast = hub

    class Room(Chat):
        def get_channel(self, websocket):
            return "room-" + websocket.path_params["room"]

    server = await serve(
        Starlette(
            routes=[
                WebSocketRoute("/", Chat),
                WebSocketRoute("/c/{channel}", Chat),
                WebSocketRoute("/r/{room}", Room),
            ]
        )
    )
    async with server.connect("/"), server.connect("/c/x"), server.connect("/r/x") as client:
        await until(lambda: hub.channels == {"default": 1, "x": 1, "room-x": 1})
        await client.send("hello")
        assert await client.recv() == "hello"
    for name in ("%0D%0A", "a%00", "x" * 201):
        with pytest.raises(InvalidStatus) as caught:
            await server.connect(f"/c/{name}")
        assert caught.value.response.status_code == 403
    assert "x" * 201 not in hub.channels


# What a client sends


@pytest.mark.parametrize(
    ("encoding", "sent", "handed", "received"),
    [
        ("text", "ok", "ok", "ok"),
        ("bytes", b"ok", b"ok", b"ok"),
        ("json", '"ok"', "ok", '"ok"'),
        ("json", b'{"a": "\xc3\xa4"}', {"a": "ä"}, '{"a":"ä"}'),
        (None, "ok", "ok", "ok"),
        (None, b"ok", b"ok", b"ok"),
    ],
)
async def test_it_speaks_its_encoding_both_ways(serve, encoding, sent, handed, received):
    class Chat(Recorded):
        pass

    Chat.encoding = encoding
    server = await serve(app_of(Chat))
    async with server.connect("/ws") as one, server.connect("/ws") as two:
        await one.send(sent)
        assert await one.recv() == await two.recv() == received
    assert ("receive", handed) in Chat.events


@pytest.mark.parametrize(
    ("encoding", "sent", "code"),
    [
        ("text", b"x", 1003),
        ("bytes", "x", 1003),
        ("json", "{bad", 1007),
        ("json", "[" * 100_000, 1007),
        ("json", "1" * 5000, 1007),
        ("json", "NaN", 1007),
        ("json", "1e999", 1007),
        ("json", '"\\ud800"', 1007),
        ("json", b"\xff\xfe", 1007),
    ],
)
async def test_bad_input_is_answered_with_a_close_code_and_one_line(
    serve, caplog, encoding, sent, code
):
    class Chat(Recorded):
        pass

    Chat.encoding = encoding
    server = await serve(app_of(Chat))
    async with server.connect("/ws") as bad, server.connect("/ws") as good:
        await until(lambda: len(Chat.broadcast) == 2)
        await bad.send(sent)
        assert await code_of(bad) == code
        await until(lambda: ("disconnect", code) in Chat.events)
        fine = b"1" if encoding == "bytes" else "1"
        await good.send(fine)
        assert await good.recv() == fine
    records = [record for record in caplog.records if record.name == "starcast"]
    assert len(records) == 1
    assert records[0].levelno == logging.WARNING
    assert not records[0].exc_info
    assert len([event for event in Chat.events if event[0] == "receive"]) == 1


async def test_decode_may_be_overridden(serve):
    class Shout(BroadcastEndpoint):
        async def decode(self, websocket, message):
            return (await super().decode(websocket, message)).upper()

    server = await serve(app_of(Shout))
    async with server.connect("/ws") as client:
        await client.send("hello")
        assert await client.recv() == "HELLO"


async def test_a_burst_keeps_its_order(serve):
    class Chat(BroadcastEndpoint):
        pass

    server = await serve(app_of(Chat))
    async with server.connect("/ws") as one, server.connect("/ws") as two:
        sent = [str(number) for number in range(1000)]
        for message in sent:
            await one.send(message)
        assert [await two.recv() for _ in sent] == sent
        assert [await one.recv() for _ in sent] == sent


# The end of a client


@pytest.mark.parametrize("code", [1000, 1001, 4321])
async def test_on_disconnect_is_told_the_clients_code(serve, code):
    class Chat(Recorded):
        pass

    server = await serve(app_of(Chat))
    async with server.connect("/ws") as client:
        await client.close(code)
    await until(lambda: len(Chat.events) == 2)
    assert Chat.events == ["connect", ("disconnect", code)]
    assert len(Chat.broadcast) == 0


async def test_on_disconnect_is_called_at_shutdown(serve):
    class Chat(Recorded):
        pass

    server = await serve(app_of(Chat))
    client = await server.connect("/ws")
    await until(lambda: Chat.events)
    await server.stop()
    assert Chat.events == ["connect", ("disconnect", 1012)]
    assert await code_of(client) == 1012


async def test_on_disconnect_is_called_when_the_task_is_cancelled():
    class Chat(Recorded):
        pass

    peer = Peer()
    task = asyncio.ensure_future(Chat(peer.scope, peer.receive, peer.send).dispatch())
    await until(lambda: Chat.events)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert Chat.events == ["connect", ("disconnect", 1006)]
    assert len(Chat.broadcast) == 0


async def test_who_is_accepted_without_super_has_an_on_disconnect_too(serve):
    class Chat(Recorded):
        async def on_connect(self, websocket):
            await websocket.accept()
            if "close" in websocket.query_params:
                await websocket.close(4000)
            self.events.append("connect")

        async def on_receive(self, websocket, data):
            await websocket.send_text(data)

    server = await serve(app_of(Chat))
    async with server.connect("/ws") as client:
        await client.send("hello")
        assert await client.recv() == "hello"
    await until(lambda: len(Chat.events) == 2)
    assert Chat.events == ["connect", ("disconnect", 1000)]
    async with server.connect("/ws?close") as client:
        assert await code_of(client) == 4000
    await until(lambda: len(Chat.events) == 4)
    assert Chat.events[2:] == ["connect", ("disconnect", 4000)]


async def test_who_is_refused_by_a_close_has_no_on_disconnect(serve, caplog):
    class Chat(Recorded):
        async def on_connect(self, websocket):
            await websocket.close()
            self.events.append("refused")

    server = await serve(app_of(Chat))
    with pytest.raises(InvalidStatus) as caught:
        await server.connect("/ws")
    assert caught.value.response.status_code == 403
    await server.stop()
    assert Chat.events == ["refused"]
    assert not [record for record in caplog.records if record.name == "starcast"]


async def test_an_on_connect_that_raises_after_an_accept_of_its_own_is_as_in_starlette(
    serve, caplog
):
    """There, on_disconnect is for those whose on_connect has come to its end."""

    def of(base):
        class Chat(base):
            events = []  # noqa: RUF012  # of this class

            async def on_connect(self, websocket):
                await websocket.accept()
                raise LookupError("a mistake")

            async def on_disconnect(self, websocket, close_code):
                self.events.append(close_code)

        return Chat

    for chat in (of(WebSocketEndpoint), of(BroadcastEndpoint)):
        server = await serve(app_of(chat))
        async with server.connect("/ws") as client:
            assert await code_of(client) in (1011, 1006)
        await server.stop()
        assert chat.events == []
    assert take_errors(caplog) == ["LookupError('a mistake')"] * 2


async def test_an_on_disconnect_that_forgets_super_leaves_nothing_behind(serve):
    class Chat(BroadcastEndpoint):
        async def on_disconnect(self, websocket, close_code):
            pass

    server = await serve(app_of(Chat))
    async with server.connect("/ws"):
        await until(lambda: len(Chat.broadcast) == 1)
    await until(lambda: len(Chat.broadcast) == 0)


async def test_the_hub_closes_a_client(serve):
    class Chat(Recorded):
        async def on_receive(self, websocket, data):
            await super().on_receive(websocket, data)
            await self.broadcast.close(websocket, 4000, "enough")

    server = await serve(app_of(Chat))
    async with server.connect("/ws") as client:
        await client.send("hello")
        assert await client.recv() == "hello"
        assert await code_of(client) == 4000
    assert Chat.events[-1] == ("disconnect", 4000)


async def test_a_hook_that_finds_its_client_gone_ends_quietly():
    class Chat(Recorded):
        async def on_receive(self, websocket, data):
            peer.fail = OSError()
            await websocket.send_text("anybody?")

    peer = Peer()
    peer.say("x")
    await Chat(peer.scope, peer.receive, peer.send)
    assert Chat.events == ["connect", ("disconnect", 1006)]


async def test_a_hook_that_finds_another_client_gone_is_mistaken(serve, caplog):
    other = Peer()
    await other.websocket.accept()
    other.fail = OSError()

    class Chat(Recorded):
        async def on_receive(self, websocket, data):
            await other.websocket.send_text(data)

    server = await serve(app_of(Chat))
    async with server.connect("/ws") as client:
        await client.send("x")
        assert await code_of(client) == 1011
    assert Chat.events == ["connect", ("disconnect", 1011)]
    assert take_errors(caplog) == ["WebSocketDisconnect()"]


async def test_a_client_that_goes_during_on_connect_ends_quietly():
    class Chat(Recorded):
        pass

    peer = Peer()
    peer.fail = OSError()
    await Chat(peer.scope, peer.receive, peer.send)
    assert Chat.events == []


@pytest.mark.parametrize("count", [1, 10, 50, 500])
async def test_a_client_that_sends_and_leaves_at_once_loses_nothing(serve, count):
    class Chat(Recorded):
        pass

    server = await serve(app_of(Chat))
    async with server.connect("/ws", max_queue=None) as listener:
        await until(lambda: len(Chat.broadcast) == 1)
        async with server.connect("/ws", max_queue=None) as client:
            for number in range(count):
                await client.send(str(number))
        assert [await listener.recv() for _ in range(count)] == [str(n) for n in range(count)]
        await until(lambda: Chat.events[-1] == ("disconnect", 1000))


# What a hook raises


async def test_a_refusal_before_accept(serve):
    class Chat(Recorded):
        async def on_connect(self, websocket):
            raise WebSocketException(1008)

    for app in (app_of(Chat), Chat):
        server = await serve(app, lifespan="off")
        with pytest.raises(InvalidStatus) as caught:
            await server.connect("/ws")
        assert caught.value.response.status_code == 403
    assert Chat.events == []


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("hook", ["on_connect", "on_receive"])
async def test_a_websocket_exception_closes_with_its_code(serve, hook, alone):
    class Chat(Recorded):
        raising = {hook: WebSocketException(4008, "no more")}  # noqa: RUF012  # never changed

    server = await serve(Chat if alone else app_of(Chat), lifespan="off")
    async with server.connect("/ws") as client:
        with contextlib.suppress(ConnectionClosed):
            await client.send("hello")
        assert await code_of(client) == 4008
    await until(lambda: Chat.events[-1] == ("disconnect", 4008))
    assert [event for event in Chat.events if event[0] == "disconnect"] == [("disconnect", 4008)]
    assert len(Chat.broadcast) == 0


@pytest.mark.parametrize("hook", ["on_connect", "on_receive"])
async def test_an_error_in_a_hook_closes_that_client_with_1011(serve, caplog, hook):
    class Chat(Recorded):
        raising = {hook: LookupError("a mistake")}  # noqa: RUF012  # never changed

        def raise_for(self, hook):
            if self.scope["query_string"]:
                super().raise_for(hook)

    server = await serve(app_of(Chat))
    async with server.connect("/ws") as good, server.connect("/ws?bad") as bad:
        with contextlib.suppress(ConnectionClosed):  # by `on_connect`, before it was sent
            await bad.send("hello")
        assert await code_of(bad) == 1011
        await good.send("alive")
        assert await good.recv() == "alive"
        assert ("disconnect", 1011) in Chat.events
    await until(lambda: len(Chat.broadcast) == 0)
    assert take_errors(caplog) == ["LookupError('a mistake')"]


@pytest.mark.parametrize("handled", [False, True])
async def test_what_a_client_still_has_to_get_comes_before_the_close(serve, handled):
    class Own(WebSocketException):
        pass

    class Chat(Recorded):
        async def on_receive(self, websocket, data):
            for _ in range(100):
                await super().on_receive(websocket, data)
            raise Own(4000)

    async def on_own(websocket, exc):
        await websocket.close(4444)

    server = await serve(app_of(Chat, exception_handlers={Own: on_own} if handled else {}))
    async with server.connect("/ws", compression=None) as client:
        await client.send("x" * 10_000)
        for _ in range(100):
            assert await client.recv() == "x" * 10_000
        assert await code_of(client) == (4444 if handled else 4000)


async def test_an_error_before_accept_refuses(serve, caplog):
    class Chat(Recorded):
        async def on_connect(self, websocket):
            raise LookupError("a mistake")

    server = await serve(app_of(Chat))
    with pytest.raises(InvalidStatus) as caught:
        await server.connect("/ws")
    assert caught.value.response.status_code == 500
    assert Chat.events == []
    assert take_errors(caplog) == ["LookupError('a mistake')"]


async def test_an_error_in_on_disconnect_is_seen_and_harms_nobody(serve, caplog):
    class Chat(Recorded):
        raising = {"on_disconnect": LookupError("a mistake")}  # noqa: RUF012  # never changed

    server = await serve(app_of(Chat))
    async with server.connect("/ws"):
        pass
    await until(lambda: any(record.levelno >= 40 for record in caplog.records))
    assert len(Chat.broadcast) == 0
    assert take_errors(caplog) == ["LookupError('a mistake')"]


async def test_an_http_exception_before_accept_is_the_apps_answer(serve, caplog):
    class Chat(Recorded):
        async def on_connect(self, websocket):
            raise HTTPException(418)

    server = await serve(app_of(Chat))
    with pytest.raises(InvalidStatus) as caught:
        await server.connect("/ws")
    assert caught.value.response.status_code == 418
    caplog.clear()  # uvicorn 0.54 complains about every such answer


async def test_the_apps_own_handler_of_an_error_is_used(serve):
    class Teapot(Exception):
        pass

    class Chat(Recorded):
        raising = {"on_receive": Teapot()}  # noqa: RUF012  # never changed

    async def on_teapot(websocket, exc):
        await websocket.close(4418)

    server = await serve(app_of(Chat, exception_handlers={Teapot: on_teapot}))
    async with server.connect("/ws") as client:
        await client.send("tea")
        assert await code_of(client) == 4418
    assert Chat.events[-1] == ("disconnect", 1011)


async def test_hooks_may_use_another_hub_than_the_endpoints(serve):
    """A client that is not registered with the endpoint's own hub may still publish."""
    other = Broadcast()

    class Chat(Recorded):
        async def on_connect(self, websocket):
            await other.connect(websocket)

    server = await serve(app_of(Chat))
    async with server.connect("/ws") as client:
        await until(lambda: len(other) == 1)
        async with Chat.broadcast.subscribe() as subscriber:
            await client.send("hello")
            assert (await anext(subscriber)).message == "hello"
    await until(lambda: len(server.server.server_state.connections) == 0)
    assert Chat.events == [("receive", "hello"), ("disconnect", 1000)]


def test_with_a_bare_test_client():
    class Chat(Recorded):
        pass

    client = TestClient(app_of(Chat))
    with client.websocket_connect("/ws") as one, client.websocket_connect("/ws") as two:
        until_sync(lambda: len(Chat.broadcast) == 2)
        one.send_text("hello")
        assert one.receive_text() == two.receive_text() == "hello"
    until_sync(lambda: len(Chat.broadcast) == 0)
    assert [event[0] for event in Chat.events].count("disconnect") == 2


async def test_what_the_server_publishes_goes_by_its_type_whatever_the_encoding_of_the_endpoint(
    serve,
):
    class Chat(BroadcastEndpoint):
        broadcast = Broadcast()
        encoding = "json"

    server = await serve(app_of(Chat))
    async with server.connect("/ws") as client:
        await client.send('"from a client"')
        assert await client.recv() == '"from a client"'
        await Chat.broadcast.publish("default", "text")
        await Chat.broadcast.publish("default", "text", encoding="json")
        await Chat.broadcast.publish("default", ["text"])
        assert [await client.recv() for _ in range(3)] == ["text", '"text"', '["text"]']


@pytest.mark.parametrize("leaving", ["the client closes", "the server closes", "a hook raises"])
async def test_an_endpoint_that_accepts_by_itself_is_told_when_its_client_leaves(serve, leaving):
    class Alone(BroadcastEndpoint):
        codes: list = []  # noqa: RUF012  # of this class

        async def on_connect(self, websocket):
            await websocket.accept()

        async def on_receive(self, websocket, data):
            if leaving == "a hook raises":
                raise WebSocketException(4000)
            await websocket.close(4001)

        async def on_disconnect(self, websocket, close_code):
            self.codes.append(close_code)
            await super().on_disconnect(websocket, close_code)

    server = await serve(app_of(Alone))
    async with server.connect("/ws") as client:
        if leaving != "the client closes":
            await client.send("hello")
            await client.wait_closed()
    await until(lambda: Alone.codes, deadline=5)
    assert len(Alone.codes) == 1
    expected = {"the client closes": 1000, "a hook raises": 4000}
    if leaving in expected:
        assert Alone.codes == [expected[leaving]]
