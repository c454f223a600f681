"""Clients that are turned away before their handshake is answered: how, and what the log says."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException, WebSocketException
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, WebSocketRoute
from websockets.exceptions import InvalidStatus

from backends.nats_server import NatsServer
from backends.postgres_server import PostgresServer
from backends.redis_server import RedisServer
from starcast import (
    BackendUnavailable,
    Broadcast,
    BroadcastEndpoint,
    ConnectionManager,
    StarcastError,
    logs,
)
from support import Broker, Bus, Peer, until

pytestmark = pytest.mark.anyio

DOORS = ["endpoint", "serve", "mount", "manager", "connect", "fastapi"]


def app_of(hub: Broadcast, channel: str = "room") -> Starlette:
    """An app with every way to let clients in, all of the same hub."""
    manager = ConnectionManager(hub)

    class Chat(BroadcastEndpoint):
        broadcast = hub

        def get_channel(self, websocket):
            return channel

    async def serve(websocket):
        await hub.serve(websocket, channel)

    async def connect(websocket):
        await hub.connect(websocket, channel)
        await websocket.receive()

    async def connect_to_manager(websocket):
        await manager.connect(websocket)
        await websocket.receive()

    fastapi = FastAPI()
    fastapi.websocket("/fastapi")(Chat)
    return Starlette(
        routes=[
            WebSocketRoute("/endpoint", Chat),
            WebSocketRoute("/serve", serve),
            WebSocketRoute("/connect", connect),
            WebSocketRoute("/manager", connect_to_manager),
            Mount("/mount", hub),
            Mount("/", fastapi),
        ]
    )


def path_of(door: str, channel: str = "room") -> str:
    return f"/{door}/{channel}" if door == "mount" else f"/{door}"


async def refusal(server, path: str, **options):
    """The response to a handshake that is refused."""
    with pytest.raises(InvalidStatus) as caught:
        await server.connect(path, **options)
    return caught.value.response


def warnings_of(caplog) -> list[str]:
    """What starcast has said, without what is no refusal."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "starcast" and "lost the connection" not in record.getMessage()
    ]


@pytest.mark.parametrize("broker", [RedisServer, NatsServer, PostgresServer])
async def test_with_the_broker_away_every_door_says_to_try_again(serve, caplog, broker):
    with contextlib.closing(broker()) as server_of_broker:
        server_of_broker.start()
        async with Broadcast(server_of_broker.url) as hub:
            server = await serve(app_of(hub))
            server_of_broker.kill()
            await until(lambda: hub.stats().backend.state == "reconnecting")
            responses = await asyncio.gather(*(refusal(server, path_of(door)) for door in DOORS))
            for door, response in zip(DOORS, responses, strict=True):
                assert (response.status_code, door) == (503, door)
                assert response.headers["Retry-After"] == "2"
                assert b"127.0.0.1" not in response.body
            (line,) = warnings_of(caplog)
            assert "HTTP 503" in line
            assert "the broker did not answer in time" in line
            assert len(hub) == 0
    caplog.clear()  # uvicorn 0.54 complains about every denial response


@pytest.mark.parametrize("door", ["endpoint", "serve", "mount"])
async def test_a_server_that_cannot_answer_with_a_status_closes(door):
    broker = Broker()
    broker.up = False
    peer = Peer()
    peer.scope |= {"path": path_of(door), "root_path": "", "method": "GET"}
    await app_of(Broadcast(backend=Bus(broker), open_timeout=0))(
        peer.scope, peer.receive, peer.send
    )
    assert peer.sent == [{"type": "websocket.close", "code": 1013, "reason": "try again later"}]


async def test_a_client_that_has_left_meanwhile_is_not_answered():
    broker = Broker()
    broker.up = False
    broker.open.clear()
    peer = Peer()
    peer.scope |= {"path": "/endpoint", "extensions": {"websocket.http.response": {}}}
    hub = Broadcast(backend=Bus(broker), open_timeout=0)

    class Chat(BroadcastEndpoint):
        broadcast = hub

        async def on_connect(self, websocket):
            await websocket.receive()
            await websocket.receive()  # it has left
            await super().on_connect(websocket)

    peer.leave()
    task = asyncio.ensure_future(Chat(peer.scope, peer.receive, peer.send).dispatch())
    await until(lambda: broker.stalled)
    broker.open.set()
    await task
    assert peer.sent == []


async def test_a_refusal_that_does_not_get_through_is_no_error():
    broker = Broker()
    broker.up = False
    peer = Peer()
    peer.scope |= {"path": "/endpoint", "extensions": {"websocket.http.response": {}}}
    peer.fail = OSError()

    class Chat(BroadcastEndpoint):
        broadcast = Broadcast(backend=Bus(broker), open_timeout=0)

    await Chat(peer.scope, peer.receive, peer.send)
    assert peer.sent == []


@pytest.mark.parametrize("door", ["endpoint", "serve", "connect", "mount", "fastapi"])
async def test_a_bad_channel_is_403_and_a_line_that_names_it(serve, caplog, door):
    server = await serve(app_of(Broadcast(), channel="a\0b"))
    for _ in range(3):
        response = await refusal(server, path_of(door, "a%00b"))
        assert response.status_code == 403
    (line,) = warnings_of(caplog)
    assert "must not contain the character '\\x00': 'a\\x00b'" in line


async def test_what_on_connect_refuses_is_a_line_a_kind(serve, caplog):
    class Chat(BroadcastEndpoint):
        async def on_connect(self, websocket):
            raise WebSocketException(int(websocket.query_params["code"]), "no token")

    server = await serve(Starlette(routes=[WebSocketRoute("/", Chat)]))
    for code in (1008, 4001, 1008, 4001):
        assert (await refusal(server, f"/?code={code}")).status_code == 403
    lines = warnings_of(caplog)
    assert len(lines) == 2
    assert "1008: no token; " in lines[0]
    assert "4001: no token; " in lines[1]


@pytest.mark.parametrize("door", ["endpoint", "fastapi", "mount"])
async def test_what_the_app_refuses_with_a_status_is_a_line_a_kind(serve, caplog, door):
    def refuse(websocket, channel=""):
        status = int(websocket.query_params["status"])
        if status == 500:
            raise LookupError("a mistake, and no refusal")
        raise HTTPException(status, "no token\nINFO:")

    class Chat(BroadcastEndpoint):
        async def on_connect(self, websocket):
            if websocket.query_params["status"] == "late":
                await websocket.accept()
                raise HTTPException(401)
            refuse(websocket)

    fastapi = FastAPI()
    fastapi.websocket("/fastapi")(Chat)
    app = Starlette(
        routes=[
            WebSocketRoute("/endpoint", Chat),
            Mount("/mount", Broadcast().app(authorize=refuse)),
            Mount("/", fastapi),
        ]
    )
    server = await serve(app)
    for status in (401, 403, 401, 403, 500):
        path = f"{path_of(door)}?status={status}"
        assert (await refusal(server, path)).status_code == status
    assert warnings_of(caplog) == [
        f"refused a client before it was accepted (HTTP {status}): 'no token\\nINFO:'; "
        "further refusals of this kind are not logged"
        for status in (401, 403)
    ]
    if door == "endpoint":
        async with server.connect("/endpoint?status=late") as client:
            await client.wait_closed()
        assert len(warnings_of(caplog)) == 2
    caplog.clear()  # the mistakes, and uvicorn 0.54 complains about every denial response


async def test_what_authorize_refuses_is_one_line(serve, caplog):
    app = Starlette(routes=[Mount("/live", Broadcast().app(authorize=lambda *args: False))])
    server = await serve(app)
    for _ in range(3):
        assert (await refusal(server, "/live/x")).status_code == 403
    (line,) = warnings_of(caplog)
    assert "authorize returned False" in line


async def test_a_page_of_another_host_is_told_once_and_by_its_own_line(serve, caplog):
    server = await serve(app_of(Broadcast()))
    for door in DOORS:
        response = await refusal(server, path_of(door), origin="https://evil.example")
        assert response.status_code == 403
    assert all("origins=" in line for line in warnings_of(caplog))


async def test_the_apps_handler_for_http_does_not_answer_an_accepted_client(serve, caplog):
    """It would send a response to an open websocket."""

    async def on_unavailable(request, exc):
        return PlainTextResponse("not now", 418)

    class Chat(BroadcastEndpoint):
        async def on_connect(self, websocket):
            if "late" in websocket.query_params:
                await websocket.accept()
            raise BackendUnavailable("the broker is down")

    app = Starlette(
        routes=[WebSocketRoute("/", Chat)], exception_handlers={StarcastError: on_unavailable}
    )
    server = await serve(app)
    async with server.connect("/?late") as client:
        await client.wait_closed()
        assert client.close_code == 1013
    assert (await refusal(server, "/")).status_code == 418
    assert not any(record.exc_info for record in caplog.records)
    caplog.clear()  # uvicorn 0.54 complains about every denial response


async def test_after_accept_the_close_code_says_it(serve, caplog):
    hub = Broadcast()

    async def endpoint(websocket):
        await websocket.accept()
        await hub.connect(websocket, "")

    server = await serve(Starlette(routes=[WebSocketRoute("/", endpoint)]))
    async with server.connect("/") as client:
        await client.wait_closed()
        assert client.close_code == 1008
    assert warnings_of(caplog) == []


# logs.once


def test_a_kind_is_logged_once(caplog):
    for number in range(3):
        logs.once(("a", "kind"), "number %d", number)
        logs.once(("another",), "100 %")
    assert [record.getMessage() for record in caplog.records] == ["number 0", "100 %"]
    assert {(r.name, r.levelno) for r in caplog.records} == {("starcast", logging.WARNING)}
    logs.reset()
    logs.once(("a", "kind"), "again")
    assert len(caplog.records) == 3


def test_kinds_are_bounded(caplog):
    for number in range(logs.MAX_KINDS + 10):
        logs.once((str(number),), "line")
    assert len(caplog.records) == logs.MAX_KINDS
