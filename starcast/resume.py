"""Resume: what a client or a subscriber gets of a channel's past when it joins.

It joins first: from then on it gets what is published. At that moment the channel is at some
position, up to which the past is read: so nothing is missing at the seam, and nothing comes twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager

from starlette.websockets import WebSocket

from . import codec
from .backends.base import Stored
from .broker import envelope
from .broker.link import Link
from .broker.local import LocalLink
from .codec import Channel
from .event import Event, Notice
from .exceptions import ConfigurationError, InvalidChannel
from .history import Histories, Position, Resumed, Wish, check_count, parse_id

# Messages that are read at once.
PAGE = 1000

# Characters of an idempotency key, at most.
MAX_KEY = 200


@dataclasses.dataclass(frozen=True, slots=True)
class Past:
    """What is kept of a channel.

    Attributes:
        events: The events, in the order that was asked for.
        id: The id of the channel's newest event.
        complete: Whether everything since the event that was named is still kept.
    """

    events: list[Event]
    id: str
    complete: bool


def notice(channel: str, resumed: Resumed) -> Notice:
    """Return what a client gets first that wants ids."""
    content: dict[str, object] = {"channel": channel, "id": resumed.id}
    if resumed.recovered is not None:
        content["recovered"] = resumed.recovered
    return Notice(content)


class Reader:
    """Reads the past of channels. From any loop.

    Args:
        link: The hub's.
        lock: The hub's.
        histories: Which channels have a history.
    """

    def __init__(
        self,
        link: Link | LocalLink,
        lock: AbstractContextManager[object],
        histories: Histories,
    ) -> None:
        self._link = link
        self._lock = lock
        self._histories = histories

    def wish(self, channel: str, since: str | None, last: int) -> Wish:
        """Return what is asked for, if it is valid and the channel has a history."""
        wish = Wish(since, check_count("history", last))
        if not wish.is_empty:
            self.check(channel)
        return wish

    def asked(self, websocket: WebSocket, channel: Channel, last: int) -> Wish:
        """Return what a client asks for with `?last_event_id=`, and what it gets without.

        Nothing on a channel that has no history, whatever it asks for.
        """
        try:
            history = self._histories.find(codec.check_channel(channel))
        except InvalidChannel:
            return Wish()
        if history is None:
            return Wish()
        return Wish(websocket.query_params.get("last_event_id"), last)

    def key(self, channel: str, key: str | None) -> str | None:
        """Return an idempotency key, if it is valid and the channel has a history."""
        if key is not None:
            self.check(channel)
            if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY or not _is_utf8(key):
                raise ConfigurationError(
                    f"an idempotency key is a str of 1 to {MAX_KEY} characters, not {key!r}"
                )
        return key

    def check(self, channel: str) -> None:
        """Raise `ConfigurationError` if the channel has no history."""
        if self._histories.find(channel) is None:
            raise ConfigurationError(
                f"the channel {channel!r} has no history: name it in Broadcast(history=...)"
            )

    async def catch_up(self, channel: str, wish: Wish) -> None:
        """Be as far as the client is. It may come from a process that has got more already."""
        since = parse_id(wish.since)
        with self._lock:
            here = self._link.position(channel)
        if since is not None and here is not None and _is_ahead(since, here):
            await self._link.catch_up(channel)

    async def read(self, channel: str, wish: Wish, here: Position) -> tuple[list[Event], Resumed]:
        """Return what a member gets that has joined at this position.

        Raises:
            BackendUnavailable: The broker is away.
        """
        recovered = None
        if wish.since is not None:
            since = parse_id(wish.since)
            if since is not None and not _is_ahead(since, here):
                events = await self._read_since(channel, since.offset, here)
                if events is not None:
                    return events, Resumed(str(here), True)
            recovered = False
        events = await self._read_last(channel, wish.last, here)
        return events, Resumed(str(here), recovered)

    async def _read_since(self, channel: str, offset: int, here: Position) -> list[Event] | None:
        """Return all events after an offset up to a position; None if some are missing."""
        events: list[Event] = []
        while offset < here.offset:
            stored = await self._link.read(channel, offset, PAGE, False)
            if stored.position.epoch != here.epoch or not stored.complete:
                return None
            events += (event for event in self._events(channel, stored) if _is_until(event, here))
            if len(stored.messages) < PAGE:
                break
            offset = stored.messages[-1].offset
        return events

    async def _read_last(self, channel: str, count: int, here: Position) -> list[Event]:
        events: list[Event] = []
        offset = here.offset + 1
        while count > 0 and offset > 1:
            stored = await self._link.read(channel, offset, min(count, PAGE), True)
            if stored.position.epoch != here.epoch:
                return []
            events += self._events(channel, stored)
            if len(stored.messages) < min(count, PAGE):
                break
            count -= PAGE
            offset = stored.messages[-1].offset
        events.reverse()
        return events

    async def history(self, channel: str, since: str | None, limit: int, reverse: bool) -> Past:
        """See `Broadcast.history`."""
        self.check(channel)
        check_count("limit", limit)
        place = parse_id(since)
        offset = None if place is None else place.offset
        stored = await self._link.read(channel, offset, limit, reverse)
        known = since is None or (place is not None and not _is_ahead(place, stored.position))
        if not known:
            stored = await self._link.read(channel, None, limit, reverse)
        events = list(self._events(channel, stored))
        return Past(events, str(stored.position), known and stored.complete)

    def _events(self, channel: str, stored: Stored) -> Iterator[Event]:
        for offset, payload in stored.messages:
            try:
                event = self._link.unpack(channel, payload)
            except envelope.Malformed:
                continue
            event.position = Position(stored.position.epoch, offset)
            yield event


def _is_ahead(since: Position, here: Position) -> bool:
    """Whether it is not a position that the channel has passed, as far as this is known."""
    return since.epoch != here.epoch or since.offset > here.offset


def _is_until(event: Event, here: Position) -> bool:
    return event.position is not None and event.position.offset <= here.offset


def _is_utf8(text: str) -> bool:
    """Whether it has no half of a surrogate pair, which no broker could be given."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
