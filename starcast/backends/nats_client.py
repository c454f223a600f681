"""What replaces parts of nats-py: the transport, where messages go, and refusals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from urllib.parse import ParseResult

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport
from nats.protocol.parser import AWAITING_MSG_PAYLOAD

from ..exceptions import BackendUnavailable
from ..sync.deadline import Deadline
from .base import MessagesRefused

END_TIMEOUT = 1.0  # seconds for the client to end its tasks, which takes a few turns of the loop

# What a server says, in lower case, when it refuses something and keeps the connection.
_SURVIVED = ("permissions violation", "maximum subscriptions exceeded")

_REFUSED = re.compile(r'(?:Publish|Subscription) to ("(?:[^"\\]|\\.)*")(?: \(sid "(\d+)"\))?')


class RefusalClient(Client):
    """The client, with those errors of the server that a connection survives.

    nats-py reports those in lower case, in which two subjects may be the same, and takes most of
    them for the end of the connection.

    Args:
        refused: Called with what the server says, in the turn in which it was read.
    """

    def __init__(self, refused: Callable[[str], Awaitable[None]]) -> None:
        super().__init__()
        self._refused = refused
        self.transport = self._transport = Transport()

    @property
    def version(self) -> str:
        """That of the server; empty if it does not say."""
        return str(self._server_info.get("version", ""))

    @property
    def is_inside_message(self) -> bool:
        """Whether a part of a message has arrived, and the rest has not."""
        return bool(self._ps.state == AWAITING_MSG_PAYLOAD)

    def send(self, commands: Iterable[bytes]) -> None:
        """Write commands at once."""
        # What the client itself has to send goes first: its own task would write it later.
        pending, self._pending = self._pending, []
        self._pending_data_size = 0
        self.transport.writelines([*pending, *commands])

    async def end(self) -> None:
        """Close the connection, and wait until the client's tasks have ended."""
        self.transport.close()
        # The client may complain about a connection that was never made.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(END_TIMEOUT):
                await self.close()
                # It may have been closing by itself already, or in a call that was cancelled.
                tasks = (self._reading_task, self._ping_interval_task, self._flusher_task)
                await asyncio.wait([task for task in tasks if task is not None])

    async def _process_err(self, err_msg: str) -> None:
        if any(words in err_msg for words in _SURVIVED):
            line = bytes(self._ps.buf).partition(b"\r\n")[0]  # which is still there
            await self._refused(line.decode().removeprefix("-ERR ").strip(" '"))
        else:
            await super()._process_err(err_msg)


class Callback(asyncio.Future[Msg]):
    """Passes every message of one subscription on, in the turn in which it was read."""

    def __init__(self, function: Callable[[Msg], None]) -> None:
        super().__init__()
        self._function = function

    def set_result(self, result: Msg, /) -> None:
        self._function(result)


class Transport(TcpTransport):
    """The transport of nats-py, made to end at once and to insist on TLS for `tls://`.

    Attributes:
        bytes_at: When any bytes arrived last, in `time.monotonic()`.
    """

    _plain = False  # tls:// was asked for, and there is no TLS yet
    _login = b""
    bytes_at = 0.0

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
        # nats-py's own leaves the streams not knowing of TLS: asyncio logs a warning at the end,
        # and a reader that is full stops no other.
        assert self._io_writer is not None
        host = uri if isinstance(uri, str) else uri.hostname
        async with Deadline(connect_timeout):
            await self._io_writer.start_tls(ssl_context, server_hostname=host)
        self._plain = False

    def write(self, payload: bytes) -> None:
        if self._plain:  # this would be the password; nats-py would send it
            raise nats.errors.SecureConnWantedError
        if payload.startswith(b"CONNECT "):
            # It goes with the PING that follows. A server that refuses the login and then finds a
            # PING unread resets the connection, and its reason may be lost.
            self._login = payload
            return
        self.writelines([self._login, payload])
        self._login = b""

    def writelines(self, payload: list[bytes]) -> None:
        assert self._io_writer is not None
        # On uvloop an error, which would break nats-py's closing. The task that reads sees the end.
        if not self._io_writer.transport.is_closing():
            # Not `writelines`: in some versions of Python 3.12 and 3.13 nothing bounds its buffer.
            super().write(b"".join(payload))

    async def read(self, buffer_size: int) -> bytes:
        data: bytes = await super().read(buffer_size)
        self.bytes_at = time.monotonic()
        return data

    @property
    def unsent(self) -> int:
        """Bytes that the socket has not taken yet."""
        assert self._io_writer is not None
        return self._io_writer.transport.get_write_buffer_size()

    async def drain(self) -> None:
        with contextlib.suppress(OSError):  # the same
            await super().drain()

    def close(self) -> None:
        # An orderly close waits for a broker that may be frozen, with TLS for 30 seconds.
        if self._io_writer is not None:
            self._io_writer.transport.abort()


def refused_subject(said: str) -> tuple[str, int | None]:
    """Return the subject that a server refuses; empty if it does not say which.

    With it comes the number of the subscription, if it had been granted and is taken away.
    """
    found = _REFUSED.search(said)
    if found is None:
        return "", None
    return json.loads(found[1]), int(found[2]) if found[2] else None


def refusal(name: str, refused: dict[str, str], subjects: Sequence[str]) -> BackendUnavailable:
    """Return the error of a call that was refused, or of some of its messages.

    Args:
        name: The server's.
        refused: What it said, by subject.
        subjects: Those of the messages.
    """
    message = f"{name}: {next(iter(refused.values()))}"
    if not refused.keys() <= set(subjects):
        return BackendUnavailable(message)  # a subscription, or it does not say which
    # All that went to such a subject, even if it was refused only from some moment on.
    places = [place for place, subject in enumerate(subjects) if subject in refused]
    return MessagesRefused(message, {at: f"{name}: {refused[subjects[at]]}" for at in places})
