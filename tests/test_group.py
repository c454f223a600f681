"""Groups of a turn against a plain model: everybody gets everything, in the order it came."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from starcast.event import OVERHEAD, Event
from starcast.frames import PLAIN
from starcast.group import Group, grouped
from starcast.outbox import Close, Leave
from starcast.servers.wire import MAX_JOIN
from support import examples
from test_frames import Reader


class Member:
    """All that a group knows of one: that it is somebody."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"member {self.number}"


MEMBERS = [Member(number) for number in range(5)]


def event(size: int = 0, exclude: frozenset[int] = frozenset(), fill: str = "x") -> Event:
    message = fill * size
    return Event("channel", message, message.encode(), exclude)


events = st.builds(
    event,
    st.sampled_from(
        [0, 1, 200, 20_000, MAX_JOIN // 2 - OVERHEAD, MAX_JOIN - OVERHEAD, 2 * MAX_JOIN]
    ),
    st.sampled_from([frozenset(), frozenset(), frozenset({1}), frozenset({2, 3})]),
)
items = st.one_of(events, events, events, st.builds(Leave), st.builds(Close, st.just(1000)))


@st.composite
def batches(draw):
    """Entries as a shard has them: the same tuple again and again, or one of somebody's own."""
    overlapping = draw(st.booleans())
    if overlapping:
        channels = draw(st.lists(st.lists(st.sampled_from(MEMBERS), unique=True), min_size=1))
    else:
        cuts = sorted(draw(st.lists(st.integers(0, 5), max_size=3)))
        channels = [MEMBERS[a:b] for a, b in itertools.pairwise([0, *cuts, 5])]
    channels = [tuple(channel) for channel in channels]
    entries = []
    for _ in range(draw(st.integers(0, 25))):
        kind = draw(st.integers(0, 9))
        done = draw(st.booleans())
        if kind == 0:
            entries.append((None, (), True))
        elif kind == 1 and overlapping:
            entries.append((draw(items), (draw(st.sampled_from(MEMBERS)),), done))
        else:
            entries.append((draw(items), draw(st.sampled_from(channels)), done))
    return entries


@given(batches())
@settings(max_examples=examples(200))
def test_everybody_gets_everything_in_order(drawn):
    got = {member: [] for member in MEMBERS}
    called = []

    def check(place, item, members):
        def done():
            called.append(place)
            if item is None:  # everything before it has been delivered
                for member in MEMBERS:
                    expected = [i for i, m, _ in drawn[:place] if member in m and i is not None]
                    assert got[member][: len(expected)] == expected
            else:
                assert all(any(item is i for i in got[member]) for member in members)

        return done

    batch = [
        (item, members, check(place, item, members) if done else None)
        for place, (item, members, done) in enumerate(drawn)
    ]
    for group in grouped(batch):
        cost = sum(item.cost for item in group.items if isinstance(item, Event))
        assert len(group.items) <= 1 or cost <= MAX_JOIN
        for item in group.items:
            assert group.has_events == isinstance(item, Event)
            assert not group.has_events or group.exclude == item.exclude
        if len(group.items) > 1:
            assert all(isinstance(item, Event) for item in group.items)
        for member in group.members:
            got[member] += group.items
        for done in group.done:
            done()
    for member in MEMBERS:
        expected = [item for item, members, _ in drawn if member in members and item is not None]
        assert got[member] == expected
    assert sorted(called) == [place for place, (*_, done) in enumerate(drawn) if done]


def test_a_burst_is_one_group():
    channel = tuple(MEMBERS)
    sent = [event(10) for _ in range(100)]
    (group,) = grouped([(item, channel, None) for item in sent])
    assert group.items == sent
    assert group.members is channel


def test_rooms_apart_are_a_group_each():
    rooms = [(member,) for member in MEMBERS]
    batch = [(event(10), rooms[number % 5], None) for number in range(100)]
    groups = grouped(batch)
    assert [group.members for group in groups] == rooms
    assert [len(group.items) for group in groups] == [20] * 5


def test_large_rooms_share_writes_for_what_follows_each_other():
    rooms = [tuple(Member(number) for number in range(600)) for _ in range(2)]
    batch = [(event(10), rooms[number], None) for number in (0, 0, 1, 0)]
    assert [len(group.items) for group in grouped(batch)] == [2, 1, 1]


def test_somebody_on_two_channels_gets_them_as_they_came():
    one, two = (MEMBERS[0], MEMBERS[1]), (MEMBERS[1], MEMBERS[2])
    sent = [event(number) for number in range(4)]
    batch = list(zip(sent, [one, one, two, one], [None] * 4, strict=True))
    assert [(group.members, group.items) for group in grouped(batch)] == [
        (one, sent[:2]),
        (two, sent[2:3]),
        (one, sent[3:]),
    ]


def test_a_group_ends_where_it_would_be_too_large():
    channel = tuple(MEMBERS)
    half = MAX_JOIN // 2 - OVERHEAD
    exact = grouped([(event(half), channel, None), (event(half), channel, None)])
    assert [len(group.items) for group in exact] == [2]
    above = grouped([(event(half), channel, None), (event(half + 1), channel, None)])
    assert [len(group.items) for group in above] == [1, 1]
    large = grouped([(event(size), channel, None) for size in (MAX_JOIN, 1, 1)])
    assert [len(group.items) for group in large] == [1, 2]


def test_a_group_ends_where_others_are_excluded():
    channel = tuple(MEMBERS)
    excluded = [frozenset(), frozenset({1}), frozenset({1}), frozenset()]
    groups = grouped([(event(1, exclude), channel, None) for exclude in excluded])
    assert [(group.exclude, len(group.items)) for group in groups] == [
        (frozenset(), 1),
        (frozenset({1}), 2),
        (frozenset(), 1),
    ]


def test_a_close_ends_a_group():
    channel = tuple(MEMBERS)
    batch = [(item, channel, None) for item in (event(), Close(1000), event(), event())]
    assert [len(group.items) for group in grouped(batch)] == [1, 1, 2]


def test_nothing_to_deliver_but_somebody_to_tell():
    told = []
    (group,) = grouped([(None, (), lambda: told.append(1)), (None, (), lambda: told.append(2))])
    assert group.items == []
    assert group.members == ()
    for done in group.done:
        done()
    assert told == [1, 2]
    assert grouped([]) == []
    last = grouped([(None, (), None), (event(), (), None)])  # nobody has no further event either
    assert [len(group.items) for group in last] == [0, 1]


def test_the_frames_of_a_group_are_joined_once_for_each_setting():
    channel = tuple(MEMBERS)
    sent = [event(300, fill=fill) for fill in "abc"]
    (group,) = grouped([(item, channel, None) for item in sent])
    for setting in (PLAIN, 9, 15):
        joined = group.joined(setting)
        assert group.joined(setting) is joined
        assert Reader(setting).messages(joined) == [item.message for item in sent]
    assert len(group.joined(9)) < len(group.joined(PLAIN))


def test_one_event_is_not_copied():
    sent = event(300)
    assert Group(sent, ()).joined(PLAIN) is sent.frame(PLAIN)
