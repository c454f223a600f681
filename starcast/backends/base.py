"""The contract of a backend: how messages travel between hubs over a broker.

A `Backend` holds settings and makes connections. A `BrokerConnection` is one of these, from
`Backend.connect` until `close`: it never reconnects, and everything that a backend has to remember
while it is connected belongs to it. It is used on the event loop that called `connect`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol

from ..exceptions import BackendUnavailable
from ..history import History, Position

Lost = Callable[[Exception], None]


class Deliver(Protocol):
    """What a connection calls with each message that arrives."""

    def __call__(
        self,
        channel: str,
        payload: bytes,
        position: Position | None = None,
        previous: int | None = None,
        /,
    ) -> None:
        """Take a message.

        Args:
            channel, payload: The message.
            position: Its place in the channel's history; None if it is not kept.
            previous: The offset of the channel's message before it; by default, the number below.
        """


class Kept(NamedTuple):
    """A message to publish that is kept in the history of its channel.

    Attributes:
        channel, payload: The message.
        history: How much is kept.
        key: Its idempotency key: if a message of the channel was published with it within the last
            `history.key_ttl` seconds, this one is neither kept nor sent.
        known: A position that the channel has reached, as far as the hub knows. If the broker is
            not as far in that epoch, it has lost messages, and the channel needs a new epoch:
            otherwise other messages would get the same positions.
    """

    channel: str
    payload: bytes
    history: History
    key: str | None = None
    known: Position | None = None


class StoredMessage(NamedTuple):
    """A message that was kept, and its offset."""

    offset: int
    payload: bytes


class Stored(NamedTuple):
    """What was kept of a channel.

    Attributes:
        position: That of the channel's newest message, or a later one with no message in between;
            the offset is 0 if there was none yet.
        messages: Those that were asked for, in the order that was asked for.
        complete: Whether every message after `since` is still kept; None if the broker cannot tell
            whether others have expired that were older than the history's `ttl`. Only of meaning if
            the epoch of `position` is that of `since`, and if the messages were not asked for in
            reverse.
    """

    position: Position
    messages: list[StoredMessage]
    complete: bool | None


class LoginRefused(BackendUnavailable):
    """The broker rejected the user or the password, so trying again soon is pointless."""


class MessagesRefused(BackendUnavailable):
    """The broker refused some messages of a batch and accepted all the others.

    Args:
        message: What the broker said about one of them.
        reasons: Why each refused message was refused, by its position in the batch.
        positions: The place in its channel's history of each message that was accepted, and None
            for the others. Of `publish_kept` only.
    """

    # Some programs rebuild an exception from its message alone, so the others need a default.
    def __init__(
        self,
        message: str,
        reasons: dict[int, str] | None = None,
        positions: Sequence[Position | None] = (),
    ) -> None:
        super().__init__(message)
        self.reasons = reasons or {}
        self.positions = positions


class SubscriptionRevoked(BackendUnavailable):
    """The broker stopped delivering one channel, and the connection goes on.

    Args:
        message: What the broker said.
        channel: The channel.
    """

    def __init__(self, message: str, channel: str = "") -> None:
        super().__init__(message)
        self.channel = channel


class BrokerConnection(Protocol):
    """One connection to the broker, made by `Backend.connect`.

    A connection need not reconnect, retry or remember anything: when it breaks, it reports that
    once, and the hub closes it, makes another one and subscribes to its channels again.

    The hub cancels a `subscribe`, `unsubscribe` or `publish` only when it is about to close the
    connection, so a cancelled call may leave the connection unusable and need not be undone.

    Attributes:
        max_payload: The size of the largest message that the broker accepts here, in bytes.
        heard_at: Optional, a `float`: when a message, or a part of one, last arrived, in
            `time.monotonic()`. A connection that carries messages is not considered broken, however
            long a probe waits behind them. Without this attribute, whole messages count. If a
            backend publishes over a separate connection and an answer is overdue there, this is not
            later than the time at which that connection fell silent. It may be read from any
            thread.
    """

    max_payload: int

    async def subscribe(self, channel: str) -> None:
        """Subscribe, and return when the broker has confirmed it: later messages arrive.

        The hub may subscribe to several channels at the same time, but each channel only has one
        call in progress.

        Raises:
            Exception: The connection is broken, or the broker refused the channel.
        """

    async def unsubscribe(self, channel: str) -> None:
        """Undo `subscribe`. Messages already on their way may still arrive.

        Raises:
            Exception: The connection is broken, or the broker refused.
        """

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> Awaitable[None]:
        """Publish messages, pairs of channel and payload, until the broker has them.

        They arrive in this order at every process that is subscribed. The hub waits for one call
        before it makes the next. This may be an `async def`; a plain function that returns a future
        saves one iteration of the event loop.

        Raises:
            MessagesRefused: The broker accepted all messages except for these.
            Exception: The connection is broken; the broker may have any number of the messages.
        """

    async def close(self) -> None:
        """Close the connection, within a few seconds even if the broker does not answer.

        Calls in progress raise, no task is left behind, and neither `deliver` nor `lost` needs to
        be called any more. Calling this again does nothing, and if a call was cancelled, the next
        one completes it.

        If the event loop of the connection does not run any more, this is called on another one.
        """


class HistoryConnection(BrokerConnection, Protocol):
    """A connection to a broker that also keeps the history of channels.

    A hub with a `history` needs one. A program that is subscribed to a channel gets what is
    published with `publish_kept` as it gets anything else, with its position.
    """

    def publish_kept(self, messages: Sequence[Kept]) -> Awaitable[Sequence[Position]]:
        """Keep and publish messages, each in one atomic step, until the broker has them.

        As with `publish`, they arrive in this order. The offsets of a channel grow in the order in
        which its messages arrive.

        Returns:
            The position of each message; for one that was published before with the same key, its
            position then.

        Raises:
            MessagesRefused: The broker accepted all messages except for these. `positions` has
                those of the others, and None for these.
            Exception: The connection is broken; the broker may have any number of the messages.
        """

    async def read_kept(
        self,
        channel: str,
        history: History,
        since: int | None,
        limit: int,
        reverse: bool,
        known: Position | None = None,
    ) -> Stored:
        """Return what is kept of a channel, and its position, as they are at one moment.

        A channel that the broker does not know yet, or not any more, gets a new epoch here.

        Args:
            channel: The channel.
            history: How much is kept. What is older than its `ttl` is not returned.
            since: Return messages after this offset, or with `reverse` those before it; None for
                those from the oldest on, or with `reverse` from the newest on.
            limit: How many messages at most; 0 for the position alone.
            reverse: Whether to begin with the newest one.
            known: See `Kept`.

        Raises:
            Exception: The connection is broken, or the broker refused.
        """


class Backend(Protocol):
    """How to reach a broker. Implement this and pass it as `Broadcast(backend=...)`.

    A backend holds settings only, and makes any number of connections, one after another.

    A channel is a `str` of up to 265 characters: the hub's name, a colon, and the channel as the
    app calls it. It must reach other hubs unchanged.

    Attributes:
        address: Optional, a `str`: where the channels are, normalised so that every spelling gives
            the same text, and without a password, such as
            `Redis at 127.0.0.1:6379, prefix 'starcast:'`. Two backends with the same address share
            their channels. With this attribute, the hub refuses to open beside another hub of this
            process with which it would share channels by accident.
        keeps_history: Optional, a `bool`: whether its connections are `HistoryConnection`s. A hub
            with a `history` needs that.
        if_silent: Optional, a `str`: what a developer should check if nothing that is published
            ever arrives. It is appended to an error message.
    """

    async def connect(self, deliver: Deliver, lost: Lost) -> BrokerConnection:
        """Connect to the broker.

        Nothing may be left behind if this raises or is cancelled.

        Args:
            deliver: Call `deliver(channel, payload)` for each message on a subscribed channel, in
                order, on this event loop. It does not block and does not raise. See `Deliver` for
                messages that are kept.
            lost: Call `lost(error)` once if the connection breaks by itself; the hub then calls
                `close`. If the broker takes away a single channel, call it with a
                `SubscriptionRevoked`, each time this happens: the connection stays open, and the
                hub tries to subscribe to that channel again. It does not raise.

        Neither has any effect once `close` has been called.

        Raises:
            BackendUnavailable: There is no connection. The message names the host, never the
                password.
            LoginRefused: A `BackendUnavailable`: the broker rejected the user or the password. A
                hub that is being opened reports that at once instead of trying again.
        """
