"""What is done with all clients of a user, wherever they are."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator

import pytest

from channels.speaking import serving
from history.brokers import kept_url as kept_url  # a fixture
from starcast import Broadcast, ConfigurationError, ConnectedClient, History, InvalidChannel
from support import Broker, Bus, Peer, starcast_tasks, until

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def two_hubs() -> AsyncIterator[tuple[Broadcast, Broadcast]]:
    """Those of two workers."""
    broker = Broker()
    async with Broadcast(backend=Bus(broker)) as one, Broadcast(backend=Bus(broker)) as two:
        yield one, two
    await until(lambda: not starcast_tasks())


async def client(hub: Broadcast, user: object = "7", channel: str = "room", **options) -> Peer:
    peer = Peer()
    await hub.connect(peer.websocket, channel, user=user, **options)
    return peer


def texts(peer: Peer) -> list[str]:
    return [it["text"] for it in peer.sent if it.get("text") is not None]


async def got(peer: Peer, *expected: str) -> None:
    await until(lambda: texts(peer) == list(expected))


async def test_a_user_gets_a_message_on_every_worker():
    async with two_hubs() as (one, two):
        ada, adas_phone, bob = await client(one), await client(two, 7), await client(two, "8")
        assert await one.send_user("7", "hello") == 1
        assert await two.send_user(7, {"a": 1}) == 1
        for peer in (ada, adas_phone):
            await got(peer, "hello", '{"a":1}')
        assert await one.send_user("7", "all", wait=0.05) == 2
        assert await one.send_user("nobody", "all", wait=0.01) == 0
        await got(ada, "hello", '{"a":1}', "all")
        assert texts(bob) == []
        # A user's own channel is none of the app's.
        assert one.channels == {"room": 1}
        assert one.stats().subscribers == 0


async def test_in_memory_all_are_counted_at_once():
    hub = Broadcast()
    ada, phone = await client(hub, uuid.UUID(int=7)), await client(hub, uuid.UUID(int=7))
    assert await hub.send_user(uuid.UUID(int=7), "hello") == 2
    assert await hub.send_user(uuid.UUID(int=7), "again", wait=0.01) == 2
    for peer in (ada, phone):
        await got(peer, "hello", "again")
    for peer in (ada, phone):
        await hub.disconnect(peer.websocket)
    assert await hub.send_user(uuid.UUID(int=7), "nobody") == 0
    assert not len(hub)
    await hub.disconnect()


async def test_clients_are_listed_with_their_users():
    async with Broadcast() as hub:
        ada = await client(hub, "7", info={"name": "Ada"})
        anonymous = Peer()
        await hub.connect(anonymous.websocket, "room")
        bob = await client(hub, "8", "other")
        assert hub.clients_of("room") == [
            ConnectedClient(ada.websocket, "7", {"name": "Ada"}),
            ConnectedClient(anonymous.websocket),
        ]
        assert hub.clients_of()[-1] == ConnectedClient(bob.websocket, "8")
        with pytest.raises(InvalidChannel):
            hub.clients_of("")
        # Somebody else may use the same connection later.
        await hub.disconnect(ada.websocket)
        await hub.connect(ada.websocket, "room")
        assert ConnectedClient(ada.websocket) in hub.clients_of("room")


async def test_a_user_is_put_on_channels_and_taken_off_everywhere():
    async with two_hubs() as (one, two):
        ada, phone = await client(one), await client(two)
        await one.subscribe_user("7", "tea")
        await until(lambda: one.channels.get("tea") == two.channels.get("tea") == 1)
        await two.publish("tea", "hello")
        for peer in (ada, phone):
            await got(peer, "hello")
        await two.unsubscribe_user("7", "tea")
        await two.unsubscribe_user("7", "a channel that they are not on")
        await until(lambda: "tea" not in one.channels and "tea" not in two.channels)
        assert len(one) == len(two) == 1


@pytest.mark.parametrize(
    ("options", "code"),
    [({}, 1008), ({"reconnect": True}, 1012), ({"code": 4000, "reason": "away"}, 4000)],
)
async def test_a_user_is_closed_everywhere(options, code):
    async with two_hubs() as (one, two):
        ada, phone, bob = await client(one), await client(two), await client(two, "8")
        await one.disconnect_user("7", **options)
        for peer in (ada, phone):
            await until(lambda peer=peer: peer.sent[-1]["type"] == "websocket.close")
            assert peer.sent[-1]["code"] == code
        assert bob.sent[-1]["type"] != "websocket.close"
        assert len(two) == 1


async def test_a_channel_is_closed_everywhere():
    async with two_hubs() as (one, two):
        ada, bob, eve = await client(one), await client(two, "8"), await client(two, "9", "other")
        async with two.subscribe("room") as subscriber:
            await one.publish("room", "last")
            await one.close_channel("room", 4001, "over")
            for peer in (ada, bob):
                await until(lambda peer=peer: peer.sent[-1]["type"] == "websocket.close")
                assert (peer.sent[-1]["code"], peer.sent[-1]["reason"]) == (4001, "over")
                assert texts(peer) == ["last"]
            await two.publish("room", "later")
            assert [(await subscriber.get()).message for _ in range(2)] == ["last", "later"]
        assert eve.sent[-1]["type"] != "websocket.close"


async def test_a_user_does_not_get_what_excludes_it():
    async with two_hubs() as (one, two):
        ada, phone, bob = await client(one), await client(two), await client(two, "8")
        await one.publish("room", "not for Ada", exclude_user="7")
        two.publish_nowait("room", "nor this", exclude_user=7)
        await two.publish("room", "not for Bob", exclude=bob.websocket, exclude_user="nobody")
        await two.publish("room", "for all")
        for peer in (ada, phone):
            await got(peer, "not for Bob", "for all")
        await got(bob, "not for Ada", "nor this", "for all")


async def test_it_does_not_get_that_when_it_resumes_either():
    async with Broadcast(history=History()) as hub:
        start = await hub.publish("room", "before")
        await hub.publish("room", "not for Ada", exclude_user="7")
        await hub.publish("room", "for all")
        ada, bob = Peer(), await client(hub, "8", since=start)
        await hub.connect(ada.websocket, "room", since=start, user="7")
        await got(ada, "for all")
        await got(bob, "not for Ada", "for all")


async def test_one_copy_for_a_client_on_several_channels():
    async with two_hubs() as (one, two):
        both, first, second = Peer(), Peer(), Peer()
        for channel in ("a", "b"):
            await two.connect(both.websocket, channel)
        await two.connect(first.websocket, "a")
        await one.connect(second.websocket, "b")
        assert await one.publish(["a", "b", "a"], "hello") is None
        two.publish_nowait(["b", "a"], "again")
        for peer in (both, first, second):
            await got(peer, "hello", "again")
    async with Broadcast(history={"kept": History()}) as hub:
        both = Peer()
        for channel in ("a", "b"):
            await hub.connect(both.websocket, channel)
        await hub.publish(["a", "b"], {"a": 1})
        await hub.publish([], "nobody")
        await got(both, '{"a":1}')
        assert await hub.publish(["kept"], "kept")
        with pytest.raises(ConfigurationError, match="'kept' has a history"):
            await hub.publish(["a", "kept"], "hello")
        with pytest.raises(InvalidChannel):
            hub.publish_nowait(["a", ""], "hello")
        assert texts(both)[-1] == '{"a":1}'


@pytest.mark.parametrize("user", ["", "x" * 151, "a\nb", 10**1000], ids=lambda user: str(user)[:9])
async def test_names_that_no_user_has(user):
    async with Broadcast() as hub:
        for call in (
            hub.send_user(user, "x"),
            hub.subscribe_user(user, "room"),
            hub.publish("room", "x", exclude_user=user),
            hub.connect(Peer().websocket, user=user),
        ):
            with pytest.raises(ConfigurationError, match="user must"):
                await call


async def test_a_user_who_was_not_found_is_an_error():
    async with Broadcast() as hub:
        for call in (
            hub.send_user(None, "x"),
            hub.subscribe_user(None, "room"),
            hub.unsubscribe_user(None, "room"),
            hub.disconnect_user(None),
        ):
            with pytest.raises(TypeError, match="None is no user"):
                await call
        with pytest.raises(ConfigurationError, match="JSON"):
            await hub.connect(Peer().websocket, info=object)
        with pytest.raises(ConfigurationError, match="2048 bytes"):
            await hub.connect(Peer().websocket, info="x" * 3000)
        for code in (1005, 2000):
            with pytest.raises(ConfigurationError):
                await hub.disconnect_user("7", code)
            with pytest.raises(ConfigurationError):
                await hub.close_channel("room", code)
        assert not len(hub)


@pytest.mark.parametrize(
    "order",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"do":"unheard of"}',
        b'{"do":["disconnect"]}',
        b'{"do":"disconnect","code":"x"}',
        b'{"do":"disconnect","code":1005}',
        b'{"do":"disconnect","code":true}',
        b'{"do":"disconnect","more":1}',
        b'{"do":"subscribe"}',
        b'{"do":"subscribe","channel":"\\u0001user:8"}',
        b'{"do":"unsubscribe","channel":""}',
        b"[" * 100_000,
        b"\xff",
    ],
)
async def test_what_others_write_to_the_broker_harms_nobody(order):
    """Who may write to the broker may close clients, but breaks nothing."""
    broker = Broker()
    async with Broadcast(backend=Bus(broker)) as hub:
        ada = await client(hub)
        backend = await Bus(broker).connect(lambda *message: None, lambda error: None)
        for channel in ("default:room", "default:\x01user:7"):
            await backend.publish([(channel, b"\xff\x01\x20" + order)])
        await hub.publish("room", "hello")
        await got(ada, "hello")
        assert hub.channels == {"room": 1}
        await backend.close()


async def test_a_client_that_leaves_while_it_is_subscribed():
    async with two_hubs() as (one, _):
        ada = await client(one)
        await one.subscribe_user("7", "tea")
        ada.leave()
        with contextlib.suppress(Exception):
            await ada.websocket.receive_text()
        await until(lambda: not len(one))
        await until(lambda: not [t for t in starcast_tasks() if "people" in repr(t)])
        assert one.channels == {}


async def test_it_is_the_same_over_each_broker(kept_url):
    name = uuid.uuid4().hex
    async with Broadcast(kept_url, name=name) as one, Broadcast(kept_url, name=name) as two:
        ada, phone = await client(one, "s\xfc\xdf *>'"), await client(two, "s\xfc\xdf *>'")
        assert await one.send_user("s\xfc\xdf *>'", "hello", wait=0.5) == 2
        await two.publish("room", "not for Ada", exclude_user="s\xfc\xdf *>'")
        await two.publish(["room", "tea"], "once")
        await one.subscribe_user("s\xfc\xdf *>'", "tea")
        await until(lambda: one.channels.get("tea") == two.channels.get("tea") == 1)
        await two.publish(["tea", "room"], "one copy")
        for peer in (ada, phone):
            await got(peer, "hello", "once", "one copy")
        await one.disconnect_user("s\xfc\xdf *>'")
        await until(lambda: not len(one) and not len(two))


# Clients of channels


async def test_clients_of_the_protocol_are_told():
    async with serving() as room, room.talker("7") as ada:
        hub = room.hub
        assert await hub.send_user("7", {"a": 1}) == 1
        assert await ada.push() == {"message": {"data": {"a": 1}}}
        await hub.send("hello", to=hub.clients_of()[0].websocket)
        assert await ada.push() == {"message": {"data": "hello"}}
        await hub.subscribe_user("7", "tea")
        await hub.subscribe_user("7", "tea")
        assert await ada.push() == {"channel": "tea", "subscribe": {}}
        await hub.publish("tea", 1)
        assert (await ada.push())["pub"] == {"data": 1}
        await hub.unsubscribe_user("7", "tea")
        unsubscribed = {"code": 2000, "reason": "server unsubscribe"}
        assert await ada.push() == {"channel": "tea", "unsubscribe": unsubscribed}
        await ada.get("subscribe", channel="room")
        await hub.close_channel("room")
        assert await ada.push() == {"channel": "room", "unsubscribe": unsubscribed}
        assert hub.channels == {}
        assert hub.clients_of()[0].user == "7"
        await hub.subscribe_user("7", "tea")
        await hub.unsubscribe_user("7", "tea")
        assert await ada.push() == {"channel": "tea", "subscribe": {}}
        assert await ada.push() == {"channel": "tea", "unsubscribe": unsubscribed}
        assert hub.channels == {}
        await hub.disconnect_user("7", reconnect=True)
        assert await ada.closed() == (3011, "force reconnect")
        async with room.talker("7") as again:
            await hub.disconnect_user("7")
            assert await again.closed() == (3503, "force disconnect")
