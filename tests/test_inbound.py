"""How long one message of a client may be."""

from __future__ import annotations

import contextlib

import pytest
from fastapi import FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from websockets.exceptions import ConnectionClosed

from starcast import Broadcast, BroadcastEndpoint, ConfigurationError

pytestmark = pytest.mark.anyio

PROTOCOLS = ["auto", "starcast.uvicorn:BroadcastProtocol"]
PATHS = ["/endpoint", "/serve", "/mount/default"]

# One byte more than 1000 in all of them; as JSON they would be refused with 1007.
TOO_LONG = ["x" * 1001, b"x" * 1001, "é" * 500 + "x", "😀" * 250 + "x"]
FITTING = ["x" * 1000, "é" * 500, "😀" * 250]


def app_of(hub: Broadcast, got: list, max_message: int | None = None, encoding=None) -> Starlette:
    """Every way in, with a bound of its own if one is given."""
    its_bound, its_encoding = max_message, encoding

    class Chat(BroadcastEndpoint):
        broadcast = hub
        max_message = its_bound
        encoding = its_encoding

        async def decode(self, websocket, message):
            got.append("decoded")
            return await super().decode(websocket, message)

        async def on_receive(self, websocket, data):
            got.append("received")
            await super().on_receive(websocket, data)

        async def on_disconnect(self, websocket, close_code):
            got.append(close_code)
            await super().on_disconnect(websocket, close_code)

    async def serve(websocket):
        got.append(await hub.serve(websocket, max_message=its_bound, encoding=its_encoding))

    mount = hub.app(publish=True, max_message=its_bound, encoding=its_encoding)
    return Starlette(
        routes=[
            WebSocketRoute("/endpoint", Chat),
            WebSocketRoute("/serve", serve),
            Mount("/mount", mount),
        ]
    )


async def closing(client) -> tuple[int, str]:
    with contextlib.suppress(ConnectionClosed):
        raise AssertionError(f"not closed, got {await client.recv()!r:.20}")
    return client.close_code, client.close_reason


@pytest.mark.parametrize("ws", PROTOCOLS)
async def test_a_message_longer_than_the_bound_closes_its_sender_with_1009(serve, caplog, ws):
    got: list = []
    hub = Broadcast(max_message=1000)
    server = await serve(app_of(hub, got, encoding="json"), ws=ws)
    async with server.connect("/endpoint") as other:
        for path in PATHS:
            for message in TOO_LONG:
                async with server.connect(path) as client:
                    await client.send(message)
                    assert await closing(client) == (1009, "longer than 1000 bytes")
                lines = [r.getMessage() for r in caplog.records if r.name == "starcast"]
                assert len(lines) == 1
                assert "with 1009" in lines[0]
                assert "max_message=" in lines[0]
                caplog.clear()
        assert got == [1009] * 8  # of the endpoint and of `serve`; nothing was decoded
        await other.send("1")
        assert await other.recv() == "1"
        assert hub.stats().published == 1


@pytest.mark.parametrize(
    ("of_the_hub", "of_the_door", "bound"),
    [(1000, None, 1000), (10, 1000, 1000), (None, 1000, 1000), (None, None, None)],
)
async def test_a_bound_of_the_hub_and_one_instead(serve, of_the_hub, of_the_door, bound):
    got: list = []
    hub = Broadcast(max_message=of_the_hub)
    server = await serve(app_of(hub, got, of_the_door))
    for path in PATHS:
        async with server.connect(path) as client:
            for message in FITTING:
                await client.send(message)
                assert await client.recv() == message
            await client.send(TOO_LONG[0])
            if bound is None:
                assert await client.recv() == TOO_LONG[0]
            else:
                assert (await closing(client))[0] == 1009


@pytest.mark.parametrize("ws", PROTOCOLS)
async def test_by_default_it_is_a_quarter_of_the_default_buffer_everywhere(serve, ws):
    hub = Broadcast()
    app = FastAPI()
    app.mount("/starlette", app_of(hub, []))
    app.mount("/live", hub.app(publish=True))

    @app.websocket("/class")
    class Chat(BroadcastEndpoint):
        broadcast = hub

    @app.websocket("/function")
    async def function(websocket: WebSocket):
        await hub.serve(websocket)

    server = await serve(app, ws=ws)
    for path in [*(f"/starlette{path}" for path in PATHS), "/live/default", "/class", "/function"]:
        async with server.connect(path, compression=None) as client:
            await client.send("x" * 256 * 1024)
            assert len(await client.recv()) == 256 * 1024
            await client.send("x" * (256 * 1024 + 1))
            assert await closing(client) == (1009, "longer than 262144 bytes")


async def test_a_json_message_of_16_mib_is_not_even_looked_at(serve):
    """Decoding it takes half a second, and more to send it on."""
    got: list = []
    server = await serve(app_of(Broadcast(), got, encoding="json"))
    async with server.connect("/endpoint", compression=None) as client:
        await client.send("[" + "1," * (8 * 1024 * 1024 - 2) + "1]")
        assert (await closing(client))[0] == 1009
    assert got == [1009]


@pytest.mark.parametrize("bound", [0, -1, 1.5, "1000", True])
def test_what_is_no_bound(bound):
    with pytest.raises(ConfigurationError, match="max_message must be a number of bytes above 0"):
        Broadcast(max_message=bound)
    with pytest.raises(ConfigurationError, match="max_message"):
        Broadcast().app(publish=True, max_message=bound)
    with pytest.raises(ConfigurationError, match="max_message"):
        type("Chat", (BroadcastEndpoint,), {"max_message": bound})
