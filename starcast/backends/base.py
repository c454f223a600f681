"""The contract of a backend: what carries messages between hubs, over a broker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from ..exceptions import BackendUnavailable

Deliver = Callable[[str, bytes], None]
Lost = Callable[[Exception], None]


class LoginRefused(BackendUnavailable):
    """The broker has answered, and does not let us in: to try again soon makes no sense."""


class MessagesRefused(BackendUnavailable):
    """The broker has refused some messages of a batch, and has all the others.

    Args:
        message: What the broker says, of one of them.
        reasons: By the position in the batch, why that message was refused.
    """

    # Programs that hand errors on make them of their message alone: so the other one has a default.
    def __init__(self, message: str, reasons: dict[int, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = reasons or {}


class SubscriptionRevoked(BackendUnavailable):
    """The broker delivers nothing of one channel any more, and the connection goes on.

    Args:
        message: What the broker says.
        channel: The channel.
    """

    def __init__(self, message: str, channel: str = "") -> None:
        super().__init__(message)
        self.channel = channel


class Backend(Protocol):
    """A connection to a broker. Implement these five calls and pass it as `Broadcast(backend=...)`.

    Everything happens on the event loop that called `start`. A backend need not reconnect, wait or
    remember anything: when its connection breaks it says so once, and the hub stops it, starts it
    again when the broker is back, and subscribes to what it needs.

    A channel is a `str` of up to 265 characters: the hub's name, a colon, and what the app calls
    the channel. It is taken as it is, and comes back as it is.

    Attributes:
        max_payload: Bytes that one message may have. It may change in `start`.
        address: Optional, a `str`: where the channels are, in a form that is the same for every
            spelling and holds no password, such as `Redis at 127.0.0.1:6379, prefix 'starcast:'`.
            Two backends with the same address share their channels. With it, the hub refuses to
            open beside another hub of this process that it would share channels with by accident.
        heard_at: Optional, a `float`: when a message arrived last, or a part of one, in
            `time.monotonic()`. A connection that carries messages is not taken for broken, however
            long one of the hub to itself waits behind them. Without it, whole messages count. If
            publishing has a connection of its own, and that is silent although an answer is due,
            it is not later than the beginning of that silence. From any thread.
        if_silent: What a developer should look for if nothing that is published ever comes back,
            as a part of a sentence. Optional.
    """

    max_payload: int

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        """Connect to the broker.

        From then on `deliver(channel, payload)` is called for each message on a channel that is
        subscribed to, in order; it returns at once and raises nothing. Call `lost(error)` once, if
        the connection breaks by itself: `stop` follows. If the broker takes away a single channel,
        call `lost` with a `SubscriptionRevoked`, as often as that happens: nothing is stopped, and
        the hub subscribes to the channel again when it can.

        Raises:
            BackendUnavailable: There is no connection. The message names the host, and no password.
            LoginRefused: One of these: the server has refused the user or the password. A hub that
                is being opened says so at once, instead of trying again.
        """

    async def stop(self) -> None:
        """Disconnect, and let calls that wait for the broker raise. Harmless when it is stopped."""

    async def subscribe(self, channel: str) -> None:
        """Come back when the broker has confirmed it: what is published from then on arrives.

        Several channels may be subscribed to at the same time, one channel only in turn.

        Raises:
            Exception: The connection is broken, or the broker refuses the channel.
        """

    async def unsubscribe(self, channel: str) -> None:
        """Undo `subscribe`. Messages that are on their way already may still arrive."""

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> Awaitable[None]:
        """Hand messages over, pairs of channel and payload; come back when the broker has them.

        They arrive in this order at every process that is subscribed. Only one call at a time. It
        may be an `async def`; a plain function that returns a future saves a turn of the loop.

        Raises:
            MessagesRefused: The broker has all of them but these.
            Exception: The connection is broken; the broker has some of them or none.
        """
