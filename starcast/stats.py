"""What a hub has done and how it is: counters, and snapshots of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from .internal import is_internal


@dataclasses.dataclass(frozen=True, slots=True)
class BackendStats:
    """The state of a hub's connection to its broker; a snapshot.

    Attributes:
        state: `"connected"`, `"reconnecting"` or `"closed"`.
        since: When that state began, in seconds since 1970.
        error: The most recent error, even if it has been resolved; None if there has been none.
        gaps: How many gaps there were: how often the connection was lost and restored, or an event
            loop was blocked for so long that its clients missed messages.
        lost: Messages that did not reach the broker, or this process's clients, and that no caller
            waited for.
        malformed: Messages that arrived and were neither text nor in a known format.
        channels: Channels that this process is subscribed to, or wants to be.
        queued: Messages that are waiting for the broker.
        refused: Channels among these that have members and that the broker refuses. They are asked
            for again until they are back; meanwhile the hub is not healthy.
    """

    state: str
    since: float
    error: str | None
    gaps: int
    lost: int
    malformed: int
    channels: int
    queued: int
    refused: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of a hub. It does not change.

    Counters start when the hub is created, and only count this process.

    Attributes:
        open: Whether the hub is open.
        clients: How many clients are registered now, WebSockets and streams of server-sent events.
        subscribers: How many `Subscriber` blocks are running now.
        channels: Channel name to number of clients, for channels that have any.
        published: Messages handed to the backend.
        failed: Messages that could not be handed over.
        delivered: Messages written to a client's socket or handed out by a subscriber.
        dropped: Messages that an overflow policy kept from a client or a subscriber.
        fast_path: How many clients are on the fast path now: what is published to them is written
            straight to their transport.
        asgi: The reason why clients are not on the fast path, to how many there are now. What is
            published to them goes through the `send` of their ASGI server. Streams of server-sent
            events are among them, as `"event stream"`.
        slow_clients: Clients and subscribers that were disconnected because they did not keep up.
        pending: Messages that are waiting for their event loop now.
        buffered: Bytes in the outboxes of clients and subscribers now, added up while they are
            being filled and emptied.
        waiting_senders: Calls of `publish` and `send`, and clients whose message is not published
            yet, that wait for space in a buffer or a queue now.
        backend: How the connection to the broker is; None for `memory://`.
    """

    open: bool
    clients: int
    subscribers: int
    channels: dict[str, int]
    published: int
    failed: int
    delivered: int
    dropped: int
    slow_clients: int
    pending: int
    buffered: int
    fast_path: int = 0
    asgi: Mapping[str, int] = dataclasses.field(default_factory=dict)
    waiting_senders: int = 0
    backend: BackendStats | None = None


class ClientCounts:
    """How many clients and subscribers there are. Guarded by the hub's lock.

    Attributes:
        by_channel: The clients of each channel that has any.
        by_reason: The clients by why they are on ASGI; None: the fast path.
        subscribers: Code on the server that subscribes.
    """

    __slots__ = ("by_channel", "by_reason", "subscribers")

    def __init__(self) -> None:
        self.by_channel: dict[str, int] = {}
        self.by_reason: dict[str | None, int] = {}
        self.subscribers = 0

    @staticmethod
    def change(counts: dict[Any, int], key: object, difference: int) -> None:
        """Add to a count, and forget it once it is 0."""
        count = counts.get(key, 0) + difference
        if count:
            counts[key] = count
        else:
            del counts[key]

    def subscriber(self, kind: str | None, channels: Iterable[str], difference: int) -> None:
        """Count a subscription, which is a client of some kind, or code if that is None."""
        if kind is None:
            if not all(map(is_internal, channels)):  # otherwise it is the hub's own
                self.subscribers += difference
        else:
            self.change(self.by_reason, kind, difference)
            for channel in channels:
                self.channel(channel, difference)

    def channel(self, channel: str, difference: int) -> None:
        """Count a client of a channel, unless that is an internal one."""
        if not is_internal(channel):
            self.change(self.by_channel, channel, difference)

    @property
    def total(self) -> int:
        """How many clients there are."""
        return sum(self.by_reason.values())

    @property
    def asgi(self) -> dict[str, int]:
        """How many are on ASGI, by the reason."""
        return {reason: count for reason, count in self.by_reason.items() if reason is not None}


class Counters:
    """What the members of one event loop count; written on that loop only."""

    __slots__ = ("delivered", "dropped", "slow_clients")

    def __init__(self) -> None:
        self.delivered = 0
        self.dropped = 0
        self.slow_clients = 0

    def add(self, other: Counters) -> None:
        """Take over what another one counted."""
        self.delivered += other.delivered
        self.dropped += other.dropped
        self.slow_clients += other.slow_clients
