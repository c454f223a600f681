"""Tests of what a review has found."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys

import pytest

from history.conftest import HISTORY
from history.keeping import TUNING, KeepingBus
from history.test_tracks import CHANNEL, kept, take, take_all
from starcast import BackendUnavailable, Broadcast, Gap, History
from support import OtherLoop, Peer, joined, starcast_tasks, until

pytestmark = pytest.mark.anyio


async def test_a_member_of_another_loop_gets_its_past(hub, other: OtherLoop):
    """That is not the one of the connection to the broker."""
    ids = [await hub.publish("room", str(n)) for n in range(3)]

    async def resume() -> list[object]:
        async with hub.subscribe("room", since=ids[0]) as subscriber:
            return await take(subscriber, 2)

    for _ in range(20):
        assert await asyncio.to_thread(other.run, resume()) == ["1", "2"]
