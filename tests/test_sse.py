"""Streams of server-sent events over real sockets: `Broadcast.stream` and GET on the mount."""

from __future__ import annotations

import json

import fastapi
import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from event_source import EventSource
from starcast import (
    SSE,
    Broadcast,
    ConfigurationError,
    History,
    InvalidChannel,
    OriginRefused,
)
from starcast.servers import stopping
from support import DEADLINE, Broker, Bus, until

pytestmark = pytest.mark.anyio

KEPT = {"kept*": History(size=3)}


async def ask(server, path, method="GET", **headers):
    """Return the whole response, which must not be a stream."""
    url = f"http://127.0.0.1:{server.port}{path}"
    async with httpx.AsyncClient(trust_env=False, timeout=DEADLINE) as client:
        return await client.request(method, url, headers=headers)


async def mounted(serve, hub, **options):
    return await serve(Starlette(routes=[Mount("/live", hub.app(**options))]))


def objects(source):
    return [json.loads(data) for data in source.data]


# What a client gets


async def test_a_stream(serve):
    hub = Broadcast()
    server = await mounted(serve, hub, sse=SSE(retry=1000))
    async with EventSource(server, "/live/a") as source:
        headers = source.response.headers
        assert source.status == 200
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["cache-control"] == "no-cache, no-transform"
        assert headers["x-accel-buffering"] == "no"
        assert "content-length" not in headers
        assert 1000 <= source.retry <= 1500
        await hub.publish("a", "one\r\ntwo\rthree\n")
        await hub.publish("a", b"\xff")
        await hub.publish("a", {"kettle": "on"})
        await hub.publish("a", "")
        await hub.publish("b", "for others")
        await hub.publish("a", "last")
        await source.got(5)
        assert source.events == [
            ("message", "one\ntwo\nthree\n", ""),
            ("bytes", "/w==", ""),
            ("message", '{"kettle":"on"}', ""),
            ("message", "", ""),
            ("message", "last", ""),
        ]
        await hub.disconnect()
        await source.over()
        assert source.whole


async def test_ids_let_a_client_miss_nothing(serve):
    hub = Broadcast(history=KEPT)
    server = await mounted(serve, hub)
    async with EventSource(server, "/live/kept") as source:
        await until(lambda: source.id)  # before there is a message
        newcomer = source.id
        await hub.publish("kept", "1")
        await source.got(1)
        assert source.id == source.events[0][2] != newcomer
    for number in (2, 3):
        await hub.publish("kept", f"{number}")
    async with EventSource(server, "/live/kept", Last_Event_ID=source.id) as again:
        await hub.publish("kept", "4")
        assert await again.got(3) == ["2", "3", "4"]
        assert len({id for _, _, id in again.events}) == 3
    # The header is newer than the URL, which a browser keeps as it was.
    path = f"/live/kept?last_event_id={newcomer}"
    async with EventSource(server, path, Last_Event_ID=again.events[1][2]) as third:
        assert await third.got(1) == ["4"]
    async with EventSource(server, f"/live/kept?last_event_id={source.id}") as fourth:
        assert await fourth.got(3) == ["2", "3", "4"]
        assert fourth.id == again.id


@pytest.mark.parametrize("id", ["first", "garbage", "0123-7", "a,b"])
async def test_a_client_that_is_too_late_is_told(serve, id):
    hub = Broadcast(history=KEPT)
    server = await mounted(serve, hub, history=2)
    first = await hub.publish("kept", "0")
    for number in range(1, 5):
        last = await hub.publish("kept", f"{number}")
    sent = first if id == "first" else id
    async with EventSource(server, "/live/kept", Last_Event_ID=sent) as source:
        await source.got(3)
        name, data, _ = source.events[0]
        assert name == "reset"
        assert json.loads(data) == {"channel": "kept", "id": last, "recovered": False}
        assert source.data[1:] == ["3", "4"]
        assert source.id == last


async def test_a_newcomer_gets_the_last_few_and_a_channel_without_a_history_nothing(serve):
    hub = Broadcast(history=KEPT)
    server = await mounted(serve, hub, history=2)
    for number in range(4):
        await hub.publish("kept", f"{number}")
        await hub.publish("other", f"{number}")
    async with EventSource(server, "/live/kept") as source:
        assert await source.got(2) == ["2", "3"]
        assert [name for name, _, _ in source.events] == ["message"] * 2
    async with EventSource(server, "/live/other", Last_Event_ID=source.id) as source:
        await hub.publish("other", "new")
        assert await source.got(1) == ["new"]
        assert source.id == ""


async def test_several_channels_on_one_stream(serve):
    hub = Broadcast(history=KEPT)
    server = await mounted(serve, hub)
    path = "/live/kept1?channel=kept2&channel=other&channel=kept1"
    async with EventSource(server, path) as source:
        assert hub.channels == {"kept1": 1, "kept2": 1, "other": 1}
        assert len(hub) == 1
        ids = [await hub.publish("kept1", "1"), await hub.publish("kept2", b"\xff")]
        await hub.publish("other", "3")
        await source.got(3)
        assert objects(source) == [
            {"id": ids[0], "channel": "kept1", "data": "1"},
            {"id": ids[1], "channel": "kept2", "data": "/w==", "encoding": "base64"},
            {"id": None, "channel": "other", "data": "3"},
        ]
        assert source.id == f"{ids[0]},{ids[1]},"
        assert source.events[0][2].split(",")[0] == ids[0]
    await until(lambda: hub.channels == {})
    await hub.publish("kept2", "4")
    await hub.publish("kept1", "5")
    async with EventSource(server, path, Last_Event_ID=source.id) as again:
        await again.got(2)
        # Each channel's past in its order, and that of one channel after that of another.
        assert [each["data"] for each in objects(again)] == ["5", "4"]
        first, second = (id.split(",") for _, _, id in again.events)
        assert first[1] == ids[1]  # whoever is cut off here still gets the past of the second
        assert second[0] == first[0]
    async with EventSource(server, path, Last_Event_ID=ids[0]) as third:  # of another stream
        await third.got(2)
        assert [name for name, _, _ in third.events] == ["reset"] * 2
        assert [each["channel"] for each in objects(third)] == ["kept1", "kept2"]


async def test_a_channel_that_is_named_in_the_query_is_named_in_its_messages(serve):
    hub = Broadcast(history=KEPT)
    server = await mounted(serve, hub)
    async with EventSource(server, "/live/?channel=kept") as source:
        id = await hub.publish("kept", "1")
        await source.got(1)
        assert objects(source) == [{"id": id, "channel": "kept", "data": "1"}]
        assert source.id == id


async def test_ids_in_the_messages(serve):
    hub = Broadcast(history=KEPT)
    server = await mounted(serve, hub, ids=True)
    async with EventSource(server, "/live/kept") as source:
        id = await hub.publish("kept", "1")
        await source.got(1)
        assert objects(source) == [{"id": id, "channel": "kept", "data": "1"}]
        assert source.id == id


async def test_one_path_for_websockets_and_streams(serve):
    hub = Broadcast()
    server = await mounted(serve, hub, publish=True)
    async with EventSource(server, "/live/a") as source, server.connect("/live/a") as client:
        await client.send("hello")
        assert await client.recv() == "hello"
        assert await source.got(1) == ["hello"]
        assert (len(hub), hub.channels, len(hub.clients())) == (2, {"a": 2}, 1)
        assert "2 clients" in repr(hub)


# Who gets one


@pytest.mark.parametrize("bare", [False, True])
async def test_pages_and_names_that_are_refused(serve, caplog, bare):
    hub = Broadcast()
    server = await serve(hub) if bare else await mounted(serve, hub)
    prefix = "" if bare else "/live"
    for path, origin, body in (
        (f"{prefix}/a", "https://elsewhere.example", "origin not allowed"),
        (f"{prefix}/a", "https://elsewhere.example/path", "origin not allowed"),
        (f"{prefix}/", None, "invalid channel"),
        (f"{prefix}/{'x' * 201}", None, "invalid channel"),
        (f"{prefix}/?channel=a&channel=%0A", None, "invalid channel"),
    ):
        answer = await ask(server, path, **({"Origin": origin} if origin else {}))
        assert (answer.status_code, answer.text) == (403, body)
    assert [line.partition(":")[0].partition(" from")[0] for line in caplog.messages] == [
        "refused an event stream"
    ] * len(caplog.messages)
    assert "write origins=" in caplog.text
    origin = f"http://127.0.0.1:{server.port}"
    async with EventSource(server, f"{prefix}/a", Origin=origin) as source:
        assert source.status == 200
    assert (await ask(server, f"{prefix}/a", "HEAD")).status_code == 405
    answer = await ask(server, f"{prefix}/a", "POST")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")


async def test_too_many_channels(serve):
    hub = Broadcast()
    server = await mounted(serve, hub, sse=SSE(max_channels=2))
    assert (await ask(server, "/live/a?channel=b&channel=c")).status_code == 403
    async with EventSource(server, "/live/a?channel=b&channel=b") as source:
        assert source.status == 200


async def test_each_channel_is_authorised(serve, caplog):
    hub = Broadcast()
    asked = []

    def authorize(client, channel):
        asked.append((type(client), channel, client.path_params["channel"]))
        return client.query_params.get("user") == "ann" and channel != "secret"

    server = await mounted(serve, hub, authorize=authorize)
    async with EventSource(server, "/live/a?user=ann&channel=b") as source:
        assert source.status == 200
    answer = await ask(server, "/live/a?user=ann&channel=secret&channel=c")
    assert (answer.status_code, answer.text) == (403, "not authorized")
    assert [(channel, path) for _, channel, path in asked] == [
        *(("a", "a"), ("b", "a"), ("a", "a"), ("secret", "a"))
    ]
    assert "refused an event stream (the channel 'secret'): authorize returned False" in caplog.text
    await until(lambda: len(hub) == 0)
    assert hub.channels == {}


async def test_the_broker_is_away(serve, caplog):
    broker = Broker()
    hub = Broadcast(backend=Bus(broker), open_timeout=0)
    broker.up = False
    bare = await serve(hub.app(), lifespan="off")
    for server, path in ((await mounted(serve, hub), "/live/a"), (bare, "/a")):
        answer = await ask(server, path)
        assert (answer.status_code, answer.text) == (503, "try again later")
        assert answer.headers["retry-after"] == "2"
    assert "refused a client before it was accepted (HTTP 503)" in caplog.text


async def test_the_apps_handlers_answer(serve):
    hub = Broadcast()

    async def answer(request, exc):
        return PlainTextResponse(type(exc).__name__, 418)

    handlers = {OriginRefused: answer, ValueError: answer}
    app = Starlette(routes=[Mount("/live", hub)], exception_handlers=handlers)
    server = await serve(app)
    response = await ask(server, "/live/a", Origin="https://elsewhere.example")
    assert (response.status_code, response.text) == (418, OriginRefused.__name__)
    response = await ask(server, "/live/")
    assert (response.status_code, response.text) == (418, InvalidChannel.__name__)


async def test_a_bug_of_the_app_is_one_on_this_way_too(serve, caplog):
    hub = Broadcast()
    server = await mounted(
        serve, hub, authorize=lambda client, channel: client.scope["subprotocols"]
    )
    assert (await ask(server, "/live/a")).status_code == 500
    assert "KeyError" in caplog.text
    caplog.clear()


async def test_a_mount_without_streams(serve):
    hub = Broadcast()
    server = await mounted(serve, hub, sse=None)
    assert (await ask(server, "/live/a")).status_code == 404
    async with server.connect("/live/a"):
        await until(lambda: hub.channels == {"a": 1})


# In a route of one's own


async def test_a_route_of_fastapi(serve):
    hub = Broadcast()
    app = FastAPI(lifespan=hub.lifespan)
    ended = []

    def current_user(request: fastapi.Request):
        if request.query_params.get("user") != "ann":
            raise fastapi.HTTPException(401, "log in")
        return "ann"

    @app.get("/mine")
    async def mine(request: fastapi.Request, user: str = fastapi.Depends(current_user)):
        response = hub.stream(request, f"user:{user}", overflow="latest", max_buffer=1000)
        response.set_cookie("seen", "1")
        response.background = BackgroundTask(ended.append, user)
        return response

    server = await serve(app)
    assert (await ask(server, "/mine")).status_code == 401
    async with EventSource(server, "/mine?user=ann") as source:
        assert source.response.headers["set-cookie"].startswith("seen=1")
        await hub.publish("user:ann", "hello")
        assert await source.got(1) == ["hello"]
    await until(lambda: ended == ["ann"])
    answer = await ask(server, "/mine?user=ann", Origin="https://elsewhere.example")
    assert (answer.status_code, answer.json()) == (403, {"detail": "origin not allowed"})


async def test_a_stream_that_begins_while_the_server_stops(serve, monkeypatch):
    """An EventSource gives up for good on any other status, and would not come back."""
    hub = Broadcast()
    server = await mounted(serve, hub)
    monkeypatch.setattr(stopping, "is_stopping", lambda: True)
    async with EventSource(server, "/live/a") as source:
        await source.over()
        assert (source.status, source.whole, source.retry >= 3000) == (200, True, True)
    assert hub.channels == {}


async def test_a_server_that_stops_ends_streams(serve):
    hub = Broadcast()
    server = await mounted(serve, hub)
    async with EventSource(server, "/live/a") as source:
        await hub.publish("a", "last words")
        server.server.should_exit = True
        await source.over()
        assert source.whole
        assert source.data == ["last words"]


# Arguments


@pytest.mark.parametrize(
    "options",
    [{"heartbeat": 0}, {"heartbeat": "x"}, {"retry": -1}, {"retry": 1.5}, {"max_channels": True}],
)
def test_settings_that_are_not_valid(options):
    with pytest.raises(ConfigurationError):
        SSE(**options)


def test_arguments_that_are_not_valid():
    hub = Broadcast()
    with pytest.raises(TypeError, match="Request, not str"):
        hub.stream("room")
    request = fastapi.Request({"type": "http", "headers": []})
    for options in ({"sse": 15}, {"history": -1}, {"overflow": "block"}):
        with pytest.raises(ConfigurationError):
            hub.stream(request, **options)
    with pytest.raises(ConfigurationError, match="sse must be an SSE"):
        hub.app(sse=15)


def test_a_mount_and_a_route_for_the_same_path():
    """A GET route before the mount goes first, and the mount still gets the WebSockets."""
    hub = Broadcast()
    app = Starlette(
        routes=[Route("/live/a", lambda request: PlainTextResponse("mine")), Mount("/live", hub)]
    )
    with TestClient(app) as client, client.websocket_connect("/live/a"):
        assert client.get("/live/a").text == "mine"
