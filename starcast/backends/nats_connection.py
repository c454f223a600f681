"""One connection to NATS, over nats-py.

nats-py is used without its reconnecting, its queues, its `publish` and its flush:

- A subscription of nats-py normally has a queue and a task, which breaks a publisher's order across
  channels and drops messages when the queue is full. A subscription with a `future=` hands each
  message to that future as it is read, so `Callback`, a future that takes every message, gets all
  messages in the order in which they arrive.
- `Client.flush()` writes its PING ahead of the commands that its flusher task still has, and if it
  is cancelled, the PONG ends the task that reads. Instead, the connection publishes a message to
  itself: the server handles the commands of a connection in order, so when that message arrives,
  everything before it has been handled.
- `Client.publish()` leaves a message to the flusher task. Here all messages of a batch are written
  together, at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from secrets import token_hex
from typing import Any

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.protocol.parser import AWAITING_MSG_PAYLOAD

from ..exceptions import BackendUnavailable, PayloadTooLarge
from .base import Deliver, Lost, SubscriptionRevoked
from .nats_client import Callback, RefusalClient, Transport, refusal, refused_subject
from .nats_names import tokens, untoken

# How long nats-py may take to end its tasks, in seconds. It needs a few iterations of the loop.
CLOSE_TIMEOUT = 1.0


class NatsConnection:
    """See the module and `BrokerConnection`.

    Args:
        name: What errors call the servers.
        prefix: What subjects begin with.
        deliver: See `Backend.connect`.

    Attributes:
        error: What nats-py has reported last.
    """

    def __init__(self, name: str, prefix: str, deliver: Deliver) -> None:
        self.error: Exception | None = None
        self.max_payload = 0  # until it is open
        self._name = name
        self._prefix = prefix
        self._deliver = deliver
        self._lost: Lost | None = None  # while it is open
        self._client = RefusalClient(self._on_refused)
        self._transport = self._client._transport = Transport()
        self._closed = asyncio.Event()  # nats-py has ended its tasks
        self._inbox = f"{prefix}%-{token_hex(8)}"
        self._message_at = 0.0
        self._numbers = itertools.count()
        self._waiters: dict[bytes, tuple[asyncio.Future[None], Sequence[tuple[str, bytes]]]] = {}
        self._subscriptions: dict[str, Subscription] = {}
        self._channels: dict[int, str] = {}  # by the number of the subscription
        self._refused: dict[str, str] = {}  # since the last answer: by subject, the reason

    async def open(self, servers: list[str], options: dict[str, Any], lost: Lost) -> None:
        """Connect, or raise an error of nats-py's, an OSError or a ValueError."""
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
        await self._client.subscribe(self._inbox, future=Callback(self._on_answer))
        await self._publish()
        if self._client.is_closed:  # it has broken just now
            raise nats.errors.ConnectionClosedError
        self.max_payload = self._client.max_payload
        self._lost = lost

    # BrokerConnection

    @property
    def heard_at(self) -> float:
        """See `BrokerConnection`. Answers to `publish` do not count."""
        is_partial = self._client._ps.state == AWAITING_MSG_PAYLOAD
        return self._transport.bytes_at if is_partial else self._message_at

    async def subscribe(self, channel: str) -> None:
        """See `BrokerConnection`."""
        receive = partial(self._receive, channel)
        await self._subscribe(channel, self._subject(channel), receive)

    async def subscribe_all(self, hub: str) -> None:
        """Subscribe to all channels of the hub with this name. For the command line."""
        await self._subscribe(f"{hub}:*", f"{self._prefix}{hub}.*", self._receive_any)

    async def unsubscribe(self, channel: str) -> None:
        """See `BrokerConnection`."""
        self._check_open()
        await self._forget(channel)
        await self._publish()

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> asyncio.Future[None]:
        """See `BrokerConnection`."""
        self._check_open()
        for _, payload in messages:
            if len(payload) > self.max_payload:
                raise PayloadTooLarge(
                    f"a message of {len(payload)} bytes is more than the {self.max_payload} that "
                    f"{self._name} takes"
                )
        return self._publish(*((self._subject(channel), data) for channel, data in messages))

    async def close(self) -> None:
        """See `BrokerConnection`."""
        self._lost = None
        self._fail_waiters("it was closed")
        self._transport.close()
        # nats-py may complain about a connection that was never made.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._client.close()
                await self._closed.wait()  # it may already have been closing by itself

    # Commands

    def _check_open(self) -> None:
        if self._client.is_closed:
            raise BackendUnavailable(f"{self._name}: not connected")

    def _subject(self, channel: str) -> str:
        return self._prefix + tokens(channel)

    def _publish(self, *messages: tuple[str, bytes]) -> asyncio.Future[None]:
        """Write messages, pairs of subject and payload, at once.

        The future is done when the server has handled these and everything before them.
        """
        number = b"%d" % next(self._numbers)
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[number] = answered, messages
        answered.add_done_callback(lambda _: self._waiters.pop(number))
        # Commands of nats-py's own go first. Its own task would write them in the next iteration.
        commands, self._client._pending = self._client._pending, []
        self._client._pending_data_size = 0
        for subject, payload in (*messages, (self._inbox, number)):
            commands.append(b"PUB %b %d\r\n%b\r\n" % (subject.encode(), len(payload), payload))
        self._transport.writelines(commands)
        return answered

    async def _subscribe(self, channel: str, subject: str, receive: Callable[[Msg], None]) -> None:
        self._check_open()
        subscription = await self._client.subscribe(subject, future=Callback(receive))
        self._subscriptions[channel] = subscription
        self._channels[subscription._id] = channel
        try:
            await self._publish()
        except BaseException:
            await self._forget(channel)
            raise
        if channel not in self._subscriptions:
            raise BackendUnavailable(f"{self._name}: the subscription was taken away at once")

    async def _forget(self, channel: str) -> None:
        """Unsubscribe, without waiting for anything."""
        subscription = self._subscriptions.pop(channel, None)
        if subscription is not None:
            del self._channels[subscription._id]
            if not self._client.is_closed:
                await subscription.unsubscribe()

    def _fail_waiters(self, reason: str) -> None:
        for waiter, _ in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(BackendUnavailable(f"{self._name}: {reason}"))

    # Called by nats-py

    def _receive(self, channel: str, message: Msg) -> None:
        self._message_at = self._transport.bytes_at
        self._deliver(channel, message.data)

    def _receive_any(self, message: Msg) -> None:
        self._receive(untoken(message.subject[len(self._prefix) :]), message)

    def _on_answer(self, message: Msg) -> None:
        # What was refused since the last answer belongs to what was sent since then.
        refused, self._refused = self._refused, {}
        waiter, messages = self._waiters.get(message.data, (None, ()))
        if waiter is None or waiter.done():
            return
        if refused:
            waiter.set_exception(refusal(self._name, refused, [subject for subject, _ in messages]))
        else:
            waiter.set_result(None)

    async def _on_refused(self, error: str) -> None:
        """The server has refused something, and keeps the connection."""
        subject, number = refused_subject(error)
        if self._lost is None or subject == self._inbox:
            self._break(error)  # no answer would come
        elif number is None:
            self._refused[subject] = error
        elif (channel := self._channels.get(number)) is not None:
            await self._forget(channel)
            self._lost(SubscriptionRevoked(f"{self._name}: {error}", channel))

    async def _on_error(self, error: Exception) -> None:
        self.error = error

    async def _on_closed(self) -> None:
        self._closed.set()
        self._break(f"the connection broke ({self._client.last_error})")

    def _break(self, reason: str) -> None:
        """Fail all calls, and report that the connection is lost unless that was done."""
        self._fail_waiters(reason)
        lost, self._lost = self._lost, None
        if lost is not None:
            lost(BackendUnavailable(f"{self._name}: {reason}"))
