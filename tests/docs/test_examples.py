"""Every program in docs/examples runs, and does what its page says."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import tokenize
import tomllib
import types
from datetime import datetime
from pathlib import Path

import anyio
import httpx
import jwt
import pytest
import uvicorn
import websockets
import websockets.sync.client as connect_sync
import yaml
from fastapi import APIRouter, Depends, FastAPI
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

import starcast.testing
from backends.postgres_server import PASSWORD, USER, PostgresServer
from backends.redis_server import RedisServer
from event_source import EventSource
from history.keeping import TUNING, KeepingBroker, KeepingBus
from server_process import ServerProcess
from starcast import BackendUnavailable, Broadcast, BroadcastEndpoint, PublishQueueFull
from support import DEADLINE, Broker, Bus, Peer, by_another, until, until_sync

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

pytestmark = pytest.mark.anyio


@pytest.fixture
def example(monkeypatch):
    """`example("name")` imports docs/examples/name.py afresh, with hubs that nobody has used."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def source(name):
    return (EXAMPLES / f"{name}.py").read_text()


def tokens(program):
    """The words of a program, without its blank lines and the shape of its lines."""
    blank = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    words = tokenize.generate_tokens(io.StringIO(program).readline)
    return [word.string for word in words if word.type not in blank]


def refused(client, path, **options):
    """The close code before accept, which a server turns into HTTP 403."""
    with pytest.raises(WebSocketDisconnect) as info:
        client.websocket_connect(path, **options).__enter__()
    return info.value.code


def closed(websocket):
    with pytest.raises(WebSocketDisconnect) as info:
        websocket.receive_text()
    return info.value.code


@contextlib.contextmanager
def stalled(server, path):
    """A client that shakes hands and then reads nothing."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        yield


# The README


async def test_quickstart(example, serve):
    server = await serve(example("quickstart").app)
    async with (
        server.connect("/ws/tea") as ann,
        server.connect("/ws/tea") as ben,
        server.connect("/ws/bar") as eve,
    ):
        await ann.send("hello")
        assert await ann.recv() == "hello"
        assert await ben.recv() == "hello"
        await eve.send("anybody?")
        assert await eve.recv() == "anybody?"


def test_main(example):
    with TestClient(example("main").app) as client:
        with client.websocket_connect("/live/orders") as ann:
            assert client.post("/orders/7/paid").status_code == 200
            assert ann.receive_text() == '{"number":7,"state":"paid"}'
        assert "new WebSocket(" in client.get("/").text


# Starlette and FastAPI


def test_starlette_routes(example):
    with TestClient(example("starlette_routes").app) as client:
        with client.websocket_connect("/rooms/tea") as ann:
            ann.send_text("hello")
            assert ann.receive_text() == "hello"
        with client.websocket_connect("/live/today") as ann:
            ann.send_text("hello")
            assert closed(ann) == 1008


def test_starlette_hooks(example):
    with TestClient(example("starlette_routes").app) as client:
        assert refused(client, "/members/tea") == 1008
        with client.websocket_connect("/members/tea?key=sesame") as ann:
            with client.websocket_connect("/members/tea?key=sesame") as ben:
                assert ann.receive_text() == "somebody came in"
                ben.send_text("hello")
                assert ann.receive_text() == ben.receive_text() == "hello"
                ben.send_text("bye")
                assert closed(ben) == 1000
            assert ann.receive_text() == "somebody left (1000)"


def test_fastapi_depends_serve(example):
    with TestClient(example("fastapi_depends").app) as client:
        assert refused(client, "/rooms/tea") == 1008
        assert refused(client, "/rooms/tea?token=wrong") == 1008
        with (
            client.websocket_connect("/rooms/tea?token=a-token") as ann,
            client.websocket_connect("/rooms/tea?token=b-token") as ben,
        ):
            ann.send_text("hello")
            assert ann.receive_text() == ben.receive_text() == "hello"


def test_fastapi_depends_loop(example):
    module = example("fastapi_depends")
    with TestClient(module.app) as client:
        assert refused(client, "/signed/tea") == 1008
        with client.websocket_connect("/signed/tea?token=b-token") as ben:
            with client.websocket_connect("/signed/tea?token=a-token") as ann:
                ann.send_text("hello")
                assert ann.receive_json() == {"from": "Ann", "text": "hello"}
            assert ben.receive_json() == {"from": "Ann", "text": "hello"}
            until_sync(lambda: module.hub.channels == {"tea": 1})


def test_fastapi_mount(example):
    client = TestClient(example("fastapi_mount").app)
    with client.websocket_connect("/live/today") as ann:
        response = client.post("/news/today", params={"headline": "It rains."})
        assert response.json() == {"listeners": 1}
        assert ann.receive_text() == "It rains."
        ann.send_text("no, it does not")
        assert closed(ann) == 1008


def test_fastapi_users(example):
    with TestClient(example("fastapi_users").app) as client:
        with client.websocket_connect("/users/7") as ann:
            answer = client.post("/users/7", params={"text": "tea is ready"})
            assert answer.json() == {"online": True}
            assert ann.receive_text() == "tea is ready"
        assert client.post("/users/8", params={"text": "tea"}).json() == {"online": False}


def test_fastapi_json(example):
    client = TestClient(example("fastapi_json").app)
    with client.websocket_connect("/live/orders") as ann:
        response = client.post("/orders")
        assert ann.receive_text() == response.text
    assert f"# Both are {response.text}\n" in source("fastapi_json")
    with client.websocket_connect("/live/users") as ann:
        response = client.post("/users")
        assert ann.receive_text() == response.text == '{"name":"Ann"}'


def away():
    """A broker that is away."""
    broker = Broker()
    broker.up = False
    return Bus(broker)


@pytest.mark.parametrize("path", ["news", "plain"])
def test_fastapi_errors_of_routes(path, example):
    module = example("fastapi_errors")
    client = TestClient(module.app)
    with client.websocket_connect("/chat/today") as ann:
        assert client.post(f"/{path}/today", params={"headline": "It rains."}).status_code == 200
        assert ann.receive_text() == "It rains."
    response = client.post(f"/{path}/a%00b", params={"headline": "x"})
    assert response.status_code == 422
    module.news = Broadcast(backend=away(), open_timeout=0)
    response = client.post(f"/{path}/today", params={"headline": "x"})
    assert (response.status_code, response.headers["Retry-After"]) == (503, "2")


def test_fastapi_errors_in_the_background(example, caplog):
    module = example("fastapi_errors")
    module.news = Broadcast(backend=away(), open_timeout=0)
    assert TestClient(module.app).post("/later", params={"headline": "x"}).status_code == 200
    assert caplog.messages == ["not announced: the broker is down"]


def test_fastapi_errors_with_a_handler(example):
    module = example("fastapi_errors")
    module.news = Broadcast(backend=away(), open_timeout=0)
    client = TestClient(module.app)
    response = client.post("/api/news")
    assert (response.status_code, response.json()) == (503, {"published": False})
    assert response.headers["Retry-After"] == "10"
    with client.websocket_connect("/api/ws") as websocket:
        assert closed(websocket) == 1013


@pytest.mark.parametrize(
    ("number", "line"),
    [("7", "no such room"), ("seven", "parameters are not valid")],
)
def test_fastapi_errors_refused(number, line, example, caplog):
    client = TestClient(example("fastapi_errors").app)
    assert refused(client, f"/rooms?number={number}") == 1008
    assert f"refused /rooms: {line}" in caplog.messages


async def test_fastapi_errors_on_publish_error(example, monkeypatch):
    module = example("fastapi_errors")
    broker = Broker()
    monkeypatch.setattr(module.Chat, "broadcast", Broadcast(backend=Bus(broker)))
    peer = Peer(path_params={"channel": "room"})
    chat = asyncio.ensure_future(module.Chat(peer.scope, peer.receive, peer.send).dispatch())
    await until(lambda: len(module.Chat.broadcast) == 1)
    broker.kill()
    peer.say("hello")
    await until(lambda: peer.got == ["Not sent: hello"])
    peer.leave()
    await chat
    await module.Chat.broadcast.disconnect()


def test_fastapi_drops_what_its_page_says():
    def app_of(router, **options):
        app = FastAPI()
        app.include_router(router, **options)
        return TestClient(app)

    class Chat(BroadcastEndpoint):
        pass

    checked = []

    def check():
        checked.append("checked")

    dependencies = [Depends(check)]
    own = APIRouter(prefix="/own", dependencies=dependencies)
    own.routes.append(WebSocketRoute("/ws", Chat))
    own.mount("/live", Broadcast())
    own.websocket("/class")(Chat)
    client = app_of(own, prefix="/given", dependencies=dependencies)
    for path in ("/given/ws", "/given/live/x"):
        with client.websocket_connect(path):
            assert checked == []
    refused(client, "/given/own/ws")
    refused(client, "/given/own/live/x")
    with client.websocket_connect("/given/own/class"):
        assert checked  # it is a route of FastAPI's


def test_fastapi_authorize(example):
    client = TestClient(example("fastapi_mount").app)
    assert refused(client, "/staff/bar") == 1008
    assert refused(client, "/staff/bar?key=k-key") == 1008
    assert refused(client, "/staff/cellar?key=k-key") == 1008
    with (
        client.websocket_connect("/staff/bar?key=b-key") as ann,
        client.websocket_connect("/staff/bar?key=b-key") as ben,
    ):
        ann.send_text("two coffees")
        assert ann.receive_text() == ben.receive_text() == "two coffees"


def test_who_may_connect_origins(example):
    client = TestClient(example("who_may_connect").app)

    def let_in(mount, *origins, host="chat.example"):
        for origin in origins:
            headers = {"origin": origin, "host": host}
            with client.websocket_connect(f"/{mount}/x", headers=headers):
                pass

    let_in("same", "http://chat.example:5173")
    for host in ("127.0.0.1:8000", "localhost:8000", "[::1]:8000"):
        let_in("same", "http://localhost:5173", "http://app.localhost", host=host)
    let_in("these", "https://example.com", "http://localhost:5173")
    let_in("subdomains", "https://example.com", "https://a.b.example.com")
    let_in("shells", "https://example.com", "capacitor://localhost", "app://obsidian.md")
    let_in("every", "https://evil.example", "null")
    let_in("embedded", "https://shop.example.org", "https://WWW.example.net")
    for mount in ("same", "these", "subdomains", "shells", "embedded"):
        for origin in ("https://evil.example", "null", "http://www.example.net"):
            assert refused(client, f"/{mount}/x", headers={"origin": origin}) == 1008


def test_who_may_connect_log(example, caplog):
    client = TestClient(example("who_may_connect").app)
    headers = {"origin": "http://localhost:5173", "host": "chat.example"}
    assert refused(client, "/same/x", headers=headers) == 1008
    page = EXAMPLES.parent / "how-to" / "who-may-connect.md"
    assert f"```text\n{caplog.records[-1].getMessage()}\n```" in page.read_text()


def test_who_may_connect_authorize(example):
    client = TestClient(example("who_may_connect").app)
    for path in ("bar", "bar?token=t-ann", "bar?token=x", "cellar?token=t-ben"):
        assert refused(client, f"/rooms/{path}") == 1008
    with client.websocket_connect("/rooms/bar?token=t-ben") as ben:
        ben.send_text("two coffees")
        assert ben.receive_text() == "two coffees"


def test_who_may_connect_token(example):
    client = TestClient(example("who_may_connect").app)
    for offered in ([], ["bearer"], ["bearer", "t-eve"], ["t-ann"], ["t-ann", "bearer"]):
        assert refused(client, "/token/news", subprotocols=offered) == 1008
    with client.websocket_connect("/token/news", subprotocols=["bearer", "t-ann"]) as ann:
        assert ann.accepted_subprotocol == "bearer"


def test_refuse_close(example):
    client = TestClient(example("refuse_close").app)
    with client.websocket_connect("/ws") as stranger:
        assert closed(stranger) == 4401
    with client.websocket_connect("/ws", headers={"cookie": "session=s-ann"}) as ann:
        ann.send_text("hello")
        assert ann.receive_text() == "hello"
    assert "/ws" in client.get("/").text


def test_refuse_close_depends(example):
    client = TestClient(example("refuse_close_depends").app)
    with client.websocket_connect("/ws") as stranger:
        assert closed(stranger) == 4401
    with client.websocket_connect("/ws", headers={"cookie": "session=s-ann"}) as ann:
        ann.send_text("hello")
        assert ann.receive_text() == "hello"


def test_heartbeats(example):
    with TestClient(example("heartbeats").app) as client:
        with client.websocket_connect("/live/a") as ann:
            ann.send_text("ping")
            assert ann.receive_text() == "pong"
            ann.send_text("hello")
            assert closed(ann) == 1008
        with client.websocket_connect("/rooms/a") as ann:
            for said in ("ping", "keepalive", "hello"):
                ann.send_text(said)
            assert [ann.receive_text(), ann.receive_text()] == ["pong", "hello"]
        with client.websocket_connect("/chat/a") as ann:
            ann.send_text('{"type":"ping"}')
            assert ann.receive_json() == {"type": "pong"}
            ann.send_json({"type": "hello"})
            assert ann.receive_json() == {"type": "hello"}


def test_fastapi_endpoint_on_a_sub_app(example):
    client = TestClient(example("fastapi_mount").app)
    with (
        client.websocket_connect("/api/ws/tea") as ann,
        client.websocket_connect("/api/ws/tea") as ben,
    ):
        ann.send_text("hello")
        assert ann.receive_text() == ben.receive_text() == "hello"


def test_fastapi_lifespan(example):
    app = example("fastapi_lifespan").app
    with TestClient(app) as client, client.websocket_connect("/live/news") as ann:
        response = client.post("/news", params={"headline": "It snows."})
        assert response.json() == ["It rains.", "It snows."]
        assert ann.receive_text() == "It snows."
    assert not hasattr(app.state, "headlines")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("starlette_routes", "/members/tea"),
        ("fastapi_depends", "/rooms/tea"),
        ("fastapi_mount", "/staff/bar"),
        ("who_may_connect", "/rooms/bar"),
    ],
)
async def test_refusals_are_http_403(name, path, example, serve):
    server = await serve(example(name).app)
    with pytest.raises(websockets.InvalidStatus) as info:
        await server.connect(path)
    assert info.value.response.status_code == 403


# Programs that people have already

FASTAPI_PAGE = """
manager = ConnectionManager()

@app.get("/")
async def get():
    return HTMLResponse(html)

@app.websocket("/ws/{client_id}")
async def websocket_endpoint(websocket: WebSocket, client_id: int):
    await manager.connect(websocket)
    try:
        while True:
            data = await websocket.receive_text()
            await manager.send_personal_message(f"You wrote: {data}", websocket)
            await manager.broadcast(f"Client #{client_id} says: {data}")
    except WebSocketDisconnect:
        manager.disconnect(websocket)
        await manager.broadcast(f"Client #{client_id} left the chat")
"""

BROADCAST_PROGRAM = """
app = FastAPI()
broadcaster = Broadcast("memory://")

@app.websocket("/ws")
async def websocket_endpoint(websocket: WebSocket):
    await websocket.accept()
    await broadcaster.connect(websocket)
    try:
        while True:
            data = await websocket.receive_text()
            await broadcaster.send(data)
    except WebSocketDisconnect:
        await broadcaster.disconnect(websocket)
"""


def test_the_programs_are_word_for_word():
    text = source("manager_chat")
    assert tokens(text[text.index("manager = ") :]) == tokens(FASTAPI_PAGE)
    *_, program = source("broadcast_loop").partition("from starcast import Broadcast\n")
    assert tokens(program) == tokens(BROADCAST_PROGRAM)
    endpoint = BROADCAST_PROGRAM[BROADCAST_PROGRAM.index("@app") :]
    assert source("broadcast_loop_startup").replace("\n\n\n", "\n\n").endswith(endpoint)


async def test_manager_chat(example, serve):
    module = example("manager_chat")
    server = await serve(module.app)
    async with server.connect("/ws/1") as one:
        async with server.connect("/ws/2") as two:
            await two.send("hello")
            assert await two.recv() == "You wrote: hello"
            assert await two.recv() == "Client #2 says: hello"
            assert await one.recv() == "Client #2 says: hello"
            assert len(module.manager.active_connections) == 2
        assert await one.recv() == "Client #2 left the chat"
        assert len(module.manager.active_connections) == 1


def test_manager_chat_page(example):
    client = TestClient(example("manager_chat").app)
    assert "<title>Chat</title>" in client.get("/").text


async def test_manager_exclude(example, serve):
    module = example("manager_exclude")
    server = await serve(module.app, send_buffer=4096)
    with stalled(server, "/ws"):  # the first of the list
        await until(lambda: len(module.manager.active_connections) == 1)
        async with server.connect("/ws") as ann, server.connect("/ws") as ben:
            async with asyncio.timeout(DEADLINE):
                for number in range(100):
                    await ann.send(f"{number:<8192}")
                    assert int(await ben.recv()) == number
                await ben.send("for ann")
                assert await ann.recv() == "for ann"


def test_manager_rooms(example):
    client = TestClient(example("manager_rooms").app)
    with (
        client.websocket_connect("/ws") as old,
        client.websocket_connect("/rooms/tea") as new,
    ):
        old.send_text("from the old one")
        assert old.receive_text() == "from the old one"
        new.send_text("from the new one")
        assert new.receive_text() == "from the new one"
        answer = client.get("/clients").json()
        assert answer == {"all": 2, "channels": {"default": 1, "room:tea": 1}}


async def test_push(example, serve):
    module = example("push")
    # Fewer lines, which are longer: still more than the client's buffer holds.
    module.history[:] = [f"line {number}".ljust(1000, ".") for number in range(2000)]
    server = await serve(module.app)
    async with server.connect("/ws", compression=None) as client:
        for line in module.history:
            assert await client.recv() == line
        assert await client.recv() == "still here"
        (websocket,) = module.hub.clients()
        assert await by_another(module.notify(websocket, "from elsewhere"))
        assert await client.recv() == "from elsewhere"
    await until(lambda: len(module.hub) == 0)
    assert not await by_another(module.notify(websocket, "too late"))


@pytest.mark.parametrize("name", ["broadcast_loop", "broadcast_loop_startup"])
async def test_broadcast_loop(name, example, serve):
    module = example(name)
    server = await serve(module.app)
    async with server.connect("/ws") as two:
        async with server.connect("/ws") as one:
            await one.send("hello")
            assert await one.recv() == "hello"
            assert await two.recv() == "hello"
        await until(lambda: len(module.broadcaster) == 1)


@pytest.mark.parametrize("name", ["broadcast_loop", "broadcast_loop_startup"])
def test_broadcast_loop_on_several_event_loops(name, example):
    client = TestClient(example(name).app)  # bare: each client has its own loop
    with client.websocket_connect("/ws") as one, client.websocket_connect("/ws") as two:
        one.send_text("hello")
        assert one.receive_text() == two.receive_text() == "hello"


def test_broadcast_loop_opened_on_another_loop(example):
    module = example("broadcast_loop_startup")

    async def start():
        await module.broadcaster.connect()

    anyio.run(start)
    assert module.broadcaster.stats().open
    client = TestClient(module.app)
    with client.websocket_connect("/ws") as one, client.websocket_connect("/ws") as two:
        one.send_text("hello")
        assert one.receive_text() == two.receive_text() == "hello"
    with TestClient(module.app):
        assert module.broadcaster.stats().open
    assert not module.broadcaster.stats().open


@pytest.mark.parametrize("name", ["broadcaster_chat", "broadcaster_endpoint"])
async def test_broadcaster_chat(name, example, serve):
    module = example(name)
    server = await serve(module.app)
    async with server.connect("/") as ann, server.connect("/") as ben:
        stats = module.broadcast.stats
        await until(lambda: stats().subscribers + stats().clients == 2)
        await ann.send("hello")
        assert await ann.recv() == "hello"
        assert await ben.recv() == "hello"
        await ben.send("hi")
        assert await ann.recv() == "hi"
    await until(lambda: stats().subscribers + stats().clients == 0)


@pytest.mark.parametrize("name", ["broadcaster_chat", "broadcaster_endpoint"])
async def test_broadcaster_chat_when_everybody_leaves(name, example, serve, caplog):
    module = example(name)
    server = await serve(module.app)
    stats = module.broadcast.stats
    clients = await asyncio.gather(*(server.connect("/", max_queue=None) for _ in range(200)))
    await until(lambda: stats().subscribers + stats().clients == 200)
    talking = asyncio.gather(*map(talk, clients))
    await until(lambda: stats().delivered > 8_000)
    leaving = []
    for client in clients:
        if len(leaving) % 2:
            reset(client)
        leaving.append(asyncio.create_task(client.close()))
        await asyncio.sleep(0)
    await asyncio.gather(talking, *leaving)
    await until(lambda: stats().subscribers + stats().clients == 0)
    await until(lambda: not server.server.server_state.tasks)
    assert [record for record in caplog.records if record.exc_info] == []


async def talk(client):
    """Say something for every 200 messages that came, until the connection is gone."""
    with contextlib.suppress(websockets.ConnectionClosed):
        while True:
            await client.send("hello")
            for _ in range(200):
                await client.recv()


def reset(client):
    """Leave as a process that was killed: with a TCP reset."""
    sock = client.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.transport.abort()


# Slow clients


async def flood(hub, channel, condition, healthy=None):
    """Publish until the condition is true: as much as the buffers of the sockets take.

    The healthy client reads each message before the next one is published.
    """
    for _ in range(1000):
        await hub.publish(channel, "x" * 60_000)
        if healthy is not None:
            await healthy.recv()
        if condition():
            return
    raise AssertionError("60 MB were not enough")


async def test_slow_clients_are_cut_off(example, serve, caplog):
    hub = (module := example("slow_clients")).hub
    server = await serve(module.app)
    async with server.connect("/chat/tea", max_size=None) as healthy:
        with stalled(server, "/chat/tea"):
            await until(lambda: len(hub) == 2)
            await flood(hub, "tea", lambda: hub.stats().slow_clients, healthy)
            assert hub.channels == {"tea": 1}
            assert "disconnect: " in caplog.text
            assert hub.stats().dropped > 1


async def test_slow_clients_get_the_latest(example, serve, caplog):
    hub = (module := example("slow_clients")).hub
    server = await serve(module.app)
    with stalled(server, "/prices/tea"):
        await until(lambda: len(hub) == 1)
        await flood(hub, "tea", lambda: hub.stats().dropped > 3)
        assert hub.stats().slow_clients == 0
        assert hub.stats().buffered <= 60_000 + 64  # a single message, larger than the buffer
        assert len(hub) == 1
        assert "latest: 1 messages lost" in caplog.text


def test_slow_clients_stats(example):
    client = TestClient(example("slow_clients").app)
    with client.websocket_connect("/chat/tea") as ann:
        ann.send_text("hello")
        assert ann.receive_text() == "hello"
        snapshot = client.get("/stats").json()
        assert snapshot["clients"] == 1
        assert snapshot["channels"] == {"tea": 1}
        assert snapshot["published"] == 1
        assert snapshot["dropped"] == 0


async def test_subscriber_lagged(example):
    module = example("subscriber_lagged")
    log = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(module.record, "tea", log)
        await until(lambda: module.hub.stats().subscribers)
        for number in range(50):
            module.hub.publish_nowait("tea", f"{number}" + " " * 10_000)
        await until(lambda: "(messages are missing here)" in log and module.hub.stats().subscribers)
        await module.hub.publish("tea", "after")
        await until(lambda: log[-1] == "after")
        await module.hub.disconnect()  # ends `record`
    assert [line.strip() for line in log[:6]] == ["0", "1", "2", "3", "4", "5"]
    assert log[-2:] == ["(messages are missing here)", "after"]


# Testing, threads


@pytest.mark.parametrize(
    "name",
    [
        "test_everybody_in_the_room_gets_it",
        "test_another_room_does_not_get_it",
        "test_pages_from_elsewhere_are_refused",
    ],
)
def test_testing(name, example):
    example("quickstart")  # which it imports
    getattr(example("testing"), name)()


async def test_testing_on_a_real_socket(example):
    example("quickstart")
    await example("testing").test_on_a_real_socket()


def test_threads_route(example):
    module = example("threads")
    client = TestClient(module.app)
    with client.websocket_connect("/live/orders") as ann:
        assert client.post("/orders/7").json() == {"published": True}
        assert ann.receive_json() == {"order": 7}


def test_threads_route_when_full(example, monkeypatch):
    module = example("threads")

    def full(channel, message):
        raise PublishQueueFull

    monkeypatch.setattr(module.hub, "publish_nowait", full)
    assert TestClient(module.app).post("/orders/7").status_code == 503


def test_threads_wait(example):
    module = example("threads")
    client = TestClient(module.app)
    with client.websocket_connect("/live/payments") as ann:
        assert client.post("/payments/7").json() == {"published": True}
        assert ann.receive_json() == {"payment": 7}
    module.hub = Broadcast(backend=away(), open_timeout=0)
    response = client.post("/payments/7")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "2")


def test_threads_thread(example):
    module = example("threads")
    before = threading.active_count()
    with TestClient(module.app).websocket_connect("/live/sensor") as ann:
        stop = module.start_watching(lambda: {"celsius": 21})
        assert ann.receive_json() == {"celsius": 21}
        stop.set()
    until_sync(lambda: threading.active_count() <= before)


def test_threads_loop(example):
    module = example("threads")
    with TestClient(module.app).websocket_connect("/live/job") as ann:
        thread = threading.Thread(target=module.run_a_job)
        thread.start()
        assert [ann.receive_json()["percent"] for _ in range(3)] == [0, 50, 100]
        thread.join()


# With a broker


async def test_many_workers(example, serve, monkeypatch):
    monkeypatch.delenv("STARCAST_URL", raising=False)
    module = example("many_workers")
    server = await serve(module.app)
    assert await module.hub.healthy()
    async with server.connect("/ws/a") as ann, server.connect("/ws/a") as bob:
        await ann.send("hello")
        assert await bob.recv() == "hello"


async def test_redis_client(example, monkeypatch):
    with RedisServer() as server:
        monkeypatch.setenv("REDIS_URL", server.url)
        module = example("redis_client")
        async with module.redis, module.hub as hub, hub.subscribe("room") as subscriber:
            await module.redis.publish("starcast:default:room", "hello")
            assert (await anext(subscriber)).message == "hello"
        assert server.clients() == []


# Users


async def heard(client, expected):
    async with asyncio.timeout(DEADLINE):
        assert json.loads(await client.recv()) == expected


async def test_users(example, serve):
    module = example("users")
    hub = module.hub
    server = await serve(module.app)
    async with (
        server.connect("/ws?user=ann") as phone,
        server.connect("/ws?user=ann") as laptop,
        server.connect("/ws?user=ben") as ben,
    ):
        assert (module.is_online("ann"), module.is_online("eve")) == (True, False)
        assert sorted(module.online_users()) == ["ann", "ben"]
        assert module.get_room_members("lobby") == {"ann", "ben"}

        assert await module.send_to_user("eve", "nobody") is False
        assert await module.send_to_user("ann", {"mail": 1}) is True
        await heard(phone, {"mail": 1})
        await heard(laptop, {"mail": 1})
        (tab, _) = hub.clients("user:ann")
        await module.send_to_other_tabs(tab, {"read": 1})
        await heard(laptop, {"read": 1})

        await ben.send('{"join": "tea"}')
        await ben.send('{"join": "vault"}')
        await phone.send('{"move": ["lobby", "tea"]}')
        await until(lambda: module.get_room_members("tea") == {"ann", "ben"})
        assert module.rooms_of(tab) == ["tea"]
        await phone.send('{"say": "not a member", "room": "bar"}')
        await phone.send('{"say": "hello", "room": "tea"}')
        await heard(phone, {"from": "ann", "text": "hello"})
        await heard(ben, {"from": "ann", "text": "hello"})
        await module.kick("ben", "tea")
        assert module.get_room_members("tea") == {"ann"}
        assert module.is_online("ben")
        await phone.send('{"leave": "tea"}')
        await until(lambda: module.rooms_of(tab) == [])

        await module.disconnect_user("ann", keep=tab)
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await laptop.recv()
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "signed out")
        assert hub.clients("user:ann") == [tab]
        await module.disconnect_user("ann")
        with pytest.raises(websockets.ConnectionClosed):
            await phone.recv()
        assert module.online_users() == ["ben"]


async def test_users_workers(example, serve, redis_url):
    workers = [await serve(example("users_workers").app) for _ in range(2)]
    one, two = workers
    async with (
        one.connect("/ws/ann") as phone,
        two.connect("/ws/ann") as laptop,
        two.connect("/ws/ben") as ben,
        httpx.AsyncClient() as client,
    ):
        answer = await client.post(f"http://{one.host}:{one.port}/sign-out/ann")
        assert answer.status_code == 200
        for tab in (phone, laptop):
            with pytest.raises(websockets.ConnectionClosed) as closed:
                async with asyncio.timeout(DEADLINE):
                    await tab.recv()
            assert closed.value.rcvd.code == 4001
        await ben.ping()
        for worker in workers:
            await worker.stop()


async def test_two_hubs(example, serve, monkeypatch):
    with RedisServer() as redis:
        monkeypatch.setenv("STARCAST_URL", redis.url)
        monkeypatch.setenv("STAGE", "test")
        module = example("two_hubs")
        server = await serve(module.app)
        cookie = {"additional_headers": {"Cookie": "session=a session of the staff"}}
        async with (
            server.connect("/live/news") as stranger,
            server.connect("/staff/news", **cookie) as insider,
        ):
            assert redis.command("PUBLISH", "starcast:shop-staff-test:news", "secret") == 1
            assert redis.command("PUBLISH", "starcast:shop-test:news", "for all") == 1
            assert await insider.recv() == "secret"
            assert await stranger.recv() == "for all"
        with pytest.raises(websockets.InvalidStatus):
            await server.connect("/staff/news")
        await server.stop()


async def test_expiring_passwords(example, monkeypatch):
    monkeypatch.setenv("TOKEN", PASSWORD)
    server = PostgresServer()
    server.start()
    try:
        url = f"postgresql://{USER}@127.0.0.1:{server.port}/postgres"
        monkeypatch.setenv("DATABASE_URL", url)
        async with example("expiring_passwords").hub as hub:
            assert await hub.healthy()
    finally:
        server.close()


async def test_gaps(example, capsys):
    broker = Broker()
    module = example("gaps")
    module.hub = Broadcast(backend=Bus(broker), on_gap=module.on_gap)
    seen = []

    class Prices:
        async def load_again(self):
            seen.append("all of them")

        def update(self, item):
            seen.append(item)

    task = asyncio.create_task(module.keep_up(Prices()))
    await until(lambda: module.hub.stats().subscribers)
    await module.hub.publish("prices", {"tea": 2})
    await until(lambda: seen)
    broker.kill()
    broker.up = True
    await until(lambda: len(seen) == 2)
    await module.hub.publish("prices", {"tea": 3})
    await until(lambda: len(seen) == 3)
    assert seen == [{"tea": 2}, "all of them", {"tea": 3}]
    await module.hub.disconnect()
    await task
    printed = capsys.readouterr().out
    assert re.fullmatch(r"messages of the last \d+\.\d s may be missing\n", printed)


@pytest.fixture
def redis_url(monkeypatch):
    """A server whose URL the examples read from the environment."""
    with RedisServer() as server:
        monkeypatch.setenv("STARCAST_URL", server.url)
        yield server.url


async def test_from_a_job(example, redis_url):
    async with Broadcast(redis_url) as hub, hub.subscribe("room") as subscriber:
        await asyncio.to_thread(example("from_a_job").main)
        script = await asyncio.create_subprocess_exec(
            *[sys.executable, str(EXAMPLES / "from_a_job.py")],
            env={**os.environ, "PYTHONPATH": str(EXAMPLES.parents[1])},
        )
        assert await script.wait() == 0
        for _ in range(2):
            assert (await anext(subscriber)).json() == {"type": "report", "ready": True}


async def test_celery_task(example, monkeypatch, redis_url):
    """The function, without Celery, which may not be installed."""
    options = {}

    def shared_task(**given):
        options.update(given)
        return lambda function: function

    celery = types.SimpleNamespace(shared_task=shared_task)
    monkeypatch.setitem(sys.modules, "celery", celery)
    module = example("celery_task")
    async with Broadcast(redis_url) as hub, hub.subscribe("report:7") as subscriber:
        with module.publisher:
            await asyncio.to_thread(module.render, 7)
        assert (await anext(subscriber)).json() == {"ready": True}
    assert options["autoretry_for"] == (BackendUnavailable,)


async def test_django_view(example, monkeypatch, redis_url):
    """The view, without Django, which may not be installed."""
    committed = []
    transaction = types.SimpleNamespace(
        atomic=lambda view: view,
        on_commit=lambda function, robust: committed.append((function, robust)),
    )
    monkeypatch.setitem(sys.modules, "django", types.ModuleType("django"))
    monkeypatch.setitem(sys.modules, "django.db", types.SimpleNamespace(transaction=transaction))
    monkeypatch.setitem(sys.modules, "django.http", types.SimpleNamespace(HttpResponse=dict))
    module = example("django_view")
    async with Broadcast(redis_url) as hub, hub.subscribe("order:7") as subscriber:
        with module.publisher:
            assert module.pay(None, 7) == {"status": 204}
            ((tell, robust),) = committed
            assert robust
            await asyncio.to_thread(tell)
        assert (await anext(subscriber)).json() == {"state": "paid"}


async def test_def_route(example, monkeypatch, serve):
    with RedisServer() as server:
        monkeypatch.setenv("STARCAST_URL", server.url)
        module = example("def_route")
        served = await serve(module.app)
        url = f"http://{served.host}:{served.port}"
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            async with (
                served.connect("/live/orders") as orders,
                served.connect("/live/notes") as notes,
            ):
                assert (await http.post("/orders/7")).json() == {"published": True}
                assert json.loads(await orders.recv()) == {"order": 7}
                assert (await http.post("/notes", params={"text": "tea"})).status_code == 200
                assert await notes.recv() == '"tea"'
            server.kill()
            answer = await http.post("/orders/8", timeout=20)
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            server.start()
            await until(lambda: module.hub.stats().backend.state == "connected")
            assert (await http.post("/orders/9")).status_code == 200


def test_healthz(example):
    with TestClient(example("healthz").app) as client:
        answer = client.get("/healthz")
        assert (answer.status_code, answer.json()) == (200, {"healthy": True})


@pytest.mark.parametrize("check", starcast.testing.CHECKS, ids=lambda check: check.__name__)
async def test_check_backend(example, check):
    module = example("own_backend")
    assert "test_my_backend" in vars(example("check_backend"))
    await check(module.InProcess)


# How-tos


SECRETS = {"SESSION_SECRET": "s" * 32, "TOKEN_SECRET": "t" * 32}


@pytest.fixture
def doors(example, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return example("cookies_and_tokens")


def token(seconds=60.0, key=SECRETS["TOKEN_SECRET"], **claims):
    return jwt.encode({"sub": "ann", "exp": time.time() + seconds, **claims}, key, "HS256")


def test_cookies(doors):
    with TestClient(doors.app) as client:
        assert refused(client, "/me") == 1008
        assert refused(client, "/me", headers={"cookie": "session=forged"}) == 1008
        client.post("/login", params={"name": "ann"})
        with client.websocket_connect("/me") as ann:
            doors.hub.publish_nowait("user:ann", "hello")
            assert ann.receive_text() == "hello"
        headers = {"origin": "https://elsewhere.example"}
        assert refused(client, "/me", headers=headers) == 1008  # with the cookie


@pytest.mark.parametrize("where", ["header", "subprotocols"])
def test_tokens(where, doors):
    def given(text):
        if where == "header":
            return {"headers": {"authorization": f"Bearer {text}"}}
        return {"subprotocols": ["bearer", text]}

    with TestClient(doors.app) as client:
        wrong = ["", "a.b.c", token(-1), token(key="x" * 32)]
        wrong += [jwt.encode({"sub": "ann"}, SECRETS["TOKEN_SECRET"], "HS256")]  # never expires
        wrong += [jwt.encode({"sub": "ann", "exp": time.time() + 60}, None, "none")]
        for text in wrong:
            assert refused(client, "/api/me", **given(text)) == 1008
        assert refused(client, "/api/me") == 1008
        with client.websocket_connect("/api/me", **given(token())) as ann:
            doors.hub.publish_nowait("user:ann", "hello")
            assert ann.receive_text() == "hello"
            assert ann.accepted_subprotocol == (None if where == "header" else "bearer")


async def test_tokens_that_expire(doors, serve):
    server = await serve(doors.app)
    doors.app.dependency_overrides[doors.claims_of_token] = lambda: {
        "sub": "ann",
        "exp": time.time() + 0.3,  # PyJWT itself takes whole seconds
    }
    async with server.connect("/api/me") as ann:
        with pytest.raises(websockets.ConnectionClosed) as info:
            await ann.recv()
    assert (info.value.rcvd.code, info.value.rcvd.reason) == (3000, "the token has expired")
    assert len(doors.hub) == 0


def test_pydantic_messages(example):
    with (
        TestClient(example("pydantic_messages").app) as client,
        client.websocket_connect("/ws/tea") as ann,
        client.websocket_connect("/ws/tea") as ben,
    ):
        ann.send_json({"type": "rename", "name": "Ann"})
        assert ben.receive_json() == {"type": "renamed", "old": "somebody", "new": "Ann"}
        ann.send_json({"type": "say", "text": "hello"})
        said = ben.receive_json()
        assert datetime.fromisoformat(said.pop("at")).tzinfo is not None
        assert said == {"type": "said", "name": "Ann", "text": "hello"}
        ann.receive_json(), ann.receive_json()
        ann.send_json({"type": "say", "text": ""})
        assert closed(ann) == 1007
        ben.send_json({"type": "sing"})
        assert closed(ben) == 1007


def test_pydantic_messages_with_an_answer(example):
    with (
        TestClient(example("pydantic_messages").app) as client,
        client.websocket_connect("/patient/tea") as ann,
        client.websocket_connect("/patient/tea") as ben,
    ):
        ann.send_json({"type": "say", "text": "x" * 1001})
        error = ann.receive_json()
        assert error["type"] == "error"
        assert error["problems"][0]["loc"] == ["say", "text"]
        assert "x" * 1001 not in json.dumps(error)
        ann.send_text("no JSON")
        assert ann.receive_json()["problems"][0]["type"] == "json_invalid"
        ann.send_json({"type": "say", "text": "hello"})
        assert ann.receive_json()["text"] == ben.receive_json()["text"] == "hello"


async def change_order(server, number, state):
    url = f"http://{server.host}:{server.port}/orders/{number}"
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.post(url, params={"state": state})).status_code == 200


async def test_sse(example, serve):
    module = example("sse")
    server = await serve(module.app)

    def orders(source):
        return [json.loads(data)["state"] for name, data, _ in source.events if name == "order"]

    async with EventSource(server, "/orders/7/events") as source:
        assert source.response.headers["content-type"].startswith("text/event-stream")
        assert source.response.headers["x-accel-buffering"] == "no"
        assert (source.retry, source.events[0][0]) == (2000, "start")
        assert source.id
        await change_order(server, 8, "paid")
        await change_order(server, 7, "paid")
        await until(lambda: orders(source) == ["paid"])
    await until(lambda: module.hub.stats().subscribers == 0)
    for number in range(101):
        await module.hub.publish("order:7", {"state": f"{number}"})
    before, after = source.id, str(source.id).replace("-1", "-2")
    async with EventSource(server, "/orders/7/events", Last_Event_ID=after) as again:
        await until(lambda: len(orders(again)) == 100)
        assert orders(again) == [f"{number}" for number in range(1, 101)]
    async with EventSource(server, "/orders/7/events", Last_Event_ID=before) as again:
        await until(lambda: again.events)
        assert again.events[0][0] == "reset"
        server.server.should_exit = True
        await again.over()
        assert again.whole
    await until(lambda: module.hub.stats().subscribers == 0)


async def test_stream(example, serve):
    module = example("stream")
    server = await serve(module.app)
    async with EventSource(server, "/orders/7/events") as source:
        await change_order(server, 8, "paid")
        await change_order(server, 7, "paid")
        assert await source.got(1) == ['{"number":7,"state":"paid"}']
    await change_order(server, 7, "sent")
    async with EventSource(server, "/orders/7/events", Last_Event_ID=source.id) as again:
        assert await again.got(1) == ['{"number":7,"state":"sent"}']
    async with EventSource(server, "/my/events") as stranger:
        assert stranger.status == 401
    async with EventSource(server, "/my/events", Authorization="Bearer t-ann") as mine:
        await module.hub.publish("user:ann", "a letter")
        id = await module.hub.publish("news", "It rains.")
        await mine.got(2)
        assert json.loads(mine.data[0])["channel"] == "user:ann"
        assert json.loads(mine.data[1]) == {"id": id, "channel": "news", "data": "It rains."}


async def test_stream_endpoint(example, serve, capsys):
    module = example("stream_endpoint")
    server = await serve(module.app)
    for path, cookie in (("/orders/7/events", "session=s-ben"), ("/orders/8/events", "")):
        async with EventSource(server, path, Cookie=cookie) as stranger:
            assert stranger.status == 401
    async with EventSource(server, "/orders/7/events", Cookie="session=s-ann") as ann:
        assert 2000 <= ann.retry <= 3000
        await module.hub.publish("order:7", "paid")
        assert await ann.got(1) == ["paid"]
    await until(lambda: module.hub.channels == {})
    said: list[str] = []
    await until(lambda: said.append(capsys.readouterr().out) or any(said))  # a hook is to say it
    assert "".join(said) == "nobody looks at order 7\n"
    async with EventSource(server, "/live/?channel=news&channel=weather") as both:
        await module.hub.publish("weather", "It rains.")
        await both.got(1)
        assert json.loads(both.data[0]) == {"id": None, "channel": "weather", "data": "It rains."}
    async with EventSource(server, "/live/news?channel=order:7") as stranger:
        assert stranger.status == 403


async def test_online(example, serve, redis_url):
    """Two workers, of which one falls silent, as one that was killed."""
    one, two = example("online"), example("online")
    assert one.me != two.me
    for worker in (one, two):
        worker.EVERY, worker.PAUSE, worker.FORGOTTEN = 0.05, 0.01, 60
    first, second = await serve(one.app), await serve(two.app)
    async with httpx.AsyncClient(trust_env=False) as http:

        async def online():
            both = [f"http://{it.host}:{it.port}/online" for it in (first, second)]
            return [(await http.get(url)).json() for url in both]

        async with first.connect("/ws/ann"), second.connect("/ws/ben"):
            await until(lambda: one.online() == two.online() == {"ann", "ben"})
            assert await online() == [["ann", "ben"]] * 2
            async with second.connect("/ws/ann"):
                await until(lambda: two.mine["ann"] == 1)
            await until(lambda: not two.mine["ann"])
            assert one.online() == two.online() == {"ann", "ben"}
            two.EVERY, one.FORGOTTEN = 3600, 0.2
            await until(lambda: one.online() == {"ann"})
        await until(lambda: one.online() == set())


def test_one_client(example):
    with (
        TestClient(example("one_client").app) as client,
        client.websocket_connect("/ws/tea") as ann,
    ):
        assert ann.receive_json() == {"welcome": "tea"}
        with client.websocket_connect("/ws/tea") as ben:
            assert ben.receive_json() == {"welcome": "tea"}
            ben.send_text("/count")
            assert ben.receive_json() == {"here": 2}
            ben.send_text("hello")
            assert ann.receive_json() == {"text": "hello"}
        with client.websocket_connect("/orders/7") as page:
            assert page.receive_json() == {"number": 7, "state": "placed"}
            client.put("/orders/7/paid")
            assert page.receive_json() == {"number": 7, "state": "paid"}


def test_diagnose(example):
    module = example("diagnose")
    with TestClient(module.app) as client, client.websocket_connect("/ws/tea") as ann:
        ann.send_text("hello")
        assert ann.receive_text() == "hello"
        assert client.get("/debug").json() == {
            "process": os.getpid(),
            "hub": f"<Broadcast memory:// 'default' open, 1 client> at {id(module.hub):#x}",
            "channels": {"tea": 1},
            "published": 1,
        }


def test_logging_setup(tmp_path):
    """In a process of its own: a test has handlers already, so `basicConfig` does nothing."""
    name = "logging_setup"
    server = ServerProcess(
        ["uvicorn", f"{name}:app", "--port", "{port}"], tmp_path / "log", EXAMPLES
    )
    try:
        for _ in range(2):
            with pytest.raises(connect_sync.InvalidStatus):
                connect_sync.connect(
                    f"ws://127.0.0.1:{server.port}/live/a",
                    origin="https://elsewhere.example",
                    proxy=None,
                )
        server.stop()
        (line,) = [line for line in server.log.splitlines() if "elsewhere" in line]
        assert re.match(rf"[\d-]+ [\d:,]+ WARNING starcast \[{server.process.pid}\] refused", line)
        assert "Uvicorn running" in server.log
        page = (EXAMPLES.parent / "how-to" / "logging.md").read_text()
        assert line.partition("] ")[2].replace(f":{server.port}", ":8000") in page
    finally:
        server.kill()


async def test_the_lines_of_a_page_at_debug(caplog, monkeypatch):
    caplog.set_level("DEBUG", "starcast")
    monkeypatch.setattr(Peer, "frames", True)  # as on uvicorn
    hub = Broadcast()
    await hub.connect(Peer().websocket, "tea")
    for channel in ("tea", "milk"):
        await hub.publish(channel, "hello")
    page = (EXAMPLES.parent / "how-to" / "logging.md").read_text()
    lines = [
        f"DEBUG starcast {it.getMessage()}" for it in caplog.records if it.levelname == "DEBUG"
    ]
    assert "```text\n" + "\n".join(lines) + "\n```" in page
    await hub.disconnect()


def test_type_checking(example):
    """`mypy`, which CI runs, has it among its files."""
    with TestClient(example("type_checking").app) as client:
        assert refused(client, "/me") == 1008
        with client.websocket_connect("/me?token=sesame"):
            pass
        with client.websocket_connect("/ws/tea") as ann:
            ann.send_json(7)
            assert ann.receive_json() == {"text": "7"}
    configuration = tomllib.loads((EXAMPLES.parents[1] / "pyproject.toml").read_text())
    assert "docs/examples/type_checking.py" in configuration["tool"]["mypy"]["files"]


async def test_type_checking_subscriber(example):
    module = example("type_checking")
    waiting = asyncio.create_task(module.first("tea"))
    await until(lambda: module.hub.stats().subscribers)
    await module.hub.publish("tea", "hello")
    assert (await waiting).message == "hello"


ASKS = """
async def app(scope, receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        text = str("starcast" in scope["extensions"])
        await send({"type": "websocket.send", "text": text})
        await receive()
        await receive()
"""


def test_docker_and_kubernetes(example):
    """What can be checked without either of them."""
    lines = (EXAMPLES / "Dockerfile").read_text().splitlines()
    command = json.loads(lines[-1].removeprefix("CMD "))
    assert command[:2] == ["uvicorn", "main:app"]
    assert uvicorn.main.make_context("uvicorn", command[1:]).params["host"] == "0.0.0.0"
    words = ["FROM", "WORKDIR", "COPY", "RUN", "COPY", "USER", "EXPOSE", "CMD"]
    assert [line.partition(" ")[0] for line in lines] == words

    spec = yaml.safe_load((EXAMPLES / "deployment.yaml").read_text())["spec"]
    pod = spec["template"]["spec"]
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    (container,) = pod["containers"]
    ready, alive = container["readinessProbe"], container["livenessProbe"]
    assert ready["timeoutSeconds"] > 2  # which is how long `healthy` may take
    with TestClient(example("healthz").app) as client:
        assert client.get(ready["httpGet"]["path"]).status_code == 200
    assert "httpGet" not in alive
    before_stop = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert before_stop + 15 < pod["terminationGracePeriodSeconds"]


def knows_both(nodes):
    return str(nodes).count(" connected") == 2


async def test_a_cluster_of_redis_passes_everything_on():
    """As the page on managed brokers says: the URL of any node will do."""
    slots = [(0, 8191), (8192, 16383)]
    with (
        RedisServer("--cluster-enabled", "yes") as one,
        RedisServer("--cluster-enabled", "yes") as two,
    ):
        for server, of in zip((one, two), slots, strict=True):
            server.command("CLUSTER", "ADDSLOTSRANGE", *of)
        one.command("CLUSTER", "MEET", "127.0.0.1", two.port)
        for server in (one, two):
            await until(
                lambda it=server: str(it.command("CLUSTER", "NODES")).count(" connected") > 1
            )
        first, second = Broadcast(one.url, name="shop"), Broadcast(two.url, name="shop")
        async with first, second, second.subscribe("room") as subscriber:
            await first.publish("room", "hello")
            async with asyncio.timeout(DEADLINE):
                assert (await anext(subscriber)).message == "hello"


# History


def test_live_values(example):
    module = example("live_values")
    with TestClient(module.app) as client:
        with client.websocket_connect("/live/price:AMS") as early:
            assert client.get("/prices/AMS").status_code == 404
            for price in (1.5, 2.5):
                assert client.put("/prices/AMS", params={"price": price}).status_code == 200
                assert early.receive_json() == {"symbol": "AMS", "price": price}
        with client.websocket_connect("/live/price:AMS") as late:
            assert late.receive_json() == {"symbol": "AMS", "price": 2.5}
        assert client.get("/prices/AMS").json() == {"symbol": "AMS", "price": 2.5}
        assert refused(client, "/live/price:XXX") == 1008
        for method in (client.get, client.put):
            assert method("/prices/XXX", params={"price": 1}).status_code == 404


@pytest.fixture
async def orders(example):
    """The hub of resume.py, its server, and the ids of 30 orders."""
    module = example("resume")
    ids = [await module.hub.publish("orders", {"number": number}) for number in range(30)]
    return module, ids


def numbers(contents):
    return [json.loads(content["data"])["number"] for content in contents]


async def test_resume_several_channels(orders, serve):
    module, ids = orders
    server = await serve(module.app)
    alerts = [await module.hub.publish("alerts", {"number": number}) for number in range(7)]
    path = "/ws/desk?last_event_id={}&last_alert_id={}"
    async with server.connect(path.format(ids[-2], alerts[0])) as client:
        got = [json.loads(await client.recv()) for _ in range(9)]
        assert got[0] == {"channel": "orders", "id": ids[-2], "past": 1, "recovered": True}
        assert got[2] == {"channel": "alerts", "id": alerts[0], "past": 6, "recovered": True}
        assert numbers([got[1], *got[3:]]) == [29, 1, 2, 3, 4, 5, 6]
    async with server.connect("/ws/desk") as client:
        got = [json.loads(await client.recv()) for _ in range(27)]
        assert numbers(got[1:21]) == list(range(10, 30))
        assert numbers(got[22:]) == [2, 3, 4, 5, 6]


async def test_resume_in_the_handler(orders, serve):
    module, ids = orders
    server = await serve(module.app)
    async with server.connect(f"/ws/orders?since={ids[27]}") as client:
        got = [json.loads(await client.recv()) for _ in range(3)]
        assert numbers(got[1:]) == [28, 29]
        await module.hub.publish("orders", {"number": 30})
        assert numbers([json.loads(await client.recv())]) == [30]
    async with server.connect("/ws/orders?since=old-1") as client:
        got = [json.loads(await client.recv()) for _ in range(22)]
        assert got[0]["recovered"] is False
        assert numbers(got[1:21]) == list(range(11, 31))
        assert json.loads(got[21]["data"]) == {"reload": "/orders"}
        await client.send("hello")
        with pytest.raises(websockets.ConnectionClosedError):
            await client.recv()
        assert client.close_code == 1008


async def test_resume_older_messages(orders, serve):
    module, ids = orders
    server = await serve(module.app)
    got, before = [], ids[25]
    base = f"http://{server.host}:{server.port}"
    async with httpx.AsyncClient(trust_env=False, base_url=base) as http:
        while page := (await http.get("/orders/events", params={"before": before})).json():
            got += page
            before = page[-1]["id"]
        assert numbers(got) == list(range(24, -1, -1))
        assert (await http.get("/orders/events", params={"before": "old-1"})).json() == []


async def test_resume_a_program(orders):
    module, _ = orders
    kept: list[int] = []

    class Accounts:
        last_id: str | None = None
        loaded = 0

        async def load_again(self):
            self.loaded += 1

        async def add(self, order):
            kept.append(order["number"])

    accounts = Accounts()

    async def keep_accounts_until(number, *, meanwhile):
        keeping = asyncio.create_task(module.keep_accounts(accounts))
        await until(lambda: module.hub.stats().subscribers)
        for new in meanwhile:
            await module.hub.publish("orders", {"number": new})
        await until(lambda: kept[-1:] == [number])
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping

    async with module.hub:
        await keep_accounts_until(30, meanwhile=[30])
        assert accounts.loaded == 1
        for new in range(31, 35):
            await module.hub.publish("orders", {"number": new})
        await keep_accounts_until(34, meanwhile=[])
        accounts.last_id = "old-1"
        await keep_accounts_until(35, meanwhile=[35])
    assert accounts.loaded == 2
    assert kept == list(range(30, 36))


async def test_resume_a_program_with_a_gap(example, monkeypatch):
    module = example("resume")
    broker = KeepingBroker()
    hub = Broadcast(backend=KeepingBus(broker), history=module.history, tuning=TUNING)
    monkeypatch.setattr(module, "hub", hub)
    loaded = []

    class Accounts:
        last_id = None

        async def load_again(self):
            loaded.append(self.last_id)

    async with hub:
        keeping = asyncio.create_task(module.keep_accounts(Accounts()))
        await until(lambda: loaded)
        broker.kill()
        broker.forget()
        broker.up = True
        await until(lambda: len(loaded) == 2)
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping


# Reference


def test_own_backend(example):
    module = example("own_backend")
    with TestClient(module.app).websocket_connect("/ws") as ann:
        ann.send_text("hello")
        assert ann.receive_text() == "hello"
        assert module.connections


async def test_await_order(example, serve):
    module = example("await_order")
    server = await serve(module.app)
    async with server.connect("/ws") as client:
        assert [message async for message in client] == [
            "first, from the hub",
            "second, from the handler",
            "third, from the hub again",
        ]
        assert client.close_code == 1000
    assert len(module.hub) == 0
