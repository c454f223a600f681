"""`starcast publish`: publish one message from the command line, a file or standard input."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, cast

from ..backends import Backend, BrokerConnection
from ..backends.base import Deliver, Lost
from ..codec import Encoding
from ..exceptions import ConfigurationError
from ..logs import escape
from ..serializer import refuse_constant
from .common import open_hub, say


def read_message(options: argparse.Namespace, argument: str) -> tuple[Any, Encoding | None]:
    """Return the message to publish, and "json" as its encoding if that was asked for.

    Args:
        options: `file`, `binary` and `json`.
        argument: The message, or "-" to read it from the file or from standard input.
    """
    content = _read_bytes(options.file, argument)
    try:
        text = None if options.binary else content.decode()
    except UnicodeDecodeError:
        text = None
    if options.json:
        if text is None:
            raise ConfigurationError("the message is not JSON: it is not even UTF-8")
        try:
            return json.loads(text, parse_constant=refuse_constant), "json"
        except (ValueError, RecursionError) as exc:
            raise ConfigurationError(f"the message is not JSON: {exc}") from None
    if text is None:
        return content, None
    if argument == "-":
        text = text.removesuffix("\n").removesuffix("\r")
    return text, None


def _read_bytes(file: str | None, argument: str) -> bytes:
    if file is not None:
        try:
            return Path(file).read_bytes()
        except (OSError, ValueError) as exc:  # ValueError for a NUL in the name
            reason = getattr(exc, "strerror", None) or exc
            raise ConfigurationError(f"{escape(file)} cannot be read: {reason}") from None
    if argument != "-":
        return os.fsencode(argument)
    if sys.stdin.isatty():
        print("starcast: reading the message from standard input", file=sys.stderr)
    return sys.stdin.buffer.read()


class _KeepConnection:
    """A backend whose connection can be asked how many processes received a message."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.connection: BrokerConnection | None = None

    async def connect(self, deliver: Deliver, lost: Lost) -> BrokerConnection:
        self.connection = await self._backend.connect(deliver, lost)
        return self.connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


async def publish(
    backend: Backend, name: str, channel: str, message: Any, encoding: Encoding | None, quiet: bool
) -> None:
    """Publish a message and, unless `quiet`, print what was published and who subscribes to it."""
    kept = _KeepConnection(backend)
    async with open_hub(cast(Backend, kept), name) as hub:
        await hub.publish(channel, message, encoding=encoding)
        receivers: int | None = getattr(kept.connection, "receivers", None)
    if quiet:
        return
    if encoding == "json":
        what = "JSON"
    else:
        is_text = isinstance(message, str)
        size = len(message.encode()) if is_text else len(message)
        kind = "text" if is_text else "a binary message"
        what = f"{kind} of {size} byte{'' if size == 1 else 's'}"
    if receivers is None:
        subscribed = ""
    elif receivers == 0:
        subscribed = "; nobody is subscribed to it"
    else:
        processes = "process is" if receivers == 1 else "processes are"
        subscribed = f"; {receivers} {processes} subscribed to it"
    say(f"published {what} to {channel!r} of the hub {name!r}{subscribed}")
