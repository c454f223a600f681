"""The files for web pages that a mount answers GET with."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

import starcast
from starcast import Broadcast
from support import until
from test_mount import fastapi

pytestmark = pytest.mark.anyio

STATIC = Path(starcast.__file__).parent / "static"
SCRIPT, TYPES = STATIC / "starcast.js", STATIC / "starcast.d.ts"


async def get(server, path: str, *, encoding: str = "identity", known: str = "") -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://{server.host}:{server.port}") as client:
        headers = {"Accept-Encoding": encoding, "If-None-Match": known}
        return await client.get(path, headers=headers)


def nobody(client, channel: str) -> bool:
    raise AssertionError("not asked")


@pytest.fixture
async def server(serve):
    app = Starlette()
    app.mount("/live", Broadcast().app(authorize=nobody, sse=None))
    return await serve(app)


def test_the_script_is_small():
    assert len(gzip.compress(SCRIPT.read_bytes(), 9)) <= 4096
    assert "import " not in SCRIPT.read_text()


@pytest.mark.parametrize(
    ("file", "kind"), [(SCRIPT, "text/javascript"), (TYPES, "text/plain")], ids=["js", "d.ts"]
)
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_a_mount_has_the_script_and_its_types(server, file, kind, encoding):
    path = f"/live/{file.name}"
    answer = await get(server, path, encoding=encoding)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers.get("content-encoding", "identity") == encoding
    assert answer.headers["vary"] == "Accept-Encoding"
    assert answer.text == file.read_text()

    tag = answer.headers["etag"]
    for known in (tag, f'"other", W/{tag}'):
        again = await get(server, path, encoding=encoding, known=known)
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert (await get(server, path, encoding=encoding, known='"other"')).status_code == 200
    other = await get(server, path, encoding="identity" if encoding == "gzip" else "gzip")
    assert other.headers["etag"] != tag


async def test_there_are_no_other_files(server):
    for path in ("/live/starcast", "/live/static/starcast.js", "/live/py.typed", "/live/../a.js"):
        assert (await get(server, path)).status_code == 404


async def test_a_channel_of_that_name(serve):
    hub = Broadcast()
    server = await serve(Starlette(routes=[Mount("/live", hub)]))
    async with server.connect("/live/starcast.js") as client:
        await until(lambda: hub.channels == {"starcast.js": 1})
        await hub.publish("starcast.js", "hello")
        assert await client.recv() == "hello"
    await until(lambda: not hub.channels)
    assert (await get(server, "/live/starcast.js")).text == SCRIPT.read_text()


async def test_the_script_behind_a_prefix_that_only_the_app_knows(serve):
    app = fastapi("/api")
    app.mount("/live", Broadcast().app())
    server = await serve(app)
    for path in ("/live/starcast.js", "/api/live/starcast.js"):
        assert (await get(server, path)).text == SCRIPT.read_text()


async def test_the_script_without_the_channels_of_a_hub(serve):
    files = StaticFiles(packages=[("starcast", "static")])
    server = await serve(Starlette(routes=[Mount("/js", files)]))
    answer = await get(server, "/js/starcast.js")
    assert answer.text == SCRIPT.read_text()
    assert answer.headers["content-type"].startswith("text/javascript")


# The types

USE = """
import { connect, type Member, type StarcastError } from "./starcast.js";

type Line = { text: string };
const live = connect("/live", {
  getToken: async () => (await fetch("/token")).text(),
  onConnect: ({ client }) => client.length,
  onDisconnect: ({ code, retryIn }) => code + (retryIn ?? 0),
});
const here: Member[] = [];
const room = live.channel<Line>("room", {
  since: { epoch: "e", offset: 1 },
  onMessage: (line, { offset = 0, info }) => `${line.text} ${offset + 1} ${info?.user}`,
  onSubscribe: ({ recovered, missed }) => recovered === false && missed > 0,
  onMembers: (members) => here.push(...members),
  onError: ({ code, message }) => `${code} ${message}`,
});
await room.publish({ text: "hello" });
// @ts-expect-error  because it is no Line
await room.publish({ words: "hello" });
// @ts-expect-error  because there is no such handler
live.channel("other", { onMesage: () => {} });
const { publications } = await room.history({ limit: 3, reverse: true });
const texts: string[] = publications.map(({ data }) => data.text);
const sum: number = await live.rpc<number>("add", [1, 2]);
const error = (await live.rpc("none").catch((error) => error)) as StarcastError;
console.log(texts, sum, error.temporary, room.ready, live.ended);
room.unsubscribe();
live.close();
live.open();
"""


@pytest.mark.skipif(shutil.which("tsc") is None, reason="needs TypeScript")
def test_the_types(tmp_path):
    shutil.copytree(STATIC, tmp_path, dirs_exist_ok=True)
    (tmp_path / "use.ts").write_text(USE)
    command = ["tsc", "--strict", "--noEmit", "--target", "es2022", "--module", "esnext"]
    command += ["--moduleResolution", "bundler", "--lib", "es2022,dom", "use.ts"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_types_name_what_the_script_has():
    """Without a compiler: each handler that the script calls, and what `connect` returns."""
    script, types = SCRIPT.read_text(), TYPES.read_text()
    handlers = set(re.findall(r'"(on[A-Z]\w+)"', script))
    assert handlers == set(re.findall(r"^  (on\w+)\?", types, re.M))
    for name in ("channel", "publish", "rpc", "open", "close", "history", "presence"):
        assert re.search(rf"\b{name}\b", script)
        assert re.search(rf"^  {name}(<.*?>)?\(", types, re.M)
