"""A hub that is being opened: attempts, who shares them, and what ends them."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from broker.conftest import make_hub, quick
from starcast import BackendUnavailable, Broadcast, ConfigurationError, Tuning
from starcast.backends.base import LoginRefused
from starcast.broker.opening import PROBE_INTERVAL
from support import Bus, Peer, joined, starcast_tasks, until

pytestmark = pytest.mark.anyio


def attempts(caplog):
    return [text for text in caplog.messages if "trying again" in text]


async def swallow(connection, messages, proceed):
    """Accept messages and deliver none of them."""


async def test_it_tries_until_the_broker_is_there(broker, caplog):
    broker.up = False
    bus = Bus(broker)
    hub = make_hub(bus, open_timeout=20)
    opening = asyncio.create_task(hub.connect())
    await until(lambda: bus.connects >= 5)
    assert "is down" in hub.stats().backend.error
    assert hub.stats().backend.state == "closed"
    broker.up = True
    await opening
    assert len(attempts(caplog)) == bus.connects - 1
    assert all("is down" in text for text in attempts(caplog))
    await hub.disconnect()


async def test_a_timeout_of_zero_tries_once(broker, caplog):
    broker.up = False
    bus = Bus(broker)
    with pytest.raises(BackendUnavailable, match="is down"):
        await make_hub(bus, open_timeout=0).connect()
    assert bus.connects == 1
    assert not attempts(caplog)


async def test_clients_that_come_meanwhile_share_the_attempts(broker):
    broker.up = False
    bus = Bus(broker)
    hub = make_hub(bus, open_timeout=0.3)
    began = time.monotonic()
    outcomes = await asyncio.gather(
        *(hub.connect(Peer().websocket, "room") for _ in range(20)),
        hub.publish("room", "x"),
        return_exceptions=True,
    )
    assert {type(outcome) for outcome in outcomes} == {BackendUnavailable}
    assert time.monotonic() - began < 5
    starts = bus.connects
    with pytest.raises(BackendUnavailable):
        await hub.connect(Peer().websocket, "room")  # who comes later does not wait so long again
    assert bus.connects == starts + 1
    for _ in range(5):  # for on a busy machine one attempt may take all of the time
        starts = bus.connects
        with pytest.raises(BackendUnavailable):
            await hub.connect()  # but who opens it does
        if bus.connects > starts + 1:
            break
    else:
        pytest.fail("who opens it makes one attempt only")


async def test_a_login_that_is_refused_is_final(broker):
    async def refuse(bus, proceed):
        raise LoginRefused("wrong password")

    bus = Bus(broker, on_connect=refuse)
    with pytest.raises(BackendUnavailable, match="wrong password"):
        await make_hub(bus).connect()
    assert bus.connects == 1


async def test_a_mistake_of_a_backend_is_not_tried_again(broker):
    async def wrong(bus, proceed):
        raise LookupError("a mistake")

    bus = Bus(broker, on_connect=wrong)
    with pytest.raises(LookupError):
        await make_hub(bus).connect()
    assert bus.connects == 1


async def test_closing_ends_the_attempts(broker):
    broker.up = False
    bus = Bus(broker)
    hub = make_hub(bus, open_timeout=60)
    opening = asyncio.create_task(hub.connect())
    await until(lambda: bus.connects > 1)
    await hub.disconnect()
    with pytest.raises(BackendUnavailable, match="closed"):
        await opening


async def test_closing_during_an_attempt_that_succeeds(hub, broker, bus, other):
    """From another loop, which gets there late."""
    broker.open.clear()
    opening = asyncio.create_task(hub.connect())
    await until(lambda: broker.stalled)
    closing = asyncio.run_coroutine_threadsafe(hub.disconnect(), other.loop)
    waiting, go = threading.Event(), threading.Event()
    other.loop.call_soon_threadsafe(lambda: (waiting.set(), go.wait(20)))
    await asyncio.to_thread(waiting.wait, 20)
    broker.open.set()
    await opening
    for _ in range(5):
        await asyncio.sleep(0)
    await hub.connect()
    assert bus.connects == 1
    go.set()
    await asyncio.wrap_future(closing)
    await until(lambda: not starcast_tasks())
    assert not broker.connections


async def test_a_broker_that_delivers_nothing(broker):
    bus = Bus(broker, on_publish=swallow)
    bus.if_silent = "look behind the sofa"
    hub = make_hub(bus, open_timeout=0, tuning=quick(probe_timeout=0.1))
    with pytest.raises(BackendUnavailable, match="delivers nothing of it; look behind the sofa"):
        await hub.connect()
    assert not broker.connections


async def test_a_broker_that_delivers_nothing_and_a_backend_without_a_hint(broker):
    bus = Bus(broker, on_publish=swallow)
    with pytest.raises(BackendUnavailable, match=r"delivers nothing of it$"):
        await make_hub(bus, open_timeout=0, tuning=quick(probe_timeout=0.1)).connect()


async def test_a_broker_that_delivers_nothing_after_an_outage(broker):
    bus = Bus(broker)
    hub = make_hub(bus, tuning=quick(probe_timeout=0.1))
    peer = await joined(hub, "room")
    bus.on_publish = swallow
    broker.restart()
    await until(lambda: "delivers nothing" in hub.stats().backend.error)
    assert hub.stats().backend.state == "reconnecting"
    bus.on_publish = None
    await until(lambda: hub.stats().backend.gaps)
    await hub.publish("room", "hello")
    await until(lambda: peer.got == ["hello"])
    await hub.disconnect()


async def test_a_broker_that_does_not_accept_the_first_message(broker):
    async def stuck(connection, messages, proceed):
        await asyncio.Event().wait()

    hub = make_hub(Bus(broker, on_publish=stuck), open_timeout=0, tuning=quick(probe_timeout=0.1))
    with pytest.raises(BackendUnavailable, match="did not answer"):
        await hub.connect()


async def test_a_connection_that_breaks_before_its_first_message_is_back(broker):
    async def fragile(connection, messages, proceed):
        broker.kill()

    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match="was lost"):
        await make_hub(Bus(broker, on_publish=fragile), open_timeout=0).connect()
    assert time.monotonic() - began < Tuning().probe_timeout


@pytest.mark.parametrize("call", ["subscribe", "publish"])
async def test_the_hubs_own_channel_is_refused(broker, call):
    async def refuse(connection, what, proceed):
        raise PermissionError("nobody may")

    bus = Bus(broker, **{f"on_{call}": refuse})
    with pytest.raises(BackendUnavailable, match=f"{call} to its own channel.*: nobody may"):
        await make_hub(bus, open_timeout=0).connect()


async def test_a_probe_that_is_refused_is_no_silence(broker, caplog):
    bus = Bus(broker)
    hub = make_hub(bus, probe_interval=0.02)
    await joined(hub, "room")
    own = broker.probe_channel
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
    broker.refused.add(broker.probe_channel)
    assert not await hub.healthy()


async def test_many_health_checks_are_one_message(hub, broker):
    await hub.connect()
    asked = broker.probes
    assert all(await asyncio.gather(*(hub.healthy() for _ in range(50))))
    assert broker.probes == asked + 1


async def test_no_probes_while_nobody_is_there(broker):
    gaps = []
    hub = make_hub(Bus(broker), probe_interval=0.01, on_gap=gaps.append)
    await hub.connect()
    asked = broker.probes
    assert asked == 1
    await asyncio.sleep(1)
    assert broker.probes == asked
    await hub.publish("room", "x")
    await until(lambda: broker.probes == asked + 1)
    peer = await joined(hub, "room")
    await until(lambda: broker.probes > asked + 5)
    await hub.disconnect(peer.websocket)
    await until(lambda: hub.stats().backend.channels == 0)
    await asyncio.sleep(0.05)
    asked = broker.probes
    await asyncio.sleep(1)
    assert broker.probes == asked
    # What was lost while nobody was there is nobody's loss.
    broker.restart()
    await until(lambda: gaps)
    assert gaps[0].seconds < 0.9
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
    assert PROBE_INTERVAL + Tuning().probe_timeout + 1 < 10
