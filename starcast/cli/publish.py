"""`starcast publish`: one message, from the command line, a file or standard input."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from ..backends import Backend
from ..codec import Encoding
from ..exceptions import ConfigurationError
from ..logs import escape
from .common import open_hub, say


def read_message(chosen: argparse.Namespace, given: str) -> tuple[Any, Encoding | None]:
    """Return what to publish, and its encoding if that is not to be seen.

    Args:
        chosen: The options.
        given: The message, or "-" if it is to be read.
    """
    content = _content(chosen.file, given)
    if chosen.binary:
        return content, None
    try:
        text = content.decode()
    except UnicodeDecodeError:
        if chosen.json:
            raise ConfigurationError("the message is not JSON: it is not even UTF-8") from None
        return content, None
    if chosen.json:
        return _json(text), "json"
    if given == "-":  # it was read
        text = text.removesuffix("\n").removesuffix("\r")
    return text, None


def _content(file: str | None, message: str) -> bytes:
    if file is not None:
        try:
            return Path(file).read_bytes()
        except (OSError, ValueError) as exc:  # a NUL in its name
            reason = getattr(exc, "strerror", None) or exc
            raise ConfigurationError(f"{escape(file)} cannot be read: {reason}") from None
    if message != "-":
        return os.fsencode(message)
    if sys.stdin.isatty():
        print("starcast: reading the message from standard input", file=sys.stderr)
    return sys.stdin.buffer.read()


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise ConfigurationError(f"the message is not JSON: {exc}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is none of its numbers")


async def publish(
    backend: Backend, name: str, channel: str, message: Any, encoding: Encoding | None, quiet: bool
) -> None:
    async with open_hub(backend, name) as hub:
        await hub.publish(channel, message, encoding=encoding)
        receivers = getattr(backend, "receivers", None)
    if quiet:
        return
    if encoding == "json":
        what = "JSON"
    elif isinstance(message, str):
        what = f"text of {_bytes(len(message.encode()))}"
    else:
        what = f"a binary message of {_bytes(len(message))}"
    heard = "" if receivers is None else f"; {_heard(receivers)}"
    say(f"published {what} to {channel!r} of the hub {name!r}{heard}")


def _bytes(size: int) -> str:
    return "1 byte" if size == 1 else f"{size} bytes"


def _heard(receivers: int) -> str:
    if receivers == 0:
        return "nobody is subscribed to it"
    return f"{receivers} {'process is' if receivers == 1 else 'processes are'} subscribed to it"
