"""History in NATS: see `nats_streams` for what is kept where.

A stream stores and publishes its messages in the order in which it gets them, and confirms each
after it was published. What one connection sends to two streams, or to a stream and to nobody, may
be handled in any order. So messages of one stream are sent together, and confirmed before others
are sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nats.aio.msg import Msg

from ..exceptions import BackendUnavailable
from ..history import History, Position
from .base import Kept, MessagesRefused, Stored, StoredMessage
from .nats_epochs import Epochs, Info, State
from .nats_jetstream import NOBODY, NOTHING, JetStream, Request, status_of
from .nats_streams import Place, Stream, message_id, place_of, stream_of

# Attempts to read from a stream while it changes, or while the replica that answers is behind, and
# the pause after each of them, in seconds.
_ATTEMPTS = 8
_PAUSE = 0.02

# Bytes that are read at once, or a single message that is larger. The server disconnects a client
# for which too much is waiting.
_MAX_BYTES = 1024 * 1024

# Histories of up to this size are read as a whole from the oldest message on.
_SMALL = 1000


class _OutOfDate(Exception):
    """An answer does not fit what is known from another one."""


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
        self._epochs = Epochs(prefix, jetstream)

    def place_of(self, headers: Mapping[str, str]) -> Place | None:
        """Return where a message was stored that has arrived; None if it was not."""
        place = place_of(headers)
        if place is not None:
            self._epochs.arrived(place)
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
            state = await self._epochs.settle(stream, known)
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
                self._epochs.forget(stream)
                if is_last:
                    why = f"{self._jetstream.name}: the stream {stream.name} is not there"
                    refused |= {draft.number: why for draft in unheard}
                    return
            drafts, is_last = unheard, True

    def _outcome(self, state: State, answer: Msg | str) -> Position | str:
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
            state = await self._epochs.settle(stream, [known] if known else [])
            subject = stream.subject(state.epoch, leaf)
            ahead = 0 if reverse or since is None else since
            if known is not None and known.epoch == state.epoch:
                ahead = max(ahead, known.offset)
            newest = await self._newest(stream, subject)
            is_behind = newest < ahead <= state.top  # or somebody has deleted a message
            with contextlib.suppress(_OutOfDate):
                if not newest:
                    return await self._nothing(stream, subject, state, since)
                if is_behind and attempts_left:
                    raise _OutOfDate
                state.reach(newest)
                position = Position(state.epoch, newest)
                read = self._before if reverse else self._after
                return await read(stream, subject, position, since, limit)
            await asyncio.sleep(_PAUSE)
        raise BackendUnavailable(f"{self._jetstream.name}: the stream {stream.name} keeps changing")

    async def _nothing(
        self, stream: Stream, subject: str, state: State, since: int | None
    ) -> Stored:
        info = await self._epochs.look(stream, subject)
        if info.state.epoch != state.epoch or info.kept:
            raise _OutOfDate
        # Whatever comes has a higher sequence than the stream has now.
        position = Position(state.epoch, info.last)
        return Stored(position, [], self._is_complete(stream, info, since, 0))

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
        found, left = await self._fetch(stream, subject, start, limit + 1, newest)
        complete: bool | None = since is None or bool(found and found[0].offset == since)
        counting = found[max(0, len(found) + left - stream.size) :]
        messages = [it for it in counting if (since or 0) < it.offset <= newest]
        if not complete:
            info = await self._epochs.look(stream)
            complete = self._is_complete(stream, info, since, len(found) + left)
        return Stored(position, messages[:limit], complete)

    @staticmethod
    def _is_complete(stream: Stream, info: Info, since: int | None, count: int) -> bool | None:
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
        self, stream: Stream, subject: str, position: Position, since: int | None, limit: int
    ) -> Stored:
        """Read the newest first. JetStream only reads forward."""
        newest = position.offset
        end = newest + 1 if since is None else min(since, newest + 1)
        width = end if stream.size <= _SMALL else limit
        found: list[StoredMessage] = []
        start = end
        while limit and start > 1 and len(found) < limit:
            start = max(1, end - width)
            count = min(end - start, stream.size + 1)
            fetched, left = await self._fetch(stream, subject, start, count, newest)
            counting = fetched[max(0, len(fetched) + left - stream.size) :]
            found = [message for message in counting if message.offset < end]
            width *= 8
        return Stored(position, found[::-1][:limit], True)

    async def _newest(self, stream: Stream, subject: str) -> int:
        """Return the sequence of the newest message of a channel that is stored; 0 if none is."""
        (answer,) = await self._jetstream.stored(
            stream.base, stream.name, {"last_by_subj": subject}
        )
        return 0 if status_of(answer) else _sequence(answer)

    async def _fetch(
        self, stream: Stream, subject: str, start: int, count: int, newest: int
    ) -> tuple[list[StoredMessage], int]:
        """Return messages of a channel from a sequence on, and how many more are stored.

        The server reads one message after the other. If others remove those that it has not reached
        yet, some are missing after those that it has read, which are not returned then.

        Raises:
            _OutOfDate: The newest one is missing: another replica has answered, or it has expired.
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
                left = 0
                break
            found += (StoredMessage(_sequence(it), it.data) for it in messages)
            left = int((end.headers or {})["Nats-Num-Pending"])
            first = found[-1].offset + 1
        if not left and first <= newest:
            raise _OutOfDate
        if len(found) > 1:
            body = {"seq": start, "next_by_subj": subject}
            (answer,) = await self._jetstream.stored(stream.base, stream.name, body)
            oldest = first if status_of(answer) else _sequence(answer)
            found = [message for message in found if message.offset >= oldest]
        return found, left


def _sequence(message: Msg) -> int:
    return int((message.headers or {})["Nats-Sequence"])
