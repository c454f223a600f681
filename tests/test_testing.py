"""The checks for backends of one's own: each says what is wrong."""

from __future__ import annotations

import asyncio

import pytest

from starcast import testing
from support import Bus

pytestmark = pytest.mark.anyio


async def test_a_check_says_what_is_wrong(monkeypatch):
    monkeypatch.setattr(testing, "DEADLINE", 0.05)
    tasks: list[asyncio.Task] = []

    async def swallow(connection, messages, proceed):
        pass

    async def leak(connection, proceed):
        await proceed()
        tasks.append(asyncio.create_task(asyncio.Event().wait()))

    async def complain(connection, proceed):
        connection.lost(ConnectionError("closed"))

    with pytest.raises(AssertionError, match="0 of 2 messages"):
        await testing.what_is_published_arrives(lambda: Bus(on_publish=swallow))
    with pytest.raises(AssertionError, match="tasks are left"):
        await testing.nothing_is_left_behind(lambda: Bus(on_close=leak))
    with pytest.raises(AssertionError, match="`lost` was called"):
        await testing.a_channel_that_is_left_is_silent(lambda: Bus(on_close=complain))
    for task in tasks:
        task.cancel()
