"""A port of loopback that goes on to a server's: in TLS, or slowly."""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

from support import DEADLINE, until


@contextlib.asynccontextmanager
async def front(
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    asked: bool = False,
    delay: float = 0.0,
    change: Callable[[bytes], bytes] = bytes,
) -> AsyncIterator[int]:
    """Yield a port that goes on to the other one.

    Args:
        port: That of the server.
        tls: With which it speaks TLS.
        asked: Whether a client first asks for TLS and is told yes, as it is with PostgreSQL.
        delay: Seconds that each piece of what is sent takes, both ways.
        change: Returns what arrives in place of each piece that the server sends.
    """
    tasks = set()

    async def copy(
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        change: Callable[[bytes], bytes] = bytes,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                await asyncio.sleep(delay)
                writer.write(change(data))
                await writer.drain()
        writer.transport.abort()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        there, back = await asyncio.open_connection("127.0.0.1", port)
        if asked:
            if not await reader.read(8):  # the client has just looked whether we are there
                back.transport.abort()
                writer.transport.abort()
                return
            writer.write(b"S")
            try:
                assert tls is not None
                await writer.start_tls(tls)
            except OSError:  # the client does not like the certificate
                back.transport.abort()
                return
        await asyncio.gather(copy(reader, back), copy(there, writer, change))

    if tls is not None:
        # In debug mode asyncio takes a client that fails the handshake for an error of the server.
        asyncio.get_running_loop().set_debug(False)
    server = await asyncio.start_server(
        accept, "127.0.0.1", 0, ssl=None if asked else tls, backlog=200
    )
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        if tasks:
            await asyncio.wait(tasks, timeout=DEADLINE)


class SlowLine:
    """A port of loopback that goes on to a server's; what the server sends comes slowly.

    Args:
        port: That of the server.
        rate: Bytes a second that each connection brings from the server; may be changed.

    Attributes:
        silent: The numbers of the connections that bring nothing now, in the order in which they
            were made.
        made: How many connections there were.
    """

    PIECE = 4096

    def __init__(self, port: int, rate: float = math.inf) -> None:
        self.port = port
        self.rate = rate
        self.silent: set[int] = set()
        self.passed = 0  # bytes that the server has sent
        self._there = port
        self._tasks: set[asyncio.Task[Any]] = set()
        self.made = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=self.PIECE)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        number, self.made = self.made, self.made + 1
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._there, limit=self.PIECE)
        except OSError:  # the server is down
            writer.transport.abort()
            return
        # Python 3.11 logs an error of a task like this one that was cancelled.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(
                self._copy(reader, back), self._copy(there, writer, number), return_exceptions=True
            )
        writer.transport.abort()
        back.transport.abort()

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int | None = None
    ) -> None:
        while data := await reader.read(self.PIECE):
            if number is not None:
                await asyncio.sleep(len(data) / self.rate)
                await until(lambda: number not in self.silent)
                self.passed += len(data)
            writer.write(data)
            await writer.drain()
        writer.transport.abort()
