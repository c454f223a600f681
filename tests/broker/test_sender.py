"""Messages that nobody awaits: while the broker is away, refuses them, or takes no more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from starcast import BackendUnavailable, Broadcast, PublishQueueFull, loglimit
from starcast.broker import sender
from starcast.event import Event
from starcast.loglimit import LogLimit
from support import Broker, Bus, Peer, joined, until

pytestmark = pytest.mark.anyio


def event(text: str, channel: str = "room") -> Event:
    return Event(channel, text, text.encode())


async def away(hub: Broadcast, broker: Broker) -> None:
    broker.kill()
    await until(lambda: hub.stats().backend.state == "reconnecting")


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "did not reach the broker" in text]


async def test_they_wait_for_a_broker_that_is_back_in_time(hub, broker, monkeypatch):
    monkeypatch.setattr(sender, "TIMEOUT", 10)
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


async def test_what_a_client_says_during_a_short_outage_is_not_lost(hub, broker, monkeypatch):
    monkeypatch.setattr(sender, "TIMEOUT", 10)
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


async def test_after_two_seconds_they_are_lost(hub, broker, caplog):
    """Each by itself, whoever else waits, and with a word to who wants to know."""
    peer = await joined(hub, "room")
    await away(hub, broker)
    lost: list[str] = []
    awaited = asyncio.create_task(hub.publish("room", "awaited"))
    await until(lambda: hub.stats().backend.queued)
    hub._hub.link.publish(event("1"), wait=False, on_lost=lost.append)
    hub._hub.link.publish(event("2"), wait=False)
    await until(lambda: hub.stats().backend.lost == 2)
    assert lost == [sender.EXPIRED]
    assert said(caplog) == [f"messages did not reach the broker: {sender.EXPIRED}"]
    await asyncio.gather(awaited, return_exceptions=True)
    hub._hub.link.publish(event("3"), wait=False, on_lost=lost.append)
    broker.up = True
    await until(lambda: peer.got == ["3"])
    assert lost == [sender.EXPIRED]


async def test_one_after_the_other(hub, broker, monkeypatch):
    await hub.connect()
    await away(hub, broker)
    lost: list[str] = []
    hub._hub.link.publish(event("1"), wait=False, on_lost=lambda why: lost.append("1"))
    monkeypatch.setattr(sender, "TIMEOUT", 60)
    hub._hub.link.publish(event("2"), wait=False, on_lost=lambda why: lost.append("2"))
    await until(lambda: lost)
    assert lost == ["1"]
    assert hub.stats().backend.queued == 1
    await hub.disconnect()
    assert lost == ["1", "2"]


async def test_a_message_that_was_under_way_is_lost(hub, broker):
    await hub.connect()
    broker.open.clear()
    lost: list[str] = []
    hub._hub.link.publish(event("1"), wait=False, on_lost=lost.append)
    await until(lambda: broker.stalled)
    broker.kill()
    broker.open.set()
    await until(lambda: lost)
    assert lost == [sender.LOST]


async def test_an_answer_that_comes_with_the_last_turn_counts():
    taken = sender.Taken()
    taken.set()
    taken._give_up()
    await taken.wait()


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


async def test_a_message_that_is_refused(hub, broker, caplog):
    await hub.connect()
    broker.refused.add("secret")
    lost: list[str] = []
    for _ in range(3):
        hub._hub.link.publish(event("x", "secret"), wait=False, on_lost=lost.append)
        await until(lambda: not hub.stats().backend.queued and not hub._hub.link._sender._sending)
    assert lost == ["nobody may have secret"] * 3
    assert hub.stats().backend.error == "nobody may have secret"
    assert said(caplog) == ["messages did not reach the broker: nobody may have secret"]


async def test_a_queue_that_is_full(hub, broker, caplog):
    hub._hub.link._sender.queue.bound = 100
    await hub.connect()
    await away(hub, broker)
    hub.publish_nowait("room", "x" * 200)
    for _ in range(3):
        with pytest.raises(PublishQueueFull):
            hub.publish_nowait("room", "x")
    assert "1 messages wait" in hub.stats().backend.error
    assert len(said(caplog)) == 1


async def test_without_a_loop_a_message_is_lost_at_once():
    lost: list[str] = []
    box = sender.Sender(Bus(), threading.RLock())
    assert box.put("room", b"x", False, lost.append) is None
    assert lost == [sender.LOST]
    assert box.lost == 1


async def test_what_waited_on_a_loop_that_ended_is_not_sent_later(broker, other, monkeypatch):
    monkeypatch.setattr(sender, "TIMEOUT", 0.05)
    box = sender.Sender(Bus(broker), threading.RLock())

    async def put() -> None:
        box.live_here()
        box.put("room", b"x", False)

    await asyncio.to_thread(other.run, put())
    await asyncio.to_thread(other.close)
    await asyncio.sleep(0.1)
    assert len(box.queue) == 1
    box.give_up()  # by whoever closes what is left
    assert len(box.queue) == 0
    assert box.lost == 1


# The log


def test_a_line_a_kind(monkeypatch):
    limit = LogLimit()
    assert limit.allows('no permission for "a" after 3 seconds')
    assert not limit.allows('no permission for "b" after 4 seconds')
    assert limit.allows("out of memory")
    monkeypatch.setattr(loglimit, "SECONDS", 0)
    assert limit.allows("out of memory")


def test_kinds_have_a_bound():
    limit = LogLimit()
    kinds = [chr(ord("a") + number) for number in range(26)]
    assert sum(map(limit.allows, kinds)) == loglimit.KINDS
