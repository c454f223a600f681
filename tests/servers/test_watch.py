"""Clients that leave, and handlers that end, without anybody telling the hub."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import uvloop
import websockets
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.exceptions import ConnectionClosed

from starcast import Broadcast, ClientGone, ConnectionManager, Tuning
from starcast.servers import served, watch
from support import BUSY, OtherLoop, Peer, Served, by_another, free_port, until, until_sync

pytestmark = pytest.mark.anyio

PROTOCOL = "starcast.uvicorn:BroadcastProtocol"
SOON = BUSY  # seconds in which a client that has left is forgotten; a ping would take 40


@pytest.fixture(params=["auto", "wsproto", PROTOCOL])
def ws(request: pytest.FixtureRequest) -> str:
    return request.param


def reset(client) -> None:
    """Leave without a word: the server gets a RST."""
    sock = client.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.transport.abort()


async def leave(client, how: str) -> None:
    if how == "close":
        await client.close()
    else:
        reset(client)


def logging_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Take uvicorn's tracebacks for handlers that were made to raise out of the log."""
    assert all(record.name == "uvicorn.error" for record in caplog.records)
    caplog.clear()


def wrapped(app):
    """Middleware that wraps `send` and copies the scope, as tracing and error reporters do."""

    async def middleware(scope, receive, send):
        async def wrapped_send(message):
            await send(message)

        await app(dict(scope), receive, wrapped_send)

    return middleware


def app_of(endpoint, middleware=None) -> object:
    app = Starlette(routes=[WebSocketRoute("/ws/{channel}", endpoint)])
    return app if middleware is None else middleware(app)


# A handler that only pushes


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("middleware", [None, wrapped], ids=["plain", "middleware"])
@pytest.mark.parametrize("personal", ["hub", "manager"])
async def test_a_push_loop_ends_with_its_client(serve, ws, how, middleware, personal):
    manager = ConnectionManager()
    hub = manager.hub
    ended: list[tuple[str, WebSocketDisconnect]] = []

    async def endpoint(websocket: WebSocket):
        await manager.connect(websocket)
        try:
            while True:
                if personal == "hub":
                    await hub.send("tick", to=websocket)
                else:
                    await manager.send_personal_message("tick", websocket)
                await asyncio.sleep(0.01)
        except WebSocketDisconnect as exc:
            ended.append((websocket.path_params["channel"], exc))
        finally:
            manager.disconnect(websocket)

    server = await serve(app_of(endpoint, middleware), ws=ws)
    async with server.connect("/ws/stays") as stays:
        leaves = await server.connect("/ws/leaves")
        assert await leaves.recv() == await stays.recv() == "tick"
        await leave(leaves, how)
        await until(lambda: ended, SOON)
        assert [(name, type(exc)) for name, exc in ended] == [("leaves", ClientGone)]
        assert len(hub) == 1
        assert await stays.recv() == "tick"
    await until(lambda: len(ended) == 2, SOON)
    assert len(hub) == 0


@pytest.mark.parametrize("ws", ["auto", PROTOCOL])
async def test_sigterm_ends_push_loops(ws, tmp_path):
    """The process is over within three seconds, whatever clients do."""
    port = free_port()
    here = Path(__file__).parents[1]
    log = tmp_path / "log"
    command = ["uvicorn", "push_app:app", "--port", str(port), "--ws", ws]
    with log.open("wb") as output:
        process = await asyncio.to_thread(
            subprocess.Popen,
            [sys.executable, "-m", *command],
            stdout=output,
            stderr=output,
            cwd=here,
            env={**os.environ, "PYTHONPATH": str(here.parent)},
        )
    try:
        await asyncio.to_thread(until_sync, lambda: b"running on" in log.read_bytes())
        url = f"ws://127.0.0.1:{port}/"
        clients = [
            await websockets.connect(url + how, proxy=None) for how in ("hub", "manager") * 3
        ]
        for client in clients:
            assert await client.recv() == "tick"
        process.terminate()
        await asyncio.to_thread(process.wait, BUSY)
    finally:
        process.kill()
        process.wait()
    await asyncio.gather(*(client.close() for client in clients))
    assert "Traceback" not in log.read_text(), log.read_text()


async def test_a_third_party_is_told_that_a_client_has_left_and_gets_no_error(serve, ws):
    hub = Broadcast()
    websockets: list[WebSocket] = []

    async def endpoint(websocket: WebSocket):
        await hub.connect(websocket)
        websockets.append(websocket)
        await asyncio.Event().wait()

    server = await serve(app_of(endpoint), ws=ws, timeout_graceful_shutdown=1)
    client = await server.connect("/ws/x")
    await until(lambda: websockets)
    assert await hub.send("here", to=websockets[0]) is True
    assert await client.recv() == "here"
    await client.close()
    await until(lambda: len(hub) == 0, SOON)
    assert await hub.send("gone", to=websockets[0]) is False
    assert await ConnectionManager(hub).send_personal_message("gone", websockets[0]) is False


async def test_tasks_below_the_handler_serve_its_client_too(road):
    hub = Broadcast()
    peer, other = Peer(), Peer()
    await hub.connect(peer.websocket)

    async def connect_another():
        await hub.connect(other.websocket)
        await hub.close(other.websocket)
        with pytest.raises(ClientGone) as caught:
            await hub.send("x", to=other.websocket)
        assert caught.value.code == 1000

    await asyncio.create_task(connect_another())
    await hub.close(peer.websocket, 4000)
    with pytest.raises(ClientGone) as caught:
        await asyncio.create_task(hub.send("x", to=peer.websocket))
    assert caught.value.code == 4000
    assert await by_another(hub.send("x", to=peer.websocket)) is False
    assert await hub.send("x", to=other.websocket) is False  # it was connected by somebody else


async def test_a_handler_that_connected_with_a_deadline_serves_its_client(serve, ws):
    """`wait_for` of Python 3.11 connects in a task of its own, which ends at once."""
    hub = Broadcast()
    ended = []

    async def endpoint(websocket: WebSocket):
        await asyncio.create_task(hub.connect(websocket))
        await asyncio.sleep(0)
        assert len(hub) == 1
        try:
            while True:
                await hub.send("tick", to=websocket)
                await asyncio.sleep(0.01)
        except WebSocketDisconnect as exc:
            ended.append(exc)

    server = await serve(app_of(endpoint), ws=ws)
    client = await server.connect("/ws/x")
    for _ in range(3):
        assert await client.recv() == "tick"
    await client.close()
    await until(lambda: ended, SOON)


async def test_a_task_remembers_a_bounded_number_of_the_clients_that_it_serves():
    hub = Broadcast()
    await asyncio.create_task(_connect_many(hub), context=contextvars.Context())


async def _connect_many(hub: Broadcast) -> None:
    peers = [Peer() for _ in range(served.MAX_SERVED + 1)]
    for peer in peers:
        await hub.connect(peer.websocket)
        await hub.close(peer.websocket)
    assert await hub.send("x", to=peers[0].websocket) is False
    for peer in peers[1:]:
        with pytest.raises(ClientGone):
            await hub.send("x", to=peer.websocket)


# A handler that ends


async def dies(websocket: WebSocket) -> None:
    raise ValueError("what a handler may run into")


async def ends(websocket: WebSocket) -> None:
    pass


async def gets_bytes(websocket: WebSocket) -> None:
    await websocket.receive_text()  # a KeyError: the frame is binary


@pytest.mark.parametrize("middleware", [None, wrapped], ids=["plain", "middleware"])
@pytest.mark.parametrize("end", [dies, ends, gets_bytes])
async def test_a_client_is_forgotten_when_its_app_ends(serve, ws, end, middleware, caplog):
    hub = Broadcast()

    async def endpoint(websocket: WebSocket):
        await hub.connect(websocket, websocket.path_params["channel"])
        await end(websocket)

    server = await serve(app_of(endpoint, middleware), ws=ws)
    clients = [await server.connect(f"/ws/user-{number}") for number in range(50)]
    for client in clients:
        with contextlib.suppress(ConnectionClosed):  # the handler may have ended at once
            await client.send(b"binary")
    await until(lambda: hub.channels == {}, SOON)
    assert len(hub) == 0
    await asyncio.gather(*(client.close() for client in clients))
    logging_nothing(caplog)


async def test_a_client_is_forgotten_when_its_handler_is_told(serve, ws):
    hub = Broadcast()
    told = []

    async def endpoint(websocket: WebSocket):
        await hub.connect(websocket)
        with pytest.raises(WebSocketDisconnect) as caught:
            await websocket.receive_text()
        told.append((caught.value.code, len(hub)))
        with pytest.raises(WebSocketDisconnect):
            await websocket.send_text("to nobody")
        with pytest.raises(RuntimeError, match="disconnect message has been received"):
            await websocket.receive_text()

    server = await serve(app_of(endpoint), ws=ws)
    client = await server.connect("/ws/x")
    await until(lambda: len(hub) == 1)
    await client.close(4001)
    await until(lambda: told, SOON)
    assert told == [(4001, 0)]


async def test_a_handler_that_waits_for_something_else_leaves_no_ghost(serve, ws):
    hub = Broadcast()
    over = asyncio.Event()

    async def endpoint(websocket: WebSocket):
        await hub.connect(websocket)
        await over.wait()

    server = await serve(app_of(endpoint), ws=ws)
    says_goodbye, resets = await server.connect("/ws/x"), await server.connect("/ws/x")
    await until(lambda: len(hub) == 2)
    await says_goodbye.close()
    reset(resets)
    await until(lambda: len(hub) == 0, SOON)
    over.set()


MANY = 40  # messages, more than may wait for a handler


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_no_ghost_when_reading_is_paused(ws, how, loop):
    """Nothing more is read while the handler has not received what came before."""
    main = reading_is_paused(ws, how)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        runner.run(main)


async def reading_is_paused(ws: str, how: str) -> None:
    hub = Broadcast()
    over = asyncio.Event()
    read: list[str] = []

    async def endpoint(websocket: WebSocket):
        await hub.connect(websocket)
        await over.wait()
        async for text in websocket.iter_text():
            read.append(text)

    server = Served(app_of(endpoint), ws=ws)
    await server.start()
    lives, leaves = await server.connect("/ws/x"), await server.connect("/ws/x", close_timeout=0.1)
    await until(lambda: len(hub) == 2)
    for client in (lives, leaves):
        for number in range(MANY):
            await client.send(str(number))
    (one, two) = server.server.server_state.connections
    await until(lambda: not one.transport.is_reading() and not two.transport.is_reading())
    await leave(leaves, how)
    await until(lambda: len(hub) == 1, SOON)
    await asyncio.sleep(Tuning().watch_interval)
    assert len(hub) == 1
    over.set()
    await until(lambda: read.count(str(MANY - 1)) >= (1 if how == "reset" else 2))
    await lives.close()
    await server.stop()
    # What has arrived before somebody closed is still received; a reset may discard some of it.
    assert read.count("0") == 2


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_what_is_published_to_clients_that_reset_floods_no_log(ws, loop, caplog):
    """asyncio logs each write to a socket after a few that failed, until the loop has its turn."""
    main = published_to_clients_that_reset(ws)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        runner.run(main)
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


async def published_to_clients_that_reset(ws: str) -> None:
    hub = Broadcast()

    async def endpoint(websocket: WebSocket):
        await hub.serve(websocket, "x")

    server = Served(app_of(endpoint), ws=ws)
    await server.start()
    clients = [await server.connect("/ws/x", compression=None) for _ in range(5)]
    await until(lambda: len(hub) == 5)
    for client in clients:
        reset(client)
    await asyncio.sleep(0)  # the clients' sockets are closed, and the server was not told
    for _ in range(10):
        for number in range(20):
            hub.publish_nowait("x", str(number))
        await hub.publish("x", "the last of a burst")
    await until(lambda: len(hub) == 0, SOON)
    await server.stop()


async def test_a_handler_that_only_sends_is_told_although_its_sends_never_wait(serve, ws, caplog):
    """uvicorn's `send` neither raises nor suspends before the loop has had its turn."""
    hub = Broadcast()
    go = asyncio.Event()
    ended: list[str] = []

    async def endpoint(websocket: WebSocket):
        await hub.connect(websocket)
        await go.wait()
        try:
            for _ in range(1000):
                await websocket.send_text("tick")
            ended.append("after all")
        except WebSocketDisconnect:
            ended.append("disconnected")

    server = await serve(app_of(endpoint), ws=ws)
    client = await server.connect("/ws/x")
    await until(lambda: len(hub) == 1)
    reset(client)
    await asyncio.sleep(0)
    go.set()
    await until(lambda: ended, SOON)
    assert ended == ["disconnected"]
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


async def test_a_helper_task_that_connects_and_ends_loses_nobody(serve, ws):
    hub = Broadcast()

    async def register(websocket: WebSocket) -> None:
        await hub.connect(websocket)

    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(register(websocket))
        with pytest.raises(WebSocketDisconnect):
            await websocket.receive_text()

    server = await serve(app_of(endpoint), ws=ws)
    async with server.connect("/ws/x") as client:
        await until(lambda: len(hub) == 1)
        await asyncio.sleep(2 * Tuning().watch_interval)
        await hub.send("still here")
        assert await client.recv() == "still here"
    await until(lambda: len(hub) == 0, SOON)


async def test_a_handler_that_connects_somebody_else_loses_only_its_own_client(serve, ws):
    hub = Broadcast()
    guest = Peer()
    guest.scope["headers"] = [(b"x", b"y")]

    async def endpoint(websocket: WebSocket):
        await hub.connect(websocket)
        await hub.connect(guest.websocket)

    server = await serve(app_of(endpoint, wrapped), ws=ws)
    client = await server.connect("/ws/x")
    await until(lambda: hub.clients() == [guest.websocket], SOON)
    await asyncio.sleep(2 * Tuning().watch_interval)
    assert len(hub) == 1
    await hub.send("hello")
    assert guest.got == ["hello"]
    await client.close()
    await hub.disconnect()


@pytest.mark.parametrize("ws", ["auto", PROTOCOL])
async def test_a_handler_is_told_the_close_code_of_the_server(serve, ws):
    """Although the hub checks in every iteration whether the transport is closing."""
    hub = Broadcast(tuning=Tuning(watch_interval=1e-6))
    codes = []

    async def endpoint(websocket: WebSocket):
        codes.append(await hub.serve(websocket))

    server = await serve(app_of(endpoint), ws=ws)
    for _ in range(5):
        client = await server.connect("/ws/x")
        await until(lambda: len(hub) == 1)
        client.transport.write(b"\x83\x80\0\0\0\0")  # a frame of a kind that does not exist
        await until(lambda: len(hub) == 0)
        await client.wait_closed()
    await until(lambda: codes == [1002] * 5)


class EndedOverTLS:
    """A client whose transport asyncio has ended: its parts are gone."""

    is_stuck = False

    def __init__(self) -> None:
        self.transport = self
        self.lost: list[bool] = []

    def is_closing(self) -> bool:
        return True

    def get_protocol(self):
        raise AttributeError("'NoneType' object has no attribute '_app_protocol'")

    def lose(self, *, drop: bool = False) -> None:
        self.lost.append(drop)


async def test_a_tls_connection_that_has_ended_does_not_end_the_watch():
    clients = [EndedOverTLS(), EndedOverTLS()]
    watching = watch.Watch(asyncio.get_running_loop(), 0.001)
    for client in clients:
        watching.add(client)
        await until(lambda client=client: client.lost)
        watching.discard(client)
    assert not any(clients[0].lost + clients[1].lost)


async def test_more_clients_than_are_checked_in_one_turn(monkeypatch):
    monkeypatch.setattr(watch, "SLICE", 2)
    clients = [EndedOverTLS() for _ in range(5)]
    watching = watch.Watch(asyncio.get_running_loop(), 0.001)
    for client in clients:
        watching.add(client)
    await until(lambda: all(len(client.lost) > 1 for client in clients))


# Servers of which nothing is known


async def as_an_app(hub: Broadcast, peer: Peer, then=None):
    async def app(scope, receive, send):
        await (then or hub.connect)(WebSocket(scope, receive, send))

    await app(peer.scope, peer.receive, peer.send)


async def test_the_end_of_the_task_that_runs_the_app_is_the_end_of_its_client(road):
    hub = Broadcast()
    peer = Peer()
    await asyncio.create_task(as_an_app(hub, peer))
    await until(lambda: len(hub) == 0)
    assert hub.channels == {}


async def test_a_middleware_that_has_let_go_of_its_scope_is_no_error():
    hub = Broadcast()

    async def app(scope, receive, send):
        inner = scope
        del scope
        await as_an_app(hub, Peer(), lambda websocket: hub.connect(WebSocket(inner, receive, send)))

    peer = Peer()
    await asyncio.create_task(app(peer.scope, peer.receive, peer.send))
    await hub.publish("default", "hello")
    assert peer.got == ["hello"]


async def test_a_client_that_comes_and_goes_in_one_app_leaves_nothing_at_its_task(road):
    hub = Broadcast()
    task = None

    async def rejoin(websocket: WebSocket):
        nonlocal task
        task = asyncio.current_task()
        for _ in range(100):
            await hub.connect(websocket)
            await hub.disconnect(websocket)
        assert len(task._callbacks) < 5

    await asyncio.create_task(as_an_app(hub, Peer(), rejoin))


async def test_a_helper_task_of_an_app_of_an_unknown_server_loses_nobody(road):
    hub = Broadcast()
    peer = Peer()

    async def helped(websocket: WebSocket):
        await asyncio.create_task(hub.connect(websocket))
        await asyncio.sleep(0)
        assert len(hub) == 1

    await asyncio.create_task(as_an_app(hub, peer, helped))


# Another event loop


async def test_connect_on_another_loop_than_the_clients_is_refused(serve, ws, other: OtherLoop):
    hub = Broadcast()
    refused = []

    async def endpoint(websocket: WebSocket):
        with pytest.raises(RuntimeError, match="another event loop than the client's") as caught:
            await asyncio.to_thread(other.run, hub.connect(websocket))
        refused.append(caught.value)
        await hub.connect(websocket, "a")
        await asyncio.to_thread(other.run, hub.connect(websocket, "b"))  # its loop is known now
        await websocket.receive_text()
        await hub.disconnect(websocket)
        with pytest.raises(RuntimeError, match="another event loop than the client's"):
            await asyncio.to_thread(other.run, hub.connect(websocket))
        await websocket.send_text("still here")

    server = await serve(app_of(endpoint), ws=ws)
    async with server.connect("/ws/x") as client:
        await until(lambda: hub.channels == {"a": 1, "b": 1})
        assert refused
        await hub.publish("b", "hello")
        assert await client.recv() == "hello"
        await client.send("the end")
        assert await client.recv() == "still here"


# A handler that only forwards what it has subscribed to


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_subscriber_ends_with_the_client_of_its_handler(serve, ws, how):
    hub = Broadcast(tuning=Tuning(watch_interval=0.05))
    ended: list[str] = []

    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        async with hub.subscribe("x") as subscriber:
            async for event in subscriber:
                await websocket.send_text(event.message)
        ended.append(websocket.path_params["channel"])

    server = await serve(app_of(endpoint, wrapped), ws=ws)
    async with server.connect("/ws/stays") as stays, hub.subscribe("x") as elsewhere:
        leaves = await server.connect("/ws/leaves")
        await until(lambda: hub.stats().subscribers == 3)
        await leaves.send("nobody reads this,")
        await leaves.send("nor this")
        await leave(leaves, how)
        await until(lambda: ended, SOON)
        assert ended == ["leaves"]
        assert hub.stats().subscribers == 2
        await hub.publish("x", "still here")
        assert await stays.recv() == "still here"
        assert (await anext(elsewhere)).message == "still here"
    await until(lambda: len(ended) == 2, SOON)
    assert hub.stats().subscribers == 0


async def test_a_subscriber_of_an_http_handler_waits_for_its_message(serve):
    hub = Broadcast()

    async def endpoint(request: Request) -> Response:
        async with hub.subscribe("x") as subscriber:
            event = await anext(subscriber)
        return PlainTextResponse(event.message)

    server = await serve(Starlette(routes=[Route("/", endpoint)]))
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    await until(lambda: hub.stats().subscribers == 1)
    await hub.publish("x", "hello")
    assert (await reader.read()).endswith(b"\r\n\r\nhello")
    writer.close()
