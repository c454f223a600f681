"""The demo: its page, its rooms, its ticker, and what it makes of clients that send nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import html
import json
import re
import time
from pathlib import Path

import pytest
import websockets
from starlette.testclient import TestClient

from starcast import BackendUnavailable, PublishQueueFull
from support import DEADLINE, Peer, until

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "demo_page.html").read_text()

pytestmark = pytest.mark.anyio


def unwrap(frame: str) -> dict:
    """Return the message in a frame, or where the room is: clients get each with its id."""
    content = json.loads(frame)
    return json.loads(content["data"]) if "data" in content else {"type": "begin", **content}


async def receive(client, kind: str) -> dict:
    """Return the next message of this type, past those of others."""
    async with asyncio.timeout(DEADLINE):
        while True:
            message = unwrap(await client.recv())
            if message["type"] == kind:
                return message


async def receive_count(client, count: int) -> None:
    """Read until the room says that this many are here."""
    while (await receive(client, "here"))["count"] != count:
        pass


async def say(client, text: str, author: str = "Mira") -> None:
    await client.send(json.dumps({"type": "message", "author": author, "text": text}))


async def close_code(client) -> int:
    """Read to the end and return the code that the server closed with."""
    async with asyncio.timeout(DEADLINE):
        with contextlib.suppress(websockets.ConnectionClosedError):
            async for _ in client:
                pass
    return client.close_code


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
    assert "import " not in script
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


def test_the_page_and_the_server_have_the_same_limits(demo_app):
    limits = set(map(int, re.findall(r'maxlength="(\d+)"', PAGE)))
    assert limits == {demo_app.MAX_NAME, demo_app.MAX_TEXT}
    assert f"const MAX_NAME = {demo_app.MAX_NAME};" in PAGE
    assert f"const MAX_TEXT = {demo_app.MAX_TEXT};" in PAGE


# The rooms


async def test_a_message_reaches_everybody_in_its_room_and_nobody_else(serve, demo_app):
    server = await serve(demo_app.app)
    async with (
        server.connect("/ws?room=tea") as mira,
        server.connect("/ws?room=tea") as jonas,
        server.connect("/ws?room=tea") as ada,
        server.connect("/ws?room=coffee") as stranger,
    ):
        me = (await receive(mira, "welcome"))["id"]
        await receive_count(mira, 3)
        before = datetime.datetime.now(datetime.UTC)
        await say(mira, "Hello, <b>tea</b>")
        copies = [await receive(client, "message") for client in (mira, jonas, ada)]
        assert copies[0] == copies[1] == copies[2]
        sent_at = datetime.datetime.fromisoformat(copies[0].pop("time"))
        assert before <= sent_at <= datetime.datetime.now(datetime.UTC)
        expected = {"type": "message", "id": me, "author": "Mira", "text": "Hello, <b>tea</b>"}
        assert copies[0] == expected
        await say(stranger, "Only coffee here")
        assert (await receive(stranger, "message"))["text"] == "Only coffee here"


async def test_without_a_room_it_is_the_lobby(serve, demo_app):
    server = await serve(demo_app.app)
    async with (
        server.connect("/ws") as one,
        server.connect("/ws?room=") as two,
        server.connect("/ws?room=lobby") as three,
    ):
        await receive_count(one, 3)
        await say(one, "hi")
        assert (await receive(two, "message"))["text"] == "hi"
        assert (await receive(three, "message"))["text"] == "hi"


async def test_messages_of_one_client_keep_their_order(serve, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/ws") as one, server.connect("/ws") as two:
        await receive_count(one, 2)
        for number in range(300):
            await say(one, str(number))
        for client in (one, two):
            got = [(await receive(client, "message"))["text"] for _ in range(300)]
            assert got == [str(number) for number in range(300)]


async def test_joining_and_leaving_is_told_with_the_count(serve, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/ws?room=tea") as first:
        here = {"type": "here", "worker": demo_app.WORKER, "count": 1}
        assert await receive(first, "here") == here
        async with server.connect("/ws?room=tea") as second:
            assert (await receive(first, "here"))["count"] == 2
            assert (await receive(second, "here"))["count"] == 2
            async with server.connect("/ws?room=coffee") as elsewhere:
                assert (await receive(elsewhere, "here"))["count"] == 1
        assert (await receive(first, "here"))["count"] == 1
        third = await server.connect("/ws?room=tea")
        assert (await receive(first, "here"))["count"] == 2
        third.transport.abort()  # gone without a word
        assert (await receive(first, "here"))["count"] == 1


async def test_typing_is_told_to_the_others_only(serve, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/ws") as mira, server.connect("/ws") as jonas:
        me = (await receive(mira, "welcome"))["id"]
        await receive_count(mira, 2)
        await mira.send(json.dumps({"type": "typing", "author": "Mira"}))
        assert await receive(jonas, "typing") == {"type": "typing", "id": me, "author": "Mira"}
        await say(mira, "there")
        assert unwrap(await mira.recv())["type"] == "message"  # and no typing before it


def test_it_works_with_the_test_client(demo_app):
    with TestClient(demo_app.app) as client:
        with client.websocket_connect("/ws") as one, client.websocket_connect("/ws") as two:
            one.send_json({"type": "message", "author": "Mira", "text": "hi"})
            for websocket in (one, two):
                while (message := unwrap(websocket.receive_text()))["type"] != "message":
                    pass
                assert message["text"] == "hi"
        with client.websocket_connect("/live/ticker") as websocket:
            assert websocket.receive_json()["values"]


def test_it_works_with_a_bare_test_client_where_each_socket_has_a_loop_of_its_own(demo_app):
    client = TestClient(demo_app.app)
    with client.websocket_connect("/ws") as one, client.websocket_connect("/ws") as two:
        one.send_json({"type": "message", "author": "Mira", "text": "hi"})
        while (message := unwrap(two.receive_text()))["type"] != "message":
            pass
        assert message["text"] == "hi"


async def broker_away(*args, **kwargs):
    raise BackendUnavailable("the broker did not answer in time")


async def test_what_the_broker_does_not_take_comes_back_to_its_author(serve, monkeypatch, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/ws") as mira:
        await receive_count(mira, 1)
        with monkeypatch.context() as patch:
            patch.setattr(demo_app.hub, "publish", broker_away)
            await mira.send(json.dumps({"type": "typing", "author": "Mira"}))
            await say(mira, "the kettle is on")
            assert (await receive(mira, "unsent"))["text"] == "the kettle is on"
        await say(mira, "again")
        assert (await receive(mira, "message"))["text"] == "again"


async def test_clients_are_told_when_the_broker_is_away_and_when_it_is_back(
    serve, monkeypatch, demo_app
):
    server = await serve(demo_app.app)
    async with server.connect("/ws") as mira:
        assert (await receive(mira, "welcome"))["away"] is False
        with monkeypatch.context() as patch:
            patch.setattr(demo_app, "broker_is_away", lambda: True)
            assert (await receive(mira, "broker"))["away"] is True
            async with server.connect("/ws") as jonas:
                assert (await receive(jonas, "welcome"))["away"] is True
        assert (await receive(mira, "broker"))["away"] is False


async def test_the_time_on_the_server(serve, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/ws") as mira:
        before = datetime.datetime.now(datetime.UTC)
        await mira.send(json.dumps({"type": "ping"}))
        answered = datetime.datetime.fromisoformat((await receive(mira, "pong"))["time"])
        assert before <= answered <= datetime.datetime.now(datetime.UTC)


async def test_rooms_are_told_again_and_again_who_is_here(serve, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/ws") as mira:
        await receive(mira, "here")
        # Those who have come to another worker since have to know it too.
        assert (await receive(mira, "here"))["count"] == 1


# What is kept


async def join(client) -> tuple[dict, list[str]]:
    """Return where the room is, and what was said before the server has said welcome."""
    begin, said = await receive(client, "begin"), []
    async with asyncio.timeout(DEADLINE):
        while (message := unwrap(await client.recv()))["type"] != "welcome":
            assert message["type"] == "message"  # nothing else is kept
            said.append(message["text"])
    return begin, said


async def test_a_newcomer_gets_what_was_said_last(serve, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/ws?room=tea") as mira:
        begin, said = await join(mira)
        assert "recovered" not in begin
        assert said == []
        await mira.send(json.dumps({"type": "typing", "author": "Mira"}))
        for number in range(60):
            await say(mira, str(number))
        for _ in range(60):
            await receive(mira, "message")
        async with server.connect("/ws?room=tea") as jonas:
            begin, said = await join(jonas)
            assert "recovered" not in begin
            assert said == [str(number) for number in range(10, 60)]
        async with server.connect("/ws?room=coffee") as stranger:
            assert (await join(stranger))[1] == []


async def test_who_was_away_gets_what_was_missed(serve, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/ws?room=tea") as mira:
        async with server.connect("/ws?room=tea") as jonas:
            begin, _ = await join(jonas)
        for number in range(demo_app.MAX_KEPT):
            await say(mira, str(number))
            await receive(mira, "message")
        since = f"/ws?room=tea&last_event_id={begin['id']}"
        async with server.connect(since) as jonas:
            again, said = await join(jonas)
            assert again["recovered"] is True
            assert said == [str(number) for number in range(demo_app.MAX_KEPT)]
        await say(mira, "one too many")
        await receive(mira, "message")
        async with server.connect(since) as jonas:
            again, said = await join(jonas)
            assert again["recovered"] is False
            assert len(said) == demo_app.MAX_KEPT
            assert said[-1] == "one too many"


# The ticker


async def test_the_ticker_sends_the_past_and_then_four_ticks_a_second(serve, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/live/ticker") as client, asyncio.timeout(DEADLINE):
        past = json.loads(await client.recv())["values"]
        started = time.monotonic()
        ticks = [json.loads(await client.recv()) for _ in range(9)]
        assert time.monotonic() - started > 1  # two seconds when nothing is in the way
    numbers = [*past, *(value for tick in ticks for value in tick["values"])]
    assert len(numbers) == 129
    everywhere = demo_app.values(300)
    assert any(everywhere[n : n + 120] == past for n in range(180))
    assert set(numbers) <= set(everywhere)  # whichever process it is
    assert ticks[-1]["delivered"] > ticks[0]["delivered"] > 0


async def test_who_listens_to_the_ticker_counts_in_no_room(serve, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/live/ticker") as listener, server.connect("/ws") as client:
        await listener.recv()
        assert (await receive(client, "here"))["count"] == 1


async def test_the_ticker_goes_on_after_a_tick_that_could_not_be_sent(serve, monkeypatch, demo_app):
    publish, calls = demo_app.hub.publish, []

    async def fail_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise PublishQueueFull("full")
        await publish(*args, **kwargs)

    monkeypatch.setattr(demo_app.hub, "publish", fail_once)
    server = await serve(demo_app.app)
    async with server.connect("/live/ticker") as client, asyncio.timeout(DEADLINE):
        await client.recv()
        assert "delivered" in json.loads(await client.recv())
    assert len(calls) >= 2


async def test_a_listener_that_is_gone_at_once_is_no_error(demo_app):
    peer = Peer()
    await peer.websocket.accept()
    peer.leave()
    await peer.websocket.receive()
    await demo_app.ticker(peer.websocket, demo_app.hub)
    assert len(demo_app.hub) == 0


async def test_the_ticker_ends_with_the_lifespan(demo_app):
    async with demo_app.lifespan(demo_app.app):
        (task,) = tickers()
        await asyncio.sleep(0)
        assert not task.done()
    assert task.cancelled()
    assert tickers() == []


async def test_nothing_is_left_when_the_server_has_stopped(serve, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/ws") as client, server.connect("/live/ticker") as listener:
        await until(lambda: len(demo_app.hub) == 2)
        assert len(tickers()) == 1
        await server.stop()
        assert await close_code(client) in (1001, 1012)
        assert await close_code(listener) in (1001, 1012)
    assert tickers() == []
    assert len(demo_app.hub) == 0
    assert demo_app.hub.channels == {}


# Bad input


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("hello", 1007),
        ("{", 1007),
        ("[" * 100_000, 1007),
        ('{"type":"message","author":"M","text":"\\ud800"}', 1007),
        (b"\xff", 1007),
        ("null", 1008),
        ("[]", 1008),
        ('"message"', 1008),
        ("{}", 1008),
        ('{"type":"message"}', 1008),
        ('{"type":"shout","author":"M","text":"x"}', 1008),
        ('{"type":"message","author":"M","text":7}', 1008),
        ('{"type":"message","author":["M"],"text":"x"}', 1008),
        ('{"type":"message","author":"","text":"x"}', 1008),
        ('{"type":"message","author":"M","text":""}', 1008),
        ('{"type":"message","author":"%s","text":"x"}' % ("M" * 25), 1008),
        ('{"type":"message","author":"M","text":"%s"}' % ("x" * 501), 1008),
        ('{"type":"typing"}', 1008),
        ('{"type":"typing","author":"%s"}' % ("M" * 25), 1008),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_who_sends_nonsense_is_closed_and_nobody_else_notices(serve, frame, code, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/ws") as good, server.connect("/ws") as bad:
        await receive_count(good, 2)
        await bad.send(frame)
        assert await close_code(bad) == code
        await receive_count(good, 1)
        await say(good, "still here")
        assert (await receive(good, "message"))["text"] == "still here"


async def test_what_just_fits_is_taken(serve, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/ws") as client:
        await say(client, "😀" * demo_app.MAX_TEXT, author="ß" * demo_app.MAX_NAME)
        message = await receive(client, "message")
        assert message["text"] == "😀" * demo_app.MAX_TEXT
        assert message["author"] == "ß" * demo_app.MAX_NAME


async def test_only_what_a_message_has_is_passed_on(serve, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/ws") as client:
        forged = {"type": "message", "author": "M", "text": "x", "id": "you", "time": "1999"}
        await client.send(json.dumps({**forged, "html": "<b>"}))
        message = await receive(client, "message")
        assert set(message) == {"type", "id", "author", "text", "time"}
        assert message["id"] != "you"
        assert message["time"] != "1999"


@pytest.mark.parametrize("frame", ["x", b"x", '{"values":[1000000]}'])
async def test_who_talks_to_the_ticker_is_closed(serve, frame, demo_app):
    server = await serve(demo_app.app)
    async with server.connect("/live/ticker") as client:
        await client.send(frame)
        assert await close_code(client) == 1008
    await until(lambda: len(demo_app.hub) == 0)


@pytest.mark.parametrize("path", ["/ws", "/live/ticker"])
async def test_a_page_from_another_host_is_refused(serve, path, demo_app):
    server = await serve(demo_app.app)
    with pytest.raises(websockets.InvalidStatus) as info:
        await server.connect(path, origin="https://evil.example")
    assert info.value.response.status_code == 403
    async with server.connect(path, origin="http://127.0.0.1:5173"):
        pass


@pytest.mark.parametrize("room", ["x" * 201, "a%00b", "a%0Ab"])
async def test_a_room_with_an_impossible_name_is_refused(serve, room, demo_app):
    server = await serve(demo_app.app)
    with pytest.raises(websockets.InvalidStatus) as info:
        await server.connect(f"/ws?room={room}")
    assert info.value.response.status_code == 403
