"""Messages that nobody awaits: while the broker is away, refuses them, or accepts no more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from broker.conftest import make_hub, quick, tuned
from starcast import BackendUnavailable, Broadcast, PublishQueueFull, logs
from starcast.backends.base import MessagesRefused
from starcast.broker.sender import Ack
from starcast.logs import LogLimit
from support import Broker, Bus, OtherLoop, Peer, joined, until, until_sync

pytestmark = pytest.mark.anyio

LOST = "the connection to the broker was lost"
EXPIRED = "the broker was away for too long"


async def away(hub: Broadcast, broker: Broker) -> None:
    broker.kill()
    await until(lambda: hub.stats().backend.state == "reconnecting")


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "did not reach the broker" in text]


@tuned(publish_timeout=10)
async def test_messages_wait_for_a_broker_that_returns_in_time(hub, broker):
    peer = await joined(hub, "room")
    await away(hub, broker)
    hub.publish_nowait("room", "0")
    awaited = asyncio.create_task(hub.publish("room", "1"))
    await until(lambda: hub.stats().backend.queued == 2)
    hub.publish_nowait("room", "2")
    thread = threading.Thread(target=hub.publish_nowait, args=("room", "3"))
    thread.start()
    await asyncio.to_thread(thread.join)
    broker.up = True
    await awaited
    await until(lambda: peer.got == ["0", "1", "2", "3"])
    assert hub.stats().backend.lost == 0


@tuned(publish_timeout=10)
async def test_messages_of_clients_are_not_lost_in_a_short_outage(hub, broker):
    peer = Peer()
    serving = asyncio.create_task(hub.serve(peer.websocket, "room"))
    await until(lambda: len(hub) == 1)
    await away(hub, broker)
    for number in range(300):
        peer.say(str(number))
    await until(lambda: hub.stats().backend.queued == 256)  # one of them is waited for
    broker.up = True
    await until(lambda: len(peer.got) == 300)
    assert peer.got == [str(number) for number in range(300)]
    assert hub.stats().backend.lost == 0
    peer.leave()
    await serving


async def test_messages_expire(hub, broker, caplog):
    """Each by itself, whatever else is waiting."""
    peer = await joined(hub, "room")
    await away(hub, broker)
    awaited = asyncio.create_task(hub.publish("room", "awaited"))
    await until(lambda: hub.stats().backend.queued)
    hub.publish_nowait("room", "1")
    hub.publish_nowait("room", "2")
    await until(lambda: hub.stats().backend.lost == 2)
    assert said(caplog) == [f"messages did not reach the broker: {EXPIRED}"]
    await asyncio.gather(awaited, return_exceptions=True)
    hub.publish_nowait("room", "3")
    broker.up = True
    await until(lambda: peer.got == ["3"])
    assert hub.stats().backend.lost == 2


@tuned(publish_timeout=2)
async def test_messages_expire_one_after_the_other(hub, broker):
    await hub.connect()
    await away(hub, broker)
    hub.publish_nowait("room", "1")
    await asyncio.sleep(1.5)  # a busy machine may not look for so long
    hub.publish_nowait("room", "2")
    await until(lambda: hub.stats().backend.lost)
    assert hub.stats().backend.lost == hub.stats().backend.queued == 1
    await hub.disconnect()
    assert hub.stats().backend.lost == 2


async def test_an_unconfirmed_message_is_lost_with_the_connection(hub, broker):
    await hub.connect()
    broker.open.clear()
    hub.publish_nowait("room", "1")
    await until(lambda: broker.stalled)
    broker.kill()
    broker.open.set()
    await until(lambda: hub.stats().backend.lost)
    assert hub.stats().backend.lost == 1


async def test_a_message_that_nobody_awaits_any_more_is_not_sent(hub, broker):
    peer = await joined(hub, "room")
    broker.open.clear()
    hub.publish_nowait("room", "under way")
    await until(lambda: broker.stalled)
    with pytest.raises(BackendUnavailable):
        await hub.publish("room", "given up")
    broker.open.set()
    await hub.publish("room", "last")
    await until(lambda: peer.got == ["under way", "last"])


async def test_a_refused_message(hub, broker, caplog):
    await hub.connect()
    broker.refused.add("secret")
    for number in range(1, 4):
        hub.publish_nowait("secret", "x")
        await until(lambda: hub.stats().backend.lost == number)  # noqa: B023  # awaited here
    assert hub.stats().backend.error == "nobody may have secret"
    assert said(caplog) == ["messages did not reach the broker: nobody may have secret"]


async def test_some_messages_of_a_batch_are_refused(hub, broker, bus):
    peer = await joined(hub, "room")

    async def refuse_one(connection, messages, proceed):
        await proceed()
        raise MessagesRefused(
            "no", {number: "no" for number, it in enumerate(messages) if not it[1]}
        )

    bus.on_publish = refuse_one
    published = [hub.publish("room", text) for text in ("a", "", "b")]
    outcomes = await asyncio.gather(*published, return_exceptions=True)
    assert [type(it) for it in outcomes] == [type(None), BackendUnavailable, type(None)]
    await until(lambda: peer.got == ["a", "", "b"])


async def test_a_publish_that_somebody_cancels(hub, broker, bus):
    await hub.connect()
    sending = []

    def publish(connection, messages, proceed):
        sending.append(asyncio.get_running_loop().create_future())
        return sending[0]

    bus.on_publish = publish
    publishing = asyncio.create_task(hub.publish("room", "x"))
    await until(lambda: sending)
    sending[0].cancel()
    with pytest.raises(BackendUnavailable, match=LOST):
        await publishing


async def test_the_first_outcome_counts():
    ack = Ack(0.0)
    ack.set()
    ack.fail("too late")
    await ack.wait()


@tuned(max_queued=100)
async def test_a_full_queue(hub, broker, caplog):
    await hub.connect()
    await away(hub, broker)
    hub.publish_nowait("room", "x" * 200)
    for _ in range(3):
        with pytest.raises(PublishQueueFull):
            hub.publish_nowait("room", "x")
    assert "1 messages wait" in hub.stats().backend.error
    assert len(said(caplog)) == 1


async def test_a_message_that_has_become_too_large(hub, broker, bus):
    """After an outage the broker accepts less than before."""
    peer = await joined(hub, "room")
    bus.max_payload = 10
    await away(hub, broker)
    hub.publish_nowait("room", "x" * 11)
    broker.up = True
    await until(lambda: hub.stats().backend.lost == 1)
    assert hub.stats().backend.error == "the broker now takes 10 bytes at most"
    await hub.publish("room", "x" * 10)
    await until(lambda: peer.got == ["x" * 10])


async def test_messages_that_waited_on_a_loop_that_has_ended_expire(broker):
    hub = make_hub(Bus(broker), tuning=quick(publish_timeout=0.3))
    first = OtherLoop()
    await asyncio.to_thread(first.run, hub.connect())
    first.loop.call_soon_threadsafe(broker.kill)
    await until(lambda: hub.stats().backend.state == "reconnecting")
    hub.publish_nowait("room", "x")
    await asyncio.to_thread(first.close)
    assert hub.stats().backend.queued == 1
    await asyncio.sleep(0.4)
    broker.up = True
    await hub.connect()
    assert hub.stats().backend.queued == 0
    assert hub.stats().backend.lost == 1
    assert not broker.asked("publish")
    await hub.disconnect()


async def test_a_message_is_lost_at_once_without_a_loop(broker):
    hub = make_hub(Bus(broker))
    first = OtherLoop()
    await asyncio.to_thread(first.run, hub.connect())
    await asyncio.to_thread(first.close)
    hub.publish_nowait("room", "x")
    assert hub.stats().backend.lost == 1
    assert hub.stats().backend.error == LOST
    await hub.disconnect()


# The log


def test_a_line_a_kind():
    limit = LogLimit()
    assert limit.allows('no permission for "a" after 3 seconds')
    assert not limit.allows('no permission for "b" after 4 seconds')
    assert limit.allows("out of memory")


def test_a_line_an_interval():
    limit = LogLimit(seconds=0.01)
    assert limit.allows("out of memory")
    until_sync(lambda: limit.allows("out of memory"))


def test_kinds_have_a_bound():
    limit = LogLimit()
    kinds = [chr(ord("a") + number) for number in range(26)]
    assert sum(map(limit.allows, kinds)) == logs.KINDS
