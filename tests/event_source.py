"""A client of server-sent events, as the HTML Living Standard describes one (section 9.2.6)."""

from __future__ import annotations

import asyncio
import re
import socket
from typing import Any

import httpx

from support import DEADLINE, until


class EventSource:
    """Reads a stream until it ends: `async with EventSource(server, "/events") as source`.

    Attributes:
        events: The name, the data and the last event id of each event that was dispatched.
        id: The last event id.
        retry: Milliseconds, as the server has said.
        comments: How many comments came.
        chunks: How many pieces the body came in.
        ended: Whether the response has ended; `whole` if it did so as HTTP demands.
    """

    def __init__(self, server: Any, path: str, **headers: str) -> None:
        self.url = f"http://127.0.0.1:{server.port}{path}"
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.response: httpx.Response | None = None
        self.events: list[tuple[str, str, str]] = []
        self.id = ""
        self.retry: int | None = None
        self.comments = self.chunks = 0
        self.ended = self.whole = False
        self._text, self._fields = "", {"event": "", "data": ""}

    async def __aenter__(self) -> EventSource:
        self._task = asyncio.create_task(self._read())
        await until(lambda: self.chunks or self._task.done())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    @property
    def data(self) -> list[str]:
        return [data for _, data, _ in self.events]

    @property
    def status(self) -> int:
        assert self.response is not None, self._task
        return self.response.status_code

    async def got(self, count: int) -> list[str]:
        """Wait until so many events have come, and return their data."""
        await until(lambda: len(self.events) >= count or self._task.done())
        assert len(self.events) >= count, self._task
        return self.data

    async def over(self) -> None:
        await until(lambda: self.ended)

    async def _read(self) -> None:
        async with (
            httpx.AsyncClient(trust_env=False, timeout=DEADLINE) as client,
            client.stream("GET", self.url, headers=self.headers) as response,
        ):
            self.response = response
            try:
                async for chunk in response.aiter_bytes():
                    self.chunks += 1
                    self._feed(chunk.decode())
                self.whole = True
            finally:
                self.ended = True

    def _feed(self, text: str) -> None:
        *lines, self._text = re.split("\r\n|\n|\r", self._text + text)
        for line in lines:
            name, colon, value = line.partition(":")
            value = value.removeprefix(" ")
            if not line:
                self._dispatch()
            elif colon and not name:
                self.comments += 1
            elif name == "data":
                self._fields["data"] += value + "\n"
            elif name == "event":
                self._fields["event"] = value
            elif name == "id" and "\0" not in value:
                self.id = value
            elif name == "retry" and value.isdigit():
                self.retry = int(value)

    def _dispatch(self) -> None:
        name, data = self._fields["event"], self._fields["data"]
        if data:
            self.events.append((name or "message", data.removesuffix("\n"), self.id))
        self._fields = {"event": "", "data": ""}


async def stalled(server: Any, path: str) -> socket.socket:
    """A client that has read the headers of the response and reads nothing any more."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", server.port))
    await loop.sock_sendall(sock, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    assert b" 200 " in await loop.sock_recv(sock, 100)
    return sock
