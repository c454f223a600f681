"""Who is on a channel, on all workers together, and who is told of it."""

from __future__ import annotations

import asyncio
import datetime
import json
import random
import signal
import uuid

import pytest

from channels.speaking import Open, serving
from history.brokers import kept_url as kept_url  # a fixture
from presence.rooms import (
    QUICK,
    TUNING,
    are,
    hubs,
    ids,
    member,
    receive_all,
    told,
    until_counts,
    worker,
)
from starcast import (
    BackendUnavailable,
    Broadcast,
    Client,
    ConfigurationError,
    Member,
    MemberCounts,
    Presence,
    Subscription,
    Tuning,
)
from support import Broker, Bus, OtherLoop, Peer, until

pytestmark = pytest.mark.anyio


async def test_members_are_the_same_on_all_workers():
    async with hubs(3) as (one, two, three):
        ada = await member(one, "ada")
        await member(two, "ada")
        await member(two, "bob")
        await member(two, "eve", "other")
        for hub in (one, two, three):
            await are(hub, "ada", "bob")
            counts = await hub.member_counts(["room", "other", "empty"])
            assert counts == {
                "room": MemberCounts(3, 2),
                "other": MemberCounts(1, 1),
                "empty": MemberCounts(0, 0),
            }
        await one.disconnect(ada.websocket, "room")
        for hub in (one, two, three):
            await until_counts(hub, MemberCounts(2, 2))
        # Nothing of this is among the app's own.
        assert one.channels == {}
        assert three.stats().subscribers == 0


async def test_a_worker_that_has_just_begun_knows_all():
    async with hubs(2) as (one, two):
        for number in range(300):  # more than one message takes
            await member(one, f"{number} {'x' * 100}")
        assert len(await two.members("room")) == 300


async def test_what_others_see_of_a_member():
    async with Broadcast(presence=QUICK) as hub:
        peer = Peer()
        ada = Member(uuid.UUID(int=7), {"name": "Ada"}, {"role": "host"})
        await hub.connect(peer.websocket, "room", member=ada)
        assert await hub.members("room") == [ada]
        assert ada.id == str(uuid.UUID(int=7))


async def test_nobody_is_told_of_a_page_that_is_loaded_again():
    async with hubs(2) as (one, two):
        watcher = Peer()
        await two.connect(watcher.websocket, "room", join_leave=True)
        tabs = [await member(one, "ada") for _ in range(3)]
        await until(lambda: told(watcher) == [(["ada"], [])])
        for tab in tabs:
            tab.leave()
            await receive_all(tab)
            await one.disconnect(tab.websocket)
        again = await member(two, "ada")
        await member(two, "bob")
        await until(lambda: told(watcher)[1:] == [(["bob"], [])])
        again.leave()
        await receive_all(again)
        await two.disconnect(again.websocket)
        assert await ids(one) == ["ada", "bob"]  # for a while
        await until(lambda: told(watcher)[2:] == [([], ["ada"])])
        assert await ids(two) == ["bob"]


async def test_who_leaves_the_channel_has_left_at_once():
    async with hubs(2, Presence(ttl=60, grace=60, interval=0.02)) as (one, two):
        watcher = Peer()
        await two.connect(watcher.websocket, "room", join_leave=True)
        ada = await member(one, "ada")
        await one.connect(ada.websocket, "other", user="7")
        await until(lambda: told(watcher) == [(["ada"], [])])
        await one.disconnect(ada.websocket, "room")
        await until(lambda: told(watcher)[1:] == [([], ["ada"])])
        await one.connect(ada.websocket, "room", member=Member("ada"))
        await until(lambda: told(watcher)[2:] == [(["ada"], [])])
        await two.unsubscribe_user("7", "room")
        await until(lambda: told(watcher)[3:] == [([], ["ada"])])
        # One that wants to know no more is told nothing.
        await two.disconnect(watcher.websocket, "room")
        await member(two, "bob")
        await are(one, "bob")


async def test_those_who_join_together_are_announced_together():
    async with Broadcast(presence=Presence(interval=0.2)) as hub:
        watcher = Peer()
        await hub.connect(watcher.websocket, "room", join_leave=True)
        for number in range(50):
            await member(hub, str(number))
        await until(lambda: sum(len(joined) for joined, _ in told(watcher)) == 50)
        assert len(told(watcher)) == 1


async def test_a_client_that_wants_to_know_is_told_with_the_others():
    async with Broadcast(presence=QUICK) as hub:
        ada = Peer()
        info = {"name": "Ada"}
        await hub.connect(
            ada.websocket, "room", member=Member("ada", info, 5), join_leave=True, ids=True
        )
        await until(lambda: told(ada))
        assert json.loads(ada.sent[-1]["text"]) == {
            "channel": "room",
            "joined": [{"id": "ada", "info": info, "channel_info": 5}],
            "left": [],
        }


async def test_clients_of_several_processes_are_told_apart(urls):
    name = uuid.uuid4().hex
    async with (
        worker(urls("redis"), name, clients=20),
        worker(urls("redis"), name, clients=20),
        Broadcast(urls("redis"), name=name, presence=QUICK) as hub,
    ):
        await until_counts(hub, MemberCounts(40, 1))


async def test_the_members_of_a_worker_go_with_it_and_come_back_with_it(urls):
    name = uuid.uuid4().hex
    async with (
        Broadcast(urls("redis"), name=name, presence=QUICK) as hub,
        worker(urls("redis"), name) as process,
    ):
        watcher = Peer()
        await hub.connect(watcher.websocket, "room", join_leave=True, member=Member("me"))
        await are(hub, "ada", "me")
        process.send_signal(signal.SIGSTOP)
        await are(hub, "me")
        await until(lambda: told(watcher)[-1:] == [([], ["ada"])])
        process.send_signal(signal.SIGCONT)
        await are(hub, "ada", "me")
        process.kill()
        await are(hub, "me")
        await until(lambda: told(watcher)[-1:] == [([], ["ada"])])


async def test_a_worker_that_leaves_in_good_order_says_so():
    broker = Broker()
    patient = Presence(ttl=600, grace=0.3, interval=0.02)
    async with Broadcast(backend=Bus(broker), presence=patient) as one:
        watcher = Peer()
        await one.connect(watcher.websocket, "room", join_leave=True)
        async with Broadcast(backend=Bus(broker), presence=QUICK) as two:
            await member(two, "ada")
            await until(lambda: told(watcher) == [(["ada"], [])])
            await are(one, "ada")
        await are(one)
        await until(lambda: told(watcher)[-1:] == [([], ["ada"])])


async def test_members_come_back_after_an_outage():
    broker = Broker()
    async with (
        Broadcast(backend=Bus(broker), presence=QUICK, tuning=TUNING) as one,
        Broadcast(backend=Bus(broker), presence=QUICK, tuning=TUNING) as two,
    ):
        await member(one, "ada")
        await member(two, "bob")
        await are(one, "ada", "bob")
        broker.kill()
        await are(one, "ada")  # the others cannot be heard of any more
        broker.restart()
        for hub in (one, two):
            await are(hub, "ada", "bob")


async def test_loops_of_one_process_know_each_other():
    other = OtherLoop()
    async with Broadcast(presence=QUICK) as hub:
        other.run(member(hub, "ada"))
        await member(hub, "bob")
        await are(hub, "ada", "bob")
        assert other.run(ids(hub)) == ["ada", "bob"]
        other.close()
        await are(hub, "bob")


async def test_two_hubs_are_two_rooms():
    broker = Broker()
    async with (
        Broadcast(backend=Bus(broker), name="one", presence=QUICK) as one,
        Broadcast(backend=Bus(broker), name="two", presence=QUICK) as two,
    ):
        await member(one, "ada")
        assert await ids(two) == []
        await are(one, "ada")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "[]",
        "{}",
        "[" * 100_000,
        '{"node":5,"beat":1}',
        '{"node":"x","beat":"y"}',
        '{"node":"x","change":1,"in":[["room"]]}',
        '{"node":"x","change":1,"in":[["room","1","",null,null]]}',
        '{"node":"x","whole":1,"part":9,"parts":1,"in":[],"more":1}',
        '{"node":"x","ask":["y"]}',
        '{"node":"x","bye":null}',
        '{"node":"x","unheard of":1}',
        '{"node":"x","whole":5,"part":0,"parts":1000000000,"in":[]}',
        '{"node":"x","whole":5,"part":0,"parts":-1,"in":[]}',
        '{"node":"x","whole":1,"in":[["room","\\ud800","ada",null,null]]}',
        '{"node":"x","whole":1,"in":[["\\ud800","1","ada",null,null]]}',
        '{"node":"x","whole":1,"in":[["room","1","ada",NaN,null]]}',
        '{"node":"x","whole":1,"in":[["room",1,"ada",null,null]]}',
        '{"node":"x","whole":true,"in":[["room","1","eve",null,null]]}',
        '{"node":"x","change":-1,"in":[["room","1","eve",null,null]]}',
        '{"node":"x","beat":1e400}',
        '{"node":"' + "x" * 1000 + '","beat":5}',
        '{"node":"x","out":[],"change":' + "9" * 5000 + "}",
        "\ud7ff\x00",
    ],
    ids=lambda text: text[:30],
)
async def test_what_others_write_to_the_broker_breaks_nothing(text):
    broker = Broker()
    async with Broadcast(backend=Bus(broker), presence=QUICK) as hub:
        await member(hub, "ada")
        backend = await Bus(broker).connect(lambda *message: None, lambda error: None)
        await backend.publish([("default:\x01presence", text.encode())])
        await backend.close()
        await are(hub, "ada")
        async with hub.watch_members("room") as watch:
            await member(hub, "bob")
            assert (await watch.get()).joined == [Member("bob")]
        await are(hub, "ada", "bob")


def test_values_that_make_no_sense():
    for wrong in [{"ttl": 0}, {"grace": -1}, {"interval": "x"}]:
        with pytest.raises(ConfigurationError):
            Presence(**wrong)
    with pytest.raises(TypeError, match="None is no user"):
        Member(None)
    with pytest.raises(ConfigurationError):
        Member("x" * 151)
    for info in ("x" * 3000, "\u20ac" * 1000):
        with pytest.raises(ConfigurationError, match="2048 bytes"):
            Member("x", info)
    for info in (float("nan"), "\ud800", object()):
        with pytest.raises(ConfigurationError, match="must be JSON data"):
            Member("x", info)


async def test_what_is_no_member_is_refused_before_the_client_joins():
    async with Broadcast(presence=QUICK) as hub:
        with pytest.raises(TypeError, match="member needs a Member"):
            await hub.connect(Peer().websocket, "room", member="ada")
        assert hub.channels == {}


async def test_info_is_what_it_was_when_the_member_was_made():
    """Otherwise an app that changes it would break what workers tell each other."""
    info = {"since": datetime.date(2026, 1, 1), 5: (1,)}
    ada = Member("ada", info, channel_info=info)
    info["more"] = object()
    plain = {"since": "2026-01-01", "5": [1]}
    async with hubs(2) as (one, two):
        await one.connect(Peer().websocket, "room", member=ada)
        await are(two, "ada")
        assert await two.members("room") == [Member("ada", plain, plain)]


async def test_who_leaves_and_comes_back_at_once_is_a_member():
    async with hubs(2) as (one, two):
        ada = await member(one, "ada")
        await one.connect(ada.websocket, "other")
        for _ in range(3):
            await one.disconnect(ada.websocket, "room")
            await one.connect(ada.websocket, "room", member=Member("ada"))
        await one.connect(ada.websocket, "room", member=Member("eve"))  # it is somebody else now
        await until_counts(two, MemberCounts(1, 1))
        await are(one, "eve")
        await are(two, "eve")


async def test_a_client_that_leaves_while_it_enters_is_no_member():
    async with hubs(1) as (hub,):
        peer = Peer()
        connecting = asyncio.create_task(
            hub.connect(peer.websocket, "room", member=Member("ada"), join_leave=True)
        )
        await until(lambda: hub.channels)
        await hub.disconnect(peer.websocket)
        await connecting
        await are(hub)


async def test_a_client_that_cannot_enter_is_not_on_the_channel():
    broker = Broker()
    broker.refused.add("default:\x01presence")
    async with Broadcast(backend=Bus(broker), tuning=Tuning(publish_timeout=0.1)) as hub:
        peer = Peer()
        await hub.connect(peer.websocket, "other")
        with pytest.raises(BackendUnavailable):
            await hub.connect(peer.websocket, "room", member=Member("ada"))
        assert hub.channels == {"other": 1}


async def test_it_holds_at_rest_whatever_happens():
    """Random joins, leaves and losses on three workers, compared with a model in the end."""
    chance = random.Random(7)
    async with hubs(3) as workers:
        here: list[tuple[Broadcast, Peer, str]] = []
        for _ in range(300):
            action = chance.random()
            if action < 0.5 or not here:
                hub, id = chance.choice(workers), str(chance.randrange(20))
                here.append((hub, await member(hub, id), id))
            elif action < 0.75:
                hub, peer, _ = here.pop(chance.randrange(len(here)))
                await hub.disconnect(peer.websocket, chance.choice(["room", None]))
            else:
                hub, peer, _ = here.pop(chance.randrange(len(here)))
                await hub.close(peer.websocket)
            if chance.random() < 0.1:
                await asyncio.sleep(0.01)
        expected = sorted({id for _, _, id in here})
        for hub in workers:
            await are(hub, *expected)
            await until_counts(hub, MemberCounts(len(here), len(expected)))


async def test_it_is_the_same_over_each_broker(kept_url):
    name = uuid.uuid4().hex
    async with (
        Broadcast(kept_url, name=name, presence=QUICK) as one,
        Broadcast(kept_url, name=name, presence=QUICK) as two,
    ):
        watcher = Peer()
        await two.connect(watcher.websocket, "room", join_leave=True)
        ada = await member(one, "ada")
        for number in range(200):  # more than one message takes
            await member(one, f"{number} {'x' * 100}")
        await until_counts(two, MemberCounts(201, 201))
        await one.disconnect(ada.websocket, "room")
        await until(lambda: any("ada" in left for _, left in told(watcher)))


# Clients of channels


class Gathering(Open):
    async def on_connect(self, websocket, token, data):
        return Client(user=token, info={"name": token}) if token else Client()

    async def on_subscribe(self, websocket, channel, token, data):
        return Subscription(presence=True, join_leave=True, info=data)


async def test_clients_of_the_protocol_are_members():
    async with (
        serving(Gathering, Broadcast(presence=QUICK)) as room,
        room.talker("ada") as ada,
        room.talker("bob") as bob,
        room.talker() as stranger,
    ):
        await ada.get("subscribe", channel="room", data={"role": "host"})
        join = await ada.push()
        info = join["join"]["info"]
        assert info.pop("client")
        assert join == {
            "channel": "room",
            "join": {
                "info": {
                    "user": "ada",
                    "conn_info": {"name": "ada"},
                    "chan_info": {"role": "host"},
                }
            },
        }
        await bob.get("subscribe", channel="room")
        await stranger.get("subscribe", channel="room")
        users = {(await ada.push())["join"]["info"]["user"] for _ in range(2)}
        assert users == {"bob", ""}
        presence = (await ada.get("presence", channel="room"))["presence"]
        assert {it["user"] for it in presence.values()} == {"ada", "bob", ""}
        assert all(client == it["client"] for client, it in presence.items())
        assert await bob.get("presence_stats", channel="room") == {
            "num_clients": 3,
            "num_users": 3,
        }
        assert {"ada", "bob"} < {it.id for it in await room.hub.members("room")}
        await bob.get("unsubscribe", channel="room")
        assert (await ada.push())["leave"]["info"]["user"] == "bob"
        await stranger.socket.close()
        assert (await ada.push())["leave"]["info"]["user"] == ""
        assert await bob.error("presence", channel="room") == 103
