"""Who may come in, by a function of the app; and what a refusal says in the log."""

from __future__ import annotations

import functools
import logging

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from starlette.testclient import TestClient
from websockets.exceptions import InvalidStatus

from starcast import Broadcast, BroadcastEndpoint, ConfigurationError
from support import Peer, until

pytestmark = pytest.mark.anyio

USERS = {"t-ann": "Ann", "t-nobody": None}


def forgets(websocket, channel):
    channel == "news"  # noqa: B015  # a `return` is missing


async def forgets_async(websocket, channel):
    channel == "news"  # noqa: B015  # a `return` is missing


class Forgets:
    async def __call__(self, websocket, channel):
        channel == "news"  # noqa: B015  # a `return` is missing


def denies(websocket, channel):
    return False


async def denies_async(websocket, channel):
    return False


def raises(websocket, channel):
    raise PermissionError("the token t-secret has expired")


async def raises_async(websocket, channel):
    raise PermissionError("the token t-secret has expired")


NOBODY = [
    (forgets, "returned None"),
    (forgets_async, "returned None"),
    (Forgets(), "returned None"),
    (functools.partial(forgets), "returned None"),
    (lambda websocket, channel: forgets_async(websocket, channel), "returned None"),
    (lambda websocket, channel: USERS.get("unknown"), "returned None"),
    (denies, "returned False"),
    (denies_async, "returned False"),
    (raises, "raised PermissionError"),
    (raises_async, "raised PermissionError"),
]


async def status(server, path: str, **options) -> int:
    try:
        async with server.connect(path, **options):
            return 101
    except InvalidStatus as exc:
        return exc.response.status_code


@pytest.mark.parametrize(("authorize", "reason"), NOBODY)
@pytest.mark.parametrize("framework", [Starlette, FastAPI])
async def test_only_true_lets_in(serve, caplog, authorize, reason, framework):
    hub = Broadcast()
    app = framework()
    app.mount("/live", hub.app(publish=True, authorize=authorize))
    server = await serve(app)
    for _ in range(3):
        assert await status(server, "/live/news?token=t-query") == 403
    assert len(hub) == 0
    (record,) = (record for record in caplog.records if record.name == "starcast")
    assert record.levelno == logging.WARNING
    said = record.getMessage()
    assert f"authorize {reason}" in said
    assert "'news'" in said
    assert ("`return True`" in said) == ("None" in reason)
    assert "t-secret" not in caplog.text
    assert "t-query" not in "".join(r.getMessage() for r in caplog.records if "uvi" not in r.name)


@pytest.mark.parametrize(
    "answer",
    [1, 0, "", "Ann", "True", b"", {}, [], {"name": "Ann", "password": "p-secret"}, object(), 1.0],
)
@pytest.mark.parametrize("how", ["plain", "async"])
async def test_what_a_lookup_found_is_a_mistake_and_lets_nobody_in(answer, how):
    def authorize(websocket, channel):
        return answer

    async def authorize_async(websocket, channel):
        return answer

    guard = authorize if how == "plain" else authorize_async
    peer = Peer(path_params={"channel": "x"})
    peer.scope |= {"path": "/x", "root_path": ""}
    hub = Broadcast()
    with pytest.raises(ConfigurationError, match="authorize returned") as raised:
        await hub.app(authorize=guard)(peer.scope, peer.receive, peer.send)
    assert peer.sent == []
    assert len(hub) == 0
    assert f"type {type(answer).__name__}," in str(raised.value)
    assert "return user is not None" in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("authorize", [False, True, "ann", {"ann"}])
def test_what_is_no_function_is_refused_at_once(authorize):
    with pytest.raises(ConfigurationError, match="authorize must be a function"):
        Broadcast().app(authorize=authorize)


def test_a_generator_is_no_answer():
    def authorize(websocket, channel):
        yield True

    async def authorize_async(websocket, channel):
        yield True

    for guard in (authorize, authorize_async):
        app = Starlette(routes=[Mount("/live", Broadcast().app(authorize=guard))])
        with (
            pytest.raises(ConfigurationError, match="authorize returned"),
            TestClient(app).websocket_connect("/live/x"),
        ):
            pass


async def test_the_page_and_the_channel_come_before_the_function(serve, caplog):
    called = []

    def authorize(websocket, channel):
        called.append(channel)
        return True

    server = await serve(Starlette(routes=[Mount("/live", Broadcast().app(authorize=authorize))]))
    assert await status(server, "/live/news", origin="https://evil.example") == 403
    assert await status(server, "/live/" + "x" * 201) == 403
    assert called == []
    assert await status(server, "/live/news") == 101
    assert called == ["news"]
    said = [record.getMessage() for record in caplog.records if record.name == "starcast"]
    assert len(said) == 2
    assert 'origins=["https://evil.example"]' in said[0]
    assert "1 to 200 characters, not 201" in said[1]


# Channels


@pytest.mark.parametrize("kind", ["endpoint", "connect", "serve", "mount"])
async def test_a_channel_that_is_refused_is_said_once_a_kind(serve, caplog, kind):
    hub = Broadcast()

    class Endpoint(BroadcastEndpoint):
        broadcast = hub

    async def connect(websocket):
        await hub.connect(websocket, websocket.path_params["channel"])

    async def serving(websocket):
        await hub.serve(websocket, websocket.path_params["channel"])

    endpoints = {"endpoint": Endpoint, "connect": connect, "serve": serving}
    if kind == "mount":
        route = Mount("/ws", hub)
    else:
        route = WebSocketRoute("/ws/{channel:path}", endpoints[kind])
    server = await serve(Starlette(routes=[route]))
    for name in ("x" * 201, "y" * 300, "", "a%00", "b%07"):
        assert await status(server, f"/ws/{name}?token=t-secret") == 403
    said = [record.getMessage() for record in caplog.records if record.name == "starcast"]
    assert len(said) == 2
    assert "1 to 200 characters, not 201" in said[0]
    assert r"must not contain the character '\x00'" in said[1]
    assert all(line.isprintable() and "secret" not in line for line in said)


async def test_who_is_let_in_is_not_logged(serve, caplog):
    hub = Broadcast()
    server = await serve(
        Starlette(routes=[Mount("/live", hub.app(authorize=lambda websocket, channel: True))])
    )
    async with server.connect("/live/news"):
        await until(lambda: hub.channels == {"news": 1})
    assert [record for record in caplog.records if record.name == "starcast"] == []


def test_a_way_to_refuse_that_there_is_not():
    with pytest.raises(ConfigurationError, match="refuse must be http or close, not 'politely'"):
        Broadcast(refuse="politely")
