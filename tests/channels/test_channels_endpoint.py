"""Clients with many channels: what they may do, and what they get."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, Query, WebSocket
from pydantic import BaseModel
from starlette.exceptions import WebSocketException
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from channels.speaking import Open, serving
from starcast import (
    Broadcast,
    ChannelsEndpoint,
    Client,
    CommandError,
    ConfigurationError,
    DisconnectClient,
    History,
    Limits,
    Subscription,
)
from support import until

pytestmark = pytest.mark.anyio


async def test_a_client_connects_subscribes_and_publishes():
    async with serving() as room, room.talker("7") as ada, room.talker("8") as bob:
        assert await ada.get("subscribe", channel="room:tea") == {}
        assert await bob.get("publish", channel="room:tea", data={"text": "hello"}) == {}
        push = await ada.push()
        assert push["channel"] == "room:tea"
        assert push["pub"]["data"] == {"text": "hello"}
        assert push["pub"]["info"]["user"] == "8"
        assert await ada.get("unsubscribe", channel="room:tea") == {}
        assert room.hub.channels == {}
        assert len(room.hub) == 2
    await until(lambda: not len(room.hub))


async def test_what_the_server_publishes_keeps_its_type():
    async with serving() as room, room.talker() as ada:
        await ada.get("subscribe", channel="room")
        for message in ['{"a": 1}', {"a": [1, "\n"]}, "hello", 5, b"\xff", None]:
            await room.hub.publish("room", message)
        got = [(await ada.push())["pub"] for _ in range(6)]
        assert [pub["data"] for pub in got] == [
            '{"a": 1}',
            {"a": [1, "\n"]},
            "hello",
            5,
            "/w==",
            None,
        ]
        assert got[4]["tags"] == {"encoding": "base64"}


async def test_json_on_several_lines_stays_one_reply():
    hub = Broadcast(dumps=lambda data: '{\n"a":\r\n1}')
    async with serving(hub=hub) as room, room.talker() as ada:
        await ada.get("subscribe", channel="room")
        await hub.publish("room", {})
        assert (await ada.push())["pub"]["data"] == {"a": 1}


async def test_a_turns_publications_share_a_frame():
    async with serving() as room, room.talker() as ada:
        await ada.get("subscribe", channel="room")
        for number in range(10):
            room.hub.publish_nowait("room", number)
        assert [(await ada.push())["pub"]["data"] for _ in range(10)] == list(range(10))
        assert len(ada.frames) == 3  # with those of the two replies


async def test_commands_and_replies_share_a_frame():
    async with serving() as room, room.talker() as ada:
        await ada.send(*({"id": n, "subscribe": {"channel": f"room:{n}"}} for n in range(10, 20)))
        assert [(await ada.next())["id"] for _ in range(10)] == list(range(10, 20))
        assert len(ada.frames) <= 3
        assert len(room.hub.channels) == 10


async def test_nothing_is_allowed_unless_a_hook_allows_it():
    async with serving(ChannelsEndpoint) as room, room.talker() as ada:
        assert await ada.error("subscribe", channel="room") == 103
        assert await ada.error("publish", channel="room", data=1) == 103
        assert await ada.error("history", channel="room") == 103
        assert await ada.error("presence", channel="room") == 103
        assert await ada.error("presence_stats", channel="room") == 103
        assert await ada.error("rpc", method="add", data=1) == 104
        assert await ada.error("refresh", token="x") == 103
        assert await ada.error("sub_refresh", channel="room", token="x") == 103
        assert await ada.error("unheard_of") == 104


class Forgetful(ChannelsEndpoint):
    async def on_connect(self, websocket, token, data):
        return Client() if token else None

    async def on_subscribe(self, websocket, channel, token, data):
        return None if channel == "none" else True

    async def on_publish(self, websocket, channel, data):
        pass

    def on_refresh(self, websocket, token):
        return True


async def test_a_hook_that_returns_nothing_allows_nothing(caplog):
    async with serving(Forgetful) as room:
        async with room.socket() as stranger:
            assert await stranger.error("connect") == 101
        async with room.talker("x") as ada:
            assert await ada.error("subscribe", channel="none") == 103
            assert await ada.error("publish", channel="room", data=1) == 103
            assert "on_subscribe returned None; return Subscription" in caplog.text
            assert "on_publish returned None; return what is to be published" in caplog.text
            assert await ada.error("subscribe", channel="room") == 100
            assert "on_subscribe has to return Subscription, not bool" in caplog.text
            assert await ada.error("refresh", token="x") == 100
            assert room.hub.channels == {}
    caplog.clear()


class Refusing(Open):
    async def on_connect(self, websocket, token, data):
        if token == "close":
            raise DisconnectClient(4500, "away")
        if token == "websocket":
            raise WebSocketException(4001, "no")
        if token == "expired":
            return Client(expires_at=time.time() - 1)
        if token == "bug":
            raise ZeroDivisionError
        if token != "ok":
            raise PermissionError
        return Client()

    async def on_subscribe(self, websocket, channel, token, data):
        if channel == "expired":
            return Subscription(expires_at=time.time() - 1)
        if channel == "own":
            raise CommandError(1000, "not today", temporary=True)
        raise DisconnectClient(3500, "away")

    async def on_publish(self, websocket, channel, data):
        return {1, 2} if channel == "set" else object()


async def test_hooks_refuse_with_codes_of_their_own(caplog):
    async with serving(Refusing) as room:
        for token, code in [("", 103), ("expired", 109), ("bug", 100)]:
            async with room.socket() as talker:
                assert await talker.error("connect", token=token) == code
        assert "ZeroDivisionError" in caplog.text
        caplog.clear()
        for token, closed in [("close", (4500, "away")), ("websocket", (4001, "no"))]:
            async with room.socket() as talker:
                await talker.send({"id": 1, "connect": {"token": token}})
                assert await talker.closed() == closed
        async with room.talker("ok") as talker:
            assert await talker.error("subscribe", channel="expired") == 109
            reply = await talker.ask("subscribe", channel="own")
            assert reply["error"] == {"code": 1000, "message": "not today", "temporary": True}
            assert await talker.error("publish", channel="object", data=1) == 107
            assert await talker.get("publish", channel="set", data=1) == {}
            await talker.send({"id": 9, "subscribe": {"channel": "away"}})
            assert await talker.closed() == (3500, "away")


async def test_plain_functions_run_in_a_thread():
    class Plain(ChannelsEndpoint):
        def on_connect(self, websocket, token, data):
            with pytest.raises(RuntimeError):
                asyncio.get_running_loop()
            return Client()

        def on_subscribe(self, websocket, channel, token, data):
            async def later():
                return Subscription(data={"a": 1})

            return later()

        def on_disconnect(self, websocket, close_code):
            codes.append(close_code)

    codes: list[int] = []
    async with serving(Plain) as room:
        async with room.talker() as ada:
            assert await ada.get("subscribe", channel="room") == {"data": {"a": 1}}
        await until(lambda: codes)
    assert codes == [1000]


async def test_on_disconnect_is_called_for_those_who_were_let_in():
    codes: list[int] = []

    class Endpoint(Open):
        async def on_disconnect(self, websocket, close_code):
            codes.append(close_code)

    async with serving(Endpoint) as room:
        async with room.socket() as stranger:
            await stranger.socket.close(4000)
        async with room.talker() as ada:
            await ada.socket.close(4001)
        await until(lambda: codes)
        await until(lambda: not len(room.hub))
    assert codes == [4001]


class Point(BaseModel):
    x: int
    y: int = 0


class Typed(Open):
    models: Mapping[str, Any] = {"move": Point}  # it does not change

    async def on_publish(self, websocket, channel, data: Point):
        return data

    async def on_rpc(self, websocket, method, data):
        if method == "move":
            return data.x + data.y
        if method == "fail":
            raise ValueError(method)
        return data


async def test_data_that_does_not_fit_its_model_is_refused_with_pydantics_words(caplog):
    async with serving(Typed) as room, room.talker() as ada:
        await ada.get("subscribe", channel="room")
        await ada.send({"id": 9, "publish": {"channel": "room", "data": {"x": 1}}})
        assert (await ada.push())["pub"]["data"] == {"x": 1, "y": 0}
        assert (await ada.next())["id"] == 9
        reply = await ada.ask("publish", channel="room", data={"x": "one", "y": None})
        assert reply["error"]["code"] == 107
        assert reply["error"]["message"].startswith("x: Input should be a valid integer")
        reply = await ada.ask("publish", channel="room", data=[])
        assert reply["error"]["message"].startswith("Input should be an object")
        assert await ada.get("rpc", method="move", data={"x": 1, "y": 2}) == {"data": 3}
        assert await ada.error("rpc", method="move", data={}) == 107
        assert await ada.get("rpc", method="echo", data=[1]) == {"data": [1]}
        assert not caplog.text
        assert await ada.error("rpc", method="fail") == 100
        assert "ValueError: fail" in caplog.text
        caplog.clear()


async def test_a_type_that_is_there_for_type_checkers_only_is_no_model():
    class Endpoint(Open):
        async def on_publish(self, websocket, channel, data: OnlyForTypeCheckers):  # noqa: F821  # on purpose
            return data

    async with serving(Endpoint) as room, room.talker() as ada:
        assert await ada.get("publish", channel="room", data={"a": 1}) == {}


async def test_methods_run_at_the_same_time_and_are_bounded():
    running: list[int] = []
    most = 0
    go = asyncio.Event()

    class Slow(Open):
        limits = Limits(max_calls=3)

        async def on_rpc(self, websocket, method, data):
            nonlocal most
            running.append(data)
            most = max(most, len(running))
            await go.wait()
            running.remove(data)
            return data

    async with serving(Slow) as room, room.talker() as ada:
        await ada.send(*({"id": n, "rpc": {"method": "x", "data": n}} for n in range(2, 9)))
        await until(lambda: len(running) == 3)
        go.set()
        assert {(await ada.next())["rpc"]["data"] for _ in range(7)} == set(range(2, 9))
    assert most == 3


async def test_a_call_that_runs_ends_with_its_client():
    cancelled = asyncio.Event()
    started = asyncio.Event()

    class Slow(Open):
        async def on_rpc(self, websocket, method, data):
            if method == "leave":
                raise DisconnectClient(4500, "away")
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

    async with serving(Slow) as room, room.talker() as ada:
        await ada.send({"id": 2, "rpc": {"method": "x"}})
        await started.wait()
        await ada.send({"id": 3, "rpc": {"method": "leave"}})
        assert await ada.closed() == (4500, "away")
        await cancelled.wait()


async def test_the_server_subscribes_a_client_as_it_connects():
    class Endpoint(Open):
        async def on_connect(self, websocket, token, data):
            return Client(
                user="7",
                info={"name": "Ada"},
                data={"hello": data},
                channels={"news": Subscription(data=1), "room:7": Subscription()},
            )

    hub = Broadcast(history={"room:*": History()})
    async with serving(Endpoint, hub) as room, room.socket() as ada:
        first = await hub.publish("room:7", "one")
        assert first is not None
        epoch = first.partition("-")[0]
        result = await ada.get("connect", data=5)
        assert result["data"] == {"hello": 5}
        assert result["ping"] == 25
        assert result["pong"] is True
        position = {"recoverable": True, "positioned": True, "epoch": epoch, "offset": 1}
        assert result["subs"] == {"news": {"data": 1}, "room:7": position}
        await hub.publish("room:7", "two")
        assert (await ada.push())["pub"] == {"data": "two", "offset": 2}
        async with room.socket() as again:
            where = {"recover": True, "epoch": epoch, "offset": 1}
            subs = (await again.get("connect", subs={"room:7": where}))["subs"]
            assert subs["room:7"]["recovered"] is True
            assert subs["room:7"]["publications"] == [{"data": "two", "offset": 2}]
            assert subs["news"] == {"data": 1}


async def test_a_client_resumes_or_is_told_that_it_cannot():
    hub = Broadcast(history=History(size=3))
    async with serving(hub=hub) as room, room.talker() as ada:
        start = await ada.get("subscribe", channel="room")
        assert start["recoverable"] is True
        epoch = start["epoch"]
        assert start["offset"] == 0
        assert "recovered" not in start
        await ada.get("unsubscribe", channel="room")
        for number in range(2):
            await hub.publish("room", number)
        where = {"recover": True, "epoch": epoch, "offset": 0}
        result = await ada.get("subscribe", channel="room", **where)
        assert result["recovered"] is True
        assert result["was_recovering"] is True
        assert result["offset"] == 0  # each publication moves it on
        assert result["publications"] == [{"data": 0, "offset": 1}, {"data": 1, "offset": 2}]
        await ada.get("unsubscribe", channel="room")
        for number in range(2, 5):
            await hub.publish("room", number)
        result = await ada.get("subscribe", channel="room", **where)
        assert result["recovered"] is False
        assert result["was_recovering"] is True
        assert result["offset"] == 5
        assert "publications" not in result
        await ada.get("unsubscribe", channel="room")
        assert await ada.error("subscribe", channel="room", flag=2, **where) == 112
        assert room.hub.channels == {}
        where |= {"epoch": "elsewhere"}
        assert (await ada.get("subscribe", channel="room", **where))["recovered"] is False
        await hub.publish("room", 5)
        assert (await ada.push())["pub"] == {"data": 5, "offset": 6}


async def test_a_channel_without_a_history_is_subscribed_to_all_the_same():
    hub = Broadcast(history={"kept": History()})
    async with serving(hub=hub) as room, room.talker() as ada:
        assert await ada.get("subscribe", channel="room", recover=True, epoch="x", offset=1) == {}
        assert await ada.error("history", channel="room") == 108


async def test_history_is_shown_to_those_who_may_see_it():
    class Endpoint(Open):
        async def on_subscribe(self, websocket, channel, token, data):
            return Subscription(history=token == "history")

    hub = Broadcast(history=History(size=3))
    async with serving(Endpoint, hub) as room, room.talker() as ada:
        for number in range(5):
            await hub.publish("room", number)
        await ada.get("subscribe", channel="room")
        assert await ada.error("history", channel="room", limit=10) == 103
        await ada.get("unsubscribe", channel="room")
        await ada.get("subscribe", channel="room", token="history")
        history = await ada.get("history", channel="room", limit=2)
        assert [pub["data"] for pub in history["publications"]] == [2, 3]
        assert history["offset"] == 5
        everything = await ada.get("history", channel="room", limit=-1)
        assert [pub["offset"] for pub in everything["publications"]] == [3, 4, 5]
        assert (await ada.get("history", channel="room"))["publications"] == []
        newest = await ada.get("history", channel="room", limit=1, reverse=True)
        assert [pub["data"] for pub in newest["publications"]] == [4]
        since = {"epoch": history["epoch"], "offset": 4}
        after = await ada.get("history", channel="room", limit=10, since=since)
        assert [pub["data"] for pub in after["publications"]] == [4]
        since["offset"] = 1
        assert await ada.error("history", channel="room", limit=10, since=since) == 112
        for limit in [-2, 1001, "1", 1.5, None]:
            assert await ada.error("history", channel="room", limit=limit) == 107


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("{", 3501),
        ("[]", 3501),
        ("5", 3501),
        ('{"id":1,"connect":[]}\n[', 3501),
        ('{"id":1,"subscribe":{"channel":"room"}}', 3501),
        ('{"id":-1,"connect":{}}', 3501),
        ('{"id":true,"connect":{}}', 3501),
        ('{"id":1e400,"connect":{}}', 3501),
        ('{"connect":{}}', 3501),
        ('{"id":1,"connect":"x"}', 3501),
        ('{"id":1,"connect":{}}\n{"id":2,"connect":{}}', 3501),
        ('{"id":1,"connect":{}}\n{"send":{"data":1}}', 3508),
        ("[" * 100_000, 3501),
        ('{"id":' + "1" * 5000 + ',"connect":{}}', 3501),
        ('{"id":1,"connect":{"token":"\\ud800"}}', 3501),
        (b"\x00\x01", 3501),
        ("x" * 300_000, 1009),
    ],
    ids=str,
)
async def test_bad_input_closes_the_client_with_one_line(frame, code, caplog):
    caplog.set_level(logging.INFO, "starcast")
    async with serving() as room:
        async with room.socket() as talker:
            await talker.raw(frame)
            assert (await talker.closed())[0] == code
        await until(lambda: not len(room.hub))
        lines = [r for r in caplog.records if r.name == "starcast" and r.exc_info is None]
        assert [r for r in lines if str(code) in r.getMessage()]
        assert not [r for r in caplog.records if r.exc_info is not None]
        async with room.talker() as next_one:
            assert await next_one.get("ping") == {}


@pytest.mark.parametrize("name", ["", "x" * 201, "a\0b", "a\r\nb", 5, None, ["room"]])
async def test_names_that_no_channel_has_are_errors(name):
    async with serving() as room, room.talker() as ada:
        for method in ["subscribe", "unsubscribe", "publish", "history"]:
            assert await ada.error(method, channel=name, data=1) == 107
        assert room.hub.channels == {}


async def test_limits():
    class Endpoint(Open):
        limits = Limits(max_subscriptions=2, commands=0.001, burst=6)

    async with serving(Endpoint) as room, room.talker() as ada:
        assert await ada.get("subscribe", channel="a") == {}
        assert await ada.error("subscribe", channel="a") == 105
        assert await ada.get("subscribe", channel="b") == {}
        assert await ada.error("subscribe", channel="c") == 106
        assert await ada.get("ping") == {}
        assert await ada.error("ping") == 111


async def test_a_client_that_says_nothing_is_closed():
    class Endpoint(Open):
        limits = Limits(connect_timeout=0.05)

    async with serving(Endpoint) as room, room.socket() as talker:
        assert await talker.closed() == (3502, "stale")


async def test_pings_have_to_be_answered():
    class Endpoint(Open):
        limits = Limits(ping_interval=0.2, pong_timeout=0.1)

    async with serving(Endpoint) as room, room.talker() as ada:
        for _ in range(3):
            assert await ada.next() == {}
            await ada.raw("{}")
        assert await ada.next() == {}
        assert await ada.closed() == (3012, "no pong")


async def test_a_client_whose_command_takes_long_is_not_closed():
    class Endpoint(Open):
        limits = Limits(ping_interval=0.1, pong_timeout=0.05)

        async def on_subscribe(self, websocket, channel, token, data):
            await go.wait()
            return Subscription()

    go = asyncio.Event()
    async with serving(Endpoint) as room, room.talker() as ada:
        await ada.send({"id": 5, "subscribe": {"channel": "room"}})
        for _ in range(4):
            assert await ada.next() == {}
        go.set()
        await ada.raw("{}")
        while not (reply := await ada.next()):
            await ada.raw("{}")
        assert reply == {"id": 5, "subscribe": {}}


async def test_a_connection_ends_unless_it_is_renewed():
    class Endpoint(Open):
        async def on_connect(self, websocket, token, data):
            return Client(expires_at=time.time() + 0.3)

        async def on_refresh(self, websocket, token):
            return {"good": time.time() + 1000, "old": time.time() - 1}[token]

    async with serving(Endpoint) as room:
        async with room.socket() as ada:
            result = await ada.get("connect")
            assert (result["expires"], result["ttl"]) == (True, 1)
            assert await ada.closed() == (3005, "connection expired")
        async with room.socket() as ada:
            await ada.get("connect")
            assert await ada.error("refresh", token="old") == 109
            renewed = await ada.get("refresh", token="good")
            assert renewed["expires"] is True
            assert 980 < renewed["ttl"] <= 990


async def test_a_subscription_ends_unless_it_is_renewed():
    class Endpoint(Open):
        async def on_subscribe(self, websocket, channel, token, data):
            seconds = {"long": 1000, "old": -1, "": 0.3}.get(token)
            return Subscription(expires_at=None if seconds is None else time.time() + seconds)

    async with serving(Endpoint) as room, room.talker() as ada:
        for channel in "abc":
            result = await ada.get("subscribe", channel=channel)
            assert (result["expires"], result["ttl"]) == (True, 1)
        assert await ada.error("sub_refresh", channel="b", token="old") == 109
        renewed = await ada.get("sub_refresh", channel="b", token="long")
        assert renewed["ttl"] == 989 or renewed["ttl"] == 990
        assert await ada.get("sub_refresh", channel="c", token="for ever") == {}
        assert await ada.push() == {
            "channel": "a",
            "unsubscribe": {"code": 2501, "reason": "subscription expired"},
        }
        assert set(room.hub.channels) == {"b", "c"}


def user(name: Annotated[str, Query()]) -> str:
    return name


async def test_it_serves_functions_of_fastapi_with_dependencies():
    hub = Broadcast()
    app = FastAPI(lifespan=hub.lifespan)

    @app.websocket("/live")
    async def live(websocket: WebSocket, name: Annotated[str, Depends(user)]) -> None:
        async def on_connect(websocket: WebSocket, token: str, data: Any) -> Client:
            return Client(user=name)

        async def on_publish(websocket: WebSocket, channel: str, data: Any) -> Any:
            return {"by": name}

        codes.append(
            await hub.serve_channels(
                websocket, on_connect=on_connect, on_publish=on_publish, limits=Limits()
            )
        )

    codes: list[int] = []
    with TestClient(app) as client:
        with client.websocket_connect("/live?name=Ada") as socket:
            socket.send_json({"id": 1, "connect": {}})
            assert socket.receive_json()["connect"]["client"]
            socket.send_json({"id": 2, "publish": {"channel": "room", "data": 1}})
            assert socket.receive_json() == {"id": 2, "publish": {}}
            for method, code in [("subscribe", 103), ("rpc", 104), ("refresh", 108)]:
                socket.send_json({"id": 3, method: {"channel": "room", "method": "x"}})
                assert socket.receive_json()["error"]["code"] == code
        with client.websocket_connect("/live?name=Bob") as socket:
            socket.close(4000)
    assert codes == [1000, 4000]


async def test_fastapi_takes_the_class_for_a_function():
    app = FastAPI()
    app.websocket("/live")(Open)
    with TestClient(app).websocket_connect("/live") as socket:
        socket.send_json({"id": 1, "connect": {}})
        assert "client" in socket.receive_json()["connect"]


async def test_a_foreign_page_is_not_let_in():
    async with serving() as room:
        with pytest.raises(Exception, match="403"):
            async with room.socket(additional_headers={"Origin": "https://elsewhere.example"}):
                pass


def test_values_that_make_no_sense_are_refused():
    assert Client(user=7) == Client(user="7")
    with pytest.raises(TypeError, match="None is no user"):
        Client(user=None)
    for wrong in [{"user": 7.5}, {"user": "x" * 151}, {"user": "a\nb"}, {"channels": "room"}]:
        with pytest.raises(ConfigurationError):
            Client(**wrong)
    for wrong in [{"expires_at": "soon"}, {"expires_at": True}]:
        with pytest.raises(ConfigurationError, match="a time in seconds since 1970"):
            Client(**wrong)
        with pytest.raises(ConfigurationError, match="a time in seconds since 1970"):
            Subscription(**wrong)
    with pytest.raises(ConfigurationError, match="ping_interval"):
        Limits(ping_interval=0)
    with pytest.raises(ConfigurationError, match="must be a Limits"):

        class Endpoint(ChannelsEndpoint):
            limits = 5  # type: ignore[assignment]  # that is the mistake


def test_a_bare_websocket_is_closed_with_its_client():
    with TestClient(Open).websocket_connect("/") as socket:
        socket.send_text("{")
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
    assert closed.value.code == 3501
