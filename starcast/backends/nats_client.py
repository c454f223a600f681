"""What stands in for parts of nats-py: where messages go, and what becomes of a refusal."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence

from nats.aio.client import Client
from nats.aio.msg import Msg

from ..exceptions import BackendUnavailable
from .base import Deliver, MessagesRefused
from .nats_names import untoken

# What a server says, in lower case, when it refuses something and keeps the connection.
_SURVIVED = ("permissions violation", "maximum subscriptions exceeded")

_REFUSED = re.compile(r'(?:Publish|Subscription) to ("(?:[^"\\]|\\.)*")(?: \(sid "(\d+)"\))?')


class RefusalClient(Client):
    """The client, with those errors of the server that a connection survives.

    nats-py tells of those in lower case, in which two subjects may be the same, and takes most of
    them for the end of the connection.

    Args:
        refused: Called with what the server says, in the turn in which it was read.
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


class Sink(asyncio.Future[Msg]):
    """Takes every message of one subscription, in the turn in which it was read."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        super().__init__()
        self._take = take

    def set_result(self, result: Msg, /) -> None:
        self._take(result.data)


class WildcardSink(asyncio.Future[Msg]):
    """The same for a wildcard. Of the subjects that it brings, so much is the prefix."""

    def __init__(self, deliver: Deliver, cut: int) -> None:
        super().__init__()
        self._deliver, self._cut = deliver, cut

    def set_result(self, result: Msg, /) -> None:
        self._deliver(untoken(result.subject[self._cut :]), result.data)


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
