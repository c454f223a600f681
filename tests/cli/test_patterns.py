"""`starcast subscribe` with a `*`, with real brokers."""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys

import pytest

from backends.redis_server import RedisServer
from starcast import BackendUnavailable, Broadcast, cli
from starcast.backends.nats import NatsBackend
from starcast.backends.redis import RedisBackend
from starcast.cli import subscribe
from starcast.cli.patterns import AllChannels
from support import until

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["redis", "nats"])
def url(request, urls):
    return urls(request.param)


class Following:
    """The command in this process, with what it prints."""

    def __init__(self, monkeypatch, *arguments: str, terminal: bool = False) -> None:
        self._out = io.StringIO()
        self._out.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdout", self._out)
        made = subscribe.open_hub

        def note(backend, name):
            self.hub = made(backend, name)
            return self.hub

        self.hub: Broadcast | None = None
        monkeypatch.setattr(subscribe, "open_hub", note)
        self._arguments = ["subscribe", *arguments]

    async def __aenter__(self) -> Following:
        self._running = asyncio.create_task(asyncio.to_thread(cli.main, self._arguments))
        await until(lambda: self.hub is not None and self.hub.stats().subscribers)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.hub.disconnect()
        assert await self._running == 0

    @property
    def lines(self) -> list[str]:
        return self._out.getvalue().splitlines()

    @property
    def texts(self) -> list[tuple[str, str]]:
        return [(line["channel"], line.get("text")) for line in map(json.loads, self.lines)]


async def test_what_a_pattern_stands_for(url, monkeypatch):
    """A star is any characters, or none, and nothing else is special."""
    names = ["room", "room:1", "room:2 \N{SNOWMAN}.*", "a?c", "abc", "other", "x", "ro[om]"]
    async with (
        Following(monkeypatch, url, "room*", "a?*", "x", "ro[om]") as following,
        Broadcast(url, name="default") as hub,
        Broadcast(url, name="other") as other,
    ):
        for name in names:
            await other.publish(name, "of another hub")
            await hub.publish(name, f"to {name}")
        await hub.publish("room:last", "last")
        await until(lambda: ("room:last", "last") in following.texts)
    expected = [(name, f"to {name}") for name in names if name not in ("abc", "other")]
    assert following.texts == [*expected, ("room:last", "last")]


async def test_a_pattern_brings_what_was_published(url, monkeypatch):
    """Binary messages too; the hub's own messages to itself are not shown."""
    async with (
        Following(monkeypatch, url, "*") as following,
        Broadcast(url, name="default") as hub,
    ):
        assert await following.hub.healthy()
        await hub.publish("a\N{SNOWMAN}", b"\xff\0")
        await hub.publish("b", {"c": 1})
        await until(lambda: len(following.lines) == 2)
    assert list(map(json.loads, following.lines)) == [
        {"channel": "a\N{SNOWMAN}", "base64": "/wA="},
        {"channel": "b", "text": '{"c":1}'},
    ]


async def test_a_pattern_with_what_other_programs_publish(monkeypatch):
    """Whatever the name, and what is no message is passed over."""
    with RedisServer() as server:
        async with Following(monkeypatch, server.url, "*", terminal=True) as following:
            server.command("PUBLISH", b"starcast:default:\xff\n\x1b[2J", "a\x1b[2Jb")
            server.command("PUBLISH", "starcast:default:room", b"\xff\xff\xff")
            server.command("PUBLISH", "starcast:default:room", b"last")
            await until(lambda: len(following.lines) == 2)
            # Not what looks like the name of the hub.
            assert server.command("PUBSUB", "NUMPAT") == 1
    assert [line[9:] for line in following.lines] == [
        "\N{REPLACEMENT CHARACTER}\\n\\x1b[2J: a\\x1b[2Jb",
        "room: last",
    ]


async def test_a_prefix_is_no_pattern(monkeypatch):
    with RedisServer() as server:
        prefix = "s*[?^]\\:"
        async with Following(monkeypatch, "--prefix", prefix, server.url, "*") as following:
            for name in ("sx", prefix):
                server.command("PUBLISH", f"{name}default:room", name)
            await until(lambda: following.lines)
    assert following.texts == [("room", prefix)]


async def test_a_pattern_with_a_prefix_on_nats(urls, monkeypatch):
    async with (
        Following(monkeypatch, urls("nats"), "r*", "--prefix", "a.b.") as following,
        Broadcast(backend=NatsBackend(urls("nats"), prefix="a.b."), name="default") as hub,
    ):
        await hub.publish("room.1", "x")
        await until(lambda: following.lines)
    assert following.texts == [("room.1", "x")]


async def test_a_pattern_after_an_outage(monkeypatch):
    with RedisServer() as server:
        async with Following(monkeypatch, server.url, "a*", "b") as following:
            server.empty()
            await until(lambda: len(following.lines) == 2)
            server.command("PUBLISH", "starcast:default:ab", "after")
            await until(lambda: len(following.lines) == 3)
    gaps = [json.loads(line) for line in following.lines[:2]]
    assert [gap["channel"] for gap in gaps] == ["a*", "b"]
    assert all(gap["gap"]["seconds"] >= 0 for gap in gaps)
    assert following.texts[2] == ("ab", "after")


async def test_a_broker_without_patterns(urls, capsys):
    """An error instead of silence."""
    assert await asyncio.to_thread(cli.main, ["subscribe", urls("postgres"), "a", "room:*"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"starcast: .*this broker has no patterns: name the channels", said)


async def test_a_user_who_may_not_follow_the_hub(capsys):
    with RedisServer() as server:
        server.command("ACL", "SETUSER", "few", "on", ">pw", "+@all", "&starcast:default:a*")
        url = server.url.replace("//", "//few:pw@")
        assert await asyncio.to_thread(cli.main, ["subscribe", url, "*"]) == 1
    assert "permission" in capsys.readouterr().err


async def test_its_backend_is_as_good_as_any(url):
    backend = AllChannels((NatsBackend if url.startswith("nats") else RedisBackend)(url))
    async with Broadcast(backend=backend) as hub, hub.subscribe("room") as subscriber:
        await hub.publish("room", "x")
        assert (await anext(subscriber)).message == "x"
        assert backend.heard_at > 0
    with pytest.raises(BackendUnavailable):
        await backend.subscribe("default:*")
