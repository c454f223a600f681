"""A broker in this process that keeps history, and drops what a test wants it to drop."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from typing import Any

from starcast import History, Tuning
from starcast.backends.base import Kept, Stored, StoredMessage
from starcast.history import Position
from support import Broker, Bus, BusConnection

# With short waits.
TUNING = Tuning(publish_timeout=1.0, first_backoff=0.01, max_backoff=0.02, subscribe_backoff=0.02)


@dataclasses.dataclass
class Log:
    """What is kept of one channel."""

    epoch: str
    top: int = 0
    messages: deque[StoredMessage] = dataclasses.field(default_factory=deque)
    keys: dict[str, int] = dataclasses.field(default_factory=dict)


class KeepingBroker(Broker):
    """A `Broker` with history."""

    def __init__(self) -> None:
        super().__init__()
        self.logs: dict[str, Log] = {}
        self.epochs = 0
        self.dropped = 0  # how many of the next messages it delivers to nobody
        self.unreadable = 0  # how many of the next reads it refuses
        self.is_sure = True  # whether it can tell that nothing has expired

    def log(self, channel: str) -> Log:
        if channel not in self.logs:
            self.epochs += 1
            self.logs[channel] = Log(f"epoch{self.epochs}")
        return self.logs[channel]

    def forget(self) -> None:
        """Lose everything, as a broker does that comes back empty."""
        self.logs.clear()

    def keep(self, message: Kept) -> Position:
        """Keep a message, and deliver it unless it is dropped or was published before."""
        log = self.log(message.channel)
        if message.key is not None and message.key in log.keys:
            return Position(log.epoch, log.keys[message.key])
        previous = log.top if log.messages or self.is_sure else 0
        log.top += 1
        log.messages.append(StoredMessage(log.top, message.payload))
        while len(log.messages) > message.history.size:
            log.messages.popleft()
        if message.key is not None:
            log.keys[message.key] = log.top
        position = Position(log.epoch, log.top)
        if self.dropped:
            self.dropped -= 1
            return position
        for connection, channels in list(self.connections.items()):
            if message.channel in channels:
                connection.deliver(message.channel, message.payload, position, previous)
        return position

    def read(self, channel: str, since: int | None, limit: int, reverse: bool) -> Stored:
        log = self.log(channel)
        first = log.messages[0].offset if log.messages else log.top + 1
        found = [
            it
            for it in log.messages
            if since is None or (it.offset < since if reverse else it.offset > since)
        ]
        if reverse:
            found.reverse()
        complete: bool | None = since is None or since + 1 >= first
        if since is not None and not (self.is_sure or found):
            complete = None
        return Stored(Position(log.epoch, log.top), found[:limit], complete)

    def expire(self, channel: str) -> None:
        """Remove the messages of a channel, which gets another position, as in NATS."""
        log = self.log(channel)
        log.messages.clear()
        log.top += 5


class KeepingBus(Bus):
    """A backend whose broker is in this process and keeps history."""

    keeps_history = True
    broker: KeepingBroker

    async def connect(self, deliver: Any, lost: Any) -> KeepingConnection:
        made = await super().connect(deliver, lost)
        made.__class__ = KeepingConnection
        return made


class KeepingConnection(BusConnection):
    """A connection of a `KeepingBus`."""

    bus: KeepingBus
    broker: KeepingBroker

    async def publish_kept(self, messages: list[Kept]) -> list[Position]:
        await self.broker.called("publish_kept", list(messages))
        assert self.channels is not None  # or it raises
        return [self.broker.keep(message) for message in messages]

    async def read_kept(
        self,
        channel: str,
        history: History,
        since: int | None,
        limit: int,
        reverse: bool,
        known: Position | None = None,
    ) -> Stored:
        stored = self.broker.read(channel, since, limit, reverse)
        await self.broker.called("read_kept", channel)
        assert self.channels is not None  # or it raises
        if self.broker.unreadable:
            self.broker.unreadable -= 1
            raise PermissionError("nobody may read this")
        await asyncio.sleep(0)
        return stored
