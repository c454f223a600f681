"""The programs of the pages about channels, users and members do what the pages say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from channels.official import NODE
from support import DEADLINE, Served, until

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

pytestmark = pytest.mark.anyio


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def ask(socket: Any, **command: Any) -> dict[str, Any]:
    """Send a command, and return its reply. Pushes before it are dropped."""
    socket.send_json({"id": 1, **command})
    while True:
        for line in socket.receive_text().split("\n"):
            reply: dict[str, Any] = json.loads(line)
            if reply.get("id"):
                return reply


def test_channels():
    module = example("channels")
    with TestClient(module["app"]) as client:
        with client.websocket_connect("/connection/websocket") as stranger:
            assert ask(stranger, connect={"token": "x"})["error"]["code"] == 103
        with client.websocket_connect("/connection/websocket") as ada:
            assert "client" in ask(ada, connect={"token": "secret-of-ada"})["connect"]
            assert ask(ada, subscribe={"channel": "room:none"})["error"]["code"] == 103
            assert ask(ada, subscribe={"channel": "room:tea"})["subscribe"]["recoverable"]
            tea = {"channel": "room:tea"}
            assert ask(ada, publish={**tea, "data": {"text": ""}})["error"]["code"] == 107
            assert ask(ada, publish={**tea, "data": {"text": "hello"}})["publish"] == {}
            none = {"channel": "room:none", "data": {"text": "hello"}}
            assert ask(ada, publish=none)["error"]["code"] == 103
            past = ask(ada, history={**tea, "limit": 10})["history"]
            assert past["publications"][0]["data"] == {"text": "hello"}
            assert past["publications"][0]["info"]["conn_info"] == {"name": "Ada"}
            rooms = ask(ada, rpc={"method": "rooms"})["rpc"]["data"]
            assert rooms == ["room:chess", "room:tea"]
            assert ask(ada, rpc={"method": "x"})["error"]["code"] == 104


@pytest.mark.browser
@pytest.mark.timeout(120)
async def test_the_page_of_channels(browser, tmp_path):
    """`channels.html`, with the file of the npm package."""
    library = NODE / "node_modules" / "centrifuge" / "dist"
    if not library.exists():
        pytest.skip("needs `npm ci` in tests/clients")
    module = example("channels")
    (tmp_path / "index.html").write_text((EXAMPLES / "channels.html").read_text())
    app = Starlette(
        routes=[
            Mount("/static", StaticFiles(directory=library)),
            Mount("/page", StaticFiles(directory=tmp_path, html=True)),
            Mount("/", module["app"]),
        ],
        lifespan=module["hub"].lifespan,
    )
    served = Served(app)
    await served.start()
    context = await browser.new_context()
    try:
        page = await context.new_page()
        page.set_default_timeout(DEADLINE * 1000)
        await page.goto(f"http://127.0.0.1:{served.port}/page/")
        await until(lambda: module["hub"].channels)
        await module["hub"].publish("room:tea", {"text": "hello"})
        await page.wait_for_selector("li")
        for connection in list(served.server.server_state.connections):
            connection.transport.abort()
        for number in range(50):
            await module["hub"].publish("room:tea", {"text": str(number)})
        await page.wait_for_function("document.querySelectorAll('li').length >= 51")
        lines = await page.locator("li").all_text_contents()
        assert lines == ["hello", *map(str, range(50))]
    finally:
        await context.close()
        await served.stop()


def test_channels_depends():
    module = example("channels_depends")
    with TestClient(module["app"]) as client:
        with (
            pytest.raises(WebSocketDisconnect),
            client.websocket_connect("/connection/websocket"),
        ):
            pass
        url = "/connection/websocket?ticket=ticket-of-ada"
        with client.websocket_connect(url) as ada:
            ask(ada, connect={})
            assert ask(ada, subscribe={"channel": "user:ada"})["subscribe"] == {}
            assert ask(ada, subscribe={"channel": "user:bob"})["error"]["code"] == 103


def test_tokens():
    module = example("tokens")
    make = module["make_token"]
    with TestClient(module["app"]) as client:
        for token, code in [
            ("x", 103),
            (module["jwt"].encode({"sub": "ada", "exp": 1}, module["SECRET"], "HS256"), 109),
        ]:
            with client.websocket_connect("/connection/websocket") as socket:
                assert ask(socket, connect={"token": token})["error"]["code"] == code
        with client.websocket_connect("/connection/websocket") as ada:
            result = ask(ada, connect={"token": make("ada")})["connect"]
            assert result["expires"] is True
            assert ask(ada, refresh={"token": make("ada")})["refresh"]["expires"] is True
            token = make("ada", channel="room:tea")
            subscribe = {"channel": "room:tea", "token": token}
            assert ask(ada, subscribe=subscribe)["subscribe"]["expires"] is True
            other = {"channel": "room:chess", "token": token}
            assert ask(ada, subscribe=other)["error"]["code"] == 103


def test_who_is_here():
    module = example("who_is_here")
    with (
        TestClient(module["app"]) as client,
        client.websocket_connect("/ws/tea?user=ada") as ada,
        client.websocket_connect("/ws/tea?user=ada"),
    ):
        assert ada.receive_json()["joined"] == [{"id": "ada", "info": {"name": "Ada"}}]
        with client.websocket_connect("/ws/tea?user=bob"):
            assert ada.receive_json()["joined"] == [{"id": "bob", "info": {"name": "Bob"}}]
            assert client.get("/rooms/tea").json() == [
                {"id": "ada", "name": "Ada"},
                {"id": "bob", "name": "Bob"},
            ]
            assert client.get("/rooms/tea/count").json() == {"clients": 3, "users": 2}


def test_messages_to_users():
    module = example("messages_to_users")
    with (
        TestClient(module["app"]) as client,
        client.websocket_connect("/ws/lobby?user=ada") as ada,
        client.websocket_connect("/ws/lobby?user=bob") as bob,
    ):
        ada.send_text("hello")
        assert bob.receive_text() == "ada: hello"
        assert client.post("/users/ada/messages?text=psst").json() == {"clients": 1}
        assert ada.receive_text() == "psst"
        client.post("/users/ada/rooms/kitchen")
        client.post("/announcements?text=tea")
        assert ada.receive_text() == "tea"
        assert bob.receive_text() == "tea"
        assert {"user": "ada", "since": 2026} in client.get("/rooms/lobby").json()
        client.delete("/users/ada/rooms/kitchen")
        client.delete("/users/ada")
        with pytest.raises(WebSocketDisconnect) as closed:
            ada.receive_text()
        assert closed.value.code == 4001
        client.delete("/rooms/lobby")
        with pytest.raises(WebSocketDisconnect) as closed:
            bob.receive_text()
        assert closed.value.code == 4002
