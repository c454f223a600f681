from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import Broadcast, ConfigurationError, Event, Overflowed
from starcast.event import OVERHEAD
from starcast.outbox import (
    MAX_BUFFER,
    OVERFLOWS,
    Close,
    Leave,
    Outbox,
    OutboxFull,
    Send,
    Unsubscribed,
    discard,
)
from support import DEADLINE, Peer, by_another, examples, until

pytestmark = pytest.mark.anyio


def event(size: int = 0, channel: str = "room") -> Event:
    return Event(channel, b"x" * size, b"x" * size)


def contents(outbox: Outbox) -> list[object]:
    items = []
    while (item := outbox.take()) is not None:
        items.append(item)
    return items


def is_alone(items: Iterable[object]) -> bool:
    """Whether a single event waits, which may be larger than the buffer."""
    return len([item for item in items if isinstance(item, Event)]) == 1


class Model:
    """An outbox written down as plainly as possible: the whole list is made anew each time."""

    def __init__(self, bound: int, overflow: str) -> None:
        self.bound = bound
        self.overflow = overflow
        self.items: list[object] = []

    @property
    def size(self) -> int:
        return sum(item.cost for item in self.items if isinstance(item, Event))

    def drop_first(self, channel: str | None = None) -> list[Event]:
        for item in self.items:
            if isinstance(item, Event) and channel in (None, item.channel):
                self.items = [other for other in self.items if other is not item]
                return [item]
        return []

    def offer(self, item: object) -> list[Event]:
        if not isinstance(item, Event):
            self.items = [*self.items, item]
            return []
        dropped: list[Event] = []
        if self.overflow == "latest" and item.channel != "":
            dropped += self.drop_first(item.channel)
        full = bool(self.size) and self.size + item.cost > self.bound
        if full and self.overflow == "disconnect":
            raise OutboxFull
        if full and self.overflow == "drop_newest":
            return [*dropped, item]
        while self.size and self.size + item.cost > self.bound:
            dropped += self.drop_first()
        self.items = [*self.items, item]
        return dropped


offers = st.builds(event, st.integers(0, 300), st.sampled_from(["", "a", "b", "c"]))
controls = st.builds(Close, st.just(1000)) | st.builds(Leave)
steps = st.lists(offers | offers | controls | st.just("take") | st.just("clear"), max_size=40)


@settings(max_examples=examples(150))
@given(st.sampled_from(OVERFLOWS), st.integers(1, 800), steps)
def test_an_outbox_does_what_a_plain_model_does(overflow, bound, steps):
    outbox, model = Outbox(bound, overflow), Model(bound, overflow)
    for step in steps:
        if step == "take":
            expected = model.items.pop(0) if model.items else None
            assert outbox.take() is expected
        elif step == "clear":
            assert outbox.clear() == model.items
            model.items = []
        else:
            try:
                expected = model.offer(step)
            except OutboxFull:
                with pytest.raises(OutboxFull):
                    outbox.offer(step)
            else:
                assert outbox.offer(step) == expected
        assert outbox.size == model.size
        assert outbox.size <= bound or is_alone(model.items)
        assert len(outbox) == len(model.items)
    assert contents(outbox) == model.items
    assert outbox.size == 0


@settings(max_examples=examples(150))
@given(st.sampled_from(OVERFLOWS), st.integers(1, 800), st.lists(offers | controls, max_size=40))
def test_nothing_is_lost_without_being_named_and_nothing_changes_places(overflow, bound, items):
    outbox = Outbox(bound, overflow)
    offered, dropped = [], []
    for item in items:
        try:
            dropped += outbox.offer(item)
        except OutboxFull:
            assert overflow == "disconnect"
            assert outbox.size + item.cost > bound
            continue
        offered.append(item)
        assert outbox.size <= bound or is_alone(outbox.items)
    remaining = contents(outbox)
    # The order of what remains is that of the offers, and the rest is what was dropped.
    gone = {id(item) for item in dropped}  # equal events are not the same
    assert list(map(id, remaining)) == [id(item) for item in offered if id(item) not in gone]
    assert len(remaining) + len(dropped) == len(offered)
    assert all(isinstance(item, Event) for item in dropped)
    if overflow == "disconnect":
        assert dropped == []
    if overflow == "latest":
        channels = [item.channel for item in remaining if isinstance(item, Event) and item.channel]
        assert len(channels) == len(set(channels))


# Settings


def test_an_outbox_has_a_mebibyte_and_cuts_off_by_default():
    assert MAX_BUFFER == 1024 * 1024
    outbox = Outbox()
    assert (outbox.max_buffer, outbox.overflow) == (MAX_BUFFER, "disconnect")
    assert (outbox.size, len(outbox)) == (0, 0)
    assert outbox.offer(event(MAX_BUFFER - OVERHEAD)) == []
    with pytest.raises(OutboxFull):
        outbox.offer(event())


@pytest.mark.parametrize("max_buffer", [0, -1, 1.5, "1", None, True])
def test_a_bound_that_is_no_number_of_bytes_is_refused(max_buffer):
    with pytest.raises(ConfigurationError, match="max_buffer is a number of bytes") as raised:
        Outbox(max_buffer)
    assert repr(max_buffer) in str(raised.value)


@pytest.mark.parametrize("overflow", ["", "drop", "LATEST", None, 1])
def test_an_unknown_policy_is_refused_with_the_known_ones(overflow):
    with pytest.raises(ConfigurationError) as raised:
        Outbox(100, overflow)
    assert str(raised.value) == (
        f"overflow must be one of disconnect, drop_oldest, drop_newest, latest, not {overflow!r}"
    )


# The policies by hand, as the documentation tells them


def test_what_fits_exactly_fits():
    outbox = Outbox(2 * (10 + OVERHEAD))
    assert outbox.offer(event(10)) == outbox.offer(event(10)) == []
    assert outbox.size == outbox.max_buffer


def test_disconnect_refuses_what_is_too_much_and_keeps_what_it_has():
    first, second, third = (event(10) for _ in range(3))
    outbox = Outbox(2 * (10 + OVERHEAD))
    outbox.offer(first)
    outbox.offer(second)
    with pytest.raises(OutboxFull):
        outbox.offer(third)
    assert contents(outbox) == [first, second]


def test_drop_oldest_makes_room_for_the_new_one():
    small = [event(0) for _ in range(3)]
    large = event(OVERHEAD)
    outbox = Outbox(3 * OVERHEAD, "drop_oldest")
    for item in small:
        outbox.offer(item)
    assert outbox.offer(large) == small[:2]
    assert contents(outbox) == [small[2], large]


def test_drop_newest_keeps_what_it_has():
    first, second = event(0), event(0)
    outbox = Outbox(OVERHEAD, "drop_newest")
    assert outbox.offer(first) == []
    assert outbox.offer(second) == [second]
    assert contents(outbox) == [first]


def test_latest_keeps_the_newest_of_each_channel_at_the_end():
    a1, b1, a2, b2, a3 = (event(0, channel) for channel in "ababa")
    outbox = Outbox(1000, "latest")
    assert [outbox.offer(item) for item in (a1, b1, a2, b2, a3)] == [[], [], [a1], [b1], [a2]]
    assert contents(outbox) == [b2, a3]


class Channel(str):
    """Counts how often one is compared with another."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other: object) -> bool:
        Channel.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_latest_does_not_look_at_the_other_channels_that_wait():
    """Neither to find the older event of a channel, nor to take the oldest or to drop it."""
    waiting = 1000
    outbox = Outbox(waiting * OVERHEAD, "latest")
    for number in range(waiting):
        outbox.offer(event(0, Channel(number)))
    Channel.compared = 0
    assert [item.channel for item in outbox.offer(event(0, Channel(900)))] == ["900"]
    assert [item.channel for item in outbox.offer(event(0, Channel(1000)))] == ["0"]
    assert outbox.take().channel == "1"
    assert Channel.compared < 10


def test_latest_keeps_all_messages_to_this_client_alone_while_there_is_room():
    one, two, three = (event(0, "") for _ in range(3))
    outbox = Outbox(2 * OVERHEAD, "latest")
    assert outbox.offer(one) == outbox.offer(two) == []
    assert outbox.offer(three) == [one]
    assert contents(outbox) == [two, three]


def test_latest_makes_room_like_drop_oldest_when_other_channels_fill_the_buffer():
    a, b, c = (event(0, channel) for channel in "abc")
    outbox = Outbox(2 * OVERHEAD, "latest")
    assert [outbox.offer(item) for item in (a, b, c)] == [[], [], [a]]
    assert contents(outbox) == [b, c]


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_a_message_larger_than_the_buffer_fits_when_nothing_is_ahead_of_it(overflow):
    outbox, large = Outbox(200, overflow), event(1000)
    for _ in range(2):
        assert outbox.offer(large) == []
        assert outbox.size == large.cost
        assert contents(outbox) == [large]


def test_drop_newest_drops_a_message_larger_than_the_buffer_when_one_is_ahead_of_it():
    small, large = event(0), event(200)
    outbox = Outbox(200, "drop_newest")
    outbox.offer(small)
    assert outbox.offer(large) == [large]
    assert contents(outbox) == [small]


@pytest.mark.parametrize("overflow", ["drop_oldest", "latest"])
def test_a_message_larger_than_the_buffer_takes_the_place_of_all_others(overflow):
    old, other, large, next_one = (event(0, "a"), event(0, "b"), event(200, "a"), event(0, "a"))
    outbox = Outbox(200, overflow)
    outbox.offer(old)
    outbox.offer(other)
    assert outbox.offer(large) == [old, other]
    assert outbox.offer(next_one) == [large]
    assert contents(outbox) == [next_one]


@pytest.mark.parametrize("overflow", OVERFLOWS)
async def test_control_items_weigh_nothing_and_are_never_dropped(overflow):
    own = Send({"type": "websocket.send", "text": "own"}, asyncio.get_running_loop())
    items = [own, Leave(), Close(1000)]
    outbox = Outbox(OVERHEAD, overflow)
    outbox.offer(event(0))
    for item in items:
        assert outbox.offer(item) == []
    assert outbox.size == OVERHEAD
    if overflow == "disconnect":
        with pytest.raises(OutboxFull):
            outbox.offer(event(0))
    else:
        outbox.offer(event(0))
    assert [item for item in contents(outbox) if not isinstance(item, Event)] == items


def test_clear_hands_out_what_there_was():
    outbox = Outbox(1000)
    items = [event(), Close(1000), event()]
    for item in items:
        outbox.offer(item)
    assert outbox.clear() == items
    assert (outbox.size, len(outbox), outbox.take()) == (0, 0, None)
    assert outbox.clear() == []


async def test_control_items_say_what_they_are_for():
    close = Close(1001, "going away")
    assert (close.code, close.reason) == (1001, "going away")
    assert Close(1000).reason == ""


async def test_a_send_is_finished_once():
    send = Send({"type": "websocket.close"}, asyncio.get_running_loop())
    send.finish(False)
    send.finish(True, OSError())
    assert send.sent.result() is False
    assert send.error is None


# The hook


def test_overflowed_tells_the_hook():
    told: list[Overflowed] = []
    overflowed = Overflowed("client", "latest", (event(),))
    overflowed.tell(told.append)
    assert told == [overflowed]


def test_overflowed_without_a_hook_is_quiet(caplog):
    Overflowed("client", "latest", ()).tell(None)
    assert caplog.records == []


@pytest.mark.parametrize("error", [LookupError, asyncio.CancelledError])
def test_an_error_in_the_hook_is_logged_and_goes_no_further(error, caplog):
    def broken(overflowed: Overflowed) -> None:
        raise error("oops")

    Overflowed("client", "latest", ()).tell(broken)
    (record,) = caplog.records
    assert record.name == "starcast"
    assert record.getMessage() == "on_overflow raised"
    assert record.exc_info[0] is error
    caplog.clear()


def test_overflowed_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Overflowed("client", "latest", ()).dropped = (event(),)


# In a hub


@pytest.mark.parametrize(
    ("overflow", "got", "dropped"),
    [
        ("drop_oldest", ["0", "3", "4"], [["1"], ["2"]]),
        ("drop_newest", ["0", "1", "2"], [["3"], ["4"]]),
        ("latest", ["0", "4"], [["1"], ["2"], ["3"]]),
        ("disconnect", ["0"], [["1", "2", "3"]]),
    ],
)
@pytest.mark.parametrize("set_on", ["hub", "client"])
async def test_a_client_that_is_behind_gets_what_its_policy_leaves(overflow, got, dropped, set_on):
    told: list[Overflowed] = []
    choice = {"max_buffer": 2 * (1 + OVERHEAD), "overflow": overflow}
    hub = Broadcast(on_overflow=told.append, **(choice if set_on == "hub" else {}))
    slow, quick = Peer(), Peer()
    await hub.connect(slow.websocket, **(choice if set_on == "client" else {}))
    await hub.connect(quick.websocket)
    slow.open.clear()
    for number in range(5):  # the first one is in flight while the others wait
        await hub.send(str(number))
    assert [[event.message for event in each.dropped] for each in told] == dropped
    assert {(each.client, each.overflow) for each in told} == {(slow.websocket, overflow)}
    slow.open.set()
    await until(lambda: len(slow.got) == len(got))
    if overflow == "disconnect":
        await until(lambda: slow.closed == 1013)
    await hub.disconnect()
    assert slow.got == got
    assert quick.got == ["0", "1", "2", "3", "4"]
    assert hub.stats().dropped == sum(map(len, dropped))


async def test_latest_drops_nothing_from_a_client_that_keeps_up():
    hub = Broadcast(overflow="latest")
    peer = Peer()
    await hub.connect(peer.websocket)
    for number in range(20):
        hub.publish_nowait("default", str(number))
    await hub.disconnect()
    assert peer.got == [str(number) for number in range(20)]
    assert hub.stats().dropped == 0


async def test_a_hook_that_raises_harms_nobody(caplog):
    def broken(overflowed: Overflowed) -> None:
        raise LookupError("oops")

    hub = Broadcast(max_buffer=OVERHEAD, overflow="drop_newest", on_overflow=broken)
    slow, quick = Peer(), Peer()
    await hub.connect(slow.websocket)
    await hub.connect(quick.websocket)
    slow.open.clear()
    for number in range(4):
        await hub.send("x" * number)
    assert quick.got == ["", "x", "xx", "xxx"]
    slow.open.set()
    await hub.disconnect()
    assert slow.got == ["", "x"]
    assert [record.getMessage() for record in caplog.records] == ["on_overflow raised"] * 2
    caplog.clear()


@pytest.mark.parametrize("choice", [{"max_buffer": 0}, {"overflow": "drop"}])
async def test_settings_that_make_no_sense_are_refused_wherever_they_are_given(choice):
    with pytest.raises(ConfigurationError):
        Broadcast(**choice)
    hub = Broadcast()
    with pytest.raises(ConfigurationError):
        hub.subscribe(**choice)
    peer = Peer()
    with pytest.raises(ConfigurationError):
        await hub.connect(peer.websocket, **choice)
    assert peer.sent == []
    assert len(hub) == 0


@pytest.mark.parametrize("ws", ["auto", "starcast.uvicorn:BroadcastProtocol"])
@pytest.mark.parametrize("way", ["publish", "publish_nowait", "to"])
@pytest.mark.parametrize("overflow", OVERFLOWS)
async def test_a_message_larger_than_the_buffer_reaches_a_client(serve, overflow, way, ws):
    hub = Broadcast(max_buffer=1000, overflow=overflow)
    websockets = []

    async def endpoint(websocket):
        await hub.connect(websocket)
        websockets.append(websocket)
        await websocket.receive()

    server = await serve(Starlette(routes=[WebSocketRoute("/", endpoint)]), ws=ws)
    async with server.connect("/", max_size=None, compression=None) as client:
        await until(lambda: websockets)
        for letter in "ab":
            text = letter * 8_000_000  # more than the socket takes at once
            if way == "to":
                assert await by_another(hub.send(text, to=websockets[0]))
            elif way == "publish":
                await hub.send(text)
            else:
                hub.publish_nowait("default", text)
            assert await asyncio.wait_for(client.recv(), DEADLINE) == text
        assert hub.stats().dropped == hub.stats().slow_clients == 0


async def test_a_task_that_waits_for_what_is_discarded_is_told():
    loop = asyncio.get_running_loop()
    send = Send({"type": "websocket.send", "text": "x"}, loop)
    discard(send)
    discard(event())
    discard(Leave())
    assert send.sent.result() is False


# A client of many channels


def shedding(max_buffer: int = 1000) -> tuple[Outbox, list[str]]:
    """An outbox that takes its client off channels, but for the one that is `pending`."""
    outbox, shed = Outbox(max_buffer), []

    def take_off(channel: str) -> bool:
        if channel != "pending":
            shed.append(channel)
        return channel != "pending"

    outbox.shed = take_off
    return outbox, shed


def big(channel: str, number: int = 0) -> Event:
    return Event(channel, f"{number:0300}")


def test_the_channel_that_fills_most_of_it_is_shed():
    outbox, shed = shedding()
    close, first, calm = Close(1000), big("flood", 1), big("calm")
    assert outbox.offer(first) == outbox.offer(calm) == []
    outbox.offer(close)
    last = big("flood", 2)
    assert outbox.offer(last) == [first, last]
    assert shed == ["flood"]
    assert list(outbox.items) == [calm, close]
    assert outbox.size == calm.cost
    # What was on its way is dropped until the client has been told.
    stale, told = big("flood", 3), Unsubscribed("flood", "told")
    assert outbox.offer(stale) == [stale]
    assert outbox.without_cut([stale]) == []
    assert outbox.without_cut([calm, stale, told, last]) == [calm, told, last]
    assert outbox.offer(last) == []


def test_another_channel_may_have_to_make_space():
    outbox, shed = shedding()
    floods = [big("flood", number) for number in range(2)]
    for event in floods:
        outbox.offer(event)
    calm = big("calm")
    assert outbox.offer(calm) == floods
    assert list(outbox.items) == [calm]
    assert shed == ["flood"]


@pytest.mark.parametrize("channel", ["", "\x01user:7", "pending"])
def test_what_belongs_to_no_channel_that_can_be_shed_overflows(channel):
    outbox, shed = shedding()
    for number in range(2):
        outbox.offer(big(channel, number))
    with pytest.raises(OutboxFull):
        outbox.offer(big(channel, 2))
    assert not shed
    assert not outbox.cut
