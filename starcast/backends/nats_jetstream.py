"""Requests to JetStream, and their answers, over one connection to NATS.

Answers come to a subject below that of the hub, `starcast:default.%-.RANDOM.NUMBER`, so the rights
that separate hubs separate their answers too. No channel has three tokens more than its hub.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from secrets import token_hex
from typing import Any, NamedTuple

from nats.aio.msg import Msg
from nats.js.api import Header

from ..exceptions import BackendUnavailable
from ..sync.deadline import Overdue
from .base import MessagesRefused
from .nats_client import Callback, RefusalClient

# Seconds without an answer after which there will be none: the server has handled the request, and
# whoever keeps the stream may be away. It is less than what a hub waits for its probe, because that
# waits behind what is published.
ANSWER_TIMEOUT = 3.0

# The first server that returns several stored messages at once.
MIN_VERSION = (2, 11)
_VERSION = re.compile(r"([0-9]+)\.([0-9]+)")

# Errors of the server.
NOT_FOUND = 10059
EXISTS = 10058
_NOT_ENABLED = (10039, 10076)

# A status in the headers of an answer.
NOBODY, NOTHING, END = "503", "404", "204"

LATE = "JetStream did not answer in time"

# Writes commands, and is done when the server has handled them. It fails with `MessagesRefused` if
# it refuses to take some of what goes to these subjects.
Flush = Callable[[Iterable[bytes], list[str]], asyncio.Future[None]]


class JetStreamError(BackendUnavailable):
    """JetStream has refused something.

    Args:
        message: What it said.
        number: That of the error; 0 if it has none.
    """

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.number = number


class Request(NamedTuple):
    """A message that is answered.

    Attributes:
        subject, payload: The message.
        message_id: What tells JetStream that it was published before; empty for nothing.
    """

    subject: str
    payload: bytes
    message_id: str = ""

    @property
    def headers(self) -> bytes:
        return b"NATS/1.0\r\nNats-Msg-Id: %b\r\n\r\n" % self.message_id.encode()

    @property
    def size(self) -> int:
        """Bytes that count for the server's limit."""
        return len(self.payload) + (len(self.headers) if self.message_id else 0)

    def command(self, reply: str) -> bytes:
        """Return what is written."""
        subjects = f"{self.subject} {reply}".encode()
        if not self.message_id:
            return b"PUB %b %d\r\n%b\r\n" % (subjects, len(self.payload), self.payload)
        sizes = b"%d %d" % (len(self.headers), self.size)
        return b"HPUB %b %b\r\n%b%b\r\n" % (subjects, sizes, self.headers, self.payload)


class _Call:
    """Some requests that are sent at once, and their answers.

    Args:
        count: How many requests there are.
        is_batch: Whether each of them has any number of answers, of which the last has a status.
    """

    def __init__(self, count: int, is_batch: bool) -> None:
        self.answers: list[list[Msg]] = [[] for _ in range(count)]
        self.is_batch = is_batch
        self.heard_at = time.monotonic()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.error: Exception | None = None  # why there will be no more answers
        self._open = set(range(count))

    def take(self, number: int, answer: Msg) -> None:
        """Take an answer to one of the requests."""
        self.heard_at = time.monotonic()
        self.answers[number].append(answer)
        if not self.is_batch or status_of(answer):
            self.finish(number)

    def finish(self, number: int) -> None:
        """There are no more answers to this request."""
        self._open.discard(number)
        if not self._open:
            self.end()

    def fail(self, error: Exception) -> None:
        """There are no more answers at all."""
        self.error = error
        self.end()

    def end(self) -> None:
        """Wait for no more answers."""
        with contextlib.suppress(asyncio.InvalidStateError):  # nobody waits any more
            self.done.set_result(None)

    @property
    def unanswered(self) -> set[int]:
        return self._open


class JetStream:
    """See the module.

    Args:
        name: What errors call the servers.
        client: Connected to one of them.
        flush: See `Flush`.

    Attributes:
        heard_at: When a message that is stored arrived last, in `time.monotonic()`.
    """

    def __init__(self, name: str, client: RefusalClient, flush: Flush) -> None:
        self.name = name
        self.heard_at = 0.0
        self._client = client
        self._flush = flush
        self._inboxes: dict[str, str] = {}  # by what the subjects of a hub begin with
        self._numbers = itertools.count()
        self._open: dict[str, tuple[_Call, int]] = {}  # by the last token of the reply subject

    def fail(self, error: Exception) -> None:
        """The connection is broken."""
        for call, _ in self._open.values():
            call.fail(error)

    def listens_to(self, subject: str) -> bool:
        """Whether answers arrive there."""
        return subject.removesuffix(".*") in self._inboxes.values()

    async def publish(self, base: str, requests: Sequence[Request]) -> list[Msg | str]:
        """Publish messages at once, in this order.

        Returns:
            For each message, the answer, or why it was refused.
        """
        answers, refused = await self._ask(base, requests, False)
        return [refused.get(number) or answer[0] for number, answer in enumerate(answers)]

    async def api(self, base: str, what: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Call a function of the JSON API.

        Args:
            base: What the subjects of the hub begin with.
            what: The function and the name of the stream.
            body: The arguments.

        Raises:
            JetStreamError: It is refused.
        """
        request = Request(f"$JS.API.{what}", json.dumps(body).encode())
        ((answer,),) = await self._ask_all(base, [request], False)
        if status_of(answer) == NOBODY:
            raise self._not_enabled("no responders")
        found: dict[str, Any] = json.loads(answer.data)
        if error := found.get("error"):
            code, said = error.get("err_code", 0), error.get("description", "")
            if code in _NOT_ENABLED:
                raise self._not_enabled(said)
            raise JetStreamError(f"{self.name} refuses: {said}", code)
        return found

    async def stored(self, base: str, stream: str, body: Mapping[str, Any]) -> list[Msg]:
        """Return messages that are stored; the last answer of a batch has a status only."""
        request = Request(f"$JS.API.DIRECT.GET.{stream}", json.dumps(body).encode())
        (answers,) = await self._ask_all(base, [request], "batch" in body)
        status = status_of(answers[-1])
        if status not in ("", NOBODY, NOTHING, END):
            said = (answers[-1].headers or {}).get(Header.DESCRIPTION, status)
            raise JetStreamError(f"{self.name} refuses: {said}")
        return answers

    def _not_enabled(self, said: str) -> JetStreamError:
        return JetStreamError(
            f"{self.name}: a history needs JetStream, which is not enabled there ({said}); start "
            "nats-server with -js, or with jetstream {} in its configuration, and enable it for "
            "the account"
        )

    async def _ask_all(
        self, base: str, requests: Sequence[Request], is_batch: bool
    ) -> list[list[Msg]]:
        answers, refused = await self._ask(base, requests, is_batch)
        if refused:
            raise JetStreamError(next(iter(refused.values())))
        return answers

    async def _ask(
        self, base: str, requests: Sequence[Request], is_batch: bool
    ) -> tuple[list[list[Msg]], dict[int, str]]:
        """Send requests; return the answers to each, and the reasons why some have none."""
        inbox = await self._inbox(base)
        call = _Call(len(requests), is_batch)
        tokens = [str(next(self._numbers)) for _ in requests]
        self._open |= {token: (call, number) for number, token in enumerate(tokens)}
        refused: dict[int, str] = {}
        try:
            commands = [
                request.command(f"{inbox}.{token}")
                for request, token in zip(requests, tokens, strict=True)
            ]
            try:
                await self._flush(commands, [request.subject for request in requests])
            except MessagesRefused as error:
                refused = error.reasons
                for number in refused:
                    call.finish(number)
            overdue = Overdue(ANSWER_TIMEOUT, call.end, lambda: call.heard_at)
            try:
                await call.done
            finally:
                overdue.cancel()
            if call.error is not None:
                raise call.error
        finally:
            for token in tokens:
                del self._open[token]
        return call.answers, dict.fromkeys(call.unanswered, f"{self.name}: {LATE}") | refused

    async def _inbox(self, base: str) -> str:
        """Return where answers arrive; a dot and a number are to follow."""
        if base not in self._inboxes:
            version = self._client.version
            found = _VERSION.match(version)
            if found and (int(found[1]), int(found[2])) < MIN_VERSION:
                raise JetStreamError(
                    f"{self.name}: a history needs nats-server {MIN_VERSION[0]}.{MIN_VERSION[1]} "
                    f"or newer, and this is {version}"
                )
            inbox = f"{base}.%-.{token_hex(8)}"
            callback = Callback(self._on_answer)
            subscription = await self._client.subscribe(f"{inbox}.*", future=callback)
            try:
                await self._flush((), [])
            except BaseException:
                if not self._client.is_closed:
                    await subscription.unsubscribe()
                raise
            self._inboxes[base] = inbox
        return self._inboxes[base]

    def _on_answer(self, answer: Msg) -> None:
        call, number = self._open.get(answer.subject.rpartition(".")[2], (None, 0))
        if call is not None:
            call.take(number, answer)
            if call.is_batch:
                self.heard_at = call.heard_at


def status_of(answer: Msg) -> str:
    """Return the status of an answer; empty if it has none."""
    return (answer.headers or {}).get(Header.STATUS.value, "")
