from __future__ import annotations

import asyncio
import threading

import pytest

from starcast.sync.waiter import Lock, Waiter, running_loop
from support import DEADLINE, until

pytestmark = pytest.mark.anyio


async def wait(waiter: Waiter) -> str:
    await waiter
    return "woken"


def in_thread(function) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


async def test_running_loop_is_this_threads_loop():
    assert running_loop() is asyncio.get_running_loop()


def test_without_a_loop_there_is_no_running_loop():
    assert running_loop() is None


def test_a_waiter_is_made_on_a_loop():
    with pytest.raises(RuntimeError):
        Waiter()


async def test_set_before_it_is_awaited():
    waiter = Waiter()
    waiter.set()
    await asyncio.wait_for(wait(waiter), DEADLINE)


async def test_set_wakes_who_waits_and_not_before():
    waiter = Waiter()
    task = asyncio.create_task(wait(waiter))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    waiter.set()
    assert await asyncio.wait_for(task, DEADLINE) == "woken"


async def test_set_twice_is_the_same_as_once():
    waiter = Waiter()
    waiter.set()
    waiter.set()
    await asyncio.wait_for(wait(waiter), DEADLINE)
    waiter.set()


async def test_set_on_its_own_loop_takes_no_turn_of_the_loop():
    turns: list[int] = []
    waiter = Waiter()
    asyncio.get_running_loop().call_soon(turns.append, 1)
    waiter.set()
    await waiter
    assert turns == []


async def test_set_from_a_thread_wakes_a_loop_that_is_idle():
    waiter = Waiter()
    task = asyncio.create_task(wait(waiter))
    await asyncio.sleep(0)
    thread = in_thread(waiter.set)
    assert await asyncio.wait_for(task, DEADLINE) == "woken"
    thread.join(DEADLINE)
    assert not thread.is_alive()


async def test_set_from_another_loop():
    waiter = Waiter()

    async def elsewhere() -> None:
        waiter.set()

    thread = in_thread(lambda: asyncio.run(elsewhere()))
    assert await asyncio.wait_for(wait(waiter), DEADLINE) == "woken"
    thread.join(DEADLINE)
    assert not thread.is_alive()


async def test_set_from_many_threads_at_once():
    waiter = Waiter()
    threads = [in_thread(waiter.set) for _ in range(8)]
    assert await asyncio.wait_for(wait(waiter), DEADLINE) == "woken"
    for thread in threads:
        thread.join(DEADLINE)
    await asyncio.sleep(0)  # the other calls find it set


async def test_set_after_the_one_who_waited_was_cancelled():
    waiter = Waiter()
    task = asyncio.create_task(wait(waiter))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    waiter.set()
    in_thread(waiter.set).join(DEADLINE)
    await asyncio.sleep(0)


def test_set_after_the_loop_was_closed():
    async def make() -> Waiter:
        return Waiter()

    waiter = asyncio.run(make())
    waiter.set()


async def test_set_from_a_loop_after_its_own_was_closed():
    async def make() -> Waiter:
        return Waiter()

    made: list[Waiter] = []
    thread = in_thread(lambda: made.append(asyncio.run(make())))
    await until(lambda: not thread.is_alive())
    made[0].set()


async def test_a_lock_lets_in_one_at_a_time_in_any_loop(other):
    lock = Lock()
    inside, most, entered = 0, 0, 0

    async def enter() -> None:
        nonlocal inside, most, entered
        for _ in range(50):
            async with lock:
                inside += 1
                entered += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1

    theirs = [asyncio.run_coroutine_threadsafe(enter(), other.loop) for _ in range(3)]
    await asyncio.gather(*(enter() for _ in range(3)))
    await asyncio.gather(*map(asyncio.wrap_future, theirs))
    assert (most, entered) == (1, 300)


async def test_a_lock_goes_on_when_somebody_who_waits_is_cancelled():
    lock = Lock()
    async with lock:
        waiting = [asyncio.create_task(lock.__aenter__()) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
    await asyncio.wait(waiting)
    assert waiting[0].cancelled()
    assert not waiting[1].cancelled()
