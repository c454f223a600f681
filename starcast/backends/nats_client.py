"""The client of nats-py, with those errors of the server that a connection survives.

nats-py tells of those in lower case, in which two subjects may be the same, and takes most of them
for the end of the connection.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable

from nats.aio.client import Client

# What a server says, in lower case, when it refuses something and keeps the connection.
_SURVIVED = ("permissions violation", "maximum subscriptions exceeded")

_REFUSED = re.compile(r'(?:Publish|Subscription) to ("(?:[^"\\]|\\.)*")(?: \(sid "(\d+)"\))?')


class RefusalClient(Client):
    """See the module.

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


def refused_subject(said: str) -> tuple[str, int | None]:
    """Return the subject that a server refuses; empty if it does not say which.

    With it comes the number of the subscription, if it had been granted and is taken away.
    """
    found = _REFUSED.search(said)
    if found is None:
        return "", None
    return json.loads(found[1]), int(found[2]) if found[2] else None
