"""Who is told of joins and leaves: code on the server, and clients of endpoints and `serve`."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from presence.rooms import QUICK, TUNING, are, hubs, ids, member, receive_all, told
from starcast import (
    BackendUnavailable,
    Broadcast,
    BroadcastEndpoint,
    Event,
    InvalidChannel,
    Member,
    MemberChange,
    Presence,
    SubscriberLagged,
    Unsubscribed,
)
from starcast.presence.announcer import Announcement
from support import Broker, Bus, OtherLoop, Peer, starcast_tasks, until

pytestmark = pytest.mark.anyio


async def test_code_is_told_who_joins_and_leaves():
    async with hubs(2) as (one, two):
        ada = await member(one, "ada")
        async with two.watch_members("room") as watch:
            assert watch.members == [Member("ada")]
            await member(one, "bob")
            assert await watch.get() == MemberChange([Member("bob")], [])
            await one.disconnect(ada.websocket, "room")
            async for joined, left in watch:
                assert (joined, left) == ([], [Member("ada")])
                break
        await member(one, "eve")
        assert two.stats().subscribers == 0
        with pytest.raises(Unsubscribed):
            await watch.get()


async def test_who_watches_later_knows_what_the_first_one_knows():
    slow = Presence(ttl=60, grace=60, interval=0.02)
    async with Broadcast(presence=slow) as hub, hub.watch_members("room") as first:
        ada = await member(hub, "ada")
        assert (await first.get()).joined == [Member("ada")]
        await hub.close(ada.websocket)
        await are(hub, "ada")
        async with hub.watch_members("room") as second:
            # Its leave is not told yet: it may come back.
            assert second.members == [Member("ada")]
            await member(hub, "bob")
            for watch in (first, second):
                assert await watch.get() == MemberChange([Member("bob")], [])


async def test_a_watch_ends_with_its_hub_and_lags_as_a_subscriber_does():
    async with Broadcast(presence=QUICK, max_buffer=1) as hub:
        watcher = Peer()
        await hub.connect(watcher.websocket, join_leave=True)
        async with hub.watch_members() as watch:
            for number, name in enumerate(("ada", "bob"), 1):
                await member(hub, name, "default")
                await until(lambda number=number: len(told(watcher)) == number)
            assert (await watch.get()).joined == [Member("ada")]
            with pytest.raises(SubscriberLagged, match="'default'"):
                await watch.get()
        async with hub.watch_members() as watch:
            await hub.disconnect()
            assert [change async for change in watch] == []
    with pytest.raises(InvalidChannel):
        hub.watch_members("")


async def test_a_watch_that_cannot_begin_says_so():
    broker = Broker()
    broker.refused.add("default:\x01presence")
    async with Broadcast(backend=Bus(broker), presence=QUICK, tuning=TUNING) as hub:
        broker.refused.clear()
        broker.kill()
        with pytest.raises(BackendUnavailable):
            async with hub.watch_members("room"):
                raise AssertionError("it is not watched")
    assert not starcast_tasks()


async def test_channels_that_were_watched_once_are_forgotten():
    """Those in which nobody joins or leaves are not remembered forever, unlike the others."""
    async with (
        Broadcast(presence=Presence(interval=0.02)) as hub,
        hub.watch_members("hall") as hall,
    ):
        for number in range(500):
            async with hub.watch_members(f"room {number}") as watch:
                assert watch.members == []
        async with hub.watch_members("room 7") as watch:
            await member(hub, "ada", "room 7")
            assert (await watch.get()).joined == [Member("ada")]
        await member(hub, "bob", "hall")
        assert (await hall.get()).joined == [Member("bob")]


async def test_each_loop_is_told_by_itself():
    other = OtherLoop()
    async with Broadcast(presence=QUICK) as hub:

        async def watch_there() -> list[Member]:
            async with hub.watch_members("room") as watch:
                while not (change := await watch.get()).joined:
                    pass
                return change.joined

        watching = asyncio.create_task(asyncio.to_thread(other.run, watch_there()))
        while not watching.done():  # it may begin at any time
            guest = await member(hub, "ada")
            await asyncio.sleep(0.05)
            await hub.disconnect(guest.websocket, "room")
            await asyncio.sleep(0.05)
        assert await watching == [Member("ada")]
    other.close()


class Room(BroadcastEndpoint):
    broadcast = Broadcast(presence=QUICK)
    join_leave = True

    def get_member(self, websocket):
        name = websocket.query_params.get("name")
        return Member(name, {"name": name.title()}) if name else None


async def test_an_endpoint_says_who_its_clients_are(serve):
    app = Starlette(routes=[WebSocketRoute("/ws/{channel}", Room)])
    server = await serve(app)
    async with Room.broadcast as hub, server.connect("/ws/room?name=ada") as ada:
        joined = [{"id": "ada", "info": {"name": "Ada"}}]
        assert json.loads(await ada.recv()) == {"channel": "room", "joined": joined, "left": []}
        async with server.connect("/ws/room?name=bob") as bob, server.connect("/ws/room"):
            assert [it["id"] for it in json.loads(await ada.recv())["joined"]] == ["bob"]
            await bob.send("hello")
            assert await ada.recv() == "hello"
            await are(hub, "ada", "bob")
        # A page that is loaded again within the grace is no news.
        async with server.connect("/ws/room?name=bob") as bob:
            await are(hub, "ada", "bob")
            await bob.send("again")
            assert await ada.recv() == "again"
        assert [it["id"] for it in json.loads(await ada.recv())["left"]] == ["bob"]


async def test_serve_takes_members_too(serve):
    hub = Broadcast(presence=QUICK)

    async def room(websocket):
        await hub.serve(websocket, "room", member=Member(7), join_leave=True)

    server = await serve(Starlette(routes=[WebSocketRoute("/ws", room)]))
    async with hub, server.connect("/ws") as client:
        assert json.loads(await client.recv())["joined"] == [{"id": "7"}]
        assert await ids(hub) == ["7"]


def test_the_hook_is_a_plain_function():
    with pytest.raises(TypeError, match="get_member is not awaited"):

        class Asynchronous(BroadcastEndpoint):
            async def get_member(self, websocket):
                raise AssertionError("not called")


async def test_a_handler_that_leaves_the_channel_of_a_client_that_is_gone_loses_it():
    """Handlers clean up with the name of the channel, and that is no leave."""
    async with Broadcast(presence=QUICK) as hub:
        watcher = Peer()
        await hub.connect(watcher.websocket, "room", join_leave=True)
        for _ in range(3):  # a page that is loaded again and again
            ada = await member(hub, "ada")
            await until(lambda: told(watcher))
            ada.leave()
            await receive_all(ada)
            await hub.disconnect(ada.websocket, "room")
        await are(hub)
        assert told(watcher) == [(["ada"], [])]
        await until(lambda: told(watcher)[1:] == [([], ["ada"])])


def test_an_announcement_is_made_once_in_a_form(monkeypatch):
    made = []

    def make(announcement: Announcement) -> Event:
        made.append(announcement.left)
        return Event("", "in another form")

    monkeypatch.setitem(Announcement.makers, 1 << 30, make)
    announcement = Announcement("room", [], [("1", Member("ada"))])
    assert announcement.in_form(0) is announcement
    assert announcement.in_form(1 << 30) is announcement.in_form(1 << 30)
    assert made == [[("1", Member("ada"))]]
