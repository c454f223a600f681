"""What becomes of an error of `publish` that nobody catches, in every kind of place."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import pickle
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Annotated

import anyio
import anyio.lowlevel
import httpx
import pytest
from anyio import from_thread
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI
from fastapi.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.exceptions import HTTPException, WebSocketException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from backends.nats_server import NatsServer
from backends.postgres_server import PostgresServer
from backends.redis_server import RedisServer
from starcast import (
    BackendUnavailable,
    Broadcast,
    ClientGone,
    InvalidChannel,
    PayloadTooLarge,
    PublishQueueFull,
    StarcastError,
)
from support import Bus, until

pytestmark = pytest.mark.anyio

Publish = Callable[[], Awaitable[None]]


async def pass_on(request, call_next):
    return await call_next(request)


def starlette_app(publish: Publish) -> Starlette:
    async def route(request):
        await publish()

    class Class(HTTPEndpoint):
        async def post(self, request):
            await publish()

    async def background(request):
        return PlainTextResponse("ok", background=BackgroundTask(publish))

    def in_thread():
        from_thread.run(publish)

    async def thread_background(request):
        return PlainTextResponse("ok", background=BackgroundTask(in_thread))

    async def stream(request):
        async def numbers():
            yield "1"
            await publish()

        return StreamingResponse(numbers())

    async def websocket_route(websocket):
        if "late" in websocket.query_params:
            await websocket.accept()
        await publish()

    class WebSocketClass(WebSocketEndpoint):
        encoding = "text"

        async def on_connect(self, websocket):
            if websocket.query_params:
                await websocket.accept()
            if "late" not in websocket.query_params and "bye" not in websocket.query_params:
                await publish()

        async def on_receive(self, websocket, data):
            await publish()

        async def on_disconnect(self, websocket, close_code):
            if "bye" in websocket.query_params:
                await publish()

    return Starlette(
        routes=[
            Route("/route", route, methods=["POST"]),
            Route("/class", Class),
            Mount("/mounted", Starlette(routes=[Route("/route", route, methods=["POST"])])),
            Route("/background", background, methods=["POST"]),
            Route("/thread-background", thread_background, methods=["POST"]),
            Route("/stream", stream, methods=["POST"]),
            WebSocketRoute("/ws", websocket_route),
            WebSocketRoute("/ws-class", WebSocketClass),
            WebSocketRoute("/ws-copied", WebSocketClass, middleware=[Middleware(CopiesTheScope)]),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=pass_on)],
    )


class CopiesTheScope:
    """As some middleware does that adds something to it."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app(dict(scope), receive, send)


async def around():
    yield 1


def fastapi_app(publish: Publish) -> FastAPI:
    app = FastAPI()
    router = APIRouter(prefix="/router")

    async def dependency():
        await publish()

    async def early():
        await publish()
        yield

    async def late():
        yield 1
        await publish()

    @router.post("/route")
    async def route(depends: Annotated[int, Depends(around)]):
        await publish()

    @app.post("/dependency", dependencies=[Depends(dependency)])
    async def after_a_dependency(): ...

    @app.post("/early", dependencies=[Depends(early)])
    async def after_a_dependency_with_yield(): ...

    @app.post("/def")
    def plain():
        from_thread.run(publish)

    @app.post("/gather")
    async def gather():
        await asyncio.gather(publish(), publish(), return_exceptions=False)

    @app.post("/task")
    async def task():
        await asyncio.create_task(publish())

    @app.post("/late", dependencies=[Depends(late)])
    async def before_the_end_of_a_dependency():
        return "ok"

    @app.post("/background")
    async def background(tasks: BackgroundTasks):
        tasks.add_task(publish)
        return "ok"

    @app.post("/sse", response_class=EventSourceResponse)
    async def events() -> AsyncIterable[str]:
        yield "1"
        await anyio.lowlevel.checkpoint()
        await publish()

    @app.websocket("/ws")
    async def websocket(websocket: WebSocket, depends: Annotated[int, Depends(around)]):
        if "late" in websocket.query_params:
            await websocket.accept()
        await publish()

    @app.websocket("/ws-dependency", dependencies=[Depends(dependency)])
    async def guarded(websocket: WebSocket): ...

    @app.websocket("/ws-bye")
    async def says_goodbye(websocket: WebSocket):
        await websocket.accept()
        if "closed" in websocket.query_params:
            await websocket.close()
        try:
            await websocket.receive_text()
        finally:
            await publish()

    app.include_router(router)
    app.mount("/mounted", starlette_app(publish))
    return app


# In all of these nothing was answered yet.
ROUTES = ["/s/route", "/s/class", "/s/mounted/route", "/f/router/route", "/f/dependency"]
ROUTES += ["/f/early", "/f/def", "/f/gather", "/f/task", "/f/mounted/route"]

# In these it was.
ANSWERED = ["/s/background", "/s/thread-background", "/s/stream", "/f/background", "/f/late"]

ACCEPTED = ["/s/ws?late", "/s/ws-class?late", "/s/ws-copied?late", "/f/ws?late"]
ACCEPTED += ["/f/mounted/ws-class?late", "/s/ws-class?at_once"]
WAITING = ["/s/ws", "/s/ws-class", "/s/ws-copied", "/f/ws", "/f/ws-dependency", "/f/mounted/ws"]


def app_of(publish: Publish) -> Starlette:
    return Starlette(
        routes=[Mount("/s", starlette_app(publish)), Mount("/f", fastapi_app(publish))]
    )


def raising(error: type[StarcastError], message: str = "at 192.0.2.1") -> Publish:
    async def publish() -> None:
        raise error(message)

    return publish


@pytest.fixture
async def web(serve):
    """`post, server = await web(publish)` serves the app with all the places."""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:

        async def start(publish_or_app):
            callable_app = isinstance(publish_or_app, Starlette)
            server = await serve(publish_or_app if callable_app else app_of(publish_or_app))

            async def post(path: str) -> httpx.Response:
                return await client.post(f"http://{server.host}:{server.port}{path}")

            return post, server

        yield start


def errors(caplog) -> list[BaseException]:
    """What has a traceback in the log, with what it came on top of."""
    found = {}
    for record in caplog.records:
        error = record.exc_info and record.exc_info[1]
        while error:
            # Middleware of older Starlettes leaves the group of its tasks behind.
            if not isinstance(error, BaseExceptionGroup):
                found[id(error)] = error
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return list(found.values())


async def code_of(server, path: str) -> int:
    """The code that a client is closed with after it has said something."""
    async with server.connect(path) as client:
        try:
            await client.send("hello")
            await client.recv()
        except ConnectionClosed:
            pass
        return client.close_code


async def status_of(server, path: str) -> tuple[int, str | None]:
    """How a handshake is refused: the status, and Retry-After."""
    with pytest.raises(InvalidStatus) as caught:
        await server.connect(path)
    response = caught.value.response
    return response.status_code, response.headers.get("Retry-After")


ANSWERS = [
    (BackendUnavailable, 503, "2", 1013),
    (PublishQueueFull, 503, "2", 1013),
    (InvalidChannel, 422, None, 1008),
    (PayloadTooLarge, 413, None, 1009),
]


@pytest.mark.parametrize(("error", "status", "retry_after", "code"), ANSWERS)
async def test_a_route_answers_with_the_status(web, caplog, error, status, retry_after, code):
    post, _ = await web(raising(error))
    for path in ROUTES:
        response = await post(path)
        assert (response.status_code, path) == (status, path)
        assert response.headers.get("Retry-After") == retry_after
        assert error.detail in response.text
        assert "192.0.2.1" not in response.text  # the message is for the log
    assert errors(caplog) == []


@pytest.mark.parametrize("path", ANSWERED)
async def test_once_the_response_has_started_it_is_one_error_in_the_log(web, caplog, path):
    post, _ = await web(raising(BackendUnavailable))
    try:
        response = await post(path)
    except httpx.RemoteProtocolError:
        assert path == "/s/stream"  # which was cut off
    else:
        assert response.status_code == 200
    await until(lambda: errors(caplog))
    assert [repr(error) for error in errors(caplog)] == ["BackendUnavailable('at 192.0.2.1')"]
    caplog.clear()


async def test_a_stream_of_events_has_no_second_error_on_top(web, caplog):
    post, _ = await web(raising(BackendUnavailable))
    try:
        response = await post("/f/sse")
    except httpx.RemoteProtocolError:
        pass
    else:
        assert response.status_code in (200, 503)
    assert "RuntimeError" not in caplog.text
    caplog.clear()


@pytest.mark.parametrize(("error", "status", "retry_after", "code"), ANSWERS)
async def test_a_websocket_route_closes_with_the_code(
    web, caplog, error, status, retry_after, code
):
    _, server = await web(raising(error))
    for path in ACCEPTED:
        assert (await code_of(server, path), path) == (code, path)
    assert errors(caplog) == []


@pytest.mark.parametrize(("error", "status", "retry_after", "code"), ANSWERS)
async def test_before_accept_only_what_may_be_tried_again_is_503(
    web, caplog, error, status, retry_after, code
):
    _, server = await web(raising(error))
    for path in WAITING:
        expected = (503, "2") if status == 503 else (403, None)
        assert (await status_of(server, path), path) == (expected, path)
    assert errors(caplog) == []
    caplog.clear()  # uvicorn 0.54 complains about every denial response


async def test_after_the_client_has_left_an_outage_is_one_line_in_the_log(web, caplog):
    _, server = await web(raising(BackendUnavailable, "at\n192.0.2.1"))
    for path in ("/s/ws-class?bye", "/f/mounted/ws-class?bye", "/f/ws-bye", "/f/ws-bye?closed"):
        async with server.connect(path):
            pass
    await until(lambda: not server.server.server_state.tasks)
    lost = [record for record in caplog.records if "is lost" in record.getMessage()]
    assert [(record.levelname, record.getMessage()) for record in lost] == [
        ("WARNING", "a message published after its client had left is lost: at\\n192.0.2.1")
    ]
    assert errors(caplog) == []


async def test_after_the_client_has_left_a_mistake_has_its_traceback(web, caplog):
    _, server = await web(raising(InvalidChannel))
    async with server.connect("/f/ws-bye"):
        pass
    await until(lambda: errors(caplog))
    assert {type(error) for error in errors(caplog)} == {InvalidChannel, WebSocketDisconnect}
    caplog.clear()


@pytest.mark.parametrize("app", [Starlette(), FastAPI()], ids=["starlette", "fastapi"])
@pytest.mark.parametrize("ws", ["auto", "starcast.uvicorn:BroadcastProtocol"])
async def test_a_handler_that_finds_its_client_gone_ends_without_a_word(serve, caplog, app, ws):
    hub, ended = Broadcast(), []

    async def route(websocket: WebSocket) -> None:
        try:
            if "slow" in websocket.query_params:  # it has left before it is accepted
                await anyio.sleep(0.1)
            await hub.connect(websocket)
            while True:
                await hub.send("tick", to=websocket)
                await anyio.sleep(0.01)
        except ClientGone as exc:
            ended.append(str(exc))
            raise

    app.router.routes[:] = [WebSocketRoute("/ws", route)]
    server = await serve(app, ws=ws)
    handshake = (
        "GET /ws{} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    for number, query in enumerate(["", "?slow"], 1):
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(handshake.format(query).encode())
        if not query:
            await reader.readuntil(b"tick")
        writer.transport.abort()
        await until(lambda: len(ended) == number)  # noqa: B023  # awaited here
    await until(lambda: not server.server.server_state.tasks)
    assert [record.levelname for record in caplog.records if record.levelname == "ERROR"] == []
    await until(lambda: len(hub) == 0)
    assert ended == ["the client has left (1006)"] * 2


async def test_of_another_client_in_a_request_it_is_an_error_like_any_other():
    with pytest.raises(ClientGone):
        await answer(ClientGone(1006))


@pytest.mark.parametrize("path", ["/s/route", "/f/def"])
async def test_the_apps_own_handler_is_called_instead(web, caplog, path):
    async def teapot(request, exc):
        assert isinstance(exc, BackendUnavailable)
        return PlainTextResponse(str(exc), 418)

    app = starlette_app if path.startswith("/s") else fastapi_app
    app = app(raising(BackendUnavailable))
    app.add_exception_handler(StarcastError, teapot)
    post, _ = await web(Starlette(routes=[Mount(path[:2], app)]))
    response = await post(path)
    assert (response.status_code, response.text) == (418, "at 192.0.2.1")


async def test_the_apps_handler_of_a_status_is_called_too(web):
    async def teapot(request, exc):
        return PlainTextResponse(f"{exc.status_code} {exc.headers}", 418)

    app = starlette_app(raising(BackendUnavailable))
    app.add_exception_handler(503, teapot)
    post, _ = await web(app)
    response = await post("/route")
    assert (response.status_code, response.text) == (418, "503 {'Retry-After': '2'}")


async def test_in_a_middleware_it_is_an_error_like_any_other(web, caplog):
    async def middleware(request, call_next):
        await raising(BackendUnavailable)()

    app = Starlette(middleware=[Middleware(BaseHTTPMiddleware, dispatch=middleware)])
    post, _ = await web(app)
    assert (await post("/")).status_code == 500
    assert [type(error) for error in errors(caplog)] == [BackendUnavailable]
    caplog.clear()


@pytest.mark.parametrize("broker", [RedisServer, NatsServer, PostgresServer])
async def test_with_a_real_broker_that_was_killed(web, caplog, broker):
    with contextlib.closing(broker()) as server_of_broker:
        server_of_broker.start()
        async with Broadcast(server_of_broker.url) as hub:
            published = []

            async def publish():
                await hub.publish("room", "hello")
                published.append(True)

            post, server = await web(publish)
            assert (await post("/s/background")).status_code == 200
            await until(lambda: published)
            server_of_broker.kill()
            await until(lambda: hub.stats().backend.state == "reconnecting")
            responses = await asyncio.gather(*(post(path) for path in ROUTES))
            for response in responses:
                assert (response.status_code, response.url.path) == (503, response.url.path)
                assert response.headers["Retry-After"] == "2"
                assert "127.0.0.1" not in response.text
            codes = await asyncio.gather(*(code_of(server, path) for path in ACCEPTED))
            assert codes == [1013] * len(ACCEPTED)
            statuses = await asyncio.gather(*(status_of(server, path) for path in WAITING))
            assert statuses == [(503, "2")] * len(WAITING)
            assert errors(caplog) == []
            assert (await post("/f/background")).status_code == 200
            await until(lambda: errors(caplog))
            assert [type(error) for error in errors(caplog)] == [BackendUnavailable]
    caplog.clear()


async def test_a_client_that_tries_again_gets_in_once_the_broker_is_back(serve, caplog):
    """`websockets` gives up for good at a 403."""
    with RedisServer() as redis:
        async with Broadcast(redis.url) as hub:
            knocks = []

            async def endpoint(websocket):
                knocks.append(websocket)
                await hub.connect(websocket)
                await websocket.receive()

            server = await serve(Starlette(routes=[WebSocketRoute("/ws", endpoint)]))
            redis.kill()
            await until(lambda: hub.stats().backend.state == "reconnecting")
            assert await status_of(server, "/ws") == (503, "2")

            async def keep_trying():
                async for client in server.connect("/ws"):
                    await client.close()
                    return

            trying = asyncio.create_task(keep_trying())
            await until(lambda: len(knocks) == 3)  # the second one was refused too
            redis.start()
            await asyncio.wait_for(trying, 30)
    caplog.clear()  # uvicorn 0.54 complains about every denial response


async def test_one_failed_opening_is_answered_to_each_in_its_way(web, caplog):
    """They all wait for the same attempt to open the hub."""
    bus = Bus()
    bus.broker.up = False
    bus.broker.open.clear()
    hub = Broadcast(backend=bus, open_timeout=0)
    calls = []

    async def publish():
        calls.append(asyncio.current_task())
        await hub.publish("room", "hello")

    post, server = await web(publish)
    waiting = []
    for coroutine in (post("/s/route"), code_of(server, "/s/ws?late"), post("/f/def")):
        waiting.append(asyncio.ensure_future(coroutine))
        await until(lambda: len(calls) == len(waiting))  # they get their answers in this order
    bus.broker.open.set()
    first, code, second = await asyncio.gather(*waiting)
    assert (first.status_code, code, second.status_code) == (503, 1013, 503)
    assert errors(caplog) == []


# The error itself


@pytest.mark.parametrize(("error", "status", "retry_after", "code"), ANSWERS)
def test_it_is_a_plain_error_with_both_answers(error, status, retry_after, code):
    exc = error("what was wrong")
    assert type(exc) is error is exc.__class__
    assert not isinstance(exc, (HTTPException, WebSocketException))
    assert (exc.status_code, exc.code) == (status, code)
    assert exc.headers == ({"Retry-After": retry_after} if retry_after else None)


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("error", [answer[0] for answer in ANSWERS])
async def test_it_can_be_read_and_sent_to_another_process(error, answered):
    exc = error("what was wrong")
    exc.note = "kept"
    if answered:
        await answer(exc)
        assert isinstance(exc, HTTPException)
    for same in (exc, pickle.loads(pickle.dumps(exc)), copy.copy(exc)):
        assert repr(same) == f"{error.__name__}('what was wrong')"
        assert str(same) == "what was wrong"
        assert same.note == "kept"
    assert type(pickle.loads(pickle.dumps(exc))) is error


async def answer(exc: Exception) -> list[dict]:
    """Let Starlette answer it in a route."""

    async def route(request):
        raise exc

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    await Starlette(routes=[Route("/", route)])(scope, None, send)
    return sent


async def test_one_that_was_answered_can_be_answered_again():
    exc = BackendUnavailable("what was wrong")
    for _ in range(2):
        sent = await answer(exc)
        assert sent[0]["status"] == 503
    assert [cls.__name__ for cls in type(exc).__mro__].count("HTTPException") == 1


async def test_an_error_of_ones_own_stays_what_it_is():
    class Mine(BackendUnavailable):
        detail = "mine"

    exc = Mine("what was wrong")
    sent = await answer(exc)
    assert (sent[0]["status"], sent[1]["body"]) == (503, b"mine")
    assert isinstance(exc, Mine)
