"""A hub that is being opened: attempts, who shares them, and what ends them."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time

import pytest

from starcast import BackendUnavailable, Broadcast, ConfigurationError
from starcast.backends.base import LoginRefused
from starcast.broker import opening, probe
from support import Bus, Peer, joined, starcast_tasks, until

pytestmark = pytest.mark.anyio


def attempts(caplog):
    return [text for text in caplog.messages if "trying again" in text]


class Deaf(Bus):
    """Takes what is published, and delivers nothing of it from its `deaf_from`th start on."""

    if_silent = "look behind the sofa"
    deaf_from = 1

    async def publish(self, messages):
        if self.starts < self.deaf_from:
            await super().publish(messages)


async def test_it_tries_until_the_broker_is_there(broker, caplog):
    broker.up = False
    bus = Bus(broker)
    hub = Broadcast(backend=bus, open_timeout=20)
    opening = asyncio.create_task(hub.connect())
    await until(lambda: bus.starts >= 5)
    assert "is down" in hub.stats().backend.error
    assert hub.stats().backend.state == "closed"
    broker.up = True
    await opening
    assert len(attempts(caplog)) == bus.starts - 1
    assert all("is down" in text for text in attempts(caplog))
    await hub.disconnect()


async def test_a_timeout_of_zero_tries_once(broker, caplog):
    broker.up = False
    bus = Bus(broker)
    with pytest.raises(BackendUnavailable, match="is down"):
        await Broadcast(backend=bus, open_timeout=0).connect()
    assert bus.starts == 1
    assert not attempts(caplog)


async def test_clients_that_come_meanwhile_share_the_attempts(broker):
    broker.up = False
    bus = Bus(broker)
    hub = Broadcast(backend=bus, open_timeout=0.3)
    began = time.monotonic()
    outcomes = await asyncio.gather(
        *(hub.connect(Peer().websocket, "room") for _ in range(20)),
        hub.publish("room", "x"),
        return_exceptions=True,
    )
    assert {type(outcome) for outcome in outcomes} == {BackendUnavailable}
    assert time.monotonic() - began < 5
    starts = bus.starts
    with pytest.raises(BackendUnavailable):
        await hub.connect(Peer().websocket, "room")  # who comes later does not wait so long again
    assert bus.starts == starts + 1
    for _ in range(5):  # for on a busy machine one attempt may take all of the time
        starts = bus.starts
        with pytest.raises(BackendUnavailable):
            await hub.connect()  # but who opens it does
        if bus.starts > starts + 1:
            break
    else:
        pytest.fail("who opens it makes one attempt only")


async def test_a_login_that_is_refused_is_final(broker):
    class Strict(Bus):
        async def start(self, deliver, lost):
            self.starts += 1
            raise LoginRefused("wrong password")

    bus = Strict(broker)
    with pytest.raises(BackendUnavailable, match="wrong password"):
        await Broadcast(backend=bus).connect()
    assert bus.starts == 1


async def test_a_mistake_of_a_backend_is_not_tried_again(broker):
    class Wrong(Bus):
        async def start(self, deliver, lost):
            self.starts += 1
            raise LookupError("a mistake")

    bus = Wrong(broker)
    with pytest.raises(LookupError):
        await Broadcast(backend=bus).connect()
    assert bus.starts == 1


async def test_closing_ends_the_attempts(broker):
    broker.up = False
    bus = Bus(broker)
    hub = Broadcast(backend=bus, open_timeout=60)
    opening = asyncio.create_task(hub.connect())
    await until(lambda: bus.starts > 1)
    await hub.disconnect()
    with pytest.raises(BackendUnavailable, match="closed"):
        await opening


async def test_closing_during_an_attempt_that_succeeds(hub, broker, other):
    """From another loop, which comes to it late."""
    broker.open.clear()
    opening = asyncio.create_task(hub.connect())
    await until(lambda: broker.stalled)
    closing = asyncio.run_coroutine_threadsafe(hub.disconnect(), other.loop)
    waiting = hub._hub.lifecycle.switching._waiting
    await until(lambda: waiting)
    go = threading.Event()
    other.loop.call_soon_threadsafe(go.wait, 20)
    broker.open.set()
    await opening
    for _ in range(5):
        await asyncio.sleep(0)
    await hub.connect()
    assert hub._hub.link._backend.starts == 1
    go.set()
    await asyncio.wrap_future(closing)
    await until(lambda: not starcast_tasks())
    assert not broker.buses


async def test_a_broker_that_delivers_nothing(broker, monkeypatch):
    monkeypatch.setattr(probe, "PROBE_TIMEOUT", 0.1)
    hub = Broadcast(backend=Deaf(broker), open_timeout=0)
    with pytest.raises(BackendUnavailable, match="delivers nothing of it; look behind the sofa"):
        await hub.connect()
    assert not broker.buses


async def test_a_broker_that_delivers_nothing_and_a_backend_without_a_hint(broker, monkeypatch):
    monkeypatch.setattr(probe, "PROBE_TIMEOUT", 0.1)
    monkeypatch.setattr(Deaf, "if_silent", "")
    with pytest.raises(BackendUnavailable, match=r"delivers nothing of it$"):
        await Broadcast(backend=Deaf(broker), open_timeout=0).connect()


async def test_a_broker_that_delivers_nothing_after_an_outage(broker, monkeypatch):
    monkeypatch.setattr(probe, "PROBE_TIMEOUT", 0.1)
    bus = Deaf(broker)
    bus.deaf_from = 2
    hub = Broadcast(backend=bus)
    peer = await joined(hub, "room")
    broker.kill()
    broker.up = True
    await until(lambda: "delivers nothing" in hub.stats().backend.error)
    assert hub.stats().backend.state == "reconnecting"
    bus.deaf_from = 1000
    await until(lambda: hub.stats().backend.gaps)
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])
    await hub.disconnect()


async def test_a_broker_that_does_not_take_the_first_message(broker, monkeypatch):
    class Stuck(Bus):
        async def publish(self, messages):
            await asyncio.Event().wait()

    monkeypatch.setattr(probe, "PROBE_TIMEOUT", 0.1)
    with pytest.raises(BackendUnavailable, match="did not answer"):
        await Broadcast(backend=Stuck(broker), open_timeout=0).connect()


async def test_a_connection_that_breaks_before_its_first_message_is_back(broker):
    class Fragile(Bus):
        async def publish(self, messages):
            self.broker.kill()

    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match="was lost"):
        await Broadcast(backend=Fragile(broker), open_timeout=0).connect()
    assert time.monotonic() - began < probe.PROBE_TIMEOUT


@pytest.mark.parametrize("call", ["subscribe", "publish"])
async def test_the_hubs_own_channel_is_refused(broker, call):
    class Refusing(Bus):
        def allowed(self, channel):
            if self.broker.calls[-1][0] == call:
                raise PermissionError("nobody may")

    with pytest.raises(BackendUnavailable, match=f"{call} to its own channel.*: nobody may"):
        await Broadcast(backend=Refusing(broker), open_timeout=0).connect()


async def test_a_probe_that_is_refused_is_no_silence(broker, caplog):
    bus = Bus(broker)
    hub = Broadcast(backend=bus, probe_interval=0.02)
    await joined(hub, "room")
    own = hub._hub.link.probe.channel
    broker.refused.add(own)
    await until(lambda: hub.stats().backend.state == "reconnecting")
    assert f"nobody may have {own}" in hub.stats().backend.error
    assert not await hub.healthy()
    broker.refused.clear()
    await until(lambda: hub.stats().backend.gaps)
    assert "did not answer" not in caplog.text
    await hub.disconnect()


async def test_a_health_check_that_the_broker_refuses(hub, broker):
    await hub.connect()
    broker.refused.add(hub._hub.link.probe.channel)
    assert not await hub.healthy()


def probes(broker):
    return sum(
        name == "publish" and what[0][0].startswith("starcast-probe") for name, what in broker.calls
    )


async def test_many_health_checks_are_one_message(hub, broker):
    await hub.connect()
    asked = probes(broker)
    assert all(await asyncio.gather(*(hub.healthy() for _ in range(50))))
    assert probes(broker) == asked + 1


async def test_no_probes_while_nobody_is_there(broker):
    hub = Broadcast(backend=Bus(broker), probe_interval=0.01)
    await hub.connect()
    asked = probes(broker)
    assert asked == 1
    await asyncio.sleep(0.1)
    assert probes(broker) == asked
    await hub.publish("room", "x")
    await until(lambda: probes(broker) == asked + 1)
    peer = await joined(hub, "room")
    await until(lambda: probes(broker) > asked + 5)
    await hub.disconnect(peer.websocket)
    await until(lambda: hub.stats().backend.channels == 0)
    await asyncio.sleep(0.05)
    asked = probes(broker)
    await asyncio.sleep(0.1)
    assert probes(broker) == asked
    # What was lost while nobody was there is nobody's loss.
    gaps = []
    hub._hub.settings = dataclasses.replace(hub._hub.settings, on_gap=gaps.append)
    broker.kill()
    broker.up = True
    await until(lambda: gaps)
    assert gaps[0].seconds < 0.1
    await hub.disconnect()


@pytest.mark.parametrize("open_timeout", [-1, "10", None, float("nan")])
def test_an_open_timeout_that_makes_no_sense(open_timeout):
    with pytest.raises(ConfigurationError, match="open_timeout"):
        Broadcast(open_timeout=open_timeout)


@pytest.mark.parametrize("probe_interval", [0, -1, "3", None, float("inf"), float("nan")])
def test_a_probe_interval_that_makes_no_sense(probe_interval):
    with pytest.raises(ConfigurationError, match="probe_interval"):
        Broadcast(probe_interval=probe_interval)


def test_the_defaults_notice_a_frozen_broker_within_ten_seconds():
    assert opening.PROBE_INTERVAL + probe.PROBE_TIMEOUT + 1 < 10
