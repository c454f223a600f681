"""SSEEndpoint: its hooks and its attributes, over real sockets."""

from __future__ import annotations

import json

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException, WebSocketException
from starlette.responses import Response
from starlette.routing import Route

from event_source import EventSource
from starcast import SSE, Broadcast, ConfigurationError, History, SSEEndpoint
from support import until
from test_sse import ask

pytestmark = pytest.mark.anyio


class Events(SSEEndpoint):
    log: list[str]

    async def on_connect(self, request):
        match request.query_params.get("door"):
            case "http":
                raise HTTPException(401, "log in")
            case "websocket":
                raise WebSocketException(4401, "log in")
            case "late":
                await super().on_connect(request)
                raise HTTPException(409)
            case "forgotten":
                return
        await super().on_connect(request)
        self.log.append(f"hello {request.path_params['channel']}")

    async def on_disconnect(self, request):
        self.log.append(f"goodbye {request.path_params['channel']} {self.broadcast.channels}")

    async def post(self, request):
        await self.broadcast.publish(self.get_channel(request), "hello")
        return Response(status_code=204)


def make_app(kind, cls):
    if kind == "starlette":
        return Starlette(routes=[Route("/events/{channel}", cls)])
    app = FastAPI()
    app.add_route("/events/{channel}", cls)
    return app


@pytest.mark.parametrize("kind", ["starlette", "fastapi"])
async def test_hooks(serve, kind, caplog):
    class Mine(Events):
        broadcast = Broadcast()
        log = []  # noqa: RUF012  # one for this test

    server = await serve(make_app(kind, Mine))
    async with EventSource(server, "/events/tea") as source:
        assert Mine.log == ["hello tea"]
        assert (await ask(server, "/events/tea", "POST")).status_code == 204
        assert await source.got(1) == ["hello"]
    await until(lambda: len(Mine.log) == 2)
    assert Mine.log == ["hello tea", "goodbye tea {}"]
    assert (await ask(server, "/events/tea?door=http")).status_code == 401
    answer = await ask(server, "/events/tea?door=websocket")
    assert (answer.status_code, "log in" in answer.text) == (403, True)
    assert Mine.log[2:] == []
    assert (await ask(server, "/events/tea?door=late")).status_code == 409
    assert Mine.log[2:] == ["goodbye tea {}"]
    assert "(HTTP 401)" in caplog.text
    assert (await ask(server, "/events/tea", "HEAD")).status_code == 405
    answer = await ask(server, "/events/tea", "PUT")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")
    caplog.clear()
    assert (await ask(server, "/events/tea?door=forgotten")).status_code == 500
    assert "on_connect has to call super().on_connect(request)" in caplog.text
    caplog.clear()


async def test_an_endpoint_that_is_the_whole_app(serve):
    class Mine(SSEEndpoint):
        broadcast = Broadcast()

    server = await serve(Mine, lifespan="off")
    async with EventSource(server, "/") as source:
        assert Mine.broadcast.channels == {"default": 1}
        assert source.status == 200
    answer = await ask(server, "/", Origin="https://elsewhere.example")
    assert (answer.status_code, answer.text) == (403, "origin not allowed")
    answer = await ask(server, "/", "DELETE")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")


async def test_attributes(serve):
    hub = Broadcast(history=History())

    class Mine(SSEEndpoint):
        broadcast = hub
        history = 1
        ids = True
        sse = SSE(heartbeat=0.1, retry=0)

    await hub.publish("tea", "0")
    server = await serve(make_app("starlette", Mine))
    async with EventSource(server, "/events/tea") as source:
        await source.got(1)
        assert source.retry == 0
        assert json.loads(source.data[0])["data"] == "0"
        await until(lambda: source.comments)


async def test_channels_of_ones_own(serve):
    class Mine(SSEEndpoint):
        broadcast = Broadcast()

        def get_channel(self, request):
            return [int(number) for number in request.query_params.getlist("order")]

    server = await serve(make_app("starlette", Mine))
    async with EventSource(server, "/events/x?order=7&order=8") as source:
        await Mine.broadcast.publish(8, "paid")
        await source.got(1)
        assert json.loads(source.data[0]) == {"id": None, "channel": "8", "data": "paid"}
    assert (await ask(server, "/events/x")).status_code == 403


def test_each_class_has_a_hub_of_its_own():
    class One(SSEEndpoint):
        pass

    class Two(SSEEndpoint):
        pass

    assert One.broadcast is One.broadcast is not Two.broadcast


def test_attributes_that_are_not_valid(caplog):
    for name, value in (("history", -1), ("sse", 15)):
        with pytest.raises(ConfigurationError):
            type("Wrong", (SSEEndpoint,), {name: value})
    with pytest.raises(TypeError, match="needs a Broadcast"):
        type("Wrong", (SSEEndpoint,), {"broadcast": "redis://"})

    async def get_channel(self, request):
        return "a"

    with pytest.raises(TypeError, match="is not awaited"):
        type("Wrong", (SSEEndpoint,), {"get_channel": get_channel})
    type("Wrong", (SSEEndpoint,), {"histori": 1})
    assert "SSEEndpoint does not read Wrong.histori: did you mean history?" in caplog.text
