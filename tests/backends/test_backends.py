"""What every backend must do, and the choice of one by URL."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable

import pytest

from starcast import (
    Broadcast,
    ConfigurationError,
    Event,
    InvalidChannel,
    PublishQueueFull,
    backends,
)
from starcast.backends import SCHEMES, Backend, MemoryBackend, from_url
from support import DEADLINE, Peer, until

pytestmark = pytest.mark.anyio

# Each backend that the suite runs over. One that needs a server starts it in its own fixture.
BACKENDS: dict[str, Callable[[], Backend]] = {"memory": MemoryBackend}


@pytest.fixture(params=BACKENDS)
def make_backend(request) -> Callable[[], Backend]:
    return BACKENDS[request.param]


@pytest.fixture
async def backend(make_backend):
    backend = make_backend()
    yield backend
    await backend.stop()


class Inbox:
    """Takes what a backend delivers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def got(self) -> list[tuple[str, str | bytes]]:
        return [(event.channel, event.message) for event in self.events]


def event(message: str | bytes = "hello", channel: str = "room") -> Event:
    return Event(channel, message, message.encode() if isinstance(message, str) else message)


ODD_CHANNELS = ["*", ">", "a.b", "a b", "'\"", "\N{GRINNING FACE}", "x" * 200, "%s", "{}", "\\"]
BAD_CHANNELS = ["", "x" * 201, "a\x00b", "a\r\nb", "a\x85b", "\ud800"]


def test_a_backend_has_the_calls_of_the_contract(make_backend):
    calls = {name for name in vars(Backend) if not name.startswith("_")}
    assert calls == {"start", "stop", "publish"}
    for name in calls:
        ours, contract = (getattr(cls, name) for cls in (make_backend(), Backend))
        assert inspect.iscoroutinefunction(ours) is inspect.iscoroutinefunction(contract)
        wanted = [p for p in inspect.signature(contract).parameters if p != "self"]
        assert list(inspect.signature(ours).parameters) == wanted


async def test_what_is_published_is_delivered(backend):
    inbox = Inbox()
    await backend.start(inbox)
    backend.publish(event("hello", "room"))
    await until(lambda: inbox.events)
    (delivered,) = inbox.events
    assert (delivered.channel, delivered.message, delivered.payload) == ("room", "hello", b"hello")


@pytest.mark.parametrize(
    "message",
    ["", "h\xe9 \N{GRINNING FACE}", "a\x00b\r\n", b"", b"\x00\xff\r\n", b"text", "x" * 100_000],
    ids=lambda message: repr(message[:10]),
)
async def test_a_message_arrives_as_it_was(backend, message):
    inbox = Inbox()
    await backend.start(inbox)
    backend.publish(event(message))
    await until(lambda: inbox.events)
    (delivered,) = inbox.events
    assert delivered.message == message
    assert type(delivered.message) is type(message)
    assert delivered.payload == event(message).payload
    assert delivered.cost == event(message).cost


@pytest.mark.parametrize("channel", ODD_CHANNELS)
async def test_a_channels_name_arrives_as_it_was(backend, channel):
    inbox = Inbox()
    await backend.start(inbox)
    backend.publish(event(channel=channel))
    await until(lambda: inbox.events)
    assert inbox.got == [(channel, "hello")]


async def test_who_is_excluded_arrives_too(backend):
    inbox = Inbox()
    await backend.start(inbox)
    backend.publish(Event("room", "hello", b"hello", frozenset({1, 7})))
    await until(lambda: inbox.events)
    assert inbox.events[0].exclude == frozenset({1, 7})


async def test_messages_arrive_in_order_across_channels_each_once(backend):
    inbox = Inbox()
    await backend.start(inbox)
    sent = [(f"room{number % 3}", str(number)) for number in range(100)]
    for channel, message in sent:
        backend.publish(event(message, channel))
    await until(lambda: len(inbox.events) >= len(sent))
    assert inbox.got == sent


async def test_threads_may_publish_and_each_ones_messages_keep_their_order(backend):
    inbox = Inbox()
    await backend.start(inbox)

    def publish(channel: str) -> None:
        for number in range(50):
            backend.publish(event(str(number), channel))

    channels = ["a", "b", "c", "d"]
    threads = [threading.Thread(target=publish, args=(channel,)) for channel in channels]
    for thread in threads:
        thread.start()
    await until(lambda: not any(thread.is_alive() for thread in threads))
    await until(lambda: len(inbox.events) >= 200)
    assert len(inbox.events) == 200
    for channel in channels:
        messages = [message for on, message in inbox.got if on == channel]
        assert messages == [str(number) for number in range(50)]


async def test_another_event_loop_may_publish(backend):
    inbox = Inbox()
    await backend.start(inbox)

    async def publish() -> None:
        backend.publish(event())

    await asyncio.to_thread(asyncio.run, publish())
    await until(lambda: inbox.events)
    assert inbox.got == [("room", "hello")]


async def test_before_the_start_nobody_gets_anything(backend):
    inbox = Inbox()
    backend.publish(event("too early"))
    await backend.start(inbox)
    backend.publish(event("in time"))
    await until(lambda: inbox.events)
    assert inbox.got == [("room", "in time")]


async def test_after_the_stop_nobody_gets_anything_and_a_start_may_follow(backend):
    before, after = Inbox(), Inbox()
    await backend.start(before)
    backend.publish(event("1"))
    await until(lambda: before.events)
    await backend.stop()
    backend.publish(event("2"))
    await backend.start(after)
    backend.publish(event("3"))
    await until(lambda: after.events)
    assert before.got == [("room", "1")]
    assert after.got == [("room", "3")]


async def test_stop_is_harmless_before_the_start_and_twice(backend):
    await backend.stop()
    await backend.start(Inbox())
    await backend.stop()
    await backend.stop()


async def test_two_backends_of_their_own_share_nothing_in_memory():
    one, two = MemoryBackend(), MemoryBackend()
    ones, twos = Inbox(), Inbox()
    await one.start(ones)
    await two.start(twos)
    one.publish(event())
    assert (len(ones.events), len(twos.events)) == (1, 0)


async def test_memory_tells_the_publisher_that_there_is_no_room():
    backend = MemoryBackend()

    def full(event: Event) -> None:
        raise PublishQueueFull("full")

    await backend.start(full)
    with pytest.raises(PublishQueueFull):
        backend.publish(event())


# Behind a hub


async def test_a_hub_reaches_its_clients_and_subscribers(backend):
    hub = Broadcast(backend=backend)
    one, two, other = Peer(), Peer(), Peer()
    await hub.connect(one.websocket, "room")
    await hub.connect(two.websocket, "room")
    await hub.connect(other.websocket, "other")
    async with hub.subscribe("room") as subscriber:
        await hub.publish("room", {"to": "all"})
        await hub.publish("room", b"\xff", exclude=one.websocket)
        hub.publish_nowait("room", "last")
        async with asyncio.timeout(DEADLINE):
            heard = [(await anext(subscriber)).message for _ in range(3)]
    assert heard == ['{"to":"all"}', b"\xff", "last"]
    await until(lambda: one.got == ['{"to":"all"}', "last"] and two.got == heard)
    await hub.disconnect()
    assert other.got == []
    assert [one.closed, two.closed, other.closed] == [1001] * 3


@pytest.mark.parametrize("channel", ODD_CHANNELS)
async def test_a_hub_takes_odd_channels(backend, channel):
    async with Broadcast(backend=backend) as hub:
        async with hub.subscribe(channel) as subscriber, hub.subscribe("room"):
            await hub.publish(channel, "hello")
            event = await asyncio.wait_for(anext(subscriber), DEADLINE)
        assert (event.channel, event.message) == (channel, "hello")


@pytest.mark.parametrize("channel", BAD_CHANNELS)
async def test_a_hub_refuses_bad_channels_before_the_backend_sees_them(
    backend, channel, monkeypatch
):
    seen: list[Event] = []
    async with Broadcast(backend=backend) as hub:
        monkeypatch.setattr(backend, "publish", seen.append)
        peer = Peer()
        with pytest.raises(InvalidChannel):
            await hub.publish(channel, "x")
        with pytest.raises(InvalidChannel):
            hub.publish_nowait(channel, "x")
        with pytest.raises(InvalidChannel):
            await hub.send("x", channel=channel)
        with pytest.raises(InvalidChannel):
            hub.subscribe(channel)
        with pytest.raises(InvalidChannel):
            await hub.connect(peer.websocket, channel)
        assert peer.sent == []
        assert (hub.stats().published, hub.channels, len(hub)) == (0, {}, 0)
        await hub.publish("room", "x")
        assert [event.channel for event in seen] == ["room"]


async def test_a_hub_can_be_opened_again(backend):
    hub = Broadcast(backend=backend)
    for message in ["one", "two"]:
        async with hub, hub.subscribe() as subscriber:
            await hub.send(message)
            event = await asyncio.wait_for(anext(subscriber), DEADLINE)
            assert event.message == message


# By URL


def test_memory_is_chosen_by_its_url():
    assert isinstance(from_url("memory://"), MemoryBackend)
    assert from_url("memory://") is not from_url("memory://")


def test_the_names_of_the_package_are_there():
    assert {"Backend", "MemoryBackend", "from_url"} <= set(backends.__all__)
    assert all(hasattr(backends, name) for name in backends.__all__)


def test_the_suite_runs_over_every_backend_that_a_url_can_name():
    assert set(SCHEMES) <= set(BACKENDS)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("carrier-pigeon://", "not with carrier-pigeon://"),
        ("MEMORY://", "not with MEMORY://"),
        ("://host", "not with ://"),
        ("memory", "not with nothing of the kind"),
        ("memory:/", "not with nothing of the kind"),
        ("", "not with nothing of the kind"),
        ("user:secret@host", "not with nothing of the kind"),
        ("mystery://user:secret@host/0", "not with mystery://"),
    ],
)
def test_another_url_is_refused_without_repeating_its_password(url, says):
    with pytest.raises(ConfigurationError, match="a hub's URL starts with memory://") as raised:
        Broadcast(url)
    assert str(raised.value).endswith(says)
    assert "secret" not in str(raised.value)
