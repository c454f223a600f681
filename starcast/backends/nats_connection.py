"""One connection to NATS, made with nats-py.

nats-py is used without its reconnecting, its queues, its `publish` and its flush:

- A subscription of nats-py normally has a queue and a task, which breaks a publisher's order across
  channels and drops what is too much. One with a `future=` hands each message to that future as it
  is read, so a `Callback`, a future that takes every message, gets them all in the order of the
  wire.
- `Client.flush()` writes its PING ahead of the commands that its flusher task still has, and if it
  is cancelled, the PONG ends the task that reads. So we send a message to ourselves: the server
  handles what one connection sends in turn, and when the message is back, it has handled everything
  before it.
- `Client.publish()` leaves a message to the flusher task. Ours are written at once, all of a batch
  together.

A call has no deadline of its own. Its answer is only missing if the whole connection is silent,
which the hub's probe notices. Only JetStream may be away while the server is there.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from secrets import token_hex
from typing import Any

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ..exceptions import BackendUnavailable, PayloadTooLarge
from ..history import History, Position
from .base import Deliver, Kept, Lost, Stored, SubscriptionRevoked
from .nats_client import Callback, RefusalClient, refusal, refused_subject
from .nats_history import NatsHistory
from .nats_jetstream import JetStream
from .nats_names import tokens, untoken
from .nats_streams import stream_of

# Bytes that may wait because the socket takes no more; further calls raise.
MAX_UNSENT = 8 * 1024 * 1024


class NatsConnection:
    """One connection of a `NatsBackend`. See `BrokerConnection`.

    Args:
        name: What errors call the servers.
        prefix: What subjects begin with.
        deliver: See `Backend.connect`.

    Attributes:
        error: Why the last server that was tried could not be reached.
    """

    def __init__(self, name: str, prefix: str, deliver: Deliver) -> None:
        self.max_payload = 0
        self.error: Exception | None = None
        self._name = name
        self._prefix = prefix
        self._inbox = f"{prefix}%-{token_hex(8)}"
        self._deliver = deliver
        self._lost: Lost | None = None  # set while the connection is open
        self._client = RefusalClient(self._on_refused)
        self._message_at = 0.0
        self._subscriptions: dict[str, Subscription] = {}
        self._numbers = itertools.count()
        # The calls that the server has not confirmed, with the subjects that each publishes to.
        self._unconfirmed: dict[bytes, tuple[asyncio.Future[None], Sequence[str]]] = {}
        self._refused: dict[str, str] = {}  # by subject, since the last confirmation: why
        self._history = NatsHistory(prefix, JetStream(name, self._client, self._flush))
        # The stream of each channel that is subscribed to and was read.
        self._streams: dict[str, str] = {}

    async def open(self, servers: list[str], options: dict[str, Any], lost: Lost) -> None:
        """Connect to one of the servers. If this raises, the connection has to be closed.

        Args:
            servers: Their URLs.
            options: Arguments of `nats.connect`.
            lost: See `Backend.connect`.
        """
        task = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        await self._client.connect(
            servers, error_cb=self._on_error, closed_cb=self._on_closed, **options
        )
        if task.cancelling() > cancellations:  # Python 3.11's `wait_for` may have swallowed one
            raise asyncio.CancelledError
        if not self._client.is_connected:  # nats-py takes silence for consent
            raise nats.errors.UnexpectedEOF
        await self._client.subscribe(self._inbox, future=Callback(self._on_confirmation))
        await self._flush()
        if self._client.is_closed:  # just now
            raise nats.errors.ConnectionClosedError
        self.max_payload = self._client.max_payload
        self._lost = lost

    async def close(self) -> None:
        self._lost = None
        self._fail_unconfirmed("the connection was closed")
        await self._client.end()

    async def subscribe(self, channel: str) -> None:
        await self._subscribe(channel, self._subject(channel), partial(self._receive, channel))

    async def subscribe_all(self, hub: str) -> None:
        """Subscribe to all channels of the hub with this name. For the command line."""
        await self._subscribe(f"{hub}:*", f"{self._prefix}{hub}.*", self._receive_any)

    async def unsubscribe(self, channel: str) -> None:
        self._check_open()
        await self._forget(channel)
        await self._flush()

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> asyncio.Future[None]:
        self._check_open()
        for _, payload in messages:
            if len(payload) > self.max_payload:
                raise PayloadTooLarge(
                    f"a message of {len(payload)} bytes is more than the {self.max_payload} that "
                    f"{self._name} takes"
                )
        subjects = [self._subject(channel) for channel, _ in messages]
        return self._flush(
            [
                b"PUB %b %d\r\n%b\r\n" % (subject.encode(), len(payload), payload)
                for subject, (_, payload) in zip(subjects, messages, strict=True)
            ],
            subjects,
        )

    async def publish_kept(self, messages: Sequence[Kept]) -> list[Position]:
        """See `HistoryConnection`."""
        self._check_open()
        return await self._history.publish(messages, self.max_payload)

    async def read_kept(
        self,
        channel: str,
        history: History,
        since: int | None,
        limit: int,
        reverse: bool,
        known: Position | None = None,
    ) -> Stored:
        """See `HistoryConnection`."""
        self._check_open()
        stored = await self._history.read(channel, history, since, limit, reverse, known)
        if channel in self._subscriptions:
            self._streams[channel] = stream_of(self._prefix, channel, history)[0].name
        return stored

    @property
    def heard_at(self) -> float:
        """See `BrokerConnection`. Confirmations do not count."""
        client = self._client
        if client.is_inside_message:
            return client.transport.bytes_at
        return max(self._message_at, self._history.heard_at)

    def _subject(self, channel: str) -> str:
        return self._prefix + tokens(channel)

    def _check_open(self) -> None:
        if self._lost is None or self._client.is_closed:
            raise self._unavailable("not connected")
        if self._client.transport.unsent > MAX_UNSENT:
            raise self._unavailable("it does not take what is sent")

    async def _subscribe(self, channel: str, subject: str, callback: Callable[[Msg], None]) -> None:
        self._check_open()
        subscription = await self._client.subscribe(subject, future=Callback(callback))
        self._subscriptions[channel] = subscription
        try:
            await self._flush()
        except BaseException:
            await self._forget(channel)
            raise
        if channel not in self._subscriptions:
            raise self._unavailable("the subscription was taken away at once")

    async def _forget(self, channel: str) -> None:
        """Unsubscribe, without waiting for anything."""
        self._streams.pop(channel, None)
        subscription = self._subscriptions.pop(channel, None)
        if subscription is not None and not self._client.is_closed:
            await subscription.unsubscribe()

    def _flush(
        self, commands: Iterable[bytes] = (), subjects: Sequence[str] = ()
    ) -> asyncio.Future[None]:
        """Write commands at once, which publish to these subjects.

        The result is there when the server has handled them and everything before them.
        """
        number = b"%d" % next(self._numbers)
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unconfirmed[number] = confirmed, subjects
        confirmed.add_done_callback(lambda _: self._unconfirmed.pop(number))
        own = b"PUB %b %d\r\n%b\r\n" % (self._inbox.encode(), len(number), number)
        self._client.send([*commands, own])
        return confirmed

    def _receive(self, channel: str, message: Msg) -> None:
        self._message_at = self._client.transport.bytes_at
        place = None if message.headers is None else self._history.place_of(message.headers)
        # A program whose history has another size has another stream, with other offsets.
        if place is None or self._streams.get(channel, place.stream) != place.stream:
            self._deliver(channel, message.data)
        else:
            self._deliver(channel, message.data, place.position, place.previous)

    def _receive_any(self, message: Msg) -> None:
        self._receive(untoken(message.subject.removeprefix(self._prefix)), message)

    def _on_confirmation(self, message: Msg) -> None:
        # What was refused since the last confirmation belongs to what was sent since then.
        refused, self._refused = self._refused, {}
        confirmed, subjects = self._unconfirmed.get(message.data, (None, ()))
        if confirmed is None or confirmed.done():
            return
        if refused:
            confirmed.set_exception(refusal(self._name, refused, subjects))
        else:
            confirmed.set_result(None)

    async def _on_refused(self, said: str) -> None:
        """The server has refused something, and keeps the connection."""
        subject, number = refused_subject(said)
        if self._lost is None or subject == self._inbox or self._history.listens_to(subject):
            self._break(said)  # no confirmation would come, or no answer
        elif number is None:
            self._refused[subject] = said
        else:
            channel = untoken(subject.removeprefix(self._prefix))
            subscription = self._subscriptions.get(channel)
            # It may be about one that we have given up since, or made anew.
            if subscription is not None and subscription._id == number:
                await self._forget(channel)
                self._lost(SubscriptionRevoked(f"{self._name}: {said}", channel))

    async def _on_error(self, error: Exception) -> None:
        self.error = error

    async def _on_closed(self) -> None:
        self._break(f"the connection broke ({self._client.last_error})")

    def _break(self, why: str) -> None:
        """Fail all calls, and report that the connection is lost, unless that was done."""
        self._fail_unconfirmed(why)
        lost, self._lost = self._lost, None
        if lost is not None:
            lost(self._unavailable(why))

    def _fail_unconfirmed(self, why: str) -> None:
        for confirmed, _ in self._unconfirmed.values():
            if not confirmed.done():
                confirmed.set_exception(self._unavailable(why))
        self._history.fail(self._unavailable(why))

    def _unavailable(self, why: str) -> BackendUnavailable:
        return BackendUnavailable(f"{self._name}: {why}")
