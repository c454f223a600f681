"""A server of the client protocol that says what a test wants, and a page that connects to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from starcast import Broadcast
from support import DEADLINE, listening

# `seen` has what handlers were called with; `log("onMessage")` is a handler that adds to it.
PAGE = """
<!doctype html>
<link rel="icon" href="data:,">
<script type="module">
  import { connect } from "./live/starcast.js"
  window.connect = connect
  window.seen = []
  const plain = it => it instanceof Error
    ? { code: it.code, message: it.message, temporary: !!it.temporary }
    : it === undefined ? null : JSON.parse(JSON.stringify(it))  // without what is undefined
  window.log = name => (...args) => { seen.push([name, ...args.map(plain)]) }
  window.logs = (...names) => Object.fromEntries(names.map(name => [name, log(name)]))
  window.failure = promise => promise.then(value => ({ value }), plain)
  window.loaded = true
</script>
"""


def app(*routes: BaseRoute) -> Starlette:
    """An app with the page at `/page/`, whose script is from a mount of a hub."""
    page = Route("/page/", lambda request: HTMLResponse(PAGE))
    return Starlette(routes=[*routes, page, Mount("/page/live", Broadcast().app())])


class Peer:
    """A connection of the page, as the server sees it."""

    def __init__(self, websocket: WebSocket) -> None:
        self.websocket = websocket
        self.frames: list[str] = []
        self.commands: list[dict[str, Any]] = []  # those that no test has asked for
        self.code: int | None = None  # that the page closed with
        self.came = asyncio.Event()
        self.over = asyncio.Event()

    async def read(self) -> None:
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                frame = await self.websocket.receive_text()
                self.frames.append(frame)
                self.commands += map(json.loads, frame.split("\n"))
                self.came.set()
                self.came = asyncio.Event()

    async def next(self, method: str) -> dict[str, Any]:
        """Return the next command, which is this one; with its `id`."""
        async with asyncio.timeout(DEADLINE):
            while not self.commands:
                assert not self.over.is_set(), "the connection has ended"
                await self.came.wait()
        command = self.commands.pop(0)
        assert method in command or (method == "pong" and not command), command
        return {"id": command.get("id"), **command.get(method, {})}

    async def send(self, *messages: dict[str, Any]) -> None:
        """Send replies and pushes, in one frame."""
        await self.websocket.send_text("\n".join(map(json.dumps, messages)))

    async def push(self, channel: str, **content: Any) -> None:
        await self.send({"push": {"channel": channel, **content}})

    async def answer(self, method: str, **result: Any) -> dict[str, Any]:
        """Answer the next command, which is this one."""
        command = await self.next(method)
        await self.send({"id": command["id"], method: result})
        return command

    async def refuse(self, method: str, code: int, **error: Any) -> dict[str, Any]:
        command = await self.next(method)
        await self.send({"id": command["id"], "error": {"code": code, "message": "no", **error}})
        return command

    async def close(self, code: int = 1012) -> None:
        await self.websocket.close(code)


class Script:
    """The server. Each connection waits until a test accepts it."""

    def __init__(self) -> None:
        self.app = app(WebSocketRoute("/page/socket", self.endpoint))
        self.begin()

    def begin(self) -> None:
        """Forget what was before this test."""
        self.peers: asyncio.Queue[Peer] = asyncio.Queue()
        self.made = 0  # connections

    async def endpoint(self, websocket: WebSocket) -> None:
        await websocket.accept()
        self.made += 1
        peer = Peer(websocket)
        self.peers.put_nowait(peer)
        await peer.read()
        peer.over.set()
        peer.came.set()

    async def accept(self) -> Peer:
        """Return the next connection, in which nothing was said yet."""
        return await asyncio.wait_for(self.peers.get(), DEADLINE)

    async def connected(self, **result: Any) -> Peer:
        """Return the next connection, after its first command was answered."""
        peer = await self.accept()
        await peer.answer("connect", client="c", **result)
        return peer


class Cable:
    """A port that goes on to a server's until it is cut."""

    def __init__(self, port: int) -> None:
        self._there = port
        self._ends: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self.port = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        there, back = await asyncio.open_connection("127.0.0.1", self._there)
        self._ends |= {writer, back}
        await asyncio.gather(self._copy(reader, back), self._copy(there, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                writer.write(data)
        writer.transport.abort()

    def cut(self) -> None:
        """Break every connection, and accept none until it is mended."""
        self._is_cut = True
        while self._ends:
            self._ends.pop().transport.abort()

    def mend(self) -> None:
        self._is_cut = False


@contextlib.asynccontextmanager
async def cable(port: int) -> AsyncIterator[Cable]:
    """Yield a cable to this port."""
    own = Cable(port)
    async with listening(own.accept) as own.port:
        yield own
        own.cut()


async def open_page(context, server, *, random: float = 0, clock: bool = False):
    """Open the page. What is random is the smallest that it may be."""
    page = await context.new_page()
    page.set_default_timeout(DEADLINE * 1000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    await page.add_init_script(f"Math.random = () => {random}")
    if clock:
        await page.clock.install()
    await page.goto(f"http://127.0.0.1:{server.port}/page/")
    await page.wait_for_function("window.loaded")
    return page


async def run(page, statements: str, argument=None):
    """Run statements in the page, which may `return` something."""
    return await page.evaluate(f"async argument => {{ {statements} }}", argument)


async def wait(page, condition: str, argument=None) -> None:
    await page.wait_for_function(condition, arg=argument)


async def seen(page, *names: str, count: int) -> list:
    """Wait for so many calls of these handlers, and return what they were called with."""
    await wait(
        page,
        "([names, count]) => seen.filter(([name]) => names.includes(name)).length >= count",
        [names, count],
    )
    calls = await page.evaluate("names => seen.filter(([name]) => names.includes(name))", names)
    assert len(calls) == count, calls
    return [call if len(names) > 1 else call[1:] for call in calls]
