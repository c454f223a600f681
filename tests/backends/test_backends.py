"""What every backend must do, over each that there is, and the choice of one by URL."""

from __future__ import annotations

import inspect
import sys

import pytest

from backends.servers import BROKERS
from starcast import Broadcast, ConfigurationError, InvalidChannel, backends, testing
from starcast.backends import SCHEMES, Backend, BrokerConnection, from_url
from support import Changed, Peer, until

pytestmark = pytest.mark.anyio

BAD_CHANNELS = ["", "x" * 201, "a\x00b", "a\r\nb", "a\x85b", "\ud800"]


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
async def test_a_backend_keeps_the_contract(make_backend, check):
    await check(make_backend)


def calls_of(contract):
    return {name for name in vars(contract) if not name.startswith("_")}


async def test_a_backend_has_the_calls_of_the_contract(make_backend):
    assert calls_of(Backend) == {"connect"}
    assert calls_of(BrokerConnection) == {"subscribe", "unsubscribe", "publish", "close"}
    backend = make_backend()
    connection = await backend.connect(lambda channel, payload: None, lambda error: None)
    for ours, contract in ((backend, Backend), (connection, BrokerConnection)):
        for name in calls_of(contract):
            call = getattr(ours, name)
            # `publish` may return a future of its own.
            assert inspect.iscoroutinefunction(call) or name == "publish"
            wanted = list(inspect.signature(getattr(contract, name)).parameters)
            assert ["self", *inspect.signature(call).parameters] == wanted
    await connection.close()


async def test_a_hub_refuses_bad_channels_before_the_backend_sees_them(make_backend):
    seen: list[str] = []

    def spy(connection):
        subscribe, publish = connection.subscribe, connection.publish

        def noting_subscribe(channel):
            seen.append(channel)
            return subscribe(channel)

        def noting_publish(messages):
            seen.extend(channel for channel, _ in messages)
            return publish(messages)

        connection.subscribe, connection.publish = noting_subscribe, noting_publish

    async with Broadcast(backend=Changed(make_backend(), spy)) as hub:
        await hub.publish("good", "x")
        for channel in BAD_CHANNELS:
            with pytest.raises(InvalidChannel):
                await hub.publish(channel, "x")
            with pytest.raises(InvalidChannel):
                hub.publish_nowait(channel, "x")
            with pytest.raises(InvalidChannel):
                hub.subscribe(channel)
            peer = Peer()
            with pytest.raises(InvalidChannel):
                await hub.connect(peer.websocket, channel)
            assert not peer.sent
    assert "default:good" in seen
    assert not {f"default:{channel}" for channel in BAD_CHANNELS} & {*seen}


async def test_excluded_clients_are_those_of_the_hub_that_published(make_backend):
    one, two = (Broadcast(backend=make_backend(), name="both") for _ in range(2))
    async with one, two:
        ones = [Peer(), Peer()]
        twos = [Peer(), Peer()]
        for hub, peers in ((one, ones), (two, twos)):
            for peer in peers:
                await hub.connect(peer.websocket, "check-exclude")
        await one.publish("check-exclude", "1", exclude=ones[0].websocket)
        await one.publish("check-exclude", "2")
        await until(lambda: all(peer.got[-1:] == ["2"] for peer in ones + twos))
        assert [peer.got for peer in ones + twos] == [["2"], ["1", "2"], ["1", "2"], ["1", "2"]]


# By URL


def test_memory_needs_no_backend():
    assert from_url("memory://") is None


def test_the_names_of_the_package_are_there():
    assert {"Backend", "from_url"} <= set(backends.__all__)
    assert all(hasattr(backends, name) for name in backends.__all__)


def test_the_suite_runs_over_every_backend_that_a_url_can_name():
    assert {found[0] for found in SCHEMES.values() if found is not None} == set(BROKERS)


@pytest.mark.parametrize("scheme", [scheme for scheme, found in SCHEMES.items() if found])
def test_a_scheme_finds_its_backend(scheme):
    module, name, _ = SCHEMES[scheme]
    url = "unix:///tmp/x.sock" if scheme == "unix" else f"{scheme}://localhost"
    backend = from_url(url)
    assert type(backend).__name__ == name
    assert type(backend).__module__ == f"starcast.backends.{module}"


@pytest.mark.parametrize("scheme", ["redis", "nats", "postgresql"])
def test_a_package_that_is_missing_is_named_with_the_line_that_installs_it(scheme, monkeypatch):
    module, _, extra = SCHEMES[scheme]
    missing = {"redis": "redis", "nats": "nats", "postgresql": "asyncpg"}[scheme]
    monkeypatch.delitem(sys.modules, f"starcast.backends.{module}", raising=False)
    for name in [missing, *(name for name in sys.modules if name.startswith(f"{missing}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError, match=rf"pip install 'starcast\[{extra}\]'"):
        Broadcast(f"{scheme}://user:secret@localhost")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("carrier-pigeon://", "not with carrier-pigeon://"),
        ("MEMORY://", "not with MEMORY://"),
        ("://host", "not with ://"),
        ("memory", "this one starts with none of them"),
        ("memory:/", "this one starts with none of them"),
        ("user:secret@host", "this one starts with none of them"),
        ("mystery://user:secret@host/0", "not with mystery://"),
    ],
)
def test_another_url_is_refused_without_repeating_its_password(url, says):
    with pytest.raises(ConfigurationError, match="a hub's URL starts with memory://") as raised:
        Broadcast(url)
    assert str(raised.value).endswith(says)
    assert "secret" not in str(raised.value)
