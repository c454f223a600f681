"""The name of a hub: what it may be, and what a backend of one's own sees of it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starcast import Broadcast, ConfigurationError, PayloadTooLarge
from starcast.backends.nats_names import tokens
from starcast.broker.naming import NamedBackend
from support import Broker, Bus, Changed, joined, until

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def no_names() -> None:
    """Leave the hubs' names alone: they are what these tests are about."""


@pytest.mark.parametrize("name", ["a", "staff", "Staff-2_b", "9", "-", "x" * 64])
def test_names(name):
    assert Broadcast(name=name).name == name
    assert Broadcast(backend=Bus(), name=name).name == name


def test_a_hub_without_a_name_of_its_own():
    assert Broadcast().name == "default"


@pytest.mark.parametrize(
    "name", ["", "x" * 65, "a:b", "a.b", "a b", "a\n", "\n", "\u00e4", "*", ">", 5, b"staff", ["a"]]
)
@pytest.mark.parametrize("url", ["memory://", "redis://localhost"])
def test_what_is_no_name(url, name):
    with pytest.raises(ConfigurationError, match="1 to 64 ASCII letters, digits, '-' and '_'"):
        Broadcast(url, name=name)


async def test_a_backend_sees_the_name_before_every_channel():
    bus = Bus()
    async with Broadcast(backend=bus, name="staff") as hub:
        peer = await joined(hub, "news", "a:b")
        await hub.publish("news", "1")
        await hub.publish("a:b", "2")
        await until(lambda: peer.got == ["1", "2"])
        assert await hub.healthy()
        assert all(name.startswith("staff:") for name in bus.connection.channels)
        assert {"staff:news", "staff:a:b"} < bus.connection.channels
        await hub.disconnect(peer.websocket, "news")
        await until(lambda: "staff:news" not in bus.connection.channels)


async def test_messages_under_another_name_are_ignored():
    bus = Bus()
    async with Broadcast(backend=bus, name="staff") as hub:
        peer = await joined(hub, "news", "staff:news")
        for name in ["news", "default:news", "staffnews", "staff2:news", "staff:", "Staff:news"]:
            bus.connection.deliver(name, b"stray")
        bus.connection.deliver("staff:news", b"ours")
        await until(lambda: peer.got)
        assert peer.got == ["ours"]


async def test_two_names_on_one_broker_are_two_rooms():
    broker = Broker()
    async with (
        Broadcast(backend=Bus(broker), name="a") as one,
        Broadcast(backend=Bus(broker), name="b") as two,
        Broadcast(backend=Bus(broker), name="a") as three,
    ):
        peers = [await joined(hub, "room") for hub in (one, two, three)]
        await one.publish("room", "1")
        await two.publish("room", "2")
        await three.publish("room", "3")
        await until(lambda: [peer.got for peer in peers] == [["1", "3"], ["2"], ["1", "3"]])


async def test_a_connection_under_a_name_says_when_it_was_heard_if_the_backend_does():
    backend = NamedBackend(Bus(), "staff")
    connection = await backend.connect(lambda channel, payload: None, lambda error: None)
    assert connection.heard_at is None
    heard = Changed(Bus(), lambda connection: setattr(connection, "heard_at", 5.0))
    backend = NamedBackend(heard, "staff")
    connection = await backend.connect(lambda channel, payload: None, lambda error: None)
    assert connection.heard_at == 5.0


async def test_the_largest_message_is_known_once_it_is_connected():
    async with Broadcast(backend=Bus(max_payload=10)) as hub:
        with pytest.raises(PayloadTooLarge, match="at most 10"):
            await hub.publish("room", "x" * 11)


# The subjects of NATS

CHANNELS = st.text(st.sampled_from(":.%*> aZ09-_2E\u00e9\U0001f600"), min_size=1, max_size=8)


@given(st.lists(CHANNELS, min_size=2, max_size=20, unique=True))
def test_no_two_channels_have_the_same_subject(channels):
    subjects = [tokens(channel) for channel in channels]
    assert len(set(subjects)) == len(channels)
    for subject in subjects:
        assert re.fullmatch(r"(?:[A-Za-z0-9_%-]+\.)?[A-Za-z0-9_%-]+", subject)
        assert not subject.startswith("%-")  # that is for answers
