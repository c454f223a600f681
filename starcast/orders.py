"""Orders: what every hub is to do with its clients on a channel, or with those of a user.

An order travels as a `Command`, in order with the messages of its channel, to the hubs that have
clients there. The channel of a user is an internal one: so a hub only hears of the users whose
clients it has.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from .event import Command
from .internal import SHARED

# What an order may say, and the type of each part.
_PARTS = {"do": str, "channel": str, "code": int, "reason": str, "reconnect": bool, "ask": str}
DEEDS = ("subscribe", "unsubscribe", "disconnect", "close", "count")


def user_channel(user: str) -> str:
    """Return the channel of a user."""
    return f"{SHARED}user:{user}"


def answer_channel(ask: str) -> str:
    """Return the channel on which a question is answered."""
    return f"{SHARED}answer:{ask}"


class Order(NamedTuple):
    """See the module.

    Attributes:
        do: One of `DEEDS`.
        channel: The channel to subscribe to or to unsubscribe from.
        code, reason: What the clients are told.
        reconnect: Whether they should come back.
        ask: The question that a count answers.
    """

    do: str
    channel: str = ""
    code: int | None = None
    reason: str = ""
    reconnect: bool = False
    ask: str = ""

    def to(self, channel: str) -> Command:
        """Return the command for the clients on a channel."""
        parts = {name: part for name, part in self._asdict().items() if part not in (None, "")}
        return Command(channel, json.dumps(parts, ensure_ascii=False), is_json=True)


def read(command: Command) -> Order | None:
    """Return what a command says; None if it is nothing that this version knows."""
    try:
        parts: Any = json.loads(command.message)
    except (ValueError, RecursionError):
        return None
    if not isinstance(parts, dict) or parts.get("do") not in DEEDS:
        return None
    if any(type(part) is not _PARTS.get(name) for name, part in parts.items()):
        return None
    return Order(**parts)
