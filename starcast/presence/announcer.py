"""Announcer: tells the clients of one event loop that want to know who joins and leaves.

It compares who was announced last with who is there now, at most once in an interval. So a member
with several clients is announced once, and those who come at the same time are announced together.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import ClassVar

from ..event import Event
from ..frames import WireFormat
from ..internal import announcements
from ..members import Member, Presence
from .node import Clients, describe

# Channels that are followed before those are looked for of which nobody wants to know any more.
MIN_FOLLOWED = 64

Announced = dict[str, tuple[str, Member]]  # by id: one of its clients, and who it is


class Announcement(Event):
    """Who has joined a channel, and who has left it: each with one of its clients."""

    __slots__ = ("joined", "left", "where")

    # What makes the event for a form; a module that knows another form adds it.
    makers: ClassVar[dict[WireFormat, Callable[[Announcement], Event]]] = {}

    def __init__(
        self, channel: str, joined: list[tuple[str, Member]], left: list[tuple[str, Member]]
    ) -> None:
        self.where, self.joined, self.left = channel, joined, left
        content = {
            "channel": channel,
            "joined": [describe(member) for _, member in joined],
            "left": [describe(member) for _, member in left],
        }
        text = json.dumps(content, ensure_ascii=False)
        super().__init__(announcements(channel), text, is_json=True)

    def in_form(self, form: WireFormat) -> Event:
        """Return it in a form; clients that want ids get it as it is."""
        maker = self.makers.get(form)
        if maker is None:
            return self
        forms = self._forms = self._forms or {}
        if form not in forms:
            forms[form] = maker(self)
        return forms[form]


class Announcer:
    """See the module.

    Args:
        settings: The hub's.
        clients: Returns who is a member of a channel now.
        announce: Sends an announcement.
        is_wanted: Returns whether anybody wants to know who joins and leaves a channel.
    """

    def __init__(
        self,
        settings: Presence,
        clients: Callable[[str], Clients],
        announce: Callable[[Announcement], None],
        is_wanted: Callable[[str], bool],
    ) -> None:
        self._settings = settings
        self._clients = clients
        self._announce = announce
        self._is_wanted = is_wanted
        self._loop = asyncio.get_running_loop()
        self._announced: dict[str, Announced] = {}
        self._followed = MIN_FOLLOWED  # channels, when those that nobody wants were dropped last
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def follow(self, channel: str) -> list[Member]:
        """Announce from now on who joins and leaves, beside those that are returned."""
        if channel not in self._announced:
            if len(self._announced) > 2 * self._followed:
                self._drop_unwanted()
            self._announced[channel] = _by_id(self._clients(channel))
        return [member for _, member in self._announced[channel].values()]

    def _drop_unwanted(self) -> None:
        """Forget the channels that nobody wants to know of any more, and that did not change."""
        for channel in self._announced.keys() - self._timers.keys():
            if not self._is_wanted(channel):
                del self._announced[channel]
        self._followed = max(MIN_FOLLOWED, len(self._announced))

    def changed(self, channel: str) -> None:
        """Note that a channel has other members."""
        if channel in self._announced and channel not in self._timers:
            seconds = self._settings.interval
            self._timers[channel] = self._loop.call_later(seconds, self._compare, channel)

    def _compare(self, channel: str) -> None:
        del self._timers[channel]
        if not self._is_wanted(channel):
            del self._announced[channel]
            return
        announced, current = self._announced[channel], _by_id(self._clients(channel))
        self._announced[channel] = current
        joined = [
            entry
            for id, entry in current.items()
            if id not in announced or announced[id][1] != entry[1]  # others see something new
        ]
        left = [entry for id, entry in announced.items() if id not in current]
        if joined or left:
            self._announce(Announcement(channel, joined, left))

    def end(self) -> None:
        """Announce nothing any more."""
        for timer in self._timers.values():
            timer.cancel()


def _by_id(clients: Clients) -> Announced:
    found: Announced = {}
    for client, member in clients.items():
        found.setdefault(member.id, (client, member))
    return found
