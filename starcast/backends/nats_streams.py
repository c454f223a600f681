"""How the history of channels is spelled in JetStream: streams, subjects and headers.

A stream keeps what is published to the channels of one hub with one size and one time to live. The
message of the channel `room` goes to the subject `starcast:default.%h-100-300000-EPOCH.room`: 100
messages for 300,000 milliseconds. The server stores it, and then publishes it to the channel's own
subject, `starcast:default.room`, with headers that say where it was stored. So whoever subscribes
to a channel needs no consumer, and gets what is kept together with what is not.

The offset of a message is its sequence in the stream, so it grows within a channel by more than
one. The epoch is a part of the subjects that the stream takes. So whoever publishes with an epoch
that is over is told that nothing listens there, a message that arrives says to which epoch it
belongs, and all programs that create a stream at the same time use the one that was first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..history import MAX_KEY_TTL, History, Position
from .nats_names import encode, tokens

# Milliseconds. The server takes nothing shorter, and counts nanoseconds in 63 bits.
MIN_AGE = 100
MAX_AGE = 9_000_000_000_000

# Characters of a hub's name with its prefix in the name of a stream, which has 255 at most.
_MAX_NAME = 200

# The subject of a message that is kept.
_KEPT = re.compile(r".*\.%h-[0-9]+-[0-9]+-([0-9a-f]{1,32})(?:\.[^.]+)?")

# A sequence, with as many digits as an offset may have.
_SEQUENCE = re.compile(r"0|[1-9][0-9]{0,17}")

# Tokens in the destination of what is published again that the server would replace.
_REPLACED = re.compile(r"(?:\A|\.)(?:\$[0-9]|\{\{)")


class Stream(NamedTuple):
    """A stream, whether it is there or not.

    Attributes:
        name: Its name.
        base: What the subjects of its channels begin with: `starcast:default`.
        is_hub: Whether it has all the channels of a hub. Otherwise `base` is the only one, whose
            name has no hub in it.
        size: Messages of each channel at most.
        age: Milliseconds for which they are kept.
    """

    name: str
    base: str
    is_hub: bool
    size: int
    age: int

    @property
    def is_possible(self) -> bool:
        """Whether the server would not take a part of the prefix for something else."""
        return _REPLACED.search(self.base) is None

    def subject(self, epoch: str, leaf: str) -> str:
        """Return the subject of a channel whose last token is this, or of all of them with `*`."""
        end = f".{leaf}" if self.is_hub else ""
        return f"{self.base}.%h-{self.size}-{self.age}-{epoch}{end}"

    def config(self, epoch: str) -> dict[str, Any]:
        """Return what the server is given to create it."""
        subjects = self.subject(epoch, "*")
        return {
            "name": self.name,
            "description": "starcast keeps the history of channels here",
            "subjects": [subjects],
            "retention": "limits",
            "discard": "old",
            # As long as the one before those that count is there, none of these was removed.
            "max_msgs_per_subject": self.size + 1,
            "max_age": self.age * 1_000_000,
            "duplicate_window": min(self.age, int(MAX_KEY_TTL * 1000)) * 1_000_000,
            # Otherwise a restart of the server would lose everything.
            "storage": "file",
            "num_replicas": 1,
            "allow_direct": True,
            "republish": {"src": subjects, "dest": self._destination},
        }

    @property
    def _destination(self) -> str:
        return f"{self.base}.{{{{wildcard(1)}}}}" if self.is_hub else self.base

    def epoch_in(self, config: Mapping[str, Any]) -> str | None:
        """Return the epoch of a stream with this configuration; None if it is not as it should be.

        Limits and replicas may be others.
        """
        subjects = config.get("subjects") or [""]
        found = _KEPT.fullmatch(subjects[0])
        if found is None:
            return None
        needed = self.config(found[1])
        same = ("subjects", "max_msgs_per_subject", "max_age", "allow_direct", "republish")
        return found[1] if all(config.get(name) == needed[name] for name in same) else None


def stream_of(prefix: str, channel: str, history: History) -> tuple[Stream, str]:
    """Return the stream of a channel, and the last token of its subjects there."""
    hub, dot, leaf = tokens(channel).partition(".")
    base = f"{prefix}{hub}"
    age = min(max(MIN_AGE, int(history.ttl * 1000)), MAX_AGE)
    name = encode(base)
    if len(name) > _MAX_NAME:
        name = f"{name[:100]}%-{hashlib.sha256(base.encode()).hexdigest()[:32]}"
    name = f"{name}-{history.size}-{age}{'' if dot else '%'}"
    return Stream(name, base, bool(dot), history.size, age), leaf


def next_epoch(epoch: str, last: int) -> str:
    """Return the epoch after one that ends where a stream has lost what came after a sequence."""
    return hashlib.sha256(f"{epoch} {last}".encode()).hexdigest()[:12]


def message_id(epoch: str, channel: str, key: str) -> str:
    """Return what tells the server that a message was published before."""
    # A channel's name has no control characters, so no other channel and key give the same text.
    return hashlib.sha256(f"{epoch}\n{channel}\n{key}".encode()).hexdigest()[:32]


class Place(NamedTuple):
    """Where a message was stored that has arrived.

    Attributes:
        stream: The name of the stream.
        position: Its place there.
        previous: The offset of the message of the channel before it, or 0.
    """

    stream: str
    position: Position
    previous: int


def place_of(headers: Mapping[str, str]) -> Place | None:
    """Return where a message was stored that has these headers; None if it was not."""
    sequence, previous = headers.get("Nats-Sequence", ""), headers.get("Nats-Last-Sequence", "")
    found = _KEPT.fullmatch(headers.get("Nats-Subject", ""))
    if not (found and _SEQUENCE.fullmatch(sequence) and _SEQUENCE.fullmatch(previous)):
        return None
    return Place(headers.get("Nats-Stream", ""), Position(found[1], int(sequence)), int(previous))
