"""Tests of `History` and of the channels that it is for."""

from __future__ import annotations

import math

import pytest

from starcast import Broadcast, ConfigurationError, History
from support import Bus

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("name", ["size", "max_channels"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True, None, 10**9])
def test_a_number_that_is_not_valid(name, value):
    with pytest.raises(ConfigurationError, match=f"{name} is a number from 1 to"):
        History(**{name: value})


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "3", None])
def test_a_time_that_is_not_valid(value):
    with pytest.raises(ConfigurationError, match="ttl must be a number above 0"):
        History(ttl=value)


@pytest.mark.parametrize("setting", [100, "room", [History()], History])
def test_what_is_no_history(setting):
    with pytest.raises(ConfigurationError, match="history must be a History or a dict"):
        Broadcast(history=setting)
    with pytest.raises(ConfigurationError, match=r"history\['room'\] must be a History or None"):
        Broadcast(history={"room": setting})


@pytest.mark.parametrize("name", ["", "a*b", "**", 5, None])
def test_a_name_that_is_none(name):
    with pytest.raises(ConfigurationError, match="a name in history is that of a channel"):
        Broadcast(history={name: History()})


async def test_the_longest_name_that_fits_decides():
    sizes = {
        "*": History(size=1),
        "room:*": History(size=2),
        "room:secret:*": None,
        "room:secret:5": History(size=4),
        "room:": History(size=3),
    }
    hub = Broadcast(history=sizes)

    async def size(channel: str) -> int | None:
        for _ in range(2):  # the second time it is remembered
            for _ in range(9):
                id = await hub.publish(channel, "text")
        return len((await hub.history(channel)).events) if id else None

    assert await size("lobby") == 1
    assert await size("room:1") == 2
    assert await size("room:") == 3
    assert await size("room:secret:1") is None
    assert await size("room:secret:5") == 4
    assert await size("room") == 1


async def test_a_hub_with_names_only_that_none_fits():
    hub = Broadcast(history={"room*": History()})
    assert await hub.publish("lobby", "text") is None
    assert await hub.publish("rooms", "text")
    hub = Broadcast(history={"*": None})
    assert await hub.publish("lobby", "text") is None


async def test_any_number_of_channels_may_be_asked_for():
    hub = Broadcast(history={"room*": History(max_channels=5)})
    for number in range(10_000):
        assert await hub.publish(f"lobby{number}", "text") is None
    assert await hub.publish("room", "text")


def test_a_backend_that_keeps_no_history():
    with pytest.raises(ConfigurationError, match="Bus keeps no history: leave out history="):
        Broadcast(backend=Bus(), history=History())
    Broadcast(backend=Bus(), history={"*": None})
