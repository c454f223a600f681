"""What every backend must do, over each that there is, and the choice of one by URL."""

from __future__ import annotations

import inspect
import sys

import pytest

from backends.servers import BROKERS
from starcast import Broadcast, ConfigurationError, InvalidChannel, backends, testing
from starcast.backends import SCHEMES, Backend, from_url
from support import Peer, until

pytestmark = pytest.mark.anyio

BAD_CHANNELS = ["", "x" * 201, "a\x00b", "a\r\nb", "a\x85b", "\ud800"]


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
async def test_a_backend_keeps_the_contract(make_backend, check):
    await check(make_backend)


def test_a_backend_has_the_calls_of_the_contract(make_backend):
    calls = {name for name in vars(Backend) if not name.startswith("_")}
    assert calls == {"start", "stop", "subscribe", "unsubscribe", "publish"}
    for name in calls:
        ours, contract = (getattr(cls, name) for cls in (make_backend(), Backend))
        # `publish` may return a future of its own.
        assert inspect.iscoroutinefunction(ours) or name == "publish"
        wanted = [p for p in inspect.signature(contract).parameters if p != "self"]
        assert list(inspect.signature(ours).parameters) == wanted


async def test_a_hub_refuses_bad_channels_before_the_backend_sees_them(make_backend, monkeypatch):
    backend = make_backend()
    seen: list[str] = []
    async with Broadcast(backend=backend) as hub:
        monkeypatch.setattr(backend, "subscribe", seen.append)
        monkeypatch.setattr(backend, "publish", seen.append)
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
        assert not seen
        monkeypatch.undo()


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
