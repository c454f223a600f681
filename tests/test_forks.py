"""Hubs that were open when the process was forked, with a real Redis and in memory."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from starcast import Broadcast, ConfigurationError, forks
from support import Bus, joined

pytestmark = pytest.mark.anyio

TESTS = Path(__file__).parent

# The parent's hubs are open on a loop in a thread, and have subscribers and a client there.
FORK = """
import asyncio, os, sys
from starcast import Broadcast, ConfigurationError
from support import OtherLoop, Peer, until

async def inside(hub):
    await hub.connect()
    peer = Peer()
    await hub.connect(peer.websocket, "room")
    return peer

async def refused(call):
    try:
        await call
    except ConfigurationError as exc:
        assert "opened before the process was forked" in str(exc), exc
    else:
        raise AssertionError(call)

async def enter(hub):
    async with hub.subscribe("room"):
        pass

async def in_child(hub, peer):
    assert not await hub.healthy() and not hub.stats().open
    await refused(asyncio.to_thread(hub.publish_nowait, "room", "lost"))
    await refused(hub.publish("room", "lost"))
    await refused(hub.send("lost", to=peer.websocket))
    await refused(hub.connect())
    await refused(hub.connect(Peer().websocket, "room"))
    await refused(enter(hub))
    await hub.disconnect()
    await refused(hub.connect())

async def child():
    for hub, peer in peers.items():
        await in_child(hub, peer)
    async with Broadcast(sys.argv[1]) as own:
        await own.publish("room", "child")

other = OtherLoop()
peers = {hub: other.run(inside(hub)) for hub in (Broadcast(sys.argv[1]), Broadcast())}
if child_id := os.fork():
    _, status = os.waitpid(child_id, 0)
else:
    try:
        asyncio.run(child())
    except BaseException as exc:
        os.write(2, repr(exc).encode())
        os._exit(1)
    os._exit(0)
for hub, peer in peers.items():
    other.run(hub.publish("room", "parent"))
    expected = ["child", "parent"] if hub.stats().backend else ["parent"]
    other.run(until(lambda: peer.got == expected))
    assert not (hub.stats().backend and hub.stats().backend.gaps)
    other.run(hub.disconnect())
other.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


async def test_a_child_process_is_told_that_the_hub_is_its_parents(urls):
    """And the parent's clients and its connection are as they were."""
    process = await asyncio.create_subprocess_exec(
        # Since Python 3.12 a fork beside a thread is warned of, but that is what is tested.
        *[sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning"],
        *["-c", FORK, urls("redis")],
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, errors.decode()


@pytest.mark.parametrize("make", [Broadcast, lambda: Broadcast(backend=Bus())])
async def test_what_a_child_process_is_told(make):
    """The steps of a fork without a child, whose lines nobody would count."""
    closed, hub = make(), make()
    peer = await joined(hub, "room")
    forks.after_fork()
    for call in (hub.connect(), hub.publish("room", "x"), hub.send("x", to=peer.websocket)):
        with pytest.raises(ConfigurationError, match="opened before the process was forked"):
            await call
    with pytest.raises(ConfigurationError, match="opened before the process was forked"):
        hub.publish_nowait("room", "x")
    await hub.disconnect()  # nothing of the parent's
    assert await closed.healthy() is False
    await closed.connect()  # which was not open
    await closed.disconnect()


@pytest.mark.parametrize("make", [Broadcast, lambda: Broadcast(backend=Bus())])
def test_a_hub_whose_event_loop_ended_before_the_fork(make):
    """Nothing of it is the parent's: a module may do this when it is imported."""
    hub = make()
    asyncio.run(hub.connect())
    forks.after_fork()
    asyncio.run(hub.publish("room", "x"))
    asyncio.run(hub.disconnect())
