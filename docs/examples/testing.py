import asyncio
import contextlib
import socket

import pytest
import uvicorn
import websockets
from quickstart import app
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect


def test_everybody_in_the_room_gets_it():
    client = TestClient(app)
    with client.websocket_connect("/ws/tea") as ann, client.websocket_connect("/ws/tea") as ben:
        ann.send_text("hello")
        assert ann.receive_text() == "hello"
        assert ben.receive_text() == "hello"


def test_another_room_does_not_get_it():
    client = TestClient(app)
    with client.websocket_connect("/ws/tea") as ann, client.websocket_connect("/ws/bar") as ben:
        ann.send_text("for the tea room")
        assert ann.receive_text() == "for the tea room"
        ben.send_text("for the bar")
        assert ben.receive_text() == "for the bar"  # and not what Ann wrote before


def test_pages_from_elsewhere_are_refused():
    client = TestClient(app)
    headers = {"origin": "https://elsewhere.example"}
    with (
        pytest.raises(WebSocketDisconnect) as refused,
        client.websocket_connect("/ws/tea", headers=headers),
    ):
        pass
    assert refused.value.code == 1008  # a browser sees HTTP 403


@contextlib.asynccontextmanager
async def served(app):
    """Run uvicorn on a free port of this machine, on the event loop of the test."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        task = asyncio.create_task(server.serve([listener]))
        while not (server.started or task.done()):  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0.01)
        try:
            yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


@pytest.mark.anyio
async def test_on_a_real_socket():
    async with (
        served(app) as url,
        websockets.connect(f"{url}/ws/tea") as ann,
        websockets.connect(f"{url}/ws/tea") as ben,
    ):
        await ann.send("hello")
        assert await ann.recv() == "hello"
        assert await ben.recv() == "hello"
