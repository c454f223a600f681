"""The mount: who may listen and publish to which channel."""

from __future__ import annotations

import functools
import threading

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.responses import Response
from starlette.routing import Mount
from starlette.testclient import TestClient, WebSocketDenialResponse
from websockets.exceptions import ConnectionClosed, InvalidStatus

from starcast import Broadcast, ConfigurationError
from support import Peer, until, until_sync

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("framework", [Starlette, FastAPI])
async def test_the_mount_only_lets_listen(serve, framework, caplog):
    hub = Broadcast()
    app = framework()
    app.mount("/live", hub)
    server = await serve(app)
    async with server.connect("/live/a/b%20c") as client:
        await until(lambda: hub.channels == {"a/b c": 1})
        await hub.publish("a/b c", "hello")
        assert await client.recv() == "hello"
        await client.send("me too")
        with pytest.raises(ConnectionClosed) as caught:
            await client.recv()
        assert caught.value.rcvd.code == 1008
    assert [record.name for record in caplog.records if record.levelname == "WARNING"] == [
        "starcast"
    ]
    async with server.connect("/live/x"):
        await until(lambda: hub.channels == {"x": 1})
    await until(lambda: len(hub) == 0)


@pytest.mark.parametrize("framework", [Starlette, FastAPI])
async def test_the_mount_with_publish(serve, framework):
    hub = Broadcast()
    app = framework()
    app.mount("/live", hub.app(publish=True, encoding="json"))
    server = await serve(app)
    async with server.connect("/live/room") as one, server.connect("/live/room") as two:
        await one.send('{"a":1}')
        assert await one.recv() == await two.recv() == '{"a":1}'


async def test_the_hub_served_alone(serve):
    hub = Broadcast()
    server = await serve(hub)
    assert hub.stats().open
    async with server.connect("/room") as client:
        await until(lambda: len(hub) == 1)
        await hub.publish("room", "hello")
        assert await client.recv() == "hello"
    for path in ("/", "/" + "x" * 201, "/a%00b"):
        with pytest.raises(InvalidStatus) as caught:
            await server.connect(path)
        assert caught.value.response.status_code == 403


def deny(websocket, channel):
    return channel != "secret"


async def deny_async(websocket, channel):
    if channel == "secret":
        raise PermissionError
    return True


class Deny:
    async def __call__(self, websocket, channel):
        return channel != "secret"


@pytest.mark.parametrize(
    "authorize", [deny, deny_async, Deny(), functools.partial(deny_async), lambda *a: Deny()(*a)]
)
@pytest.mark.parametrize("framework", [Starlette, FastAPI, None])
async def test_authorize(serve, authorize, framework):
    hub = Broadcast()
    app = hub.app(authorize=authorize)
    if framework is not None:
        inner, app = app, framework()
        app.mount("/live", inner)
    path = "" if framework is None else "/live"
    server = await serve(app)
    with pytest.raises(InvalidStatus) as caught:
        await server.connect(f"{path}/secret")
    assert caught.value.response.status_code == 403
    async with server.connect(f"{path}/open"):
        await until(lambda: hub.channels == {"open": 1})


@pytest.mark.parametrize("answer", [0, "", {}, "alice", object()])
async def test_an_answer_of_authorize_that_is_none_is_a_mistake(answer):
    """A lookup returns somebody or nothing: letting in nothing would let in everybody."""
    app = Starlette(routes=[Mount("/live", Broadcast().app(authorize=lambda *args: answer))])
    with (
        pytest.raises(ConfigurationError, match="authorize returned"),
        TestClient(app).websocket_connect("/live/x"),
    ):
        pass


async def test_the_apps_own_handler_answers_for_the_mount(serve):
    async def teapot(websocket, exc):
        await websocket.send_denial_response(Response(status_code=418))

    app = Starlette(
        routes=[Mount("/live", Broadcast().app(authorize=lambda *args: False))],
        exception_handlers={WebSocketException: teapot},
    )
    with (
        pytest.raises(WebSocketDenialResponse) as caught,
        TestClient(app).websocket_connect("/live/x"),
    ):
        pass
    assert caught.value.status_code == 418


async def test_a_plain_authorize_runs_in_a_thread():
    threads = []

    def authorize(websocket, channel):
        threads.append(threading.current_thread())
        return True

    app = Starlette(routes=[Mount("/live", Broadcast().app(authorize=authorize))])
    with TestClient(app).websocket_connect("/live/x"):
        until_sync(lambda: threads)
    assert threads[0] is not threading.main_thread()


async def test_a_client_that_leaves_while_it_is_authorized():
    async def authorize(websocket, channel):
        await websocket.close()
        return True

    peer = Peer(path_params={"channel": "x"})
    peer.scope |= {"path": "/x", "root_path": ""}
    hub = Broadcast()
    await hub.app(authorize=authorize)(peer.scope, peer.receive, peer.send)
    assert len(hub) == 0


async def test_another_error_in_authorize_takes_its_way():
    def authorize(websocket, channel):
        raise LookupError("a mistake")

    app = Starlette(routes=[Mount("/live", Broadcast().app(authorize=authorize))])
    with (
        pytest.raises(LookupError, match="a mistake"),
        TestClient(app).websocket_connect("/live/x"),
    ):
        pass


async def test_authorize_must_be_a_function():
    with pytest.raises(ConfigurationError, match="authorize must be a function"):
        Broadcast().app(authorize=True)


async def test_the_mount_knows_encodings():
    with pytest.raises(ConfigurationError):
        Broadcast().app(encoding="morse")
