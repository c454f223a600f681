"""Node: what one event loop knows of the members of all channels, and what it tells the others.

Everything here runs on that loop, so that nothing needs a lock. Several event loops of one process
are nodes of their own.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import Callable, Iterator
from typing import Any

from ..event import Event, Gap
from ..exceptions import StarcastError
from ..internal import SHARED
from ..members import Member, Presence
from . import wire
from .wire import In, Out

CHANNEL = SHARED + "presence"

# How long a node that asks all others waits for the first words of each, in seconds, once it has
# heard its own question.
SETTLE = 0.3

# How soon a node answers, in seconds: several may ask at about the same time.
ANSWER = 0.05

# How often another node is asked for its members at most, in seconds.
ASK_INTERVAL = 1.0

# Parts of the ttl. A node that was not heard of in SILENCE is gone, so within the ttl, and two of
# its messages may be lost before that.
BEAT, SILENCE, LOOK = 0.25, 0.9, 0.1

Clients = dict[str, Member]


class Known:
    """What is known of a node: its clients by channel, up to the change of a number."""

    def __init__(self, now: float) -> None:
        self.channels: dict[str, Clients] = {}
        self.number = -1
        self.heard = now
        self.asked = float("-inf")
        self.complete = False  # since all were asked
        self.parts: dict[int, tuple[In, ...]] = {}  # of a whole that has not arrived as such
        self.parts_of = -1  # the number of that

    def put(self, entry: In) -> None:
        self.channels.setdefault(entry.channel, {})[entry.client] = entry.member

    def take(self, channel: str, client: str) -> Member | None:
        clients = self.channels.get(channel, {})
        member = clients.pop(client, None)
        if not clients:
            self.channels.pop(channel, None)
        return member


class Node:
    """See the module.

    Args:
        settings: The hub's.
        patience: How long others are waited for at most, in seconds.
        publish: Publishes an event without waiting; may raise a `StarcastError`.
        on_change: Called with a channel whose members have changed.
        on_look: Called whenever it looks for nodes that are gone.

    Attributes:
        settled: Done when everybody who could be heard has answered since all were asked.
    """

    def __init__(
        self,
        settings: Presence,
        patience: float,
        publish: Callable[[Event], object],
        on_change: Callable[[str], None],
        on_look: Callable[[], None],
    ) -> None:
        self.id = secrets.token_hex(8)
        self._settings = settings
        self._patience = patience
        self._publish = publish
        self._on_change = on_change
        self._on_look = on_look
        self.own = Known(self._loop.time())
        self.own.number = 0
        self._others: dict[str, Known] = {}
        # Clients that were lost: who they are, and until when they may come back.
        self._lost: dict[str, dict[str, tuple[Member, float]]] = {}
        self._ins: dict[tuple[str, str], In] = {}  # that the others are still to be told
        self._outs: dict[tuple[str, str], Out] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._ended = False
        self._listened = False  # for SETTLE
        self.settled = self._loop.create_future()

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    # What is known

    def clients(self, channel: str) -> Clients:
        """Return the clients that are members of a channel, with those that may be back soon."""
        found: Clients = {}
        for known in self._all():
            found |= known.channels.get(channel, {})
        if lost := self._lost.get(channel):
            here = {member.id for member in found.values()}
            found |= {client: it for client, (it, _) in lost.items() if it.id not in here}
        return found

    def _all(self) -> Iterator[Known]:
        yield self.own
        yield from self._others.values()

    # This node's own

    def begin(self) -> None:
        """Let the others know of this node, and ask them. It listens already."""
        self._beat()
        self._look(self._loop.time())
        self._ask_all()

    def _ask_all(self) -> None:
        if self.settled.done():
            self.settled = self._loop.create_future()
        self._listened = False
        for known in self._others.values():
            known.complete = False
        self._say(wire.ask(self.id))
        if "patience" not in self._timers:
            self._call("patience", self._patience, self._settle)

    def _listen(self) -> None:
        self._listened = True
        self._settle_if_complete()

    def _settle_if_complete(self) -> None:
        if self._listened and all(known.complete for known in self._others.values()):
            self._settle()

    def _settle(self) -> None:
        if not self.settled.done():
            self.settled.set_result(None)

    def say_bye(self) -> None:
        """Let the others know that this node ends. From any thread."""
        self._say(wire.bye(self.id))

    def end(self) -> None:
        """Do nothing any more: the hub is closed."""
        self._ended = True
        self._settle()
        for timer in self._timers.values():
            timer.cancel()

    def put(self, channel: str, client: str, member: Member) -> None:
        """Let a client be a member."""
        entry = In(channel, client, member)
        self.own.put(entry)
        self._outs.pop((channel, client), None)
        self._ins[channel, client] = entry
        self._changed(channel)

    def take(self, channel: str, client: str, *, left: bool) -> None:
        """Let a client be none any more; `left` if that is its own will."""
        member = self.own.take(channel, client)
        if member is not None:  # pragma: no branch  # whoever is taken was put before
            self._ins.pop((channel, client), None)
            self._outs[channel, client] = Out(channel, client, left)
            self._gone(channel, client, member, left)
            self._changed(channel)

    def _gone(self, channel: str, client: str, member: Member, left: bool) -> None:
        """Keep a client that was lost for a while. It, or a new page, may come back."""
        if not left:
            until = self._loop.time() + self._settings.grace
            self._lost.setdefault(channel, {})[client] = member, until
            if "lost" not in self._timers:
                self._call("lost", self._settings.grace, self._forget_lost)

    def _forget_lost(self) -> None:
        now = self._loop.time()
        for channel, lost in list(self._lost.items()):
            for client in [client for client, (_, until) in lost.items() if until <= now]:
                del lost[client]
                self._on_change(channel)
            if not lost:
                del self._lost[channel]
        if self._lost:
            soonest = min(until for lost in self._lost.values() for _, until in lost.values())
            self._call("lost", max(soonest - now, self._settings.interval), self._forget_lost)

    def _changed(self, channel: str) -> None:
        self._on_change(channel)
        if "flush" not in self._timers:
            self._call("flush", self._settings.interval, self._flush)

    def _flush(self) -> None:
        ins, outs = list(self._ins.values()), list(self._outs.values())
        self._ins, self._outs = {}, {}
        for text in wire.changes(self.id, self.own.number + 1, ins, outs):
            self.own.number += 1
            self._say(text)

    def _beat(self) -> None:
        """Say that this node is there."""
        self._say(wire.beat(self.id, self.own.number))
        self._call("beat", self._settings.ttl * BEAT, self._beat)

    def _look(self, expected: float) -> None:
        """Forget the nodes that were not heard of for long."""
        ttl, now = self._settings.ttl, self._loop.time()
        late = now - expected
        self._on_look()
        for id, known in list(self._others.items()):
            if late > ttl * LOOK:  # what they said while this loop was blocked is still to be read
                known.heard = min(now, known.heard + late)
            if now - known.heard > ttl * SILENCE:
                self.forget(id, left=True)
        self._call("look", ttl * LOOK, functools.partial(self._look, now + ttl * LOOK))

    def _tell_all(self) -> None:
        entries = [
            In(channel, client, member)
            for channel, clients in self.own.channels.items()
            for client, member in clients.items()
        ]
        self._flush()
        self._say(*wire.whole(self.id, self.own.number, entries))

    def _call(self, name: str, seconds: float, callback: Callable[[], None]) -> None:
        def call() -> None:
            del self._timers[name]
            callback()

        if not self._ended:
            if name in self._timers:
                self._timers[name].cancel()
            self._timers[name] = self._loop.call_later(seconds, call)

    def _say(self, *texts: str) -> None:
        for text in texts:
            try:
                self._publish(Event(CHANNEL, text))
            except StarcastError:
                return  # the broker is away: once it is back, everybody asks everybody

    # The others

    def on_gap(self, gap: Gap) -> None:
        """Something may be missing: tell the others everything, and ask them."""
        self._tell_all()
        self._ask_all()

    def on_event(self, event: Event) -> None:
        """Take what another node says."""
        message = wire.read(event.message)
        if message is None:
            return
        if message.node == self.id:
            if message.kind == "ask" and not message.asked:
                self._call("listen", SETTLE, self._listen)
        elif message.kind == "ask":
            if message.asked in ("", self.id) and "tell" not in self._timers:
                self._call("tell", min(ANSWER, self._settings.interval / 2), self._tell_all)
        elif message.kind == "bye":
            self.forget(message.node, left=False)
        else:
            self._take(message)

    def _take(self, message: wire.Message) -> None:
        known = self._others.get(message.node)
        if known is None:
            known = self._others[message.node] = Known(self._loop.time())
        known.heard = self._loop.time()
        if message.kind == "whole":
            self._take_whole(known, message)
        elif message.number == known.number + 1 and message.kind == "change" and known.number >= 0:
            self._take_change(known, message)
        elif message.kind == "beat" and message.number == 0:
            known.number = max(known.number, 0)  # it has no members yet
            known.complete = True
        elif message.number > known.number:
            self._ask(message.node, known)
        self._settle_if_complete()

    def _ask(self, node: str, known: Known) -> None:
        now = self._loop.time()
        if now - known.asked > ASK_INTERVAL:
            known.asked = now
            self._say(wire.ask(self.id, node))

    def _take_change(self, known: Known, message: wire.Message) -> None:
        known.number = message.number
        for entry in message.ins:
            known.put(entry)
            self._on_change(entry.channel)
        for channel, client, left in message.outs:
            member = known.take(channel, client)
            if member is not None:
                self._gone(channel, client, member, left)
                self._on_change(channel)

    def _take_whole(self, known: Known, message: wire.Message) -> None:
        if message.number < known.number:
            known.complete = True  # it was sent before changes that are known
            return
        if message.number != known.parts_of:
            known.parts, known.parts_of = {}, message.number
        known.parts[message.part] = message.ins
        if len(known.parts) < message.parts:
            return
        before = known.channels
        known.channels, known.number, known.parts_of = {}, message.number, -1
        for entries in known.parts.values():
            for entry in entries:
                known.put(entry)
        known.parts, known.complete = {}, True
        for channel in before.keys() | known.channels.keys():
            self._on_change(channel)

    def forget(self, node: str, *, left: bool) -> None:
        """Forget a node, whose members are gone, or are sure not to come back if `left`."""
        known = self._others.pop(node, None)
        for channel, clients in () if known is None else known.channels.items():
            for client, member in clients.items():
                self._gone(channel, client, member, left)
            self._on_change(channel)
        self._settle_if_complete()


def describe(member: Member) -> dict[str, Any]:
    """Return what clients without the protocol are told of a member."""
    content: dict[str, Any] = {"id": member.id}
    if member.info is not None:
        content["info"] = member.info
    if member.channel_info is not None:
        content["channel_info"] = member.channel_info
    return content
