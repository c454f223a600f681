"""The queue that has a bound in bytes, and those who wait for space in it."""

from __future__ import annotations

import asyncio
import pickle
import threading

import pytest

from starcast import PublishQueueFull
from starcast.sync.bounded import BoundedQueue, Full
from support import until

pytestmark = pytest.mark.anyio


@pytest.fixture
def queue():
    return BoundedQueue(threading.RLock(), 10)


def test_the_bound_holds_for_all_but_the_first_that_costs_anything(queue):
    assert queue.has_space(1000)
    queue.append("nothing", 0)
    assert queue.has_space(1000)
    queue.append("four", 4)
    assert queue.has_space(6)
    assert not queue.has_space(7)


def test_what_is_taken_costs_no_more(queue):
    for entry in ("one", "three", "seven"):
        queue.append(entry, len(entry))
    queue.prepend("zero", 4)
    assert (list(queue.entries), queue.size) == (["zero", "one", "three", "seven"], 17)
    queue.drop_first(4)
    assert (len(queue), queue.size) == (3, 13)
    queue.keep((entry for entry in queue.entries if entry != "three"), 8)
    assert (list(queue.entries), queue.size) == (["one", "seven"], 8)
    assert list(queue.take_all()) == ["one", "seven"]
    assert (len(queue), queue.size) == (0, 0)


@pytest.mark.parametrize("how", ["drop_first", "take_all", "keep"])
async def test_everybody_who_waits_is_told_when_something_has_gone(queue, how):
    queue.append("one", 3)
    queue.append("two", 3)
    waiting = [asyncio.create_task(queue.wait_for_space(60)) for _ in range(2)]
    await until(lambda: len(queue.waiters) == 2)
    queue.append("three", 5)  # more of it is no reason to look
    await asyncio.sleep(0)
    assert len(queue.waiters) == 2
    if how == "drop_first":
        queue.drop_first(3)
        queue.tell()
    elif how == "take_all":
        queue.take_all()
    else:
        queue.keep(["three"], 5)
    await asyncio.wait_for(asyncio.gather(*waiting), 10)
    assert not queue.waiters


async def test_nobody_waits_for_space_in_an_empty_queue(queue):
    await asyncio.wait_for(queue.wait_for_space(60), 10)
    assert not queue.waiters


@pytest.mark.parametrize("how", ["cancelled", "late"])
async def test_who_gives_up_is_forgotten(queue, how):
    queue.append("one", 3)
    waiting = asyncio.create_task(queue.wait_for_space(60 if how == "cancelled" else 0.01))
    await until(lambda: queue.waiters)
    if how == "cancelled":
        waiting.cancel()
    await asyncio.wait([waiting], timeout=10)
    assert waiting.cancelled() == (how == "cancelled")
    assert not queue.waiters


def test_an_error_about_a_full_queue_can_be_sent_to_another_process(queue):
    sent = pickle.loads(pickle.dumps(Full("2 messages wait", queue)))
    assert (type(sent), str(sent)) == (PublishQueueFull, "2 messages wait")
