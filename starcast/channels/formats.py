"""Formats: how commands, replies and pushes are written in a WebSocket message.

A reply's or a push's content is a dict of what JSON has, and of `Raw`: JSON that was written
already. In JSON, several commands or replies of one message are separated by a line feed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any, Protocol

from starlette.types import Message

from .. import codec, event, frames
from ..codec import Dumps
from ..event import Event, Ready
from ..exceptions import InvalidMessage
from ..history import Position
from ..internal import is_internal

# What a client offers that wants Protobuf. It is here because `protobuf` is imported when needed.
PROTOBUF_SUBPROTOCOL = "centrifuge-protobuf"

# Commands in one message of a client's. A client that comes back subscribes to all of its channels
# at once, but while the commands of a message are read, nobody else is served.
MAX_COMMANDS = 5_000


class Raw(str):
    """JSON that was written already, on one line."""

    __slots__ = ()


def raw(data: Any, dumps: Dumps) -> Raw:
    """Write data as JSON.

    Raises:
        EncodingError: It cannot be written.
    """
    text, _ = codec.encode(data, "json", dumps)
    assert isinstance(text, str)
    return one_line(text)


def one_line(text: str) -> Raw:
    """Return JSON on one line: a line feed is white space there, wherever it stands."""
    return Raw(text.replace("\n", " ") if "\n" in text else text)


class Malformed(Exception):
    """What a client has sent is no command."""


def text(params: Mapping[str, Any], name: str) -> str:
    """Return a text of a command's; empty if there is none."""
    value = params.get(name)
    return value if isinstance(value, str) else ""


class Format(Protocol):
    """One way to write the protocol."""

    form: frames.WireFormat
    subprotocol: str | None
    ping: Ready

    def read(self, message: Message) -> list[dict[str, Any]]:
        """Return the commands of a message of the client's; a pong is an empty one.

        Raises:
            Malformed: It has none.
        """

    def reply(self, id: int, method: str, result: Mapping[str, Any]) -> Ready:
        """Return a reply; an error is the result of the method `error`."""

    def push(self, channel: str, kind: str, content: Mapping[str, Any]) -> Ready:
        """Return a push; `channel` is empty for one that belongs to none."""


def publication(published: Event) -> dict[str, Any]:
    """Return what a client gets of an event that was published."""
    content: dict[str, Any] = {}
    if isinstance(published.message, bytes):
        content["data"] = base64.b64encode(published.message).decode()
        content["tags"] = {"encoding": "base64"}
    elif published.is_json:
        content["data"] = one_line(published.message)
    else:
        content["data"] = published.message
    position: Position | None = published.position
    if position is not None:
        content["offset"] = position.offset
    if published.info is not None:
        content["info"] = Raw(published.info)
    return content


class JsonFormat:
    """The protocol in JSON: text frames."""

    form = frames.PROTOCOL_JSON
    subprotocol: str | None = None
    ping = Ready("", "{}")

    def read(self, message: Message) -> list[dict[str, Any]]:
        """See `Format`."""
        text = message.get("text")
        if text is None:
            raise Malformed("text frames only")
        if text.count("\n") > MAX_COMMANDS:
            raise Malformed("too many commands")
        return [self._command(line) for line in text.split("\n") if line and not line.isspace()]

    def _command(self, line: str) -> dict[str, Any]:
        try:
            command = codec.decode({"text": line}, "json")
        except InvalidMessage as exc:
            raise Malformed(exc.reason) from None
        if not isinstance(command, dict):
            raise Malformed("a command is an object")
        return command

    def reply(self, id: int, method: str, result: Mapping[str, Any]) -> Ready:
        """See `Format`."""
        return Ready("", f'{{"id":{id},"{method}":{write(result)}}}')

    def push(self, channel: str, kind: str, content: Mapping[str, Any]) -> Ready:
        """See `Format`."""
        where = f'"channel":{json.dumps(channel, ensure_ascii=False)},' if channel else ""
        return Ready("", f'{{"push":{{{where}"{kind}":{write(content)}}}}}')


def write(value: Any) -> str:
    """Write a value that may have parts that are written already."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{json.dumps(key)}:{write(it)}" for key, it in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(write, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


JSON = JsonFormat()


def published(source: Event, writer: Format) -> Event:
    """Return what clients with a format get of an event that they get as members of a channel."""
    content = publication(source)
    if not source.channel or is_internal(source.channel):  # a message to the client or its user
        return writer.push("", "message", {"data": content["data"]})
    return writer.push(source.channel, "pub", content)


event.MAKERS[frames.PROTOCOL_JSON] = lambda source: published(source, JSON)
