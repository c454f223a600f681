"""History in NATS: see `nats_streams` for what is kept where.

A stream stores and publishes its messages in the order in which it gets them, and confirms each
after it was published. What one connection sends to two streams, or to a stream and to nobody, may
be handled in any order. So messages of one stream are sent together, and confirmed before others
are sent.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from secrets import token_hex
from typing import Any, NamedTuple

from nats.aio.msg import Msg

from ..exceptions import BackendUnavailable
from ..history import History, Position
from .base import Kept, MessagesRefused, Stored, StoredMessage
from .nats_jetstream import (
    EXISTS,
    NOBODY,
    NOT_FOUND,
    NOTHING,
    JetStream,
    JetStreamError,
    Request,
    status_of,
)
from .nats_streams import Place, Stream, message_id, next_epoch, place_of, stream_of

# Attempts to read from a stream, or to agree on it, while others delete it and create it anew, or
# while the replica that answers is behind; and the pause between two of the former, in seconds.
_ATTEMPTS = 8
_PAUSE = 0.02

# Bytes that are read at once, or a single message that is larger. The server disconnects a client
# for which too much is waiting.
_MAX_BYTES = 1024 * 1024

# Histories of up to this size are read as a whole from the oldest message on.
_SMALL = 1000


@dataclasses.dataclass(slots=True)
class _State:
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


class _Info(NamedTuple):
    """A stream at one moment.

    Attributes:
        config: Its configuration.
        state: What is to be remembered of it.
        first, last: The sequences of the oldest message that is stored, of any channel, and of the
            newest one that ever was.
        kept: How many messages are stored of one channel.
    """

    config: Mapping[str, Any]
    state: _State
    first: int
    last: int
    kept: int

    @property
    def is_limited(self) -> bool:
        """Whether somebody has set a limit for all channels together."""
        return any(self.config.get(name, -1) > 0 for name in ("max_msgs", "max_bytes"))


class _Draft(NamedTuple):
    """A message of a batch: where it is in there, its stream, the last token of its subject."""

    number: int
    stream: Stream
    leaf: str
    message: Kept

    def request(self, epoch: str) -> Request:
        message = self.message
        key = "" if message.key is None else message_id(epoch, message.channel, message.key)
        return Request(self.stream.subject(epoch, self.leaf), message.payload, key)


class NatsHistory:
    """The history of one connection.

    Args:
        prefix: What subjects begin with.
        jetstream: Sends the requests.
    """

    def __init__(self, prefix: str, jetstream: JetStream) -> None:
        self._prefix = prefix
        self._jetstream = jetstream
        self._states: dict[str, _State] = {}  # by the name of the stream
        self._lock = asyncio.Lock()  # held while a stream is looked for

    def place_of(self, headers: Mapping[str, str]) -> Place | None:
        """Return where a message was stored that has arrived; None if it was not."""
        place = place_of(headers)
        if place is not None:
            state = self._states.get(place.stream)
            if state is not None and state.epoch == place.position.epoch:
                state.reach(place.position.offset)
            else:
                self._states.pop(place.stream, None)
        return place

    @property
    def heard_at(self) -> float:
        """When a message that is stored was read last, in `time.monotonic()`."""
        return self._jetstream.heard_at

    def fail(self, error: Exception) -> None:
        """The connection is broken."""
        self._jetstream.fail(error)

    def listens_to(self, subject: str) -> bool:
        """Whether it waits for answers there."""
        return self._jetstream.listens_to(subject)

    # Publishing

    async def publish(self, messages: Sequence[Kept], max_payload: int) -> list[Position]:
        """See `HistoryConnection.publish_kept`.

        Args:
            messages: The messages.
            max_payload: The size of the largest message that the server takes, with its headers.
        """
        positions: list[Position | None] = [None] * len(messages)
        refused: dict[int, str] = {}
        drafts = []
        for number, message in enumerate(messages):
            draft = _Draft(
                number, *stream_of(self._prefix, message.channel, message.history), message
            )
            if (size := draft.request("").size) <= max_payload:
                drafts.append(draft)
            else:
                refused[number] = f"with its headers it takes {size} bytes of {max_payload}"
        for stream, run in itertools.groupby(drafts, key=lambda draft: draft.stream):
            sent = list(run)
            try:
                await self._publish_run(stream, sent, positions, refused)
            except BackendUnavailable as error:
                refused |= {it.number: str(error) for it in sent if not positions[it.number]}
        if refused:
            raise MessagesRefused(next(iter(refused.values())), refused, positions)
        return [position for position in positions if position is not None]

    async def _publish_run(
        self,
        stream: Stream,
        drafts: list[_Draft],
        positions: list[Position | None],
        refused: dict[int, str],
    ) -> None:
        """Publish messages of one stream; fill in their positions, and why some are refused."""
        known = [it.message.known for it in drafts if it.message.known is not None]
        is_last = False
        while drafts:
            state = await self._settle(stream, known)
            requests = [draft.request(state.epoch) for draft in drafts]
            answers = await self._jetstream.publish(stream.base, requests)
            unheard: list[_Draft] = []
            for draft, answer in zip(drafts, answers, strict=True):
                outcome = self._outcome(state, answer)
                if isinstance(outcome, Position):
                    positions[draft.number] = outcome
                    is_last = is_last or bool(unheard)  # they were overtaken
                elif outcome:
                    refused[draft.number] = outcome
                else:
                    unheard.append(draft)
            if unheard:  # the epoch is over, or the stream is gone
                self._states.pop(stream.name, None)
                if is_last:
                    why = f"{self._jetstream.name}: the stream {stream.name} is not there"
                    refused |= {draft.number: why for draft in unheard}
                    return
            drafts, is_last = unheard, True

    def _outcome(self, state: _State, answer: Msg | str) -> Position | str:
        """Return where a message was stored, or why it was refused; empty if nobody listens."""
        if isinstance(answer, str):
            return answer
        if status_of(answer) == NOBODY:
            return ""
        said = json.loads(answer.data)
        if error := said.get("error"):
            return f"{self._jetstream.name} refuses: {error.get('description')}"
        state.reach(said["seq"])
        return Position(state.epoch, said["seq"])

    # Reading

    async def read(
        self,
        channel: str,
        history: History,
        since: int | None,
        limit: int,
        reverse: bool,
        known: Position | None,
    ) -> Stored:
        """See `HistoryConnection.read_kept`."""
        stream, leaf = stream_of(self._prefix, channel, history)
        for attempts_left in reversed(range(_ATTEMPTS)):
            state = await self._settle(stream, [known] if known else [])
            subject = stream.subject(state.epoch, leaf)
            newest = await self._newest(stream, subject)
            ahead = 0 if reverse or since is None else since
            if known is not None and known.epoch == state.epoch:
                ahead = max(ahead, known.offset)
            if newest and attempts_left and newest < ahead <= state.top:
                # Messages are missing that are known to be there.
                await asyncio.sleep(_PAUSE)
            elif newest:
                state.reach(newest)
                position = Position(state.epoch, newest)
                if reverse:
                    end = newest + 1 if since is None else min(since, newest + 1)
                    found = await self._before(stream, subject, end, limit)
                    return Stored(position, found, True)
                return await self._after(stream, subject, position, since, limit)
            else:
                info = await self._look(stream, subject)
                if info.state.epoch == state.epoch and not info.kept:
                    # Whatever comes has a higher sequence than the stream has now.
                    position = Position(state.epoch, info.last)
                    return Stored(position, [], self._is_complete(stream, info, since, 0))
                await asyncio.sleep(_PAUSE)
        raise BackendUnavailable(f"{self._jetstream.name}: the stream {stream.name} keeps changing")

    async def _after(
        self, stream: Stream, subject: str, position: Position, since: int | None, limit: int
    ) -> Stored:
        newest = position.offset
        if since is None and not limit:
            return Stored(position, [], True)
        if since is not None and since >= newest:
            return Stored(position, [], since == newest)
        # The message with this offset, too: if it is still stored, so is everything after it.
        start = 1 if since is None else max(since, 1)
        found, left = await self._fetch(stream, subject, start, limit + 1)
        complete: bool | None = since is None or bool(found and found[0].offset == since)
        counting = found[max(0, len(found) + left - stream.size) :]
        messages = [it for it in counting if (since or 0) < it.offset <= newest]
        if not complete:
            info = await self._look(stream)
            complete = self._is_complete(stream, info, since, len(found) + left)
        return Stored(position, messages[:limit], complete)

    @staticmethod
    def _is_complete(stream: Stream, info: _Info, since: int | None, count: int) -> bool | None:
        """Return whether nothing of a channel was removed after an offset that is not stored.

        Args:
            count: How many of its messages are stored after that.
        """
        if since is None or since == info.last:
            return True
        if since > info.last or count > stream.size:
            return False
        # Messages expire in the order of their sequences, in all channels together.
        if info.first <= since + 1:
            return True
        return False if info.is_limited else None

    async def _before(
        self, stream: Stream, subject: str, end: int, limit: int
    ) -> list[StoredMessage]:
        """Return messages before a sequence, the newest first. JetStream only reads forward."""
        width = end if stream.size <= _SMALL else limit
        found: list[StoredMessage] = []
        start = end
        while limit and start > 1 and len(found) < limit:
            start = max(1, end - width)
            count = min(end - start, stream.size + 1)
            fetched, left = await self._fetch(stream, subject, start, count)
            counting = fetched[max(0, len(fetched) + left - stream.size) :]
            found = [message for message in counting if message.offset < end]
            width *= 8
        return found[::-1][:limit]

    async def _newest(self, stream: Stream, subject: str) -> int:
        """Return the sequence of the newest message of a channel that is stored; 0 if none is."""
        (answer,) = await self._jetstream.stored(
            stream.base, stream.name, {"last_by_subj": subject}
        )
        return 0 if status_of(answer) else _sequence(answer)

    async def _fetch(
        self, stream: Stream, subject: str, start: int, count: int
    ) -> tuple[list[StoredMessage], int]:
        """Return messages of a channel from a sequence on, and how many more are stored.

        The server reads one message after the other. If others remove those that it has not reached
        yet, some are missing after those that it has read, which are not returned then.
        """
        found: list[StoredMessage] = []
        left, first = 1, start
        while left and len(found) < count:
            body = {
                "seq": first,
                "next_by_subj": subject,
                "batch": count - len(found),
                "max_bytes": _MAX_BYTES,
            }
            *messages, end = await self._jetstream.stored(stream.base, stream.name, body)
            if status_of(end) in (NOTHING, NOBODY):
                break
            found += (StoredMessage(_sequence(it), it.data) for it in messages)
            left = int((end.headers or {})["Nats-Num-Pending"])
            first = found[-1].offset + 1
        if len(found) > 1:
            body = {"seq": start, "next_by_subj": subject}
            (answer,) = await self._jetstream.stored(stream.base, stream.name, body)
            oldest = first if status_of(answer) else _sequence(answer)
            found = [message for message in found if message.offset >= oldest]
        return found, left

    # Streams

    async def _settle(self, stream: Stream, known: Sequence[Position]) -> _State:
        """Return the state of a stream, which is created if it is not there.

        If it is not as far as is known, it has lost messages, and begins another epoch.
        """
        if state := self._current(stream, known):
            return state
        async with self._lock:
            state = self._current(stream, known) or await self._refresh(stream, known)
        return state

    async def _refresh(self, stream: Stream, known: Sequence[Position]) -> _State:
        info = await self._look(stream)
        if info.state.is_behind(known):
            return await self._begin_epoch(stream, info)
        return info.state

    def _current(self, stream: Stream, known: Sequence[Position]) -> _State | None:
        """Return the state of a stream; None if it is not known, or out of date."""
        state = self._states.get(stream.name)
        if state is None or state.is_behind(known) or any(it.epoch != state.epoch for it in known):
            return None
        return state

    async def _look(self, stream: Stream, subject: str = "") -> _Info:
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

    async def _begin_epoch(self, stream: Stream, info: _Info) -> _State:
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
    ) -> _Info:
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
        found = self._states[stream.name] = _State(epoch, last)
        return _Info(config, found, state["first_seq"], last, count)


def _sequence(message: Msg) -> int:
    return int((message.headers or {})["Nats-Sequence"])
