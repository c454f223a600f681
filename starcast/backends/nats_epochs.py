"""Epochs: which streams there are, and which epoch each is in, as one connection knows it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from secrets import token_hex
from typing import Any, NamedTuple

from ..exceptions import BackendUnavailable
from ..history import Position
from .nats_jetstream import EXISTS, NOT_FOUND, JetStream, JetStreamError
from .nats_streams import Place, Stream, next_epoch

# Attempts to agree on a stream, while others delete it and create it anew.
_ATTEMPTS = 5


@dataclasses.dataclass(slots=True)
class State:
    """What is known of a stream.

    Attributes:
        epoch: The current one.
        top: A sequence that it has reached.
    """

    epoch: str
    top: int

    def reach(self, sequence: int) -> None:
        """The stream has reached a sequence."""
        self.top = max(self.top, sequence)

    def is_behind(self, known: Sequence[Position]) -> bool:
        """Whether it was further than it is."""
        return any(it.epoch == self.epoch and it.offset > self.top for it in known)


class Info(NamedTuple):
    """A stream at one moment.

    Attributes:
        config: Its configuration.
        state: What is to be remembered of it.
        first, last: The sequences of the oldest message that is stored, of any channel, and of the
            newest one that ever was.
        kept: How many messages are stored of one channel.
    """

    config: Mapping[str, Any]
    state: State
    first: int
    last: int
    kept: int

    @property
    def is_limited(self) -> bool:
        """Whether somebody has set a limit for all channels together."""
        return any(self.config.get(name, -1) > 0 for name in ("max_msgs", "max_bytes"))


class Epochs:
    """See the module.

    Args:
        prefix: What subjects begin with.
        jetstream: Sends the requests.
    """

    def __init__(self, prefix: str, jetstream: JetStream) -> None:
        self._prefix = prefix
        self._jetstream = jetstream
        self._states: dict[str, State] = {}  # by the name of the stream
        self._lock = asyncio.Lock()  # held while a stream is looked for

    def forget(self, stream: Stream) -> None:
        """Look for a stream again when it is used next."""
        self._states.pop(stream.name, None)

    def arrived(self, place: Place) -> None:
        """A message has arrived that is kept there."""
        state = self._states.get(place.stream)
        if state is not None and state.epoch == place.position.epoch:
            state.reach(place.position.offset)
        else:
            self._states.pop(place.stream, None)

    async def settle(self, stream: Stream, known: Sequence[Position]) -> State:
        """Return the state of a stream, which is created if it is not there.

        If it is not as far as is known, it has lost messages, and begins another epoch.
        """
        if state := self._current(stream, known):
            return state
        async with self._lock:
            state = self._current(stream, known) or await self._refresh(stream, known)
        return state

    async def _refresh(self, stream: Stream, known: Sequence[Position]) -> State:
        info = await self.look(stream)
        if info.state.is_behind(known):
            return await self._begin_epoch(stream, info)
        return info.state

    def _current(self, stream: Stream, known: Sequence[Position]) -> State | None:
        """Return the state of a stream; None if it is not known, or out of date."""
        state = self._states.get(stream.name)
        if state is None or state.is_behind(known) or any(it.epoch != state.epoch for it in known):
            return None
        return state

    async def look(self, stream: Stream, subject: str = "") -> Info:
        """Ask for a stream, which is created if it is not there, and for how much of a channel."""
        if not stream.is_possible:
            raise BackendUnavailable(
                f"{self._jetstream.name}: the prefix {self._prefix!r} has a token that JetStream "
                "takes for a placeholder; choose another one, without '$' and '{{'"
            )
        for _ in range(_ATTEMPTS):
            for what, body, goes_on in (
                ("INFO", {"subjects_filter": subject} if subject else {}, NOT_FOUND),
                ("CREATE", stream.config(token_hex(6)), EXISTS),
            ):
                try:
                    return await self._call(stream, what, body, subject)
                except JetStreamError as error:
                    if error.number != goes_on:
                        raise
        raise BackendUnavailable(f"{self._jetstream.name}: the stream {stream.name} keeps changing")

    async def _begin_epoch(self, stream: Stream, info: Info) -> State:
        """Begin another epoch: the same one in all programs that find out at the same time.

        The stream is not deleted: one that is created at once after that may have its messages.
        """
        old = info.state.epoch
        new = stream.config(next_epoch(old, info.last))
        config = {**info.config, "subjects": new["subjects"], "republish": new["republish"]}
        state = (await self._call(stream, "UPDATE", config)).state
        removed = {"filter": stream.subject(old, "*")}
        await self._jetstream.api(stream.base, f"STREAM.PURGE.{stream.name}", removed)
        return state

    async def _call(
        self, stream: Stream, what: str, body: Mapping[str, Any], subject: str = ""
    ) -> Info:
        answer = await self._jetstream.api(stream.base, f"STREAM.{what}.{stream.name}", body)
        config, state = answer["config"], answer["state"]
        epoch = stream.epoch_in(config)
        if epoch is None:
            raise BackendUnavailable(
                f"{self._jetstream.name}: there is a stream {stream.name}, and it is not as "
                "starcast makes it; delete it, and it is made anew"
            )
        count = (state.get("subjects") or {}).get(subject, 0)
        last = state["last_seq"]
        found = self._states[stream.name] = State(epoch, last)
        return Info(config, found, state["first_seq"], last, count)
