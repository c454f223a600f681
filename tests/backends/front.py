"""A port of loopback that goes on to a server's: in TLS, or slowly."""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

from support import listening, until


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
        there, back = await asyncio.open_connection("127.0.0.1", port)
        try:
            if asked:
                if not await reader.read(8):  # the client has just looked whether we are there
                    return
                writer.write(b"S")
                assert tls is not None
                try:
                    await writer.start_tls(tls)
                except OSError:  # the client does not like the certificate
                    return
            await asyncio.gather(copy(reader, back), copy(there, writer, change))
        finally:
            back.transport.abort()
            writer.transport.abort()

    if tls is not None:
        # In debug mode asyncio takes a client that fails the handshake for an error of the server.
        asyncio.get_running_loop().set_debug(False)
    async with listening(accept, ssl=None if asked else tls, backlog=200) as own:
        yield own


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
        self._listening = listening(self._accept, limit=self.PIECE)
        self.made = 0

    async def __aenter__(self) -> Self:
        self.port = await self._listening.__aenter__()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self._listening.__aexit__(*exc_info)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self.made = self.made, self.made + 1
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._there, limit=self.PIECE)
        except OSError:  # the server is down
            writer.transport.abort()
            return
        try:
            await asyncio.gather(
                self._copy(reader, back), self._copy(there, writer, number), return_exceptions=True
            )
        finally:
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
