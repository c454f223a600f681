"""The tutorial, typed in as it stands: each step's program is taken from the page and served."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import re
import shlex

import httpx
import pytest
import websockets

from server_process import ServerProcess
from support import program, until
from test_docs import BLOCK, DOCS, TITLE

pytestmark = pytest.mark.anyio

PAGE = (DOCS / "tutorial.md").read_text()
STEPS = PAGE.split("\n## ")[1:7]
FILES = [
    "tutorial/1/chat.py",
    "tutorial/2/chat.py",
    "tutorial/3/chat.py",
    "tutorial/4/chat.py",
    "tutorial/5/chat.py",
    "tutorial/6/chat.py",
]
PAGES = {3: "tutorial/chat_page.html", 6: "tutorial/6/chat_page.html"}  # by step


def shown(text, name):
    """The block that is to be saved under this name, and what stands in its first line."""
    ((info, block),) = [
        (info, block)
        for _, _, info, block in BLOCK.findall(text)
        if TITLE.search(info) and TITLE.search(info)[1] == name
    ]
    return block, info


def save(step, folder):
    """Do what a reader does who has come as far as this step."""
    folder.joinpath("chat.py").write_text(shown(STEPS[step - 1], "chat.py")[0])
    for number in PAGES:
        if step >= number:
            page, _ = shown(STEPS[number - 1], "chat_page.html")
            folder.joinpath("chat_page.html").write_text(page)


@pytest.fixture
def typed(tmp_path, serve):
    """`module, server = await typed(step)` saves the files of the step and runs the program."""

    async def start(step):
        save(step, tmp_path)
        module = program(tmp_path / "chat.py")
        return module, await serve(module.app)

    return start


async def receive(client):
    return json.loads(await client.recv())


async def receive_data(client):
    """The next message of a client with ids, past what has none."""
    while "data" not in (content := await receive(client)):
        pass
    return json.loads(content["data"])


async def test_step_1(typed):
    _, server = await typed(1)
    async with server.connect("/ws") as ann, server.connect("/ws") as ben:
        await ann.send("hello")
        assert await ann.recv() == await ben.recv() == "hello"


async def test_step_2(typed):
    chat, server = await typed(2)
    async with (
        server.connect("/ws/tea") as ann,
        server.connect("/ws/tea") as ben,
        server.connect("/ws/bar") as eve,
    ):
        await until(lambda: chat.hub.channels == {"room:tea": 2, "room:bar": 1})
        await ann.send("tea?")
        assert await ben.recv() == "tea?"
        await eve.send("beer?")
        assert await eve.recv() == "beer?"


async def test_step_3(typed):
    _, server = await typed(3)
    async with httpx.AsyncClient(trust_env=False) as http:
        page = await http.get(f"http://{server.host}:{server.port}/?room=tea&name=Ann")
    assert "<title>Chat</title>" in page.text
    async with server.connect("/ws/tea?name=Ann") as ann, server.connect("/ws/tea") as ben:
        await ann.send('"hello"')
        assert await ann.recv() == await ben.recv() == '{"name":"Ann","text":"hello"}'
        await ben.send('"hi"')
        assert await receive(ann) == await receive(ben) == {"name": "somebody", "text": "hi"}
        for client, text, code in (ann, '{"name": "Ben"}', 1008), (ben, "no JSON", 1007):
            await client.send(text)
            with pytest.raises(websockets.ConnectionClosed) as info:
                await client.recv()
            assert info.value.rcvd.code == code


async def test_step_4(typed):
    chat, server = await typed(4)
    async with server.connect("/ws/tea?name=Ben") as ben:
        assert await receive(ben) == {"here": ["Ben"]}
        async with server.connect("/ws/tea?name=Ann") as ann:
            assert await receive(ann) == await receive(ben) == {"here": ["Ann", "Ben"]}
            await ann.send('"hello"')
            assert await receive(ben) == {"name": "Ann", "text": "hello"}
        assert await receive(ben) == {"here": ["Ben"]}
    await until(lambda: not chat.names)
    assert len(chat.hub) == 0


async def talk_about_the_time(connect, receive=receive, hello='"hello"', count=4):
    async with connect("/ws/clock?name=Ann") as ann:
        await ann.send(hello)
        got = [await receive(ann) for _ in range(count)]
    assert {"here": ["Ann"]} in got
    assert {"name": "Ann", "text": "hello"} in got
    first, second = (message["seconds"] for message in got if "seconds" in message)
    assert second == first + 1


async def test_step_5(typed):
    chat, server = await typed(5)
    await talk_about_the_time(server.connect)
    await server.stop()
    assert not chat.hub.stats().open


HELLO = '{"key":"1","text":"hello"}'


async def test_step_6(typed):
    chat, server = await typed(6)
    await talk_about_the_time(server.connect, receive_data, HELLO, 5)
    await until(lambda: not chat.names)
    async with server.connect("/ws/tea?name=Ann") as ann, server.connect("/ws/tea") as ben:
        begin = await receive(ben)
        assert "recovered" not in begin
        for key in ("a", "a", "b"):  # sent twice
            await ann.send(json.dumps({"key": key, "text": key * 3}))
        for client in (ann, ben):
            said = []
            while len(said) < 2:
                content = await receive(client)
                if content.get("channel") == "room:tea" and "data" in content:
                    said.append(json.loads(content["data"]))
            assert said == [{"name": "Ann", "text": "aaa"}, {"name": "Ann", "text": "bbb"}]
        while await receive_data(ann) != {"sent": "b"}:
            pass
        async with server.connect(f"/ws/tea?last_event_id={begin['id']}") as again:
            resumed = await receive(again)
            assert resumed == {
                "channel": "room:tea",
                "id": begin["id"],
                "past": 2,
                "recovered": True,
            }
            assert [await receive_data(again) for _ in range(2)] == said
        async with server.connect("/ws/tea?last_event_id=5f3a9c01d2e4-17") as away:
            assert (await receive(away))["recovered"] is False
            assert [await receive_data(away) for _ in range(2)] == said
        await ben.send('"hello"')
        with contextlib.suppress(websockets.ConnectionClosedError):
            async for _ in ben:
                pass
        assert ben.close_code == 1008


async def test_step_6_keeps_what_the_page_says(typed):
    chat, _ = await typed(6)
    assert chat.kept.size == chat.Chat.history == 50
    assert chat.kept.ttl == 3600
    assert "the last 50 messages of each room for an hour" in STEPS[5]


async def test_the_command_runs_it_for_others(tmp_path):
    save(6, tmp_path)
    command = shlex.split(re.findall(r"^uvicorn chat:app --host.*$", PAGE, re.M)[0])
    assert command[-4:] == ["--host", "0.0.0.0", "--port", "8000"]
    here = [*command[:-4], "--port", "{port}"]  # a test listens on this machine alone
    server = await asyncio.to_thread(ServerProcess, here, tmp_path / "log", tmp_path)
    try:
        await talk_about_the_time(server.connect, receive_data, HELLO, 5)
        await asyncio.to_thread(server.stop)
        assert "Traceback" not in server.log
    finally:
        server.kill()


def new_lines(block, info, before):
    """The numbers of the lines that are marked, and of those that are new."""
    marked = {
        line
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", info.partition("hl_lines=")[2])
        for line in range(int(first), int(last or first) + 1)
    }
    before, now = before.splitlines(), block.splitlines()
    same = difflib.SequenceMatcher(None, before, now, autojunk=False).get_matching_blocks()
    kept = {match.b + at + 1 for match in same for at in range(match.size)}
    return marked, {at for at, line in enumerate(now, 1) if line and at not in kept}


@pytest.mark.parametrize("step", range(1, 7))
def test_a_step_shows_its_whole_program_and_marks_what_is_new(step):
    block, info = shown(STEPS[step - 1], "chat.py")
    assert block == (DOCS / "examples" / FILES[step - 1]).read_text()
    before = shown(STEPS[step - 2], "chat.py")[0] if step > 1 else block
    marked, new = new_lines(block, info, before)
    assert marked == new


def test_the_page_is_shown_whole():
    first, second = (shown(STEPS[step - 1], "chat_page.html") for step in PAGES)
    for (block, _), file in zip((first, second), PAGES.values(), strict=True):
        assert block == (DOCS / "examples" / file).read_text()
    marked, new = new_lines(*second, first[0])
    assert marked == new
