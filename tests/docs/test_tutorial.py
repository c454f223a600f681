"""The tutorial, typed in as it stands: each step's program is taken from the page and served."""

from __future__ import annotations

import asyncio
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
STEPS = PAGE.split("\n## ")[1:6]
FILES = [
    "tutorial/1/chat.py",
    "tutorial/2/chat.py",
    "tutorial/3/chat.py",
    "tutorial/4/chat.py",
    "tutorial/5/chat.py",
    "tutorial/chat_page.html",
]


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
    if step >= 3:
        folder.joinpath("chat_page.html").write_text(shown(STEPS[2], "chat_page.html")[0])


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


async def talk_about_the_time(connect):
    async with connect("/ws/clock?name=Ann") as ann:
        await ann.send('"hello"')
        got = [await receive(ann) for _ in range(4)]
    assert {"here": ["Ann"]} in got
    assert {"name": "Ann", "text": "hello"} in got
    first, second = (message["seconds"] for message in got if "seconds" in message)
    assert second == first + 1


async def test_step_5(typed):
    chat, server = await typed(5)
    await talk_about_the_time(server.connect)
    await server.stop()
    assert not chat.hub.stats().open


async def test_the_command_runs_it_for_others(tmp_path):
    save(5, tmp_path)
    command = shlex.split(re.findall(r"^uvicorn chat:app --host.*$", PAGE, re.M)[0])
    assert command[-4:] == ["--host", "0.0.0.0", "--port", "8000"]
    here = [*command[:-4], "--port", "{port}"]  # a test listens on this machine alone
    server = await asyncio.to_thread(ServerProcess, here, tmp_path / "log", tmp_path)
    try:
        await talk_about_the_time(server.connect)
        await asyncio.to_thread(server.stop)
        assert "Traceback" not in server.log
    finally:
        server.kill()


@pytest.mark.parametrize("step", range(1, 6))
def test_a_step_shows_its_whole_program_and_marks_what_is_new(step):
    block, info = shown(STEPS[step - 1], "chat.py")
    assert block == (DOCS / "examples" / FILES[step - 1]).read_text()
    marked = {
        line
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", info.partition("hl_lines=")[2])
        for line in range(int(first), int(last or first) + 1)
    }
    before = (shown(STEPS[step - 2], "chat.py")[0] if step > 1 else block).splitlines()
    now = block.splitlines()
    same = difflib.SequenceMatcher(None, before, now, autojunk=False).get_matching_blocks()
    kept = {match.b + at + 1 for match in same for at in range(match.size)}
    assert marked == {at for at, line in enumerate(now, 1) if line and at not in kept}


def test_the_page_is_shown_whole():
    block, _ = shown(STEPS[2], "chat_page.html")
    assert block == (DOCS / "examples" / FILES[-1]).read_text()
