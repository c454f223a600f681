"""Replacements for parts of nats-py: the client, its transport, and where messages go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import ParseResult

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport

from ..exceptions import BackendUnavailable
from ..sync.deadline import Deadline
from .base import MessagesRefused

# The messages, in lower case, with which a server refuses something and keeps the connection.
_SURVIVED = ("permissions violation", "maximum subscriptions exceeded")

_REFUSED = re.compile(r'(?:Publish|Subscription) to ("(?:[^"\\]|\\.)*")(?: \(sid "(\d+)"\))?')


class RefusalClient(Client):
    """A client that reports the errors of a server which do not end the connection.

    nats-py reports these in lower case, in which two subjects may be equal, and takes most of them
    for the end of the connection.

    Args:
        refused: Called with the server's message as soon as it has been read.
    """

    def __init__(self, refused: Callable[[str], Awaitable[None]]) -> None:
        super().__init__()
        self._refused = refused

    async def _process_err(self, err_msg: str) -> None:
        if any(words in err_msg for words in _SURVIVED):
            line = bytes(self._ps.buf).partition(b"\r\n")[0]  # which is still there
            await self._refused(line.decode().removeprefix("-ERR ").strip(" '"))
        else:
            await super()._process_err(err_msg)


class Callback(asyncio.Future[Msg]):
    """Calls a function with every message of one subscription, as soon as it has been read."""

    def __init__(self, receive: Callable[[Msg], None]) -> None:
        super().__init__()
        self._receive = receive

    def set_result(self, result: Msg, /) -> None:
        self._receive(result)


class Transport(TcpTransport):
    """The transport of nats-py, which closes at once and insists on TLS for `tls://`."""

    _plain = False  # tls:// was asked for, and there is no TLS yet
    _login = b""
    bytes_at = 0.0  # when any bytes arrived last, in `time.monotonic()`

    def __bool__(self) -> bool:
        return True  # else nats-py makes a transport of its own

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        self._plain = uri.scheme == "tls"
        await super().connect(uri, buffer_size, connect_timeout)

    async def connect_tls(
        self,
        uri: str | ParseResult,
        ssl_context: ssl.SSLContext,
        buffer_size: int,
        connect_timeout: int,
    ) -> None:
        # nats-py's own does not tell the streams of TLS: asyncio logs a warning at the end, and a
        # reader that is full does not pause the socket.
        assert self._io_writer is not None
        host = uri if isinstance(uri, str) else uri.hostname
        async with Deadline(connect_timeout):
            await self._io_writer.start_tls(ssl_context, server_hostname=host)
        self._plain = False

    def write(self, payload: bytes) -> None:
        if self._plain:  # this would be the password; nats-py would send it
            raise nats.errors.SecureConnWantedError
        if payload.startswith(b"CONNECT "):
            # Send it together with the PING that follows. A server that refuses the login while a
            # PING is unread resets the connection, and its reason may be lost.
            self._login = payload
            return
        self.writelines([self._login, payload])
        self._login = b""

    def writelines(self, payload: list[bytes]) -> None:
        assert self._io_writer is not None
        # On uvloop this would be an error that breaks nats-py's closing. The task that reads
        # notices that the connection has ended.
        if not self._io_writer.transport.is_closing():
            # Not `writelines`, whose buffer has no bound in some versions of Python 3.12 and 3.13.
            super().write(b"".join(payload))

    async def read(self, buffer_size: int) -> bytes:
        data: bytes = await super().read(buffer_size)
        self.bytes_at = time.monotonic()
        return data

    async def drain(self) -> None:
        with contextlib.suppress(OSError):  # the same
            await super().drain()

    def close(self) -> None:
        # An orderly close waits for a server that may be frozen, with TLS for 30 seconds.
        if self._io_writer is not None:
            self._io_writer.transport.abort()


def refused_subject(error: str) -> tuple[str, int | None]:
    """Return the subject that a server refuses, or an empty one if its message names none.

    The second value is the number of the subscription if the server takes it away again.
    """
    found = _REFUSED.search(error)
    if found is None:
        return "", None
    return json.loads(found[1]), int(found[2]) if found[2] else None


def refusal(name: str, refused: dict[str, str], subjects: Sequence[str]) -> BackendUnavailable:
    """Return the error of a call that was refused, or of some of its messages.

    Args:
        name: What errors call the servers.
        refused: By subject, the server's message.
        subjects: The subjects of the call's messages.
    """
    message = f"{name}: {next(iter(refused.values()))}"
    if not refused.keys() <= set(subjects):
        return BackendUnavailable(message)  # a subscription, or no subject was named
    # All messages to such a subject, even if the first ones may have been accepted.
    places = [place for place, subject in enumerate(subjects) if subject in refused]
    return MessagesRefused(message, {at: f"{name}: {refused[subjects[at]]}" for at in places})
