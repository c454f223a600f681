"""The demo: its page, its rooms, its ticker, and what it makes of clients that send nonsense."""

from __future__ import annotations

import asyncio
import datetime
import html
import re
import time
from pathlib import Path

import pytest
import websockets
from starlette.testclient import TestClient

from channels.speaking import Talker
from docs.chatting import tab
from starcast import BackendUnavailable, PublishQueueFull
from support import DEADLINE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "demo_page.html").read_text()

pytestmark = pytest.mark.anyio


def tickers() -> list[asyncio.Task]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "ticker"]


# The page


def test_the_file_is_short():
    assert len((ROOT / "demo_app.py").read_text().splitlines()) < 250


def test_the_page_is_served(demo_app):
    response = TestClient(demo_app.app).get("/?room=tea")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.text == PAGE


def test_the_server_on_the_page_is_a_program_that_works():
    program = html.unescape(re.search("<pre>\n(.*?)</pre>", PAGE, re.S)[1])
    assert len(program.split("\n")) <= 12
    module = {}
    exec(compile(program, "<page>", "exec"), module)
    client = TestClient(module["app"])
    with client.websocket_connect("/ws/tea") as ann, client.websocket_connect("/ws/tea") as ben:
        ann.send_text("hello")
        assert ann.receive_text() == ben.receive_text() == "hello"


def test_the_page_leads_to_the_tutorial(demo_app):
    assert '<a href="tutorial">' in PAGE
    response = TestClient(demo_app.app).get("/tutorial")
    assert response.headers["content-type"].startswith("text/plain")
    assert response.text.startswith("# Tutorial")


def test_the_page_needs_nothing_from_elsewhere_and_makes_no_html_of_text():
    assert "//" not in re.sub(r"\s+//.*", "", PAGE)  # neither https:// nor //cdn
    (script,) = re.findall("<script.*?</script>", PAGE, re.S)
    assert re.findall("import .*", script) == ['import { connect } from "./js/starcast.js";']
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


def test_the_page_and_the_server_have_the_same_limits(demo_app):
    limits = set(map(int, re.findall(r'maxlength="(\d+)"', PAGE)))
    assert limits == {demo_app.MAX_NAME, demo_app.MAX_TEXT}
    assert f"const MAX_NAME = {demo_app.MAX_NAME};" in PAGE
    assert f"const MAX_TEXT = {demo_app.MAX_TEXT};" in PAGE
    assert f"const MAX_PAST = {demo_app.MAX_KEPT};" in PAGE


def test_the_script_is_that_of_the_package(demo_app):
    response = TestClient(demo_app.app).get("/js/starcast.js")
    assert response.text == (ROOT / "starcast" / "static" / "starcast.js").read_text()


# The rooms


async def test_a_message_reaches_everybody_in_its_room_and_nobody_else(serve, demo_app):
    server = await serve(demo_app.app)
    async with (
        tab(server, "Mira", "tea") as mira,
        tab(server, "Jonas", "tea") as jonas,
        tab(server, "Ada", "tea") as ada,
        tab(server, "Sam", "coffee") as stranger,
    ):
        before = datetime.datetime.now(datetime.UTC)
        await mira.say("Hello, <b>tea</b>")
        copies = [await client.heard() for client in (mira, jonas, ada)]
        assert copies[0] == copies[1] == copies[2]
        data, info = copies[0]["data"], copies[0]["info"]
        sent_at = datetime.datetime.fromisoformat(data.pop("time"))
        assert before <= sent_at <= datetime.datetime.now(datetime.UTC)
        assert data == {"text": "Hello, <b>tea</b>"}
        assert (info["user"], info["conn_info"]) == (mira.welcome["user"], {"name": "Mira"})
        await stranger.say("Only coffee here")
        assert await stranger.hears() == "Only coffee here"


async def test_messages_of_one_client_keep_their_order(serve, demo_app):
    server = await serve(demo_app.app)
    async with tab(server) as one, tab(server) as two:
        for number in range(300):
            await one.say(str(number))
        for client in (one, two):
            got = [await client.hears() for _ in range(300)]
            assert got == [str(number) for number in range(300)]


async def test_who_is_here(serve, demo_app):
    server = await serve(demo_app.app)
    async with tab(server, "Mira", "tea") as mira, tab(server, "Sam", "coffee") as stranger:
        await mira.sees("Mira")
        async with tab(server, "Jonas", "tea") as jonas, tab(server, "Ada", "tea") as ada:
            await mira.sees("Ada", "Jonas", "Mira")
            await jonas.sees("Ada", "Jonas", "Mira")
            await stranger.sees("Sam")
            ada.socket.transport.abort()  # gone without a word
        await mira.sees("Mira")


async def test_nobody_else_is_the_same_user(serve, demo_app):
    server = await serve(demo_app.app)
    users = []
    for name, secret in ("Mira", "a"), ("Mira", "a"), ("Mira", "b"), ("Jonas", "a"), ("Mira", ""):
        async with tab(server, name, secret=secret) as client:
            users.append(client.welcome["user"])
    assert users[0] == users[1]
    assert len({*users}) == 4
    async with tab(server, "Mira") as client:  # without a secret it is another one each time
        assert client.welcome["user"] not in users


async def test_typing_is_told_and_not_kept(serve, demo_app):
    server = await serve(demo_app.app)
    async with tab(server, "Mira") as mira, tab(server, "Jonas") as jonas:
        await jonas.get("subscribe", channel="typing:lobby")
        await mira.get("publish", channel="typing:lobby")
        while (push := await jonas.push())["channel"] != "typing:lobby":
            pass
        assert push["pub"]["data"] == {}
        assert push["pub"]["info"]["conn_info"] == {"name": "Mira"}
        assert await jonas.error("history", channel="typing:lobby") == 103


def test_it_works_with_the_test_client(demo_app):
    with TestClient(demo_app.app) as client, client.websocket_connect("/live") as websocket:
        websocket.send_json({"id": 1, "connect": {"data": {"name": "Mira"}}})
        assert websocket.receive_json()["connect"]["data"]["values"]
        websocket.send_json({"id": 2, "subscribe": {"channel": "room:tea"}})
        websocket.send_json({"id": 3, "publish": {"channel": "room:tea", "data": "hi"}})
        lines: list[str] = []
        while not any('"text":"hi"' in line for line in lines):
            lines += websocket.receive_text().split("\n")


async def test_a_client_is_told_that_the_broker_did_not_take_it(serve, monkeypatch, demo_app):
    async def away(*args):
        raise BackendUnavailable("the broker did not answer in time")

    server = await serve(demo_app.app)
    with monkeypatch.context() as patch:
        patch.setattr(demo_app.Live, "on_publish", away)
        async with tab(server) as mira:
            assert await mira.error("publish", channel="room:lobby", data="hello") == 100
    async with tab(server) as mira:
        await mira.say("again")
        assert await mira.hears() == "again"


async def test_clients_are_told_when_the_broker_is_away_and_when_it_is_back(
    serve, monkeypatch, demo_app
):
    server = await serve(demo_app.app)
    async with tab(server) as mira:
        assert mira.welcome["away"] is False
        with monkeypatch.context() as patch:
            patch.setattr(demo_app, "broker_is_away", lambda: True)
            assert await mira.told() == {"away": True}
            async with tab(server) as jonas:
                assert jonas.welcome["away"] is True
        assert await mira.told() == {"away": False}


async def test_the_time_on_the_server(serve, demo_app):
    server = await serve(demo_app.app)
    async with tab(server) as mira:
        before = datetime.datetime.now(datetime.UTC)
        answer = await mira.get("rpc", method="time")
        now = datetime.datetime.now(datetime.UTC)
        assert before <= datetime.datetime.fromisoformat(answer["data"]) <= now
        assert await mira.error("rpc", method="date") == 104


# What is kept


async def test_a_newcomer_gets_what_was_said_last(serve, demo_app):
    server = await serve(demo_app.app)
    async with tab(server, room="tea") as mira:
        for number in range(60):
            await mira.say(str(number))
        for _ in range(60):
            await mira.heard()
        async with tab(server, room="tea") as jonas:
            past = await jonas.get("history", channel="room:tea", limit=-1)
            said = [publication["data"]["text"] for publication in past["publications"]]
            assert said == [str(number) for number in range(10, 60)]
        async with tab(server, room="coffee") as stranger:
            past = await stranger.get("history", channel="room:coffee", limit=-1)
            assert past["publications"] == []


async def test_who_was_away_gets_what_was_missed(serve, demo_app):
    server = await serve(demo_app.app)
    async with tab(server, room="tea") as mira:
        since = {key: mira.joined[key] for key in ("epoch", "offset")}
        for number in range(demo_app.MAX_KEPT):
            await mira.say(str(number))
            await mira.heard()
        async with tab(server, room="tea", recover=True, **since) as jonas:
            assert jonas.joined["recovered"] is True
            said = [it["data"]["text"] for it in jonas.joined["publications"]]
            assert said == [str(number) for number in range(demo_app.MAX_KEPT)]
        await mira.say("one too many")
        await mira.heard()
        async with tab(server, room="tea", recover=True, **since) as jonas:
            assert jonas.joined["recovered"] is False


# The ticker


async def test_the_ticker_sends_the_past_and_then_four_ticks_a_second(serve, demo_app):
    server = await serve(demo_app.app)
    async with tab(server) as client, asyncio.timeout(DEADLINE):
        past = client.welcome["values"]
        started = time.monotonic()
        ticks = [await client.ticks() for _ in range(9)]
        assert time.monotonic() - started > 1  # two seconds when nothing is in the way
    numbers = [*past, *(value for tick in ticks for value in tick["values"])]
    assert len(numbers) == 129
    everywhere = demo_app.values(300)
    assert any(everywhere[n : n + 120] == past for n in range(180))
    assert set(numbers) <= set(everywhere)  # whichever process it is
    assert ticks[-1]["delivered"] > ticks[0]["delivered"]


async def test_the_ticker_goes_on_after_a_tick_that_could_not_be_sent(serve, monkeypatch, demo_app):
    publish, calls = demo_app.hub.publish, []

    async def fail_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise PublishQueueFull("full")
        await publish(*args, **kwargs)

    monkeypatch.setattr(demo_app.hub, "publish", fail_once)
    server = await serve(demo_app.app)
    async with tab(server) as client, asyncio.timeout(DEADLINE):
        assert "delivered" in await client.ticks()
    assert len(calls) >= 2


async def test_the_ticker_ends_with_the_lifespan(demo_app):
    async with demo_app.lifespan(demo_app.app):
        (task,) = tickers()
        await asyncio.sleep(0)
        assert not task.done()
    assert task.cancelled()
    assert tickers() == []


async def test_nothing_is_left_when_the_server_has_stopped(serve, demo_app):
    server = await serve(demo_app.app)
    async with tab(server) as client:
        assert len(demo_app.hub) == 1
        assert len(tickers()) == 1
        await server.stop()
        assert (await client.closed())[0] in (1001, 1012)
    assert tickers() == []
    assert len(demo_app.hub) == 0
    assert demo_app.hub.channels == {}


# Bad input


@pytest.mark.parametrize(
    "frame",
    [
        "hello",
        "{",
        "[" * 100_000,
        '{"id":9,"publish":{"channel":"room:lobby","data":"\\ud800"}}',
        "null",
        "[]",
        '"message"',
        '{"type":"message","author":"M","text":"x"}',
        '{"id":9,"send":{"data":"x"}}',
    ],
    ids=lambda frame: frame[:50],
)
async def test_who_sends_nonsense_is_closed_and_nobody_else_notices(serve, frame, demo_app):
    server = await serve(demo_app.app)
    async with tab(server, "Mira") as good, tab(server, "Jonas") as bad:
        await bad.raw(frame)
        code, _ = await bad.closed()
        assert 3500 <= code < 4000  # it does not come back
        await good.sees("Mira")
        await good.say("still here")
        assert await good.hears() == "still here"


@pytest.mark.parametrize("data", [None, 7, "", "x" * 501, ["x"], {"text": "x"}])
async def test_what_is_no_message_is_an_error(serve, data, demo_app):
    server = await serve(demo_app.app)
    async with tab(server) as client:
        assert await client.error("publish", channel="room:lobby", data=data) == 107
        await client.say("still here")
        assert await client.hears() == "still here"


async def test_what_just_fits_is_taken(serve, demo_app):
    server = await serve(demo_app.app)
    async with tab(server, "ß" * demo_app.MAX_NAME) as client:
        await client.say("😀" * demo_app.MAX_TEXT)
        message = await client.heard()
        assert message["data"]["text"] == "😀" * demo_app.MAX_TEXT
        assert message["info"]["conn_info"]["name"] == "ß" * demo_app.MAX_NAME


@pytest.mark.parametrize("data", [None, {}, {"name": ""}, {"name": "M" * 25}, {"name": ["M"]}])
async def test_who_has_no_name_is_not_let_in(serve, data, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/live") as socket:
        assert await Talker(socket).error("connect", data=data) == 107


@pytest.mark.parametrize("channel", ["ticker:", "news", "rooms:tea", "room", ""])
async def test_other_channels_are_nobodys(serve, channel, demo_app):
    server = await serve(demo_app.app)
    if channel == "ticker:":
        channel = demo_app.TICKER
    async with tab(server) as client:
        error = await client.error("publish", channel=channel, data=[1])
        assert error == 107
        if channel != "room":
            assert await client.error("subscribe", channel=channel) in (103, 105, 107)


async def test_a_page_from_another_host_is_refused(serve, demo_app):
    server = await serve(demo_app.app)
    with pytest.raises(websockets.InvalidStatus) as info:
        await server.connect("/live", origin="https://evil.example")
    assert info.value.response.status_code == 403
    async with server.connect("/live", origin="http://127.0.0.1:5173"):
        pass


@pytest.mark.parametrize("room", ["x" * 201, "a\0b", "a\nb"])
async def test_a_room_with_an_impossible_name_is_refused(serve, room, demo_app):
    server = await serve(demo_app.app)
    async with tab(server) as client:
        assert await client.error("subscribe", channel=f"room:{room}") == 107
