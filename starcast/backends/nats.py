"""NATS: core subjects, over nats-py.

nats-py is used without its reconnecting, its queues, its `publish` and its flush:

- A subscription of nats-py normally has a queue and a task, which breaks a publisher's order across
  channels and drops what is too much. One with a `future=` hands each message to that future as it
  is read, so `Sink`, a future that takes every message, gets them all in the order of the wire.
- `Client.flush()` writes its PING ahead of the commands that its flusher task still has, and if it
  is cancelled, the PONG ends the task that reads. So we ask the broker by a message to ourselves:
  it handles what one connection sends in turn, and when the message is back, all before it is done.
- `Client.publish()` leaves a message to the flusher task. Ours are written when they are handed
  over, all of a batch together.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import re
from collections.abc import Sequence
from functools import partial
from secrets import token_hex
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.protocol.parser import AWAITING_MSG_PAYLOAD

from ..exceptions import BackendUnavailable, ConfigurationError, PayloadTooLarge
from ..sync.deadline import Deadline, Overdue
from .base import Deliver, LoginRefused, Lost, SubscriptionRevoked
from .nats_client import RefusalClient, Sink, Wire, refusal, refused_subject
from .nats_names import endpoints_of, read, same_servers, tokens, untoken
from .urls import Endpoint

START_TIMEOUT = 5.0  # seconds to connect, log in and get a first answer
CONNECT_TIMEOUT = 2  # seconds of these for each step with one server
ANSWER_TIMEOUT = 10.0  # seconds that the broker has to confirm a call
STOP_TIMEOUT = 1.0  # seconds for nats-py to end its tasks, which takes a few turns of the loop

# Bytes that may wait because the socket takes no more; further calls raise.
MAX_UNSENT = 8 * 1024 * 1024

# Characters. A server takes 4,096 bytes of subject; a hub's name has 64 and a dot, and the 200
# characters of a channel take up to 2,400.
MAX_PREFIX = 200

# Printable ASCII but the wildcards, in tokens between dots; the last one may be empty.
_PREFIX = re.compile(r"(?:[!-)+,\-/-=?-~]+\.)*[!-)+,\-/-=?-~]*")
# What this module decides for itself; no option of the user's.
_FIXED: dict[str, Any] = {
    "allow_reconnect": False,
    # With 0 it would never give up. Now each server is tried twice, without a pause.
    "max_reconnect_attempts": 1,
    "reconnect_time_wait": 0,
    "connect_timeout": CONNECT_TIMEOUT,
    # Commands are never kept for a later connection, and handing one over never suspends. (Where
    # it would, nats-py swallows a cancellation.)
    "pending_size": 0,
    "flusher_queue_size": 0,
    "no_echo": False,
    "verbose": False,
}

# Options whose value may be a function that is asked for it, for each connection.
_CREDENTIALS = ("user", "password", "token")


class _Session:
    """One connection, from its start to its end."""

    def __init__(self, inbox: str, name: str, deliver: Deliver) -> None:
        self.lost: Lost | None = None  # set when it has started
        self.client = RefusalClient(self._on_refused)
        self.trouble: Exception | None = None
        self._inbox = inbox
        self._name = name
        self._deliver = deliver
        self._message_at = 0.0
        self._wire = Wire()
        self.client._transport = self._wire
        self._subscriptions: dict[str, Subscription] = {}
        self._numbers = itertools.count()
        self._channels: dict[int, str] = {}  # by the number of the subscription
        self._waiters: dict[bytes, tuple[asyncio.Future[None], Sequence[tuple[str, bytes]]]] = {}
        self._refused: dict[str, str] = {}  # by subject, since the last answer: why
        self._connecting = True  # or not even that: there is nothing to be closed yet
        self._ended = asyncio.Event()

    async def open(self, servers: list[str], options: dict[str, Any]) -> None:
        task = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        try:
            await self.client.connect(
                servers, error_cb=self._on_error, closed_cb=self._on_closed, **options, **_FIXED
            )
        finally:
            self._connecting = False
        if task.cancelling() > cancellations:  # Python 3.11's `wait_for` may have swallowed one
            raise asyncio.CancelledError
        if not self.client.is_connected:  # nats-py takes silence for consent
            raise nats.errors.UnexpectedEOF
        await self.client.subscribe(self._inbox, future=Sink(self._on_answer))
        await self.hand_over()

    def hand_over(self, *messages: tuple[str, bytes]) -> asyncio.Future[None]:
        """Publish pairs of subject and payload, at once.

        What comes back is done when the broker has handled these and all that went before.
        """
        loop = asyncio.get_running_loop()
        number = b"%d" % next(self._numbers)
        answered: asyncio.Future[None] = loop.create_future()
        self._waiters[number] = answered, messages
        trouble = f"no answer within {ANSWER_TIMEOUT:g} seconds"
        fail = partial(self._fail, answered, trouble)
        overdue = Overdue(ANSWER_TIMEOUT, fail, lambda: self.heard_at)

        def forget(answered: asyncio.Future[None]) -> None:
            overdue.cancel()
            del self._waiters[number]

        answered.add_done_callback(forget)
        # What nats-py itself has to send goes first: its own task would write it in the next turn.
        commands, self.client._pending = self.client._pending, []
        self.client._pending_data_size = 0
        for subject, payload in (*messages, (self._inbox, number)):
            commands.append(b"PUB %b %d\r\n%b\r\n" % (subject.encode(), len(payload), payload))
        self._wire.writelines(commands)
        return answered

    @property
    def heard_at(self) -> float:
        """When a message, or a part of one, arrived last. Answers to `hand_over` do not count."""
        is_partial = self.client._ps.state == AWAITING_MSG_PAYLOAD
        return self._wire.bytes_at if is_partial else self._message_at

    def _take(self, channel: str, message: Msg) -> None:
        self._message_at = self._wire.bytes_at
        self._deliver(channel, message.data)

    def _take_any(self, cut: int, message: Msg) -> None:
        self._take(untoken(message.subject[cut:]), message)

    @property
    def unsent(self) -> int:
        """Bytes that the socket has not taken yet."""
        writer = self._wire._io_writer
        return 0 if writer is None else writer.transport.get_write_buffer_size()

    async def subscribe(self, channel: str, subject: str, cut: int | None = None) -> None:
        """Subscribe; with `cut` to a wildcard, whose subjects have a prefix as long as that."""
        take = partial(self._take, channel) if cut is None else partial(self._take_any, cut)
        subscription = await self.client.subscribe(subject, future=Sink(take))
        self._subscriptions[channel] = subscription
        self._channels[subscription._id] = channel
        try:
            await self.hand_over()
        except BaseException:
            await self.forget(channel)
            raise
        if channel not in self._subscriptions:
            raise BackendUnavailable(f"{self._name}: the subscription was taken away at once")

    async def forget(self, channel: str) -> None:
        """Unsubscribe, without waiting for anything."""
        subscription = self._subscriptions.pop(channel, None)
        if subscription is not None:
            del self._channels[subscription._id]
            if not self.client.is_closed:
                await subscription.unsubscribe()

    async def close(self) -> None:
        """End the connection and nats-py's tasks."""
        self.lost = None
        self._release("it was stopped")
        self._wire.close()
        if self._connecting:  # nats-py would go on; `open` fails now, and `start` closes it then
            return
        # nats-py may complain about a connection that was never made.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(STOP_TIMEOUT):
                await self.client.close()
                await self._ended.wait()  # it may have been closing by itself already

    def _release(self, trouble: str) -> None:
        for waiter, _ in self._waiters.values():
            self._fail(waiter, trouble)

    def _fail(self, waiter: asyncio.Future[None], trouble: str) -> None:
        if not waiter.done():
            waiter.set_exception(BackendUnavailable(f"{self._name}: {trouble}"))

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

    async def _on_refused(self, said: str) -> None:
        """The server has refused something, and keeps the connection."""
        subject, number = refused_subject(said)
        if self.lost is None or subject == self._inbox:
            self._release(said)  # no answer would come
            self._end(said)
        elif number is None:
            self._refused[subject] = said
        elif (channel := self._channels.get(number)) is not None:
            await self.forget(channel)
            self.lost(SubscriptionRevoked(f"{self._name}: {said}", channel))

    async def _on_error(self, error: Exception) -> None:
        self.trouble = error

    async def _on_closed(self) -> None:
        trouble = f"the connection broke ({self.client.last_error})"
        self._release(trouble)
        self._ended.set()
        self._end(trouble)

    def _end(self, trouble: str) -> None:
        """Say that the connection is of no use any more, unless that was said."""
        lost, self.lost = self.lost, None
        if lost is not None:
            lost(BackendUnavailable(f"{self._name}: {trouble}"))


class NatsBackend:
    """`Broadcast("nats://localhost:4222")`: core NATS, nothing is stored.

    A channel is the subject of the prefix, the hub's name, a dot and the channel, in which every
    byte of its UTF-8 form that is not an ASCII letter, a digit, `-` or `_` is written as `%` and
    two upper-case hex digits. The channel `room 1.b` is `starcast:default.room%201%2Eb`, so no
    channel is a wildcard or has two tokens. `nats pub starcast:default.lobby hello` reaches the
    clients of the channel `lobby`; headers and reply subjects are ignored.

    With the prefix `starcast.` the channels of the hub `staff` are `starcast.staff.*` in
    permissions and for other subscribers. A process needs `starcast.*` besides, for the subject
    with which it asks whether the server has handled what it sent; that is no hub's channel.

    One publisher's messages keep their order, also across channels. Those of two publishers may
    reach two processes in different orders.

    That subject is `%-` and a random word after the prefix: what a process sends there and gets
    back tells it that the broker has handled all that went before.

    Args:
        url: `nats://` or `tls://`, with `user:password@` or `token@` (percent-encoded) before the
            host; port 4222 by default. More servers of a cluster follow after commas; one of them
            is chosen at random. `tls://` refuses a server without TLS; `nats://` uses TLS when
            the server asks for it. A `str`, or anything whose `str()` is one.
        prefix: What subjects begin with: up to 200 printable ASCII characters without blanks, `*`
            and `>`; may be empty.
        options: Further arguments of `nats.connect`, such as `tls` (an `ssl.SSLContext`),
            `user_credentials`, `nkeys_seed` or `name`. `user`, `password` and `token` may be
            functions without arguments, plain or `async`, that are called for each connection: for
            passwords that expire. They are called on the event loop and have five seconds.

    Attributes:
        address: Where its channels are; see `Backend`.
        max_payload: Bytes that one message may have: 1 MiB, until a server has told its own limit.

    Raises:
        ConfigurationError: The URL, the prefix or an option makes no sense.
    """

    if_silent = "do the user's permissions allow to subscribe to what it may publish to?"

    def __init__(self, url: object, *, prefix: str = "starcast:", **options: Any) -> None:
        if len(prefix) > MAX_PREFIX or not _PREFIX.fullmatch(prefix):
            raise ConfigurationError(
                f"a prefix of subjects is up to {MAX_PREFIX} printable ASCII characters without "
                f"blanks, '*', '>' and empty tokens, not {prefix!r}"
            )
        if taken := options.keys() & {*_FIXED, "servers", "error_cb", "closed_cb"}:
            raise ConfigurationError(f"the backend sets these options: {', '.join(sorted(taken))}")
        known = inspect.signature(Client.connect).parameters
        if unknown := options.keys() - known:
            raise ConfigurationError(f"nats.connect does not know: {', '.join(sorted(unknown))}")
        self._servers, login = read(str(url))
        if "password" in options and "token" in login:  # nats://user@host is a user then
            login = {"user": login["token"]}
        self._name = "NATS at " + ", ".join(url.partition("://")[2] for url in self._servers)
        self._options = {**login, **options}
        self.address = f"NATS at {', '.join(same_servers(self._servers))}, prefix {prefix!r}"
        self.endpoints: list[Endpoint] = [*endpoints_of(self._servers)]
        self._prefix = prefix
        self._session: _Session | None = None
        self.max_payload = 1024 * 1024

    async def connect(self, deliver: Deliver, lost: Lost) -> NatsBackend:
        """Connect, and return this object, which is its own connection: one at a time."""
        await self.start(deliver, lost)
        return self

    async def close(self) -> None:
        """Close the connection. See `BrokerConnection`."""
        await self.stop()

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        session = self._session = _Session(f"{self._prefix}%-{token_hex(8)}", self._name, deliver)
        failed: BackendUnavailable | None = None
        try:
            async with Deadline(START_TIMEOUT):
                await session.open(self._servers, await self._current_options())
            # It may also have been stopped, or have broken just now.
            if self._session is not session or session.client.is_closed:
                raise nats.errors.ConnectionClosedError
        except BaseException as error:
            await session.close()
            if self._session is session:
                self._session = None
            if not isinstance(error, (OSError, ValueError, nats.errors.Error)):
                raise
            reason = str(session.trouble or error) or "no answer in time"
            refused = "authorization violation" in reason.lower()
            failed = self._unavailable(reason, LoginRefused if refused else None)
        if failed is not None:
            raise failed  # not above: whatever the error holds, it would be its context
        self.max_payload = session.client.max_payload
        session.lost = lost

    async def stop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def subscribe(self, channel: str) -> None:
        await self._opened().subscribe(channel, self._subject(channel))

    async def subscribe_all(self, hub: str) -> None:
        """Subscribe to all channels of the hub with this name. For the command line."""
        subject = f"{self._prefix}{hub}.*"
        await self._opened().subscribe(f"{hub}:*", subject, len(self._prefix))

    async def unsubscribe(self, channel: str) -> None:
        session = self._opened()
        await session.forget(channel)
        await session.hand_over()

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> asyncio.Future[None]:
        session = self._opened()
        for _, payload in messages:
            if len(payload) > self.max_payload:
                raise PayloadTooLarge(
                    f"a message of {len(payload)} bytes is more than the {self.max_payload} that "
                    f"{self._name} takes"
                )
        return session.hand_over(*((self._subject(channel), data) for channel, data in messages))

    @property
    def heard_at(self) -> float:
        """See `Backend`."""
        session = self._session
        return 0.0 if session is None else session.heard_at

    async def _current_options(self) -> dict[str, Any]:
        options = dict(self._options)
        for name in _CREDENTIALS:
            ask = options.get(name)
            if callable(ask):
                try:
                    answer = ask()
                    options[name] = await answer if inspect.isawaitable(answer) else answer
                    continue
                except Exception as error:
                    kind = type(error).__name__  # and not what it says, which may hold a secret
                raise self._unavailable(f"{name}= raised {kind}")
        return options

    def _opened(self) -> _Session:
        session = self._session
        if session is None or session.client.is_closed:
            raise self._unavailable("not connected")
        if session.unsent > MAX_UNSENT:
            raise self._unavailable("it does not take what is sent")
        return session

    def _subject(self, channel: str) -> str:
        return self._prefix + tokens(channel)

    def _unavailable(
        self, reason: str, kind: type[BackendUnavailable] | None = None
    ) -> BackendUnavailable:
        return (kind or BackendUnavailable)(f"{self._name}: {reason}")
