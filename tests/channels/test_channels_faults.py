"""What clients of channels see when the broker, a hook or they themselves fail."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest
from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.routing import WebSocketRoute

from channels.speaking import Open, narrow, serving
from starcast import (
    BackendUnavailable,
    Broadcast,
    Client,
    History,
    Limits,
    Presence,
    Subscription,
    Tuning,
)
from support import Broker, Bus, Served, until

pytestmark = pytest.mark.anyio

IMPATIENT = Tuning(publish_timeout=0.2, first_backoff=0.01, max_backoff=0.05)


def hub_on(broker: Broker, **options: object) -> Broadcast:
    return Broadcast(backend=Bus(broker), tuning=IMPATIENT, **options)


async def test_commands_fail_while_the_broker_is_away(caplog):
    broker = Broker()
    async with serving(hub=hub_on(broker)) as room, room.talker() as ada:
        await ada.get("subscribe", channel="room")
        broker.kill()
        error = await ada.ask("publish", channel="room", data=1)
        assert error["error"]["code"] == 100
        assert error["error"]["temporary"] is True
        assert "commands of clients fail" in caplog.text
        caplog.clear()
        assert await ada.error("subscribe", channel="other") == 100
        broker.up = True
        await until(lambda: room.hub.stats().backend.state == "connected")
        assert await ada.get("subscribe", channel="other") == {}
        await ada.send({"id": 9, "publish": {"channel": "room", "data": 1}})
        assert (await ada.push())["pub"]["data"] == 1
        assert await ada.next() == {"id": 9, "publish": {}}
    caplog.clear()


async def test_a_client_whose_first_channels_cannot_be_had_comes_back():
    class Endpoint(Open):
        async def on_connect(self, websocket, token, data):
            return Client(channels=["refused"])

    broker = Broker()
    broker.refused.add("default:refused")
    async with serving(Endpoint, hub_on(broker)) as room, room.socket() as ada:
        await ada.send({"id": 1, "connect": {}})
        assert await ada.closed() == (3004, "internal server error")


async def test_a_message_too_large_for_the_broker_is_an_error():
    async with (
        serving(hub=Broadcast(backend=Bus(max_payload=1000))) as room,
        room.talker() as ada,
    ):
        assert await ada.error("publish", channel="room", data="x" * 2000) == 106
        assert await ada.get("publish", channel="room", data="x") == {}


async def test_a_user_who_cannot_be_subscribed_is_closed_and_comes_back():
    broker = Broker()
    broker.refused.add("default:refused")
    async with serving(hub=hub_on(broker)) as room, room.talker("7") as ada:
        await room.hub.subscribe_user("7", "refused")
        assert (await ada.closed())[0] == 1013


async def test_a_call_that_refuses_its_client_closes_it():
    class Endpoint(Open):
        async def on_rpc(self, websocket, method, data):
            raise WebSocketException(4001, "no")

    async with serving(Endpoint) as room, room.talker() as ada:
        await ada.send({"id": 5, "rpc": {"method": "x"}})
        assert await ada.closed() == (4001, "no")


async def test_the_handshake_is_answered_by_the_apps_handler_if_it_has_one():
    hub = Broadcast("redis://127.0.0.1:1", open_timeout=0)

    class Endpoint(Open):
        broadcast = hub

    async def handle(websocket, exc):
        handled.append(exc)
        await websocket.close()

    handled: list[Exception] = []
    app = Starlette(
        routes=[WebSocketRoute("/", Endpoint)], exception_handlers={BackendUnavailable: handle}
    )
    served = Served(app)
    await served.start()
    with pytest.raises(Exception, match="403"):
        await served.connect("/")
    assert len(handled) == 1
    await served.stop()


async def test_a_client_that_leaves_while_it_subscribes_is_on_no_channel():
    broker = Broker()
    async with serving(hub=Broadcast(backend=Bus(broker))) as room:
        async with room.talker() as ada:
            broker.open.clear()
            await ada.send({"id": 5, "subscribe": {"channel": "room"}})
            await until(lambda: broker.stalled)
        await asyncio.sleep(0)
        broker.open.set()
        await until(lambda: not len(room.hub))
        await until(lambda: room.hub.stats().backend.channels == 0)
        assert room.hub.channels == {}


async def test_the_server_subscribes_a_client_that_is_about_to_subscribe():
    Slow.asked, Slow.go = asyncio.Event(), asyncio.Event()
    async with serving(Slow) as room, room.talker("7") as ada:
        await ada.send({"id": 5, "subscribe": {"channel": "room"}})
        await Slow.asked.wait()
        await room.hub.subscribe_user("7", "room")
        assert await ada.push() == {"channel": "room", "subscribe": {}}
        Slow.go.set()
        assert (await ada.next())["error"]["code"] == 105
        assert room.hub.channels == {"room": 1}


class Slow(Open):
    """Says when it is asked, and waits."""

    asked: asyncio.Event
    go: asyncio.Event

    async def on_subscribe(self, websocket, channel, token, data):
        Slow.asked.set()
        await Slow.go.wait()
        return Subscription(expires_at=time.time() + 1000)


async def test_a_subscription_that_ends_while_it_is_renewed():
    Slow.asked, Slow.go = asyncio.Event(), asyncio.Event()
    async with serving(Slow) as room, room.talker("7") as ada:
        Slow.go.set()
        await ada.get("subscribe", channel="room")
        Slow.asked.clear()
        Slow.go.clear()
        await ada.send({"id": 5, "sub_refresh": {"channel": "room", "token": "x"}})
        await Slow.asked.wait()
        await room.hub.unsubscribe_user("7", "room")
        assert (await ada.push())["unsubscribe"]["code"] == 2000
        Slow.go.set()
        assert await ada.next() == {"id": 5, "sub_refresh": {}}
        assert room.hub.channels == {}


async def test_the_server_unsubscribes_a_client_that_is_being_subscribed():
    broker = Broker()
    waiting, go = asyncio.Event(), asyncio.Event()

    async def subscribe(connection, channel, proceed):
        if channel == "default:room":
            waiting.set()
            await go.wait()
        await proceed()

    hub = Broadcast(backend=Bus(broker, on_subscribe=subscribe))
    async with serving(hub=hub) as room, room.talker("7") as ada:
        await ada.send({"id": 5, "subscribe": {"channel": "room"}})
        await waiting.wait()
        await room.hub.unsubscribe_user("7", "room")
        await room.hub.send_user("7", "after that")
        assert await ada.push() == {"message": {"data": "after that"}}
        go.set()
        assert await ada.next() == {"id": 5, "subscribe": {}}
        assert (await ada.push())["unsubscribe"]["code"] == 2000
        assert room.hub.channels == {}


async def test_a_channel_that_the_server_has_chosen_ends_with_the_connection():
    """Clients do not subscribe to it again by themselves."""

    class Endpoint(Open):
        async def on_connect(self, websocket, token, data):
            expires_at = time.time() + 0.2 if token == "short" else None
            return Client(channels={"news": Subscription(expires_at=expires_at)})

    hub = Broadcast(max_buffer=50_000, tuning=Tuning(close_timeout=0.2))
    async with serving(Endpoint, hub, send_buffer=8192) as room:
        async with room.talker("short") as ada:
            assert await ada.closed() == (3005, "connection expired")
        async with narrow(room) as ada:
            ada.socket.transport.pause_reading()
            while hub.channels:
                await hub.publish("news", "x" * 2000)
            await until(lambda: not len(hub))
            assert hub.stats().slow_clients == 1


async def test_data_that_cannot_be_written_subscribes_nobody(caplog):
    class Endpoint(Open):
        async def on_subscribe(self, websocket, channel, token, data):
            return Subscription(data=object())

    for history in (None, History()):
        async with (
            serving(Endpoint, Broadcast(history=history)) as room,
            room.talker() as ada,
        ):
            assert await ada.error("subscribe", channel="room") == 107
            assert room.hub.channels == {}


async def test_senders_wait_for_a_member_that_is_behind():
    """So nobody is unsubscribed who reads as fast as it can."""
    hub = Broadcast(max_buffer=70_000, history=History(size=1000))
    async with (
        serving(hub=hub, send_buffer=8192) as room,
        narrow(room) as ada,
        room.talker() as bob,
    ):
        await ada.get("subscribe", channel="room")

        async def publish() -> None:
            for number in range(300):
                data = f"{number} {'x' * 5000}"
                await bob.send({"id": 9, "publish": {"channel": "room", "data": data}})

        ada.socket.transport.pause_reading()
        publishing = asyncio.create_task(publish())
        await until(lambda: hub.stats().waiting_senders)
        ada.socket.transport.resume_reading()
        for number in range(300):
            push = await ada.push()
            assert push["pub"]["data"].startswith(f"{number} ")
        await publishing
        for _ in range(300):
            assert await bob.next() == {"id": 9, "publish": {}}
        assert hub.stats().dropped == 0


async def test_models_need_pydantic(monkeypatch, caplog):
    class Endpoint(Open):
        async def on_publish(self, websocket, channel, data: tuple[int, str, bytes]):
            return data

    monkeypatch.setitem(sys.modules, "pydantic", None)
    async with serving(Endpoint) as room, room.talker() as ada:
        assert await ada.error("publish", channel="room", data=[1, "a", "b"]) == 100
        assert "pydantic has to be installed for tuple[int, str, bytes]" in caplog.text
    caplog.clear()


async def test_functions_may_leave_out_what_they_do_not_need():
    hub = Broadcast()

    async def live(websocket):
        await hub.serve_channels(websocket)

    served = Served(Starlette(routes=[WebSocketRoute("/", live)], lifespan=hub.lifespan))
    await served.start()
    async with served.connect("/") as socket:
        await socket.send('{"id":1,"connect":{}}')
        assert '"client"' in await socket.recv()
        await socket.send('{"id":2,"publish":{"channel":"room"}}')
        assert '"code":103' in await socket.recv()
    await served.stop()


class Members(Open):
    async def on_subscribe(self, websocket, channel, token, data):
        return Subscription(presence=token != "watch", join_leave=token == "watch")


async def test_presence_that_cannot_be_had_ends_the_subscription_which_is_tried_again():
    broker = Broker()
    broker.refused.add("default:\x01presence")
    async with serving(Members, hub_on(broker)) as room, room.talker() as ada:
        assert await ada.get("subscribe", channel="room") == {}
        assert (await ada.push())["unsubscribe"]["code"] == 2500
        assert room.hub.channels == {}
        broker.refused.clear()
        assert await ada.get("subscribe", channel="room") == {}
        assert (await ada.get("presence_stats", channel="room"))["num_clients"] == 1


async def test_who_only_watches_may_not_look():
    hub = Broadcast(presence=Presence(interval=0.02))
    async with serving(Members, hub) as room, room.talker("7") as ada, room.talker() as bob:
        await ada.get("subscribe", channel="room", token="watch")
        assert await ada.error("presence", channel="room") == 103
        await bob.get("subscribe", channel="room")
        assert "join" in await ada.push()


async def test_a_flood_of_commands_that_are_refused_lets_others_have_a_turn():
    class Endpoint(Open):
        limits = Limits(burst=1)

    async with serving(Endpoint) as room, room.talker() as ada, room.socket() as eve:
        await eve.raw("\n".join(f'{{"id":{number},"x":{{}}}}' for number in range(1, 3)))
        assert (await eve.closed())[0] == 3501
        await ada.raw("\n".join(f'{{"id":{number},"x":{{}}}}' for number in range(1, 300)))
        errors = [(await ada.next())["error"]["code"] for _ in range(299)]
        assert errors[-1] == 111
