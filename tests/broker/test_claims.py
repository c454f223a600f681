"""Two hubs of one process that would share a broker's channels by accident do not open."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from starcast import BackendUnavailable, Broadcast, ConfigurationError
from starcast.broker import claims
from support import Broker, Bus, OtherLoop, joined, until

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def no_names() -> None:
    """Leave the hubs' names alone: they are what these tests are about."""


class Placed(Bus):
    """A backend that says where it is."""

    address = "the bus in this process"


def hub(name: str | None = None, broker: Broker | None = None) -> Broadcast:
    return Broadcast(backend=Placed(broker), name=name, open_timeout=0)


async def refused(second: Broadcast) -> str:
    with pytest.raises(ConfigurationError) as raised:
        await second.connect()
    assert not second.stats().open
    return str(raised.value)


@pytest.mark.parametrize(
    "names", [(None, None), (None, "default"), ("default", None)], ids=lambda names: str(names)
)
async def test_the_second_one_does_not_open_if_nobody_chose_to_share(names):
    first, second = map(hub, names)
    async with first:
        said = await refused(second)
        assert "'default'" in said
        assert Placed.address in said
        assert 'Broadcast(url, name="staff")' in said
        await first.publish("room", "x")  # as good as before
    async with second:  # there is no other now
        await refused(first)


@pytest.mark.parametrize("names", [("a", "a"), ("default", "default"), ("a", "b"), (None, "a")])
async def test_names_that_were_chosen(names):
    first, second = map(hub, names)
    async with first, second:
        assert first.stats().open
        assert second.stats().open


async def test_three_of_which_one_was_given_no_name():
    async with hub("default"), hub("default"):
        await refused(hub())


async def test_another_place_is_another_room():
    class Elsewhere(Bus):
        address = "another bus"

    async with hub(), Broadcast(backend=Elsewhere()) as second:
        assert second.stats().open


async def test_a_backend_that_does_not_say_where_it_is_takes_no_part():
    async with Broadcast(backend=Bus()), Broadcast(backend=Bus()), hub() as third:
        assert third.stats().open


async def test_memory_is_apart_already():
    async with Broadcast(), Broadcast() as second:
        assert second.stats().open


async def test_one_hub_opens_as_often_as_it_likes(other: OtherLoop):
    broker = Broker()
    first = hub(None, broker)
    for _ in range(2):
        await asyncio.gather(first.connect(), first.connect())
        await first.connect()
        await first.disconnect()
    await asyncio.to_thread(other.run, first.connect())
    peer = await joined(first, "room")
    other.close()  # the connection moves here
    await until(lambda: first.stats().backend.state == "connected")
    await first.publish("room", "x")
    await until(lambda: peer.got == ["x"])
    await refused(hub())
    await first.disconnect()


async def test_a_hub_that_did_not_open_is_in_nobodys_way():
    broker = Broker()
    broker.up = False
    first = hub(None, broker)
    with pytest.raises(BackendUnavailable):
        await first.connect()
    broker.open.clear()
    opening = asyncio.create_task(first.connect())
    await until(lambda: broker.stalled)
    await refused(hub())  # while it opens
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    broker.open.set()
    async with hub() as second:
        assert second.stats().open


async def test_an_open_hub_that_fails_to_open_again_is_still_open():
    """It does if it opens anew on an event loop that is about to end."""
    claim = claims.Claim(Placed.address, "default", chosen=False)
    with claim.held(), pytest.raises(ZeroDivisionError), claim.held():
        raise ZeroDivisionError
    await refused(hub())
    claim.release()
    claim.release()
    async with hub() as second:
        assert second.stats().open


def test_a_hub_that_nobody_has_any_more_is_in_nobodys_way():
    async def forget() -> weakref.ref[Broadcast]:
        first = hub()
        await first.connect()
        return weakref.ref(first)

    gc.disable()
    try:
        gone = asyncio.run(forget())
        assert gone() is not None  # it is in a reference cycle
        asyncio.run(hub().connect())
        assert gone() is None
    finally:
        gc.enable()
        gc.collect()


def test_two_threads_that_open_at_the_same_time():
    barrier = threading.Barrier(8)
    opened: list[Broadcast] = []
    errors: list[Exception] = []
    end = threading.Event()

    async def open_one() -> None:
        one = hub()
        barrier.wait()
        try:
            async with one:
                opened.append(one)
                await asyncio.to_thread(end.wait)
        except ConfigurationError as exc:
            errors.append(exc)

    threads = [threading.Thread(target=asyncio.run, args=[open_one()]) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(opened) + len(errors) < 8:
        assert any(thread.is_alive() for thread in threads)
    end.set()
    for thread in threads:
        thread.join()
    assert (len(opened), len(errors)) == (1, 7)


FORK = """
import asyncio, os, sys
from starcast import Broadcast
from starcast.broker import claims
from support import Bus, OtherLoop

class Placed(Bus):
    address = "somewhere"

async def open_another():
    async with Broadcast(backend=Placed()) as hub:
        assert hub.stats().open

other = OtherLoop()
first = Broadcast(backend=Placed())
other.run(first.connect())
# As if another thread was about to open a hub.
os.register_at_fork(before=claims._lock.acquire, after_in_parent=claims._lock.release)
child = os.fork()
if not child:
    try:
        asyncio.run(open_another())
    except BaseException as exc:
        os.write(2, repr(exc).encode())
        os._exit(1)
    os._exit(0)
_, status = os.waitpid(child, 0)
other.run(first.disconnect())
other.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


async def test_what_a_child_process_forgets():
    async with hub():
        claims.forget_all()
        async with hub() as second:
            assert second.stats().open


def test_a_child_process_begins_anew():
    """What was open in the parent is not open in the child."""
    here = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        cwd=here,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


async def test_a_hub_that_only_publishes_may_have_the_name_of_another():
    async with hub():
        claim = claims.Claim(Placed.address, "default", chosen=False)
        with pytest.raises(ConfigurationError), claim.held():
            pass
        claim.waive()
        with claim.held():
            pass
