"""A token in the subprotocol: the one of ours that was offered is answered, and never the token."""

from __future__ import annotations

import logging
from http import HTTPStatus

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from websockets.exceptions import InvalidStatus

from starcast import Broadcast, BroadcastEndpoint, ConfigurationError
from support import Peer, until

pytestmark = pytest.mark.anyio

KINDS = ["endpoint", "serve", "mount"]
TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.s3cr3t"


def app_of(kind, hub, names):
    if kind == "mount":
        return Starlette(routes=[Mount("/ws", hub.app(subprotocols=names))])

    async def serving(websocket):
        await hub.serve(websocket, "a", subprotocols=names)

    class Endpoint(BroadcastEndpoint):
        broadcast = hub
        subprotocols = names

    endpoint = serving if kind == "serve" else Endpoint
    return Starlette(routes=[WebSocketRoute("/ws/{channel}", endpoint)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("ours", "offered", "answered"),
    [
        (["bearer"], ["bearer", TOKEN], "bearer"),
        (["bearer"], [TOKEN, "bearer"], "bearer"),
        (["v2", "v1"], ["v1", "v2"], "v2"),  # the first of ours
        (["v2", "v1"], [TOKEN, "v1"], "v1"),
        (("bearer",), ["bearer", TOKEN], "bearer"),
        (["bearer"], None, None),
        # None of ours: accepted without one. A browser closes then, as RFC 6455 has it.
        (["bearer"], [TOKEN], None),
        (["bearer"], ["Bearer", TOKEN], None),
        ([], ["bearer", TOKEN], None),
    ],
)
async def test_the_first_of_ours_that_was_offered_is_answered(serve, kind, ours, offered, answered):
    hub = Broadcast()
    server = await serve(app_of(kind, hub, ours))
    async with server.connect("/ws/a", subprotocols=offered) as client:
        assert client.subprotocol == answered
        assert TOKEN not in str(client.response.headers)
        await until(lambda: hub.channels == {"a": 1})
        await hub.publish("a", "hello")
        assert await client.recv() == "hello"


async def test_authorize_reads_the_token(serve, caplog):
    """The way of who-may-connect.md, with everything that is logged."""
    caplog.set_level(logging.DEBUG, "starcast")
    caplog.set_level(logging.INFO, "uvicorn")
    hub = Broadcast()
    let_in = {TOKEN}

    def authorize(websocket, channel):
        offered = websocket.scope["subprotocols"]
        return len(offered) == 2 and offered[0] == "bearer" and offered[1] in let_in

    app = hub.app(authorize=authorize, subprotocols=["bearer"])
    server = await serve(Starlette(routes=[Mount("/ws", app)]))
    async with server.connect("/ws/a", subprotocols=["bearer", TOKEN]) as client:
        assert client.subprotocol == "bearer"
        await until(lambda: len(hub) == 1)
    let_in.clear()
    for path, origin in (("/ws/a", None), ("/ws/a%00", None), ("/ws/a", "https://evil.example")):
        with pytest.raises(InvalidStatus) as caught:
            await server.connect(path, subprotocols=["bearer", TOKEN], origin=origin)
        assert caught.value.response.status_code == HTTPStatus.FORBIDDEN
    assert len([record for record in caplog.records if record.name == "starcast"]) == 3
    assert TOKEN not in caplog.text
    assert TOKEN not in repr(hub.stats())


@pytest.mark.parametrize(
    "names",
    [
        "bearer",
        b"bearer",
        {"bearer"},
        iter(["bearer"]),
        7,
        None,
        [""],
        ["two words"],
        ["a,b"],
        ["a\r\nb"],
        [7],
        [None],
        ["\u00e9"],
    ],
)
async def test_what_is_no_list_of_names_is_refused_at_once(names):
    hub = Broadcast()
    with pytest.raises(ConfigurationError):
        hub.app(subprotocols=names)
    with pytest.raises(ConfigurationError):
        app_of("endpoint", hub, names)
    peer = Peer()
    with pytest.raises(ConfigurationError):
        await hub.serve(peer.websocket, subprotocols=names)
    assert peer.sent == []


async def test_one_that_is_fixed_and_a_list_are_too_much():
    peer = Peer()
    with pytest.raises(ConfigurationError, match="not both"):
        await Broadcast().serve(peer.websocket, subprotocol="a", subprotocols=["a"])
    assert peer.sent == []


async def test_one_that_is_fixed_is_answered_as_before(serve):
    hub = Broadcast()

    async def serving(websocket):
        await hub.serve(websocket, subprotocol="chat")

    server = await serve(Starlette(routes=[WebSocketRoute("/", serving)]))
    async with server.connect("/", subprotocols=["chat"]) as client:
        assert client.subprotocol == "chat"


async def test_a_server_that_does_not_say_what_was_offered():
    """`subprotocols` is optional in ASGI."""
    hub = Broadcast()
    for offered in ({}, {"subprotocols": None}):
        peer = Peer()
        del peer.scope["subprotocols"]
        peer.scope |= offered
        peer.leave()
        await hub.serve(peer.websocket, subprotocols=["bearer"])
        assert peer.sent[0]["subprotocol"] is None
