"""Whatever clients send, it is answered with a code, and nothing but a line goes to the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest
import websockets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channels.speaking import Open, Room, serving
from starcast import Broadcast, Client, History, Limits, Subscription
from support import DEADLINE, OtherLoop, examples, until

METHODS = [
    *("connect", "subscribe", "unsubscribe", "publish", "history", "presence", "presence_stats"),
    *("rpc", "refresh", "sub_refresh", "ping", "send", "unheard_of", "id"),
]
NAMES = [
    *(
        "channel",
        "token",
        "data",
        "recover",
        "epoch",
        "offset",
        "flag",
        "limit",
        "since",
        "reverse",
    ),
    *("method", "subs", "positioned", "name"),
]
CHANNELS = [
    "room",
    "present",
    "",
    "*",
    ">",
    "a.b",
    "'\"",
    "\N{GRINNING FACE}",
    "x" * 201,
    "\0",
    "\r\n",
]

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
params = (
    st.dictionaries(st.sampled_from(NAMES), anything | st.sampled_from(CHANNELS), max_size=5)
    | anything
)
command = st.builds(
    lambda id, method, params: {"id": id, method: params},
    st.integers(0, 5) | anything,
    st.sampled_from(METHODS),
    params,
)
connect = {"id": 1, "connect": {}}


class Everything(Open):
    limits = Limits(max_subscriptions=5, commands=1e6, burst=1_000_000)

    async def on_connect(self, websocket, token, data):
        return Client(user="7", channels=["server"])

    async def on_subscribe(self, websocket, channel, token, data):
        present = channel == "present"
        return Subscription(history=True, presence=present, join_leave=present)

    async def on_rpc(self, websocket, method, data):
        return data


async def say(room: Room, frames: list[str]) -> None:
    """Send frames, and wait until all were answered or the client was closed."""
    async with room.socket() as talker:
        with contextlib.suppress(websockets.ConnectionClosed):
            for frame in frames:
                await talker.raw(frame)
            await talker.send({"id": 4_000_000_000, "ping": {}})
            while (await talker.next()).get("id") != 4_000_000_000:
                pass
    code = talker.socket.close_code
    assert code in (1000, 3501, 3508), code


def test_commands_of_any_kind(caplog):
    hub = Broadcast(history={"room": History()})
    other = OtherLoop()  # one server for all examples
    server = serving(Everything, hub)
    room = other.run(server.__aenter__())

    async def run(frames: list[list[Any]]) -> None:
        texts = ["\n".join(json.dumps(it) for it in frame) for frame in frames]
        await asyncio.wait_for(say(room, texts), DEADLINE)
        async with room.talker() as next_one:
            assert await next_one.get("ping") == {}
        await until(lambda: not len(hub))
        assert hub.channels == {}

    @settings(max_examples=examples(60), suppress_health_check=list(HealthCheck))
    @given(st.lists(st.lists(command | anything, max_size=4), max_size=4))
    def check(frames: list[list[Any]]) -> None:
        other.run(run([[connect], *frames]))
        assert not [record for record in caplog.records if record.exc_info is not None]

    try:
        check()
    finally:
        other.run(server.__aexit__(None, None, None))
        other.close()


@pytest.mark.anyio
async def test_ten_thousand_subscriptions():
    class Endpoint(Open):
        limits = Limits(max_subscriptions=100, burst=20_000)

    async with serving(Endpoint) as room, room.talker() as ada:
        results = []
        for start in range(0, 10_000, 1000):
            numbers = range(start, start + 1000)
            await ada.send(*({"id": n + 10, "subscribe": {"channel": f"c{n}"}} for n in numbers))
            results += [await ada.next() for _ in numbers]
        assert sum("subscribe" in it for it in results) == 100
        assert {it["error"]["code"] for it in results if "error" in it} == {106}
        assert len(room.hub.channels) == 100
