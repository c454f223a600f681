"""Resume: what a client or a subscriber gets of a channel's past when it joins.

It joins first: from then on it gets what is published. At that moment the channel is at some
position, up to which the past is read: so nothing is missing at the seam, and nothing comes twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager

from starlette.websockets import WebSocket

from . import codec
from .backends.base import Stored
from .broker import envelope
from .broker.link import Link
from .broker.local import LocalLink
from .codec import Channel
from .event import Event, Notice
from .exceptions import BackendUnavailable, ConfigurationError, InvalidChannel
from .history import Histories, Position, Resumed, Wish, check_count, parse_id

# Messages that are read at once.
PAGE = 1000

# Bytes of events that members of one event loop share at most, but for the last page that was read,
# and for how many seconds.
MAX_SHARED = 16 * 1024 * 1024
SHARED_FOR = 1.0

# Characters of an idempotency key, at most.
MAX_KEY = 200


@dataclasses.dataclass(frozen=True, slots=True)
class Past:
    """What is kept of a channel.

    Attributes:
        events: The events, in the order that was asked for.
        id: The id of the channel's newest event.
        complete: Whether all events after the one that was named are still kept; always True if
            none was named. In reverse: whether the id that was named is one of this history.
    """

    events: list[Event]
    id: str
    complete: bool


def notice(channel: str, wish: Wish, resumed: Resumed, past: Sequence[Event], count: int) -> Notice:
    """Return what a client gets before its past that wants ids: the id of what it has now.

    `count` is how many events of the past it gets: from some it may be excluded.
    """
    id = resumed.id
    if resumed.recovered:
        id = wish.since or id
    elif past and (position := past[0].position) is not None:
        id = str(Position(position.epoch, position.offset - 1))
    content: dict[str, object] = {"channel": channel, "id": id, "past": count}
    if resumed.recovered is not None:
        content["recovered"] = resumed.recovered
    return Notice(content)


class _Shared:
    """What several members of one event loop read at about the same time.

    After an outage, everybody comes back at once and wants much the same. So they share reads that
    are under way, and events, whose frames are made once.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.reads: dict[tuple[str, int | None, int, bool], asyncio.Task[Stored]] = {}
        self._loop = loop
        self._events: dict[tuple[str, str], dict[int, Event]] = {}  # by channel, epoch and offset
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None

    def events(self, channel: str, epoch: str) -> dict[int, Event]:
        """Return the events of a channel that somebody has read a moment ago, to be added to."""
        if self._size > MAX_SHARED:
            self._clear()
        if self._timer is None:
            self._timer = self._loop.call_later(SHARED_FOR, self._let_go)
        return self._events.setdefault((channel, epoch), {})

    def count(self, size: int) -> None:
        """Note that events of so many bytes were added."""
        self._size += size

    def _let_go(self) -> None:
        self._timer = None
        self._clear()

    def _clear(self) -> None:
        self._events.clear()
        self._size = 0


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
        self._shared: dict[asyncio.AbstractEventLoop, _Shared] = {}

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
        if (since := parse_id(wish.since)) is None:
            return
        with self._lock:
            here = self._link.position(channel)
        if here is not None and _is_ahead(since, here):
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
            stored = await self._read(channel, offset, PAGE, False, here)
            if stored.position.epoch != here.epoch or not stored.complete:
                return None
            found = self._events(channel, stored)
            if stored.position.offset > here.offset:  # it gets the rest as it is delivered
                found = [event for event in found if _is_until(event, here)]
            events += found
            if len(stored.messages) < PAGE:
                break
            offset = stored.messages[-1].offset
            await asyncio.sleep(0)  # others have a turn after each page, in memory too
        return events

    async def _read_last(self, channel: str, count: int, here: Position) -> list[Event]:
        events: list[Event] = []
        offset = here.offset + 1
        while count > 0 and offset > 1:
            stored = await self._read(channel, offset, min(count, PAGE), True, here)
            if stored.position.epoch != here.epoch:
                return []
            events += self._events(channel, stored)
            if len(stored.messages) < min(count, PAGE):
                break
            count -= PAGE
            offset = stored.messages[-1].offset
            await asyncio.sleep(0)
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
        events = self._events(channel, stored)
        return Past(events, str(stored.position), known and (reverse or bool(stored.complete)))

    async def _read(
        self, channel: str, since: int | None, limit: int, reverse: bool, here: Position
    ) -> Stored:
        """Read, or share what is being read, if that turns out to be as far as here."""
        if self._link.is_local:
            return await self._link.read(channel, since, limit, reverse)
        reads = self._shared_here().reads
        key = channel, since, limit, reverse
        for _ in range(2):  # the second one has begun after the caller has joined
            if (reading := reads.get(key)) is None:
                break
            with contextlib.suppress(BackendUnavailable):
                stored = await asyncio.shield(reading)
                if not _is_ahead(here, stored.position):
                    return stored
        reading = asyncio.create_task(self._link.read(channel, since, limit, reverse))
        reads[key] = reading

        def ended(reading: asyncio.Task[Stored]) -> None:
            if reads.get(key) is reading:  # pragma: no branch  # or another one has begun
                del reads[key]
            if not reading.cancelled():  # pragma: no branch  # only with the event loop
                reading.exception()  # whoever wanted it may have been cancelled

        reading.add_done_callback(ended)
        return await asyncio.shield(reading)

    def _shared_here(self) -> _Shared:
        """Return what members of this event loop share."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if (shared := self._shared.get(loop)) is None:
                for ended in [other for other in self._shared if other.is_closed()]:
                    del self._shared[ended]
                shared = self._shared[loop] = _Shared(loop)
            return shared

    def _events(self, channel: str, stored: Stored) -> list[Event]:
        epoch = stored.position.epoch
        shared = self._shared_here()
        known = shared.events(channel, epoch)
        added = 0
        events = []
        for offset, payload in stored.messages:
            event = known.get(offset)
            if event is None:
                try:
                    event = self._link.unpack(channel, payload)
                except envelope.Malformed:
                    continue
                event.position = Position(epoch, offset)
                known[offset] = event
                added += event.cost
            events.append(event)
        shared.count(added)
        return events


def _is_ahead(since: Position, here: Position) -> bool:
    """Whether it is not a position that the channel has passed, as far as this is known."""
    return since.epoch != here.epoch or since.offset > here.offset


def _is_until(event: Event, here: Position) -> bool:
    return event.position is not None and event.position.offset <= here.offset


def _is_utf8(text: str) -> bool:
    """Whether it has no half of a surrogate pair, which no broker could be given."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
