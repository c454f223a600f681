"""What clients say over a broker waits until their room can take it: see `test_pressure.py`."""

from __future__ import annotations

import pytest

from starcast import Broadcast
from support import starcast_tasks, until
from test_pressure import KIB, PROTOCOLS, app_of, talk

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("ws", PROTOCOLS)
@pytest.mark.parametrize(
    ("size", "count"), [(100 * KIB, 3), (16 * KIB, 10), (200, 500)], ids=["huge", "large", "small"]
)
async def test_no_healthy_reader_is_lost_however_much_its_room_says(serve, url, ws, size, count):
    """What the broker has, and has not brought yet, counts too."""
    async with Broadcast(url, max_buffer=64 * KIB, max_message=None) as hub:
        server = await serve(app_of(hub), ws=ws, send_buffer=16 * KIB)
        await talk(server, senders=4, readers=2, size=size, count=count)
        assert hub.stats().slow_clients == hub.stats().dropped == 0
        await until(lambda: not hub.stats().clients)
    await until(lambda: not starcast_tasks())
