"""A port of loopback that goes on to a server's: in TLS, or slowly."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

from support import DEADLINE


@contextlib.asynccontextmanager
async def front(
    port: int, *, tls: ssl.SSLContext | None = None, asked: bool = False, delay: float = 0.0
) -> AsyncIterator[int]:
    """Yield a port that goes on to the other one.

    Args:
        port: That of the server.
        tls: With which it speaks TLS.
        asked: Whether a client first asks for TLS and is told yes, as it is with PostgreSQL.
        delay: Seconds that each piece of what is sent takes, both ways.
    """
    tasks = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                await asyncio.sleep(delay)
                writer.write(data)
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
        await asyncio.gather(copy(reader, back), copy(there, writer))

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
