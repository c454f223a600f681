"""What people pass for a client or a channel: None is nobody, and an int or a UUID is a name."""

from __future__ import annotations

import logging
import textwrap
import uuid

import pytest
from fastapi import FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import InvalidStatus

from starcast import (
    BackendUnavailable,
    Broadcast,
    BroadcastEndpoint,
    ConfigurationError,
    ConnectionManager,
    InvalidChannel,
)
from support import Bus, Peer, joined, until

pytestmark = pytest.mark.anyio

UID = uuid.UUID("12345678-1234-5678-1234-567812345678")

# Every method that takes a client, its name with the client left out, and what None would have
# meant.
CALLS = [
    pytest.param(call, name, meaning, id=name)
    for call, name, meaning in [
        (
            lambda hub, who: hub.send("secret", to=who),
            "send(to=...)",
            "would have sent the message to everybody; check whether your look-up found a client, "
            "or leave to= out if everybody is meant",
        ),
        (
            lambda hub, who: hub.disconnect(who),
            "disconnect(...)",
            "would have closed the hub; check whether your look-up found a client, "
            "or call disconnect() to close the hub",
        ),
        (
            lambda hub, who: hub.connect(who),
            "connect(...)",
            "would have opened the hub and registered nobody; check whether your look-up found a "
            "client, or call connect() to open the hub",
        ),
        (
            lambda hub, who: hub.close(who),
            "close(...)",
            "names no client; check whether your look-up found a client",
        ),
        (
            lambda hub, who: hub.serve(who, "room"),
            "serve(...)",
            "names no client; check whether your look-up found a client",
        ),
    ]
]
MANAGER_CALLS = [
    pytest.param(call, name, id=name)
    for call, name in [
        (lambda manager, who: manager.connect(who), "connect(...)"),
        (lambda manager, who: manager.disconnect(who), "disconnect(...)"),
        (
            lambda manager, who: manager.send_personal_message("secret", who),
            "send_personal_message(message, ...)",
        ),
    ]
]
REQUEST = Request({"type": "http", "headers": []})


# None is nobody


@pytest.mark.parametrize(("call", "name", "meaning"), CALLS)
async def test_none_is_nobody(call, name, meaning):
    async with Broadcast() as hub:
        peer = await joined(hub, "default")
        with pytest.raises(TypeError) as raised:
            await call(hub, None)
        assert str(raised.value) == f"{name.replace('...', 'None')} {meaning}"
        assert peer.got == []
        assert peer.closed is None
        assert len(hub) == 1
        assert hub.stats().open


@pytest.mark.parametrize(("call", "name", "meaning"), CALLS)
async def test_none_opens_no_hub(call, name, meaning):
    hub = Broadcast()
    with pytest.raises(TypeError, match="None"):
        await call(hub, None)
    assert not hub.stats().open


async def test_none_with_a_channel_is_nobody():
    hub = Broadcast()
    with pytest.raises(TypeError, match="registered nobody"):
        await hub.connect(None, "room")
    with pytest.raises(TypeError, match="would have closed the hub"):
        await hub.disconnect(None, "room")
    assert not hub.stats().open


@pytest.mark.parametrize("who", ["ann", 7, REQUEST], ids=["str", "int", "Request"])
@pytest.mark.parametrize(("call", "name", "meaning"), CALLS)
async def test_what_is_no_websocket_is_refused_by_name(call, name, meaning, who):
    async with Broadcast() as hub:
        peer = await joined(hub, "default")
        with pytest.raises(TypeError) as raised:
            await call(hub, who)
        assert str(raised.value) == f"{name} needs a WebSocket, not {type(who).__name__}"
        assert peer.got == []
        assert len(hub) == 1


@pytest.mark.parametrize(("call", "name"), MANAGER_CALLS)
async def test_none_is_nobody_for_the_manager(call, name):
    manager = ConnectionManager()
    peer = Peer()
    await manager.connect(peer.websocket)
    for who, says in (
        (None, f"{name.replace('...', 'None')} names no client"),
        ("ann", f"{name} needs a WebSocket, not str"),
    ):
        with pytest.raises(TypeError) as raised:
            await call(manager, who)
        assert str(raised.value).startswith(says)
    assert peer.got == []
    assert manager.active_connections == [peer.websocket]
    await manager.hub.disconnect()


async def test_an_argument_that_is_left_out_means_what_it_did():
    hub = Broadcast()
    await hub.connect()
    assert hub.stats().open
    peer = await joined(hub, "default")
    await hub.send("to everybody")
    assert peer.got == ["to everybody"]
    await hub.disconnect()
    assert not hub.stats().open
    assert peer.closed == 1001


@pytest.mark.parametrize("order", ["client first", "client second"])
async def test_a_client_that_is_not_named_is_shown_how(order):
    hub = Broadcast()
    peer = await joined(hub, "default")
    arguments = (peer.websocket, "hello") if order == "client first" else ("hello", peer.websocket)
    with pytest.raises(TypeError, match=r"write send\(data, to=websocket\)$"):
        await hub.send(*arguments)
    assert peer.got == []
    await hub.disconnect()


async def test_a_personal_message_with_its_arguments_swapped_is_shown_how():
    manager = ConnectionManager()
    peer = Peer()
    await manager.connect(peer.websocket)
    with pytest.raises(TypeError, match=r"send_personal_message\(message, websocket\)$"):
        await manager.send_personal_message(peer.websocket, "hello")
    assert peer.got == []
    await manager.hub.disconnect()


# Who is excluded


@pytest.mark.parametrize(
    "exclude",
    [
        lambda one, two: None,
        lambda one, two: (),
        lambda one, two: [None],
        lambda one, two: {None},
        lambda one, two: (who for who in [None, None]),
    ],
)
async def test_none_excludes_nobody(exclude):
    hub = Broadcast()
    one, two = await joined(hub, "room"), await joined(hub, "room")
    await hub.publish("room", "1", exclude=exclude(one.websocket, two.websocket))
    hub.publish_nowait("room", "2", exclude=exclude(one.websocket, two.websocket))
    await hub.send("3", channel="room", exclude=exclude(one.websocket, two.websocket))
    assert one.got == two.got == ["1", "2", "3"]
    await hub.disconnect()


@pytest.mark.parametrize(
    "exclude",
    [
        lambda one: one,
        lambda one: [one, None],
        lambda one: {None, one},
        lambda one: (who for who in (None, one, one)),
        lambda one: {one: "Ann"},
        lambda one: {one: "Ann"}.keys(),
    ],
)
async def test_who_is_excluded_gets_nothing(exclude):
    hub = Broadcast()
    one, two = await joined(hub, "room"), await joined(hub, "room")
    await hub.publish("room", "hello", exclude=exclude(one.websocket))
    hub.publish_nowait("room", "hello", exclude=exclude(one.websocket))
    assert one.got == []
    await until(lambda: two.got == ["hello"] * 2)
    await hub.disconnect()


@pytest.mark.parametrize(
    ("exclude", "says"),
    [
        ("ann", "exclude=... needs a WebSocket, not str"),
        (7, "exclude=... needs a WebSocket, not int"),
        (REQUEST, "exclude=... needs a WebSocket, not Request"),
        (["ann"], "exclude=[...] needs a WebSocket, not str"),
        ([None, 7], "exclude=[...] needs a WebSocket, not int"),
    ],
)
async def test_something_else_that_is_excluded_is_refused(exclude, says):
    hub = Broadcast()
    peer = await joined(hub, "room")
    for call in (hub.publish, hub.publish_nowait):
        with pytest.raises(TypeError) as raised:
            await call("room", "secret", exclude=exclude)
        assert str(raised.value) == says
    assert peer.got == []
    await hub.disconnect()


# Channels that are no str


@pytest.mark.parametrize("channel", [1, UID])
@pytest.mark.parametrize("other", ["itself", "its str"])
async def test_a_channel_is_its_str_everywhere(channel, other):
    second = channel if other == "itself" else str(channel)
    hub = Broadcast()
    peer = Peer()
    await hub.connect(peer.websocket, channel)
    assert hub.channels == {str(channel): 1}
    async with hub.subscribe(second) as subscriber:
        await hub.publish(second, "1")
        hub.publish_nowait(channel, "2")
        await hub.send("3", channel=second)
        events = [await anext(subscriber) for _ in range(3)]
    assert {event.channel for event in events} == {str(channel)}
    await until(lambda: peer.got == ["1", "2", "3"])
    await hub.disconnect(peer.websocket, second)
    assert hub.channels == {}
    assert len(hub) == 0
    await hub.disconnect()


async def test_disconnect_with_a_number_leaves_that_channel_alone():
    hub = Broadcast()
    peer = await joined(hub, "1", "2")
    await hub.disconnect(peer.websocket, 1)
    assert hub.channels == {"2": 1}
    with pytest.raises(InvalidChannel, match="not bool"):
        await hub.disconnect(peer.websocket, True)
    await hub.disconnect()


async def test_a_channel_of_a_broker_is_its_str():
    bus = Bus()
    async with Broadcast(backend=bus) as hub:
        peer = Peer()
        await hub.connect(peer.websocket, UID)
        assert f"default:{UID}" in bus.connection.channels
        await hub.publish(UID, "hello")
        await until(lambda: peer.got == ["hello"])
        await hub.disconnect(peer.websocket, UID)
        await until(lambda: str(UID) not in bus.connection.channels)


def test_a_path_parameter_of_a_route_is_a_channel():
    hub = Broadcast()
    app = FastAPI()

    @app.websocket("/numbers/{number}")
    async def numbers(websocket: WebSocket, number: int):
        await hub.serve(websocket, number)

    @app.post("/uids/{uid}")
    async def publish(uid: uuid.UUID):
        await hub.publish(uid, "hello")

    class Uids(BroadcastEndpoint):
        broadcast = hub

        def get_channel(self, websocket):
            return websocket.path_params["uid"]

    app.router.routes.append(WebSocketRoute("/uids/{uid:uuid}", Uids))
    client = TestClient(app)
    with client.websocket_connect("/numbers/7") as ann, client.websocket_connect("/numbers/7") as b:
        ann.send_text("hello")
        assert ann.receive_text() == b.receive_text() == "hello"
        assert hub.channels == {"7": 2}
    with client.websocket_connect(f"/uids/{UID}") as ann:
        assert client.post(f"/uids/{UID}").status_code == 200
        assert ann.receive_text() == "hello"
        ann.send_text("again")
        assert ann.receive_text() == "again"


# What is refused for its channel


class Wrong(BroadcastEndpoint):
    broadcast = Broadcast()
    channel: object = None

    def get_channel(self, websocket):
        return self.channel


async def test_a_client_that_is_refused_for_its_channel_is_one_line_a_kind(serve, caplog):
    caplog.set_level(logging.WARNING, "starcast")
    hub = Broadcast()

    async def endpoint(websocket):
        channel = {"number": 1.5, "none": None}.get(websocket.path_params["kind"], "\x00")
        await hub.serve(websocket, channel)

    app = Starlette(
        routes=[
            WebSocketRoute("/wrong", Wrong),
            WebSocketRoute("/serve/{kind}", endpoint),
            Mount("/live", hub),
        ]
    )
    server = await serve(app)
    paths = ["/wrong", "/serve/number", "/serve/none", "/live/", f"/live/{'x' * 201}", "/live/%00"]
    for path in paths * 2:
        with pytest.raises(InvalidStatus) as refused:
            await server.connect(path)
        assert refused.value.response.status_code == 403
    start = "refused a WebSocket: a channel's name must "
    hint = "; check get_channel(), or what you pass as the channel"
    assert [record.getMessage() for record in caplog.records if record.name == "starcast"] == [
        f"{start}be a str, an int or a UUID, not NoneType{hint}",
        f"{start}be a str, an int or a UUID, not float{hint}",
        f"{start}have 1 to 200 characters, not 0",
        f"{start}not contain the character '\\x00': '\\x00'",
    ]


async def test_what_is_raised_after_accept_is_not_logged_as_a_refusal(caplog):
    hub = Broadcast()
    peer = Peer()
    await peer.websocket.accept()
    with pytest.raises(InvalidChannel):
        await hub.connect(peer.websocket, None)
    assert caplog.records == []


def test_a_channel_that_is_none_is_refused_by_the_endpoint():
    client = TestClient(Starlette(routes=[WebSocketRoute("/", Wrong)]))
    with pytest.raises(WebSocketDisconnect) as refused, client.websocket_connect("/"):
        pass
    assert refused.value.code == 1008


# What a hub says of itself


async def test_a_hub_that_is_not_open_shows_how_to_open_it(caplog):
    with pytest.raises(BackendUnavailable, match=r"FastAPI\(lifespan=hub\.lifespan\)"):
        Broadcast(backend=Bus()).publish_nowait("room", "hello")
    assert "FastAPI(lifespan=hub.lifespan)" in caplog.text
    caplog.clear()


def test_a_route_whose_hub_is_not_open_says_so_in_the_log_once(caplog):
    hub, app = Broadcast(backend=Bus()), FastAPI()

    @app.post("/orders")
    def order() -> None:
        hub.publish_nowait("orders", "one")

    client = TestClient(app)
    assert [client.post("/orders").status_code for _ in range(3)] == [503] * 3
    (line,) = caplog.messages
    assert "FastAPI(lifespan=hub.lifespan)" in line
    caplog.clear()


async def test_a_hub_that_was_closed_says_nothing_about_opening_it(caplog):
    hub = Broadcast(backend=Bus())
    async with hub:
        await hub.publish("room", "hello")
    with pytest.raises(BackendUnavailable):
        hub.publish_nowait("room", "hello")
    assert not caplog.messages


async def test_the_repr_says_scheme_state_and_clients():
    hub = Broadcast()
    assert repr(hub) == "<Broadcast memory:// 'default' closed, 0 clients>"
    peer = await joined(hub, "a", "b")
    assert repr(hub) == "<Broadcast memory:// 'default' open, 1 client>"
    await joined(hub, "a")
    assert repr(hub) == "<Broadcast memory:// 'default' open, 2 clients>"
    await hub.disconnect(peer.websocket)
    await hub.disconnect()
    assert repr(hub) == "<Broadcast memory:// 'default' closed, 0 clients>"


def test_the_repr_has_no_password_and_no_host():
    hub = Broadcast("redis://ann:hush@broker.example:6379/1")
    assert repr(hub) == "<Broadcast redis:// 'default' closed, 0 clients>"
    assert repr(Broadcast(backend=Bus())) == "<Broadcast Bus 'default' closed, 0 clients>"
    named = Broadcast(backend=Bus(), name="staff")
    assert repr(named) == "<Broadcast Bus 'staff' closed, 0 clients>"


# What a type checker says

PROGRAM = """
    from uuid import UUID
    from starlette.websockets import WebSocket
    from starcast import Broadcast, BroadcastEndpoint, ConnectionManager

    class ById(BroadcastEndpoint):
        def get_channel(self, websocket: WebSocket) -> int:
            return 1

    async def right(hub: Broadcast, one: WebSocket, found: WebSocket | None, uid: UUID) -> None:
        await hub.connect()
        await hub.connect(one, uid)
        await hub.send("x")
        await hub.send("x", to=one, encoding="json")
        await hub.send("x", channel=7, exclude=found)
        await hub.publish(uid, "x", exclude=[one, found])
        hub.publish_nowait(7, "x", exclude={one})
        await hub.disconnect(one, 7)
        await hub.disconnect()
        async with hub.subscribe(uid) as subscriber:
            print(subscriber)

    async def wrong(hub: Broadcast, manager: ConnectionManager, one: WebSocket | None) -> None:
        await hub.connect(one)
        await hub.send("x", to=one)
        await hub.send(one, "x")
        await hub.disconnect(one)
        await hub.close(one)
        await hub.serve(one)
        await manager.connect(one)
        manager.disconnect(one)
        await manager.send_personal_message("x", one)
        await hub.publish(None, "x")
        await hub.publish("room", "x", exclude="ann")
"""


def test_a_type_checker_finds_the_same_mistakes(tmp_path):
    mypy = pytest.importorskip("mypy.api", reason="mypy comes with the extra `lint`")
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    cache = tmp_path / "cache"
    said, errors, _ = mypy.run(["--strict", f"--cache-dir={cache}", "--config=", str(program)])
    assert not errors
    found = {int(line.split(":")[1]) for line in said.splitlines() if ": error: " in line}
    lines = program.read_text().splitlines()
    start = next(number for number, line in enumerate(lines, 1) if "def wrong" in line)
    assert found == set(range(start + 1, len(lines) + 1)), said


# Close codes


@pytest.mark.parametrize("code", [-1, 0, 999, 1004, 1005, 1006, 1015, 2999, 5000])
async def test_a_close_code_that_is_never_sent(code):
    hub = Broadcast()
    peer = await joined(hub)
    with pytest.raises(ConfigurationError, match=f"{code} is not a close code"):
        await hub.close(peer.websocket, code)
    assert peer.closed is None


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1014, 3000, 4999])
async def test_a_close_code_that_may_be_sent(code):
    hub = Broadcast()
    peer = await joined(hub)
    await hub.close(peer.websocket, code, "\u00e4" * 61)
    assert peer.closed == code


async def test_a_close_reason_that_does_not_fit_into_its_frame():
    hub = Broadcast()
    peer = await joined(hub)
    with pytest.raises(ConfigurationError, match="at most 123 bytes"):
        await hub.close(peer.websocket, 4000, "\u00e4" * 62)
    assert peer.closed is None
