"""Which clients are on the fast path, and why the others are not."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys

import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.routing import Mount, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from starcast import Broadcast, BroadcastEndpoint
from support import joined, until

pytestmark = pytest.mark.anyio

MIDDLEWARE = "middleware wraps send or receive"
SERVER = "the server is not uvicorn with its default WebSocket protocol"


class WrapsSend:
    """Middleware that sees everything that is sent, as a tracing library's does."""

    def __init__(self, app):
        self.app = app
        self.sent = []

    async def __call__(self, scope, receive, send):
        async def sees(message):
            self.sent.append(message)
            await send(message)

        await self.app(scope, receive, sees)


class WrapsReceive:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def sees():
            return await receive()

        await self.app(scope, sees, send)


class BoundSend:
    """Middleware whose `send` is a method of an object that has the name of another one's."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, Passing(send).send)


class Passing:
    def __init__(self, send):
        self._send = send

    async def send(self, message):
        await self._send(message)


class Proxy:
    """What libraries that patch functions put in place of one: it seems to be the function."""

    def __init__(self, wrapped, sent):
        self._wrapped = wrapped
        self._sent = sent

    @property
    def __class__(self):
        return type(self._wrapped)

    def __getattr__(self, name):
        return getattr(self._wrapped, name)

    async def __call__(self, message):
        self._sent.append(message)
        await self._wrapped(message)


# Otherwise it would be that of this module, which a lookup finds before `__getattr__`.
Proxy.__module__ = "starlette._exception_handler"


def in_disguise(send, sent):
    """A wrapper that has the name and the module of what it wraps."""

    @functools.wraps(send)
    async def sees(message):
        sent.append(message)
        await send(message)

    return sees


def endpoint_of(hub):
    async def endpoint(websocket: WebSocket):
        await hub.connect(websocket)
        try:
            while True:
                await hub.send(await websocket.receive_text())
        except WebSocketDisconnect:
            await hub.disconnect(websocket)

    return endpoint


def starlette_app(hub, *middleware):
    routes = [WebSocketRoute("/ws", endpoint_of(hub))]
    return Starlette(routes=routes, middleware=[Middleware(*each) for each in middleware])


def fastapi_app(hub):
    app, router = FastAPI(), APIRouter()

    def dependency():
        yield

    @router.websocket("/ws", dependencies=[Depends(dependency)])
    async def endpoint(websocket: WebSocket):
        await endpoint_of(hub)(websocket)

    app.include_router(router)
    return app


def mounted_app(hub):
    """An app in an app in an app, each with its own routing."""
    inner = fastapi_app(hub)
    return Starlette(routes=[Mount("/", Starlette(routes=[Mount("/", inner)]))])


def class_app(hub):
    class Chat(BroadcastEndpoint):
        broadcast = hub

    return Starlette(routes=[WebSocketRoute("/ws", Chat)])


def hub_app(hub):
    return Starlette(routes=[Mount("/", hub.app(publish=True))])


def with_handlers(hub):
    app = starlette_app(hub)
    app.add_exception_handler(ValueError, lambda websocket, exc: None)
    return app


def with_sessions(hub):
    return starlette_app(
        hub,
        (CORSMiddleware,),
        (GZipMiddleware,),
        (lambda app: SessionMiddleware(app, secret_key="secret"),),
    )


FAST = [starlette_app, fastapi_app, mounted_app, class_app, hub_app, with_handlers, with_sessions]


async def talk(server, hub, *, fast_path, asgi):
    """Two clients say something, and both get it; so does a large and a small one of the hub's."""
    async with server.connect("/ws") as one, server.connect("/ws", compression=None) as two:
        await until(lambda: len(hub) == 2)
        stats = hub.stats()
        assert (stats.fast_path, stats.asgi) == (fast_path, asgi)
        for text in ("hello", "x" * 3000):
            await one.send(text)
            assert await one.recv() == await two.recv() == text
    await until(lambda: len(hub) == 0)
    stats = hub.stats()
    assert (stats.fast_path, stats.asgi) == (0, {})


@pytest.mark.parametrize("app_of", FAST)
async def test_plain_uvicorn_is_enough(serve, app_of):
    hub = Broadcast()
    server = await serve(app_of(hub))
    await talk(server, hub, fast_path=2, asgi={})


@pytest.mark.parametrize("middleware", [WrapsSend, WrapsReceive, BoundSend])
async def test_middleware_that_sees_messages_keeps_its_clients_on_asgi(serve, middleware):
    hub = Broadcast()
    server = await serve(middleware(starlette_app(hub)))
    await talk(server, hub, fast_path=0, asgi={MIDDLEWARE: 2})


async def test_middleware_below_a_mount_too(serve):
    hub = Broadcast()
    inner = WrapsSend(fastapi_app(hub))
    server = await serve(Starlette(routes=[Mount("/", inner)]))
    await talk(server, hub, fast_path=0, asgi={MIDDLEWARE: 2})
    assert [message["text"] for message in inner.sent if "text" in message] == [
        *("hello",) * 2,
        *("x" * 3000,) * 2,
    ]


@pytest.mark.parametrize("wrap", [Proxy, in_disguise])
@pytest.mark.parametrize("below", [False, True], ids=["above the app", "below its routing"])
async def test_a_wrapper_that_looks_like_what_it_wraps(serve, wrap, below):
    hub, sent = Broadcast(), []

    def middleware(app):
        async def call(scope, receive, send):
            await app(scope, receive, wrap(send, sent))

        return call

    route = WebSocketRoute("/ws", endpoint_of(hub), middleware=[Middleware(middleware)] * below)
    app = Starlette(routes=[route])
    server = await serve(app if below else middleware(app))
    await talk(server, hub, fast_path=0, asgi={MIDDLEWARE: 2})
    assert len([message for message in sent if "text" in message]) == 4


@pytest.mark.parametrize("ready_frames", [True, False])
@pytest.mark.parametrize("how", ["a subclass", "a patch of the class", "a function", "a proxy"])
async def test_an_app_that_replaces_the_send_of_its_websocket(
    serve, how, ready_frames, monkeypatch
):
    hub, sent = Broadcast(ready_frames=ready_frames), []
    original = WebSocket.send

    async def send(self, message):
        sent.append(message)
        await original(self, message)

    if how == "a patch of the class":
        monkeypatch.setattr(WebSocket, "send", send)

    async def app(scope, receive, server_send):
        cls = type("Subclass", (WebSocket,), {"send": send}) if how == "a subclass" else WebSocket
        websocket = cls(scope, receive, server_send)
        if how == "a function":
            websocket.send = in_disguise(websocket.send, sent)
        elif how == "a proxy":
            websocket.send = Proxy(websocket.send, sent)
        await endpoint_of(hub)(websocket)

    server = await serve(app)
    reason = MIDDLEWARE if ready_frames else "ready_frames=False"
    await talk(server, hub, fast_path=0, asgi={reason: 2})
    assert len([message for message in sent if "text" in message]) == 4


async def test_another_protocol_of_uvicorns(serve):
    hub = Broadcast()
    server = await serve(starlette_app(hub), ws="wsproto")
    await talk(server, hub, fast_path=0, asgi={SERVER: 2})


async def test_without_ready_frames(serve):
    hub = Broadcast(ready_frames=False)
    server = await serve(starlette_app(hub))
    await talk(server, hub, fast_path=0, asgi={"ready_frames=False": 2})


async def test_the_second_hub_of_a_client_sends_through_the_first(serve):
    first, second = Broadcast(), Broadcast()

    async def endpoint(websocket: WebSocket):
        await first.connect(websocket)
        await second.connect(websocket)
        with contextlib.suppress(WebSocketDisconnect):
            await websocket.receive_text()

    server = await serve(Starlette(routes=[WebSocketRoute("/ws", endpoint)]))
    async with server.connect("/ws") as client:
        await until(lambda: len(second) == 1)
        assert first.stats().fast_path == 1
        assert second.stats().asgi == {"another hub writes to the client": 1}
        await first.send("first")
        await second.send("second")
        await first.send("third")
        assert [await client.recv() for _ in range(3)] == ["first", "second", "third"]


async def test_a_client_that_connects_again_is_on_the_fast_path_again(serve):
    hub, other = Broadcast(), Broadcast()

    async def endpoint(websocket: WebSocket):
        for each in (hub, other, hub):
            await each.connect(websocket)
            await each.send(await websocket.receive_text())
            stats = each.stats()
            assert (stats.fast_path, stats.asgi) == (1, {})
            await each.disconnect(websocket)

    server = await serve(Starlette(routes=[WebSocketRoute("/ws", endpoint)]))
    async with server.connect("/ws") as client:
        for text in ("one", "two", "three"):
            await client.send(text)
            assert await client.recv() == text
        await client.wait_closed()
        assert client.close_code != 1011


async def test_the_log_says_which_path_a_client_takes(serve, caplog):
    caplog.set_level(logging.DEBUG, "starcast")
    hub = Broadcast()
    plain, wrapped = await serve(starlette_app(hub)), await serve(WrapsSend(starlette_app(hub)))
    async with plain.connect("/ws"), wrapped.connect("/ws"):
        await until(lambda: len(hub) == 2)
    joined = [record.getMessage() for record in caplog.records if "joined" in record.message]
    assert any("a client on the fast path joined" in line for line in joined)
    assert any(f"a client on ASGI ({MIDDLEWARE}) joined" in line for line in joined)
    caplog.clear()


async def test_nothing_of_uvicorn_is_imported_for_another_server(tmp_path):
    program = (
        "import sys, asyncio\n"
        "from starcast import Broadcast\n"
        "from support import Peer\n"
        "async def main():\n"
        "    async with Broadcast() as hub:\n"
        "        peer = Peer()\n"
        "        await hub.connect(peer.websocket)\n"
        f"        assert hub.stats().asgi == {{{SERVER!r}: 1}}, hub.stats()\n"
        "asyncio.run(main())\n"
        "assert 'starcast.uvicorn' not in sys.modules\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, cwd="tests", stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()


async def test_an_app_without_routes_is_on_the_fast_path(serve):
    hub = Broadcast()

    async def app(scope, receive, send):
        await hub.serve(WebSocket(scope, receive, send))

    server = await serve(app, lifespan="off")
    async with server.connect("/") as client:
        await until(lambda: len(hub) == 1)
        assert (hub.stats().fast_path, hub.stats().asgi) == (1, {})
        await client.send("hello")
        assert await client.recv() == "hello"


async def test_a_client_without_a_server():
    hub = Broadcast()
    await joined(hub)
    assert (hub.stats().fast_path, hub.stats().asgi) == (0, {SERVER: 1})
