"""Tests of how a hub fills what it has missed, with a broker that drops what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

import pytest

from history.conftest import HISTORY
from history.keeping import TUNING, KeepingBus
from starcast import (
    BackendUnavailable,
    Broadcast,
    Event,
    Gap,
    GapSubscriber,
    History,
    Resumed,
    Subscriber,
)
from starcast.backends.base import Kept, MessagesRefused
from support import Bus, OtherLoop, Peer, joined, starcast_tasks, until

pytestmark = pytest.mark.anyio

CHANNEL = "default:room"  # as the broker calls it


async def take(subscriber: Subscriber, count: int) -> list[str | bytes]:
    async with asyncio.timeout(5):
        return [(await subscriber.get()).message for _ in range(count)]


async def take_all(subscriber: GapSubscriber, last: str) -> list[str | bytes | Gap]:
    """What comes until this message."""
    got: list[str | bytes | Gap] = []
    async with asyncio.timeout(5):
        while not got or got[-1] != last:
            item = await subscriber.get()
            got.append(item.message if isinstance(item, Event) else item)
    return got


async def test_a_message_that_was_dropped_is_filled_in(hub, broker):
    async with hub.subscribe("room", gaps=True) as subscriber:
        await hub.publish("room", "0")
        broker.dropped = 2
        for number in range(1, 5):
            await hub.publish("room", str(number))
        assert await take_all(subscriber, "4") == [*"01234"]
    assert hub.stats().backend.gaps == 0


async def test_the_first_message_may_be_dropped_too(hub, broker):
    async with hub.subscribe("room") as subscriber:
        broker.dropped = 1
        await hub.publish("room", "0")
        await hub.publish("room", "1")
        assert await take(subscriber, 2) == ["0", "1"]


async def test_what_arrives_while_it_is_filled_waits(hub, broker):
    async with hub.subscribe("room") as subscriber:
        await hub.publish("room", "0")
        broker.dropped = 1
        await hub.publish("room", "1")
        broker.open.clear()
        publishing = asyncio.create_task(hub.publish("room", "2"))
        await until(lambda: broker.stalled)
        for number in range(3, 6):  # from elsewhere
            broker.keep(kept(str(number)))
        await until(lambda: broker.stalled == 2)  # the one that reads
        broker.open.set()
        await publishing
        assert await take(subscriber, 6) == ["0", "1", "3", "4", "5", "2"]


@pytest.mark.parametrize("size", [1, 100_000])
async def test_what_arrives_while_it_is_filled_need_not_be_kept_so_long(broker, size):
    """Unless it is too much to be held back."""
    history = History(size=3 if size == 1 else 100)
    hub = Broadcast(backend=KeepingBus(broker), history=history, tuning=TUNING, max_buffer=2**24)
    async with hub, hub.subscribe("room", gaps=True) as subscriber:
        await hub.publish("room", "0")
        broker.dropped = 1
        await hub.publish("room", "1")
        broker.open.clear()
        publishing = asyncio.create_task(hub.publish("room", "2"))
        await until(lambda: broker.stalled)
        broker.keep(kept("3")._replace(history=history))
        await until(lambda: broker.stalled == 2)  # the one that reads
        messages = [str(number) * size for number in range(4, 10)]
        for text in messages:
            broker.keep(kept(text)._replace(history=history))
        broker.open.set()
        await publishing
        assert await take_all(subscriber, "2") == [*"013", *messages, "2"]
        assert hub.stats().backend.gaps == 0


async def test_what_arrives_as_the_first_one_joins_need_not_be_kept_so_long(broker):
    history = History(size=1)
    async with Broadcast(backend=KeepingBus(broker), history=history, tuning=TUNING) as hub:
        await hub.publish("room", "0")
        broker.open.clear()
        subscriber = hub.subscribe("room", gaps=True)
        joining = asyncio.create_task(subscriber.__aenter__())
        await until(lambda: broker.stalled)
        broker.open.set()
        await until(lambda: broker.asked("read_kept"))
        for number in range(1, 5):
            broker.keep(kept(str(number))._replace(history=history))
        await joining
        await hub.publish("room", "5")
        got = await take_all(subscriber, "5")
        assert got == [str(number) for number in range(6 - len(got), 6)]
        await subscriber.__aexit__(None, None, None)
        assert hub.stats().backend.gaps == 0


def kept(text: str, channel: str = CHANNEL):
    """A message that another program publishes."""
    return Kept(channel, text.encode(), History(size=10))


@pytest.mark.parametrize("count", [3, 2500])
async def test_an_outage_heals(broker, count):
    hub = Broadcast(
        backend=KeepingBus(broker), history=History(size=5000), tuning=TUNING, max_buffer=2**24
    )
    gaps: list[Gap] = []
    async with hub, hub.subscribe("room", gaps=True) as subscriber:
        await hub.publish("room", "before")
        broker.kill()
        for number in range(count):
            broker.keep(kept(str(number))._replace(history=History(size=5000)))
        broker.up = True
        await until(lambda: hub.stats().backend.state == "connected")
        await hub.publish("room", "after")
        got = await take_all(subscriber, "after")
    assert got == ["before", *map(str, range(count)), "after"]
    assert gaps == []
    assert hub.stats().backend.gaps == 0


async def test_a_gap_is_told_for_what_the_history_no_longer_has(broker, caplog):
    gaps: list[Gap] = []
    hub = Broadcast(backend=KeepingBus(broker), history=HISTORY, tuning=TUNING, on_gap=gaps.append)
    async with hub, hub.subscribe("room", gaps=True) as subscriber:
        await hub.publish("room", "before")
        broker.kill()
        for number in range(15):
            broker.keep(kept(str(number)))
        broker.up = True
        await until(lambda: hub.stats().backend.state == "connected")
        await hub.publish("room", "after")
        got = await take_all(subscriber, "after")
    assert got == ["before", *gaps, *map(str, range(5, 15)), "after"]
    (gap,) = gaps
    assert gap.channel == "room"
    assert "lost the history" in gap.error
    assert hub.stats().backend.gaps == 1
    assert "messages of the channel 'room' may be missing" in caplog.text


async def test_a_broker_that_comes_back_empty_is_a_new_epoch(hub, broker):
    async with hub.subscribe("room", gaps=True) as subscriber:
        old = await hub.publish("room", "before")
        broker.kill()
        broker.forget()
        broker.up = True
        await until(lambda: hub.stats().backend.state == "connected")
        new = await hub.publish("room", "after")
        before, gap, after = await take_all(subscriber, "after")
        assert (before, after) == ("before", "after")
        assert isinstance(gap, Gap)
    assert new.partition("-")[0] != old.partition("-")[0]
    async with hub.subscribe("room", since=old) as subscriber:
        assert not subscriber.resumed.recovered


async def test_a_new_epoch_without_an_outage(hub, broker):
    """The broker has forgotten the channel: it expired, or somebody flushed it."""
    async with hub.subscribe("room", gaps=True) as subscriber:
        await hub.publish("room", "0")
        broker.forget()
        await hub.publish("room", "1")  # the first one of the new epoch: nothing is missing
        assert await take_all(subscriber, "1") == ["0", "1"]
        broker.forget()
        broker.dropped = 1
        await hub.publish("room", "2")
        await hub.publish("room", "3")
        one, *others = await take_all(subscriber, "3")
        assert isinstance(one, Gap)
        assert others == ["2", "3"]
        broker.forget()  # once more, which is not logged again so soon
        broker.dropped = 1
        await hub.publish("room", "4")
        await hub.publish("room", "5")
        one, *others = await take_all(subscriber, "5")
        assert isinstance(one, Gap)
        assert others == ["4", "5"]


async def test_after_an_outage_only_channels_without_a_history_have_a_gap(broker):
    gaps: list[Gap] = []
    hub = Broadcast(
        backend=KeepingBus(broker),
        history=HISTORY,
        tuning=TUNING,
        on_gap=gaps.append,
        after_gap="close",
    )
    async with hub:
        both = await joined(hub, "room", "other")
        kept_only = await joined(hub, "room")
        async with (
            hub.subscribe("room", gaps=True) as room,
            hub.subscribe("other", gaps=True) as other,
        ):
            broker.restart()
            await until(lambda: both.closed == 1012)
            assert isinstance(await other.get(), Gap)
            await hub.publish("room", "after")
            assert await take_all(room, "after") == ["after"]
            assert kept_only.closed is None
            await until(lambda: kept_only.got == ["after"])
    assert len(gaps) == 1


async def test_a_position_check_finds_what_was_dropped_in_silence(broker):
    tuning = dataclasses.replace(TUNING, position_interval=0.05)
    hub = Broadcast(backend=KeepingBus(broker), history=HISTORY, tuning=tuning)
    async with hub, hub.subscribe("room") as subscriber, hub.subscribe("room1"):
        broker.dropped = 1
        await hub.publish("room", "in silence")
        assert await take(subscriber, 1) == ["in silence"]
        reads = len(broker.asked("read_kept"))
        await until(lambda: len(broker.asked("read_kept")) > reads + 4)  # it goes on


@pytest.mark.parametrize("ttl", [60, 0.01])
async def test_a_broker_that_cannot_tell_whether_something_has_expired(broker, ttl):
    """Nothing has, if the channel was up to date a moment ago."""
    hub = Broadcast(backend=KeepingBus(broker), history=History(ttl=ttl), tuning=TUNING)
    async with hub, hub.subscribe("room", gaps=True) as subscriber:
        await hub.publish("room", "before")
        assert await take_all(subscriber, "before") == ["before"]
        broker.expire(CHANNEL)
        broker.is_sure = False
        await asyncio.sleep(0.02)
        broker.restart()
        await until(lambda: hub.stats().backend.state == "connected")
        await hub.publish("room", "after")
        got = await take_all(subscriber, "after")
    assert [type(item) for item in got] == ([str] if ttl == 60 else [Gap, str])


async def test_a_position_that_changes_without_a_message_is_no_gap(broker):
    tuning = dataclasses.replace(TUNING, position_interval=0.02)
    hub = Broadcast(backend=KeepingBus(broker), history=History(ttl=0.01), tuning=tuning)
    async with hub, hub.subscribe("room", gaps=True) as subscriber:
        await hub.publish("room", "before")
        broker.expire(CHANNEL)
        broker.is_sure = False
        reads = len(broker.asked("read_kept"))
        await until(lambda: len(broker.asked("read_kept")) > reads + 3)
        await hub.publish("room", "after")
        assert await take_all(subscriber, "after") == ["before", "after"]
        assert hub.stats().backend.gaps == 0


async def test_a_history_that_cannot_be_read_is_tried_again(hub, broker, caplog):
    async with hub.subscribe("room") as subscriber:
        await hub.publish("room", "0")
        broker.dropped, broker.unreadable = 1, 3
        await hub.publish("room", "1")
        await hub.publish("room", "2")
        assert await take(subscriber, 3) == ["0", "1", "2"]
    assert "the broker does not return the history of the channel 'room'" in caplog.text
    assert "nobody may read this" in caplog.text
    assert hub.stats().backend.error == "nobody may read this"


async def test_a_channel_whose_position_is_not_told_is_refused(hub, broker):
    broker.unreadable = 1
    with pytest.raises(BackendUnavailable, match="nobody may read this"):
        async with hub.subscribe("room"):
            pass
    async with hub.subscribe("room") as subscriber:  # and the next one gets it
        await hub.publish("room", "text")
        assert await take(subscriber, 1) == ["text"]


async def test_a_channel_that_was_refused_is_filled(hub, broker):
    async with hub.subscribe("room", gaps=True) as subscriber:
        await hub.publish("room", "0")
        broker.refused.add(CHANNEL)
        broker.restart()
        await until(lambda: hub.stats().backend.refused == 1)
        broker.keep(kept("1"))
        broker.refused.clear()
        await until(lambda: hub.stats().backend.refused == 0)
        await hub.publish("room", "2")
        assert await take_all(subscriber, "2") == ["0", "1", "2"]


async def test_a_client_that_is_ahead_of_this_process(hub, broker):
    """It comes from a process that has got more already."""
    async with hub.subscribe("room") as first:
        await hub.publish("room", "0")
        assert await take(first, 1) == ["0"]
        broker.dropped = 2
        ahead = str(broker.keep(kept("1")))
        broker.keep(kept("2"))
        async with hub.subscribe("room", since=ahead) as second:
            assert second.resumed.recovered
            await hub.publish("room", "3")
            assert await take(second, 2) == ["2", "3"]
        assert await take(first, 3) == ["1", "2", "3"]


async def test_clients_that_come_back_at_once_share_a_read(hub, broker):
    async with hub.subscribe("room") as subscriber:
        ids = [await hub.publish("room", str(number)) for number in range(5)]
        await take(subscriber, 5)
        reads = len(broker.asked("read_kept"))
        peers = [Peer() for _ in range(50)]
        await asyncio.gather(*(hub.connect(peer.websocket, "room", since=ids[0]) for peer in peers))
        assert len(broker.asked("read_kept")) == reads + 1
        for peer in peers:
            await until(lambda peer=peer: peer.got == [*"1234"])


async def test_a_message_that_is_neither_text_nor_an_envelope_is_passed_over(hub, broker):
    async with hub.subscribe("room") as subscriber:
        await hub.publish("room", "0")
        broker.keep(kept("")._replace(payload=b"\xff\xff"))
        await hub.publish("room", "1")
        assert await take(subscriber, 2) == ["0", "1"]
        assert [event.message for event in (await hub.history("room")).events] == ["0", "1"]
    assert hub.stats().backend.malformed == 1
    assert hub.stats().backend.gaps == 0


async def test_a_hub_without_a_history_gets_what_is_kept_without_an_id(hub, broker):
    async with (
        Broadcast(backend=Bus(broker), name="default", tuning=TUNING) as other,
        other.subscribe("room") as subscriber,
    ):
        await hub.publish("room", "text")
        event = await subscriber.get()
        assert (event.message, event.id) == ("text", None)


async def test_what_is_published_without_a_history_is_delivered_and_not_kept(hub, broker):
    async with (
        Broadcast(backend=Bus(broker), name="default", tuning=TUNING) as other,
        hub.subscribe("room") as subscriber,
    ):
        await other.publish("room", "not kept")
        await hub.publish("room", "kept")
        assert await take(subscriber, 2) == ["not kept", "kept"]
        assert [event.message for event in (await hub.history("room")).events] == ["kept"]


async def test_a_batch_of_messages_of_which_one_is_refused(broker):
    class Refusing(KeepingBus):
        async def connect(self, deliver, lost):
            connection = await super().connect(deliver, lost)
            publish = connection.publish_kept

            async def refuse(messages):
                reasons = {n: "no" for n, it in enumerate(messages) if it.payload == b"no"}
                positions = await publish([it for it in messages if it.payload != b"no"])
                if reasons:
                    rest = iter(positions)
                    raise MessagesRefused(
                        "no",
                        reasons,
                        [None if n in reasons else next(rest) for n in range(len(messages))],
                    )
                return positions

            connection.publish_kept = refuse
            return connection

    async with Broadcast(backend=Refusing(broker), history=HISTORY, tuning=TUNING) as hub:
        publishing = [hub.publish("room", text) for text in ("0", "no", "1")]
        first, refused, second = await asyncio.gather(*publishing, return_exceptions=True)
    assert isinstance(refused, BackendUnavailable)
    assert (first[-2:], second[-2:]) == ("-1", "-2")


async def test_the_history_of_a_broker_that_is_away(hub, broker):
    await hub.publish("room", "text")
    broker.kill()
    with pytest.raises(BackendUnavailable, match="there is no connection to the broker"):
        await hub.history("room")
    broker.up = True
    await until(lambda: hub.stats().backend.state == "connected")
    assert len((await hub.history("room")).events) == 1


async def test_a_broker_that_does_not_answer_a_read(hub, broker):
    id = await hub.publish("room", "text")
    broker.open.clear()
    with pytest.raises(BackendUnavailable, match="did not answer in time"):
        await hub.history("room")
    broker.open.set()
    assert len((await hub.history("room")).events) == 1
    peer = await joined(hub, "other")
    reads = len(broker.asked("read_kept"))
    broker.open.clear()
    connecting = asyncio.create_task(hub.connect(peer.websocket, "room", since=id, history=1))
    await until(lambda: broker.stalled)
    connecting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await connecting
    broker.open.set()
    await until(lambda: "room" not in hub.channels)
    assert len(broker.asked("read_kept")) >= reads


async def test_a_client_whose_past_cannot_be_read_does_not_join(hub, broker):
    async with hub.subscribe("room"):  # so that the position is known
        for number in range(3):
            await hub.publish("room", str(number))
        await until(lambda: not broker.stalled)
        peer = await joined(hub, "other")
        broker.unreadable = 1
        with pytest.raises(BackendUnavailable, match="nobody may read this"):
            await hub.connect(peer.websocket, "room", history=1)
        assert hub.channels == {"other": 1}
        broker.unreadable = 1
        with pytest.raises(BackendUnavailable, match="nobody may read this"):
            async with hub.subscribe("room", history=1):
                pass
        assert hub.stats().subscribers == 1
        await hub.publish("room", "3")
        await hub.publish("other", "4")
        await until(lambda: peer.got == ["4"])


async def test_a_channel_that_is_left_is_forgotten(hub, broker):
    for _ in range(3):
        async with hub.subscribe("room") as subscriber:
            await hub.publish("room", "text")
            assert await take(subscriber, 1) == ["text"]
        broker.keep(kept("while nobody is here"))
        async with hub.subscribe("room") as subscriber:
            broker.restart()
            await until(lambda: hub.stats().backend.state == "connected")
        await until(lambda: hub.stats().backend.channels == 0)


@pytest.mark.parametrize("filling", [False, True])
async def test_a_track_survives_its_event_loop(broker, filling):
    """Also if it is being filled at that moment."""
    hub = Broadcast(backend=KeepingBus(broker), history=HISTORY, tuning=TUNING)
    other = OtherLoop()
    await asyncio.to_thread(other.run, hub.connect())
    async with hub.subscribe("room") as subscriber:
        await hub.publish("room", "0")
        assert await take(subscriber, 1) == ["0"]
        if filling:
            broker.dropped = 1
            await hub.publish("room", "1")
            broker.open = asyncio.Event()
            other.loop.call_soon_threadsafe(broker.keep, kept("2"))
            await until(lambda: broker.stalled)  # the one that reads
        await asyncio.to_thread(other.close)
        broker.open = asyncio.Event()
        broker.open.set()
        broker.keep(kept("last"))
        got: list[str | bytes] = []
        async with asyncio.timeout(5):
            while not got or got[-1] != "last":
                got.append((await subscriber.get()).message)
        assert got[:-1] == (["1", "2"] if filling else [])
        await hub.publish("room", "after")
        assert await take(subscriber, 1) == ["after"]
    await hub.disconnect()
    await until(lambda: not starcast_tasks())


async def test_a_channel_that_is_left_while_it_is_filled(hub, broker):
    async with hub.subscribe("room"):
        await hub.publish("room", "0")
        broker.open.clear()
        broker.dropped = 1
        for text in ("1", "2"):
            broker.keep(kept(text))
        await until(lambda: broker.stalled)
    broker.open.set()
    await until(lambda: not hub.stats().backend.channels)
    assert await hub.publish("room", "3")


async def test_a_channel_that_is_left_while_it_cannot_be_read(hub, broker, caplog):
    async with hub.subscribe("room"):
        await hub.publish("room", "0")
        broker.dropped, broker.unreadable = 1, 10**6
        for text in ("1", "2"):
            await hub.publish("room", text)
        await until(lambda: "does not return the history" in caplog.text)
    await until(lambda: not hub.stats().backend.channels)
    left = broker.unreadable
    await asyncio.sleep(4 * TUNING.subscribe_backoff)
    assert broker.unreadable >= left - 1  # it has ended


async def test_a_connection_that_breaks_while_the_past_is_read(hub, broker):
    await hub.publish("room", "0")
    broker.open.clear()
    reading = asyncio.create_task(hub.history("room"))
    await until(lambda: broker.stalled)
    broker.kill()
    with pytest.raises(BackendUnavailable):
        await reading
    broker.open.set()
    broker.up = True
    await until(lambda: hub.stats().backend.state == "connected")
    assert len((await hub.history("room")).events) == 1


async def test_a_history_that_is_lost_between_joining_and_reading(hub, broker):
    async with hub.subscribe("room"):
        for text in "01":
            old = await hub.publish("room", text)
        broker.forget()
        async with hub.subscribe("room", history=2) as subscriber:
            assert subscriber.resumed == Resumed(old)
            await hub.publish("room", "new")
            assert await take(subscriber, 1) == ["new"]


async def test_a_client_that_is_given_up_while_its_past_is_read(broker, road):
    tuning = dataclasses.replace(TUNING, close_timeout=0.05)
    async with Broadcast(backend=KeepingBus(broker), history=HISTORY, tuning=tuning) as hub:
        async with hub.subscribe("room"):
            await hub.publish("room", "0")
            peer = await joined(hub, "other")
            broker.open.clear()
            connecting = asyncio.create_task(hub.connect(peer.websocket, "room", history=1))
            await until(lambda: broker.stalled)
            await hub.close(peer.websocket)
            assert len(hub) == 0
            broker.open.set()
            await connecting
        assert peer.got == []
