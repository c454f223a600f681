from __future__ import annotations

import asyncio
import contextlib
import threading
from types import SimpleNamespace

import pytest

from starcast import (
    Broadcast,
    Event,
    Gap,
    InvalidChannel,
    Overflowed,
    StarcastError,
    Subscriber,
    SubscriberLagged,
    Unsubscribed,
)
from starcast.event import OVERHEAD
from starcast.history import Wish
from starcast.outbox import OVERFLOWS, Leave, Outbox
from starcast.stats import Counters
from support import DEADLINE, Broker, Bus, Peer, until

pytestmark = pytest.mark.anyio

ONE = 1 + OVERHEAD  # what a message of one character takes in a buffer


async def collect(subscriber: Subscriber) -> list[str | bytes]:
    """Return everything up to the end."""
    async with asyncio.timeout(DEADLINE):
        return [event.message async for event in subscriber]


async def collect_until_error(subscriber: Subscriber) -> list[str | bytes]:
    """Return everything up to SubscriberLagged, which must come."""
    messages = []
    try:
        async with asyncio.timeout(DEADLINE):
            async for event in subscriber:
                messages.append(event.message)
    except SubscriberLagged:
        return messages
    pytest.fail("the iteration ended without SubscriberLagged")


def nobody_left(hub: Broadcast) -> bool:
    stats = hub.stats()
    return stats.subscribers == stats.buffered == 0 and not stats.channels


async def test_a_subscriber_gets_its_channels_messages_in_order():
    hub = Broadcast()
    async with hub.subscribe(channel="room") as subscriber:
        assert subscriber.channel == "room"
        for message in ["text", b"bytes", {"a": 1}, ""]:
            await hub.publish(channel="room", message=message)
            await hub.publish(channel="other", message="not this")
        events = [await anext(subscriber) for _ in range(4)]
    assert [event.message for event in events] == ["text", b"bytes", '{"a":1}', ""]
    assert all(isinstance(event, Event) and event.channel == "room" for event in events)
    assert events[2].json() == {"a": 1}
    await hub.disconnect()


async def test_a_subscriber_of_nothing_named_is_on_the_default_channel():
    hub = Broadcast()
    async with hub.subscribe() as subscriber:
        await hub.send("hello")
        assert (await anext(subscriber)).channel == "default"
    await hub.disconnect()


async def test_a_subscriber_hears_what_is_published_from_entering_to_leaving():
    hub = Broadcast()
    subscriber = hub.subscribe("room")
    await hub.publish("room", "too early")
    async with subscriber:
        await hub.publish("room", "in time")
        assert (await anext(subscriber)).message == "in time"
    await hub.publish("room", "too late")
    assert await collect(subscriber) == []
    await hub.disconnect()


async def test_a_subscriber_waits_for_the_next_message():
    hub = Broadcast()
    async with hub.subscribe("room") as subscriber:
        task = asyncio.create_task(anext(subscriber))
        await hub.publish("other", "x")
        assert not task.done()
        await hub.publish("room", "hello")
        assert (await asyncio.wait_for(task, DEADLINE)).message == "hello"
        task = asyncio.create_task(anext(subscriber))
        await hub.publish("room", "again")
        assert (await asyncio.wait_for(task, DEADLINE)).message == "again"
    await hub.disconnect()


async def test_a_subscriber_is_its_own_iterator():
    async with Broadcast() as hub, hub.subscribe() as subscriber:
        assert aiter(subscriber) is subscriber


async def test_a_subscriber_is_counted_and_is_no_client():
    hub = Broadcast()
    async with hub.subscribe("room"), hub.subscribe("room"):
        assert hub.stats().subscribers == 2
        assert (len(hub), hub.channels) == (0, {})
    assert hub.stats().subscribers == 0
    await hub.disconnect()


async def test_a_subscriber_hears_what_clients_hear_and_excluding_a_client_excludes_no_subscriber():
    hub = Broadcast()
    peer = Peer()
    await hub.connect(peer.websocket)
    async with hub.subscribe() as subscriber:
        await hub.send("to all")
        await hub.publish("default", "not the client", exclude=peer.websocket)
        await hub.send("personal", to=peer.websocket)
        await hub.disconnect()
        assert await collect(subscriber) == ["to all", "not the client"]
    assert peer.got == ["to all", "personal"]


@pytest.mark.parametrize("channel", ["", "x" * 201, "a\nb"])
def test_a_subscriber_of_a_bad_channel_is_refused_at_once(channel):
    with pytest.raises(InvalidChannel):
        Broadcast().subscribe(channel)


# The end


async def test_iteration_ends_quietly_when_the_hub_closes_after_what_is_buffered():
    hub = Broadcast()
    async with hub.subscribe() as subscriber:
        await hub.send("1")
        await hub.send("2")
        await hub.disconnect()
        assert await collect(subscriber) == ["1", "2"]
        assert await collect(subscriber) == []
    assert nobody_left(hub)


async def test_a_subscriber_that_waits_is_woken_when_the_hub_closes():
    hub = Broadcast()
    async with hub.subscribe() as subscriber:
        task = asyncio.create_task(collect(subscriber))
        await hub.send("1")
        await hub.disconnect()
        assert await asyncio.wait_for(task, DEADLINE) == ["1"]


async def test_a_subscriber_of_a_closed_hub_stays_ended_when_the_hub_opens_again():
    hub = Broadcast()
    async with hub.subscribe() as old:
        await hub.send("1")
        await hub.disconnect()
        async with hub.subscribe() as new:
            await hub.send("2")
            assert (await anext(new)).message == "2"
        assert await collect(old) == ["1"]
    assert nobody_left(hub)
    await hub.disconnect()


async def test_iteration_ends_quietly_when_the_block_is_left():
    hub = Broadcast()
    async with hub.subscribe() as subscriber:
        task = asyncio.create_task(collect(subscriber))
        await hub.send("1")
        await until(lambda: hub.stats().delivered == 1)
    assert await asyncio.wait_for(task, DEADLINE) == ["1"]
    await hub.disconnect()


async def test_what_was_not_iterated_over_is_gone_when_the_block_is_left():
    hub = Broadcast()
    async with hub.subscribe() as subscriber:
        await hub.send("1")
        assert hub.stats().buffered == ONE
    assert await collect(subscriber) == []
    assert nobody_left(hub)
    await hub.disconnect()


async def test_what_was_on_its_way_when_the_block_is_left_does_not_reach_it():
    hub = Broadcast()
    async with hub.subscribe() as subscriber:
        hub.publish_nowait("default", "1")
    await until(lambda: hub.stats().pending == 0)
    assert await collect(subscriber) == []
    assert nobody_left(hub)
    assert hub.stats().delivered == 0
    await hub.disconnect()


async def test_an_error_in_the_block_goes_through_and_leaves_nothing():
    hub = Broadcast()
    with pytest.raises(LookupError, match="mine"):
        async with hub.subscribe():
            raise LookupError("mine")
    assert nobody_left(hub)
    await hub.disconnect()


async def test_a_subscriber_cannot_be_entered_twice():
    hub = Broadcast()
    subscriber = hub.subscribe()
    async with subscriber:
        with pytest.raises(RuntimeError, match="entered once"):
            async with subscriber:
                pass
        await hub.send("still subscribed")
        assert (await anext(subscriber)).message == "still subscribed"
    with pytest.raises(RuntimeError, match="entered once"):
        async with subscriber:
            pass
    assert nobody_left(hub)
    await hub.disconnect()


async def test_a_subscriber_cannot_be_iterated_over_before_it_is_entered():
    with pytest.raises(RuntimeError, match="inside `async with`"):
        await anext(Broadcast().subscribe())


# Too slow


async def test_a_subscriber_that_lags_gets_what_is_buffered_and_is_told():
    told: list[Overflowed] = []
    hub = Broadcast(max_buffer=2 * ONE, overflow="latest", on_overflow=told.append)
    async with hub.subscribe("room") as subscriber:
        for message in "1234":
            await hub.publish("room", message)
        assert hub.stats().subscribers == 0  # it has been unsubscribed
        assert (hub.stats().slow_clients, hub.stats().dropped) == (1, 1)
        assert await collect_until_error(subscriber) == ["1", "2"]
        assert await collect(subscriber) == []
    (overflowed,) = told
    assert overflowed.client is subscriber
    assert overflowed.overflow == "disconnect"
    assert [event.message for event in overflowed.dropped] == ["3"]
    assert nobody_left(hub)
    await hub.disconnect()


async def test_the_error_of_a_subscriber_that_lags_says_which_and_how_much():
    hub = Broadcast()
    async with hub.subscribe("room", max_buffer=ONE) as subscriber:
        await hub.publish("room", "1")
        await hub.publish("room", "2")
        await anext(subscriber)
        with pytest.raises(SubscriberLagged, match=rf"'room' fell more than {ONE} bytes behind"):
            await anext(subscriber)
    assert issubclass(SubscriberLagged, StarcastError)
    await hub.disconnect()


async def test_a_message_larger_than_the_buffer_arrives_when_nothing_is_ahead_of_it():
    hub = Broadcast()
    async with hub.subscribe(max_buffer=ONE) as subscriber:
        for overlong in ("xx", "y" * 1000):
            await hub.send(overlong)
            assert (await asyncio.wait_for(anext(subscriber), DEADLINE)).message == overlong
        task = asyncio.create_task(anext(subscriber))
        await hub.publish("other", "")
        await hub.send("zz")
        assert (await asyncio.wait_for(task, DEADLINE)).message == "zz"
        await hub.send("1")
        await hub.send("zz")
        assert await collect_until_error(subscriber) == ["1"]
    await hub.disconnect()


@pytest.mark.parametrize("overflow", OVERFLOWS)
async def test_a_message_larger_than_the_buffer_arrives_under_every_policy(overflow):
    hub = Broadcast()
    async with hub.subscribe(max_buffer=ONE, overflow=overflow) as subscriber:
        for number in range(3):
            await hub.send(f"{number}" * 1000)
            assert (await asyncio.wait_for(anext(subscriber), DEADLINE)).message == (
                f"{number}" * 1000
            )
        if overflow == "latest":
            for text in ("1" * 1000, "2" * 1000):
                await hub.send(text)
            assert (await asyncio.wait_for(anext(subscriber), DEADLINE)).message == text
        assert hub.stats().slow_clients == 0
    await hub.disconnect()


async def test_a_subscriber_that_lagged_is_told_also_when_the_hub_closes():
    hub = Broadcast()
    async with hub.subscribe(max_buffer=ONE) as subscriber:
        await hub.send("1")
        await hub.send("2")
        await hub.disconnect()
        assert await collect_until_error(subscriber) == ["1"]


async def test_after_a_lag_one_may_subscribe_again():
    hub = Broadcast()
    async with hub.subscribe(max_buffer=ONE) as lagged:
        await hub.send("1")
        await hub.send("2")
        async with hub.subscribe(max_buffer=ONE) as again:
            await hub.send("3")
            assert (await anext(again)).message == "3"
        assert await collect_until_error(lagged) == ["1"]
    assert nobody_left(hub)
    await hub.disconnect()


async def test_one_subscriber_that_lags_takes_nothing_from_another():
    hub = Broadcast()
    async with hub.subscribe(max_buffer=ONE), hub.subscribe() as other:
        for message in "123":
            await hub.send(message)
        await hub.disconnect()
        assert await collect(other) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("overflow", "got", "dropped"),
    [
        ("drop_oldest", ["3", "4"], [["1"], ["2"]]),
        ("drop_newest", ["1", "2"], [["3"], ["4"]]),
        ("latest", ["4"], [["1"], ["2"], ["3"]]),
    ],
)
async def test_a_subscriber_with_a_policy_that_drops_is_never_cut_off(overflow, got, dropped):
    told: list[Overflowed] = []
    hub = Broadcast(on_overflow=told.append)
    async with hub.subscribe(max_buffer=2 * ONE, overflow=overflow) as subscriber:
        for message in "1234":
            await hub.send(message)
            assert hub.stats().buffered <= 2 * ONE
        assert hub.stats().dropped == sum(map(len, dropped))
        assert hub.stats().slow_clients == 0
        await hub.disconnect()
        assert await collect(subscriber) == got
    assert [[event.message for event in each.dropped] for each in told] == dropped
    assert {(each.client, each.overflow) for each in told} == {(subscriber, overflow)}


# Cancellation, loops and threads


async def test_cancellation_while_waiting_leaves_nothing_in_the_hub():
    hub = Broadcast()
    tasks = asyncio.all_tasks()

    async def listen() -> None:
        async with hub.subscribe() as subscriber:
            async for _ in subscriber:
                pass

    listening = asyncio.create_task(listen())
    await until(lambda: hub.stats().subscribers == 1)
    await hub.send("1")
    listening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await listening
    assert nobody_left(hub)
    await hub.send("2")
    assert asyncio.all_tasks() == tasks
    await hub.disconnect()


async def test_a_wait_that_was_given_up_loses_no_message():
    hub = Broadcast()
    async with hub.subscribe() as subscriber:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(subscriber), 0.001)
        await hub.send("1")
        assert (await anext(subscriber)).message == "1"
        task = asyncio.create_task(anext(subscriber))
        await asyncio.sleep(0)
        hub.publish_nowait("default", "2")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await asyncio.wait_for(anext(subscriber), DEADLINE)).message == "2"
    await hub.disconnect()


async def test_cancellation_while_entering_leaves_nothing_in_the_hub():
    broker = Broker()
    broker.open.clear()
    hub = Broadcast(backend=Bus(broker))
    task = asyncio.create_task(hub.subscribe().__aenter__())
    await until(lambda: broker.stalled)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert nobody_left(hub)


async def test_a_subscriber_hears_a_publisher_in_a_thread():
    hub = Broadcast()

    def publish() -> None:
        for number in range(100):
            hub.publish_nowait("default", str(number))
        hub.publish_nowait("default", "last")

    async with hub.subscribe() as subscriber:
        thread = threading.Thread(target=publish)
        thread.start()
        got = []
        async with asyncio.timeout(DEADLINE):
            async for event in subscriber:
                got.append(event.message)
                if event.message == "last":
                    break
        thread.join(DEADLINE)
    assert got == [*map(str, range(100)), "last"]
    await hub.disconnect()


async def test_subscribers_on_two_loops_hear_each_other_and_end_together():
    hub = Broadcast()
    got: list[str | bytes] = []

    async def elsewhere() -> None:
        async with hub.subscribe() as subscriber:
            await hub.publish("other", "from elsewhere")
            got.extend(await collect(subscriber))

    async with hub.subscribe("other") as here:
        thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
        thread.start()
        assert (await asyncio.wait_for(anext(here), DEADLINE)).message == "from elsewhere"
        await hub.send("from here")
        await hub.disconnect()
        assert await collect(here) == []
        await until(lambda: not thread.is_alive())
    assert got == ["from here"]
    assert nobody_left(hub)


# Without a hub


def alone() -> tuple[Subscriber, Counters, list[Subscriber]]:
    """Return a subscriber, what it counts in, and who has left."""
    counters, left = Counters(), []

    async def join(subscriber: Subscriber) -> None:
        subscriber.shard = SimpleNamespace(counters=counters)

    wish = Wish()
    return Subscriber("room", Outbox(), join=join, leave=left.append, wish=wish), counters, left


async def test_what_is_meant_for_clients_alone_does_not_end_a_subscriber():
    subscriber, counters, left = alone()
    event = Event("room", "1", b"1")
    async with subscriber:
        subscriber.offer([Leave()])
        subscriber.offer([event])
        assert await asyncio.wait_for(anext(subscriber), DEADLINE) is event
        assert left == []
    assert left == [subscriber]
    assert counters.delivered == 1


async def test_what_arrives_before_the_block_is_entered_is_not_lost():
    subscriber, _, _ = alone()
    event = Event("room", "1", b"1")
    subscriber.offer([event])
    async with subscriber:
        assert await asyncio.wait_for(anext(subscriber), DEADLINE) is event


async def test_leaving_a_block_that_was_never_entered_is_harmless():
    hub = Broadcast()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_exit(hub.subscribe())
    assert nobody_left(hub)


async def test_encode_broadcasters_chat_ends_when_its_client_leaves():
    """The shape of encode/broadcaster's published example."""
    hub = Broadcast()
    peer = Peer()
    await peer.websocket.accept()

    async def receiver() -> None:
        async for message in peer.websocket.iter_text():
            await hub.publish(channel="chatroom", message=message)

    async def sender() -> None:
        async with hub.subscribe(channel="chatroom") as subscriber:
            async for event in subscriber:
                await peer.websocket.send_text(event.message)

    async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(sender())
        await until(lambda: hub.stats().subscribers == 1)
        peer.say("one")
        peer.say("two")
        receiving = tasks.create_task(receiver())
        await until(lambda: peer.got == ["one", "two"])
        peer.leave()
        await receiving
        sending.cancel()
    assert nobody_left(hub)
    await hub.disconnect()


async def test_two_tasks_that_iterate():
    hub = Broadcast()
    async with hub.subscribe("room") as subscriber:
        first = asyncio.create_task(anext(subscriber))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one task"):
            await anext(subscriber)
        await hub.publish("room", "x")
        assert (await first).message == "x"


# One at a time


async def test_get_returns_the_next_event():
    """What the tests of encode/broadcaster do."""
    async with Broadcast("memory://") as broadcast, broadcast.subscribe("chatroom") as subscriber:
        await broadcast.publish("chatroom", "hello")
        event = await subscriber.get()
        assert event.channel == "chatroom"
        assert event.message == "hello"
        assert event == Event("chatroom", "hello")


async def test_get_waits_and_may_be_given_up():
    hub = Broadcast()
    async with hub.subscribe("room") as subscriber:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(subscriber.get(), 0.01)
        getting = asyncio.create_task(subscriber.get())
        await asyncio.sleep(0)  # now it waits
        await hub.publish("room", "hello")
        assert (await getting).message == "hello"
    await hub.disconnect()


async def test_get_raises_unsubscribed_once_no_event_will_come():
    hub = Broadcast()
    async with hub.subscribe("room") as subscriber:
        await hub.publish("room", "last")
        await hub.disconnect()
        assert (await subscriber.get()).message == "last"
        with pytest.raises(Unsubscribed, match="the subscription to 'room' has ended"):
            await subscriber.get()
    with pytest.raises(Unsubscribed):
        await subscriber.get()


async def test_get_raises_what_iteration_raises():
    hub = Broadcast()
    subscriber = hub.subscribe("room", max_buffer=1)
    with pytest.raises(RuntimeError, match="async with"):
        await subscriber.get()
    async with subscriber:
        await hub.publish("room", "1")
        await hub.publish("room", "2")
        assert (await subscriber.get()).message == "1"
        with pytest.raises(SubscriberLagged):
            await subscriber.get()
    await hub.disconnect()


async def test_get_returns_gaps_to_who_wants_them():
    broker = Broker()
    hub = Broadcast(backend=Bus(broker))
    async with hub, hub.subscribe("room", gaps=True) as subscriber:
        broker.kill()
        broker.up = True
        async with asyncio.timeout(DEADLINE):
            assert isinstance(await subscriber.get(), Gap)
