"""`serve`: a client's life from `connect` to its close code, and errors that stand for one."""

from __future__ import annotations

import asyncio
import functools
import sys

import pydantic
import pytest
from fastapi import WebSocket
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount, WebSocketRoute
from websockets.exceptions import ConnectionClosed, InvalidStatus

from starcast import (
    BackendUnavailable,
    Broadcast,
    BroadcastEndpoint,
    ConfigurationError,
    InvalidChannel,
    Tuning,
)
from support import Bus, Peer, until
from test_relay import code_of, lines

pytestmark = pytest.mark.anyio


async def test_serve_lives_a_clients_whole_life(serve):
    hub = Broadcast()
    codes = []

    async def endpoint(websocket: WebSocket) -> None:
        codes.append(await hub.serve(websocket, channel=websocket.path_params["room"]))

    server = await serve(Starlette(routes=[WebSocketRoute("/{room}", endpoint)]))
    async with server.connect("/a") as one, server.connect("/a") as two, server.connect("/b") as b:
        await one.send("hello")
        assert await one.recv() == await two.recv() == "hello"
        assert hub.channels == {"a": 2, "b": 1}
        await b.close(4321)
        await until(lambda: len(hub) == 2)
    await until(lambda: len(codes) == 3)
    assert sorted(codes) == [1000, 1000, 4321]
    assert len(hub) == 0


@pytest.mark.parametrize(
    ("encoding", "sent", "received"),
    [
        ("text", "ok", "ok"),
        ("bytes", b"ok", b"ok"),
        ("json", '"ok"', '"ok"'),
        ("json", b'{"a": 1}', '{"a":1}'),
        (None, "ok", "ok"),
        (None, b"ok", b"ok"),
    ],
)
async def test_serve_speaks_its_encoding_both_ways(serve, encoding, sent, received):
    hub = Broadcast()
    server = await serve(
        Starlette(routes=[WebSocketRoute("/", functools.partial(hub.serve, encoding=encoding))])
    )
    async with server.connect("/") as client:
        await client.send(sent)
        assert await client.recv() == received


@pytest.mark.parametrize(
    ("encoding", "sent", "code"),
    [("text", b"x", 1003), ("bytes", "x", 1003), ("json", "{", 1007)],
)
async def test_serve_closes_who_sends_something_else(serve, encoding, sent, code, caplog):
    hub = Broadcast()
    codes = []

    async def endpoint(websocket: WebSocket) -> None:
        codes.append(await hub.serve(websocket, encoding=encoding))

    server = await serve(Starlette(routes=[WebSocketRoute("/", endpoint)]))
    async with server.connect("/") as client:
        await client.send(sent)
        with pytest.raises(ConnectionClosed) as caught:
            await client.recv()
        assert caught.value.rcvd.code == code
    await until(lambda: codes == [code])
    lines = [record for record in caplog.records if record.name == "starcast"]
    assert len(lines) == 1
    assert str(code) in lines[0].getMessage()


async def test_serve_refuses_an_encoding_that_is_none():
    with pytest.raises(ConfigurationError):
        await Broadcast().serve(Peer().websocket, encoding="morse")


async def test_serve_unregisters_when_it_is_cancelled():
    hub = Broadcast()
    peer = Peer()
    serving = asyncio.create_task(hub.serve(peer.websocket))
    await until(lambda: len(hub) == 1)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert len(hub) == 0


async def test_serve_of_a_client_that_has_left_comes_back():
    hub = Broadcast()
    peer = Peer()
    await peer.websocket.accept()
    await peer.websocket.close()
    assert await hub.serve(peer.websocket) == 1006


# Errors


# Bytes of a message that a client is told of later if it is lost, and of one that is waited for.
SIZES = [5, 70_000]
QUICK = Tuning(publish_timeout=0.05)


async def unreachable(connection, messages, proceed):
    if messages and not messages[0][0].startswith("default:starcast-probe"):
        raise ConnectionError("the broker is away")
    await proceed()


@pytest.mark.parametrize("size", SIZES)
async def test_an_error_in_the_hook_closes_after_what_the_client_has_to_get(serve, size, caplog):
    def mistaken(websocket, data, exc):
        for number in range(100):
            local.publish_nowait("here", str(number).ljust(10_000))
        raise LookupError("a mistake")

    local = Broadcast()
    hub = Broadcast(backend=Bus(on_publish=unreachable), tuning=QUICK)

    async def endpoint(websocket: WebSocket) -> None:
        await local.connect(websocket, "here")
        await hub.serve(websocket, on_publish_error=mistaken)

    server = await serve(Starlette(routes=[WebSocketRoute("/", endpoint)]))
    async with server.connect("/", compression=None) as client:
        await client.send("x" * size)
        for number in range(100):
            assert (await client.recv()).rstrip() == str(number)
        with pytest.raises(ConnectionClosed) as caught:
            await client.recv()
        assert caught.value.rcvd.code == 1011
    await until(lambda: len(hub) == 0)
    errors = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [repr(error) for error in errors] == ["LookupError('a mistake')"]
    caplog.clear()
    await hub.disconnect()


async def test_the_apps_handler_answers_a_client_that_is_not_accepted_yet():
    async def away(bus, proceed):
        raise BackendUnavailable("the broker is away")

    async def handle(websocket, exc):
        await websocket.close(4503)

    hub = Broadcast(backend=Bus(on_connect=away), open_timeout=0)
    handlers = {BackendUnavailable: handle}
    app = Starlette(routes=[WebSocketRoute("/", hub.serve)], exception_handlers=handlers)
    peer = Peer()
    await app(peer.scope, peer.receive, peer.send)
    assert peer.closed == 4503


@pytest.mark.parametrize("answer", ["close", "denial"])
async def test_a_client_of_a_server_sees_what_the_apps_handler_answers(serve, answer, caplog):
    async def away(bus, proceed):
        raise BackendUnavailable("the broker is away")

    async def handle(websocket, exc):
        if answer == "close":
            await websocket.close(4503)
        else:
            await websocket.send_denial_response(Response("later", status_code=429))

    hub = Broadcast(backend=Bus(on_connect=away), open_timeout=0)
    handlers = {BackendUnavailable: handle}
    app = Starlette(routes=[WebSocketRoute("/", hub.serve)], exception_handlers=handlers)
    server = await serve(app)
    with pytest.raises(InvalidStatus) as caught:
        await server.connect("/")
    # A close before accept is an HTTP 403, and not the 503 that the error stands for.
    assert caught.value.response.status_code == (403 if answer == "close" else 429)
    caplog.clear()  # uvicorn takes a denial for a handshake that is not completed


async def test_without_a_handler_a_client_that_is_not_accepted_gets_503(serve, caplog):
    async def away(bus, proceed):
        raise BackendUnavailable("the broker is away")

    hub = Broadcast(backend=Bus(on_connect=away), open_timeout=0)
    codes = []

    async def endpoint(websocket: WebSocket) -> None:
        codes.append(await hub.serve(websocket))

    server = await serve(Starlette(routes=[WebSocketRoute("/", endpoint)]))
    with pytest.raises(InvalidStatus) as caught:
        await server.connect("/")
    assert caught.value.response.status_code == 503
    await until(lambda: codes == [1013])
    caplog.clear()  # uvicorn takes a denial for a handshake that is not completed


async def test_an_error_in_authorize_before_accept_is_a_500(serve, caplog):
    def authorize(websocket, channel):
        raise LookupError("a mistake")

    hub = Broadcast()
    server = await serve(Starlette(routes=[Mount("/live", hub.app(authorize=authorize))]))
    with pytest.raises(InvalidStatus) as caught:
        await server.connect("/live/room")
    assert caught.value.response.status_code == 500
    assert len(hub) == 0
    errors = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [repr(error) for error in errors] == ["LookupError('a mistake')"]
    caplog.clear()


async def test_a_client_that_the_hub_has_closed_is_served_no_more_and_nothing_is_logged(caplog):
    hub, peer = Broadcast(), Peer()
    await hub.connect(peer.websocket)
    await hub.close(peer.websocket, 4000)
    assert await hub.serve(peer.websocket) == 4000
    assert caplog.records == []


async def test_a_client_that_has_left_before_it_can_be_refused(caplog):
    hub, peer = Broadcast(refuse="close"), Peer()
    peer.fail = OSError("reset")
    peer.scope |= {"path": "/room", "root_path": ""}
    await hub.app(authorize=lambda *args: False)(peer.scope, peer.receive, peer.send)
    assert peer.sent == []


@pytest.mark.parametrize("size", SIZES)
async def test_a_hook_that_finds_its_client_gone_ends_serve_with_its_code(size, caplog):
    async def close_and_send(websocket, data, exc):
        await hub.close(websocket, 4001)
        found.append(await hub.send("not sent", to=websocket))

    hub, peer, found = Broadcast(backend=Bus(on_publish=unreachable), tuning=QUICK), Peer(), []
    peer.say("x" * size)
    assert await hub.serve(peer.websocket, on_publish_error=close_and_send) == 4001
    assert peer.closed == 4001
    assert found == []  # it raised ClientGone
    assert not any(record.exc_info for record in caplog.records)
    caplog.clear()
    await hub.disconnect()


@pytest.mark.parametrize("size", SIZES)
async def test_a_message_that_cannot_be_published_closes_its_client_with_1013(size, caplog):
    async def handle(websocket, exc):
        raise AssertionError("it is for HTTP routes, and this client is accepted")

    hub, peer = Broadcast(backend=Bus(on_publish=unreachable), tuning=QUICK), Peer()
    peer.say("x" * size)
    codes = []

    async def endpoint(websocket: WebSocket) -> None:
        codes.append(await hub.serve(websocket))

    routes = [WebSocketRoute("/", endpoint)]
    app = Starlette(routes=routes, exception_handlers={BackendUnavailable: handle})
    await app(peer.scope, peer.receive, peer.send)
    assert codes == [peer.closed] == [1013]
    caplog.clear()
    await hub.disconnect()


# What it receives


async def test_a_client_that_may_only_listen_and_speaks_is_closed_with_1008(caplog):
    hub, peer = Broadcast(), Peer()
    peer.say("me too")
    assert await hub.serve(peer.websocket, publish=False) == 1008
    assert peer.closed == 1008
    assert hub.stats().published == 0
    (line,) = lines(caplog)
    assert line.endswith("with 1008: listen only")


async def test_heartbeats_are_answered_and_not_published():
    hub, peer = Broadcast(), Peer()
    serving = asyncio.create_task(hub.serve(peer.websocket, heartbeats={"ping": "pong"}))
    for text in ("ping", "hello"):
        peer.say(text)
    await until(lambda: peer.got == ["pong", "hello"])
    peer.leave()
    assert await serving == 1000
    assert hub.stats().published == 1


async def test_a_channel_that_is_none_is_the_callers_mistake():
    peer = Peer()
    with pytest.raises(InvalidChannel):
        await Broadcast().serve(peer.websocket, "")
    assert peer.sent == []


async def test_the_handshake_of_a_client_that_on_connect_refuses_is_no_message():
    class Chat(BroadcastEndpoint):
        broadcast = Broadcast()

        async def on_connect(self, websocket):
            await websocket.send({"type": "websocket.close", "code": 4000})

    peer = Peer()
    peer.leave()
    await Chat(peer.scope, peer.receive, peer.send)
    assert peer.closed == 4000


# Not valid


class Message(pydantic.BaseModel):
    text: str
    count: int


@pytest.mark.parametrize("hook", ["decode", "on_receive"])
async def test_what_does_not_fit_the_model_is_1007_and_one_line(serve, caplog, hook):
    class Chat(BroadcastEndpoint):
        encoding = "json"

        async def decode(self, websocket, message):
            data = await super().decode(websocket, message)
            return Message.model_validate(data) if hook == "decode" else data

        async def on_receive(self, websocket, data):
            message = Message.model_validate(data)
            await super().on_receive(websocket, message)

    server = await serve(Starlette(routes=[WebSocketRoute("/", Chat)]))
    async with server.connect("/") as client:
        await client.send('{"text": "fine", "count": 1}')
        assert await client.recv() == '{"text":"fine","count":1}'
        await client.send('{"text": "a secret", "count": "a secret", "a secret": 1}')
        assert await code_of(client) == 1007
        assert client.close_reason == "not a valid Message"
    await until(lambda: lines(caplog))
    (line,) = lines(caplog)
    assert line.endswith("with 1007: not a valid Message")
    assert "secret" not in caplog.text


async def test_the_apps_own_handler_of_a_validation_error_is_used(serve):
    async def on_invalid(websocket, exc):
        await websocket.close(4000, str(exc.error_count()))

    class Chat(BroadcastEndpoint):
        encoding = "json"

        async def on_receive(self, websocket, data):
            Message.model_validate(data)

    handlers = {pydantic.ValidationError: on_invalid}
    app = Starlette(routes=[WebSocketRoute("/", Chat)], exception_handlers=handlers)
    server = await serve(app)
    async with server.connect("/") as client:
        await client.send("{}")
        assert await code_of(client) == 4000
        assert client.close_reason == "2"


async def test_a_long_name_of_a_model_fits_into_the_close_frame(serve, caplog):
    model = pydantic.create_model("ä" * 100, text=(str, ...))

    class Chat(BroadcastEndpoint):
        async def on_receive(self, websocket, data):
            model.model_validate({})

    server = await serve(Starlette(routes=[WebSocketRoute("/", Chat)]))
    async with server.connect("/") as client:
        await client.send("x")
        assert await code_of(client) == 1007
        assert client.close_reason.startswith("not a valid ää")


async def test_without_pydantic_an_error_of_a_hook_is_what_it_was(serve, caplog, monkeypatch):
    class Chat(BroadcastEndpoint):
        async def on_receive(self, websocket, data):
            raise LookupError("a mistake")

    monkeypatch.delitem(sys.modules, "pydantic_core")
    server = await serve(Starlette(routes=[WebSocketRoute("/", Chat)]))
    async with server.connect("/") as client:
        await client.send("x")
        assert await code_of(client) == 1011
    assert [repr(r.exc_info[1]) for r in caplog.records if r.exc_info] == [
        "LookupError('a mistake')"
    ]
    caplog.clear()
