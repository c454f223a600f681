"""Wire: what workers tell each other about members, as JSON.

Every message has the `node` that sends it: one event loop of one worker. Besides, it has one of
these:

    change  a number, one more than that of the node's last change; who is `in`, and who is `out`
    whole   the number of the last change that it includes, a `part` of `parts`, and who is `in`
    beat    the number of the node's last change
    ask     the node that is to send the whole; empty for all
    bye     the node ends: all its members are gone

Somebody who is in: channel, client, id, info and info on this channel. Out: channel, client, and
whether it has left and was not merely lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ..codec import check_channel
from ..members import Member

# Bytes of a message, about, if it has more than one entry.
MAX_SIZE = 16 * 1024

# What is not believed any more: a whole of this many parts, which would have 1.6 GB, and a number
# that no node reaches.
MAX_PARTS = 100_000
MAX_NUMBER = 1 << 53


class In(NamedTuple):
    """A client that is a member of a channel."""

    channel: str
    client: str
    member: Member


class Out(NamedTuple):
    """A client that is none any more; `left` if that was its own will."""

    channel: str
    client: str
    left: bool


class Message(NamedTuple):
    """What has arrived. See the module."""

    node: str
    kind: str
    number: int = 0
    ins: tuple[In, ...] = ()
    outs: tuple[Out, ...] = ()
    part: int = 0
    parts: int = 1
    asked: str = ""


def changes(node: str, number: int, ins: list[In], outs: list[Out]) -> Iterator[str]:
    """Write changes as messages, of which the first has this number."""
    entries = [*map(_write_in, ins), *map(_write_out, outs)]
    for chunk in _chunks(entries):
        content = {
            "node": node,
            "change": number,
            "in": [entry for entry in chunk if len(entry) > 3],
            "out": [entry for entry in chunk if len(entry) == 3],
        }
        yield json.dumps(content, ensure_ascii=False)
        number += 1


def whole(node: str, number: int, ins: Iterable[In]) -> Iterator[str]:
    """Write all members of a node."""
    chunks = list(_chunks(list(map(_write_in, ins)))) or [[]]
    for part, chunk in enumerate(chunks):
        content = {"node": node, "whole": number, "part": part, "parts": len(chunks), "in": chunk}
        yield json.dumps(content, ensure_ascii=False)


def beat(node: str, number: int) -> str:
    """Write that a node is there."""
    return json.dumps({"node": node, "beat": number})


def ask(node: str, other: str = "") -> str:
    """Ask a node, or all of them, for all its members."""
    return json.dumps({"node": node, "ask": other})


def bye(node: str) -> str:
    """Write that a node ends."""
    return json.dumps({"node": node, "bye": 1})


def read(text: str | bytes) -> Message | None:
    """Return what has arrived; None if it is nothing that this version knows."""
    try:
        content = json.loads(text)
        for kind in ("change", "whole", "beat", "ask", "bye"):
            if kind in content:
                return _read(_name(content["node"]), kind, content[kind], content)
    except Exception:  # whatever others write to the broker
        return None
    return None


def _read(node: str, kind: str, value: Any, content: dict[str, Any]) -> Message:
    if kind == "ask":
        return Message(node, kind, asked=_name(value) if value else "")
    ins = tuple(
        In(_name(channel), _name(client), Member(id, info, channel_info))
        for channel, client, id, info, channel_info in content.get("in", ())
    )
    outs = tuple(
        Out(_name(channel), _name(client), bool(left))
        for channel, client, left in content.get("out", ())
    )
    parts = _number(content.get("parts", 1), MAX_PARTS + 1)
    part = _number(content.get("part", 0), parts)
    return Message(node, kind, _number(value, MAX_NUMBER), ins, outs, part, parts)


def _name(value: Any) -> str:
    # The names of channels, of clients and of nodes are told to clients, or kept.
    if not isinstance(value, str):
        raise TypeError
    return check_channel(value)


def _number(value: Any, end: int) -> int:
    if type(value) is not int or not 0 <= value < end:
        raise ValueError
    return value


def _write_in(entry: In) -> list[Any]:
    member = entry.member
    return [entry.channel, entry.client, member.id, member.info, member.channel_info]


def _write_out(entry: Out) -> list[Any]:
    return [entry.channel, entry.client, int(entry.left)]


def _chunks(entries: list[list[Any]]) -> Iterator[list[list[Any]]]:
    chunk: list[list[Any]] = []
    size = 0
    for entry in entries:
        cost = len(json.dumps(entry, ensure_ascii=False).encode())
        if chunk and size + cost > MAX_SIZE:
            yield chunk
            chunk, size = [], 0
        chunk.append(entry)
        size += cost
    if chunk:
        yield chunk
