from __future__ import annotations

import threading
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.testclient import TestClient

from starcast import Broadcast, ConnectionManager, EncodingError, OriginRefused
from support import Peer, by_another, until

pytestmark = pytest.mark.anyio


def program(manager: ConnectionManager) -> FastAPI:
    """The program of FastAPI's WebSocket page, whose class is the import."""
    app = FastAPI()

    @app.websocket("/ws/{client_id}")
    async def websocket_endpoint(websocket: WebSocket, client_id: int):
        await manager.connect(websocket)
        try:
            while True:
                data = await websocket.receive_text()
                await manager.send_personal_message(f"You wrote: {data}", websocket)
                await manager.broadcast(f"Client #{client_id} says: {data}")
        except WebSocketDisconnect:
            manager.disconnect(websocket)
            await manager.broadcast(f"Client #{client_id} left the chat")

    return app


@pytest.fixture(params=["one loop", "a loop for each client"])
def client(request):
    manager = ConnectionManager()
    client = TestClient(program(manager))
    client.manager = manager
    if request.param == "one loop":
        with client:
            yield client
    else:
        yield client


async def joined(manager: ConnectionManager, *peers: Peer) -> None:
    for peer in peers:
        await manager.connect(peer.websocket)


# The program of FastAPI's page


def test_the_program_of_fastapis_page(client):
    with client.websocket_connect("/ws/1") as one:
        with client.websocket_connect("/ws/2") as two:
            one.send_text("hello")
            assert one.receive_text() == "You wrote: hello"
            assert one.receive_text() == "Client #1 says: hello"
            assert two.receive_text() == "Client #1 says: hello"
            two.send_text("hi")
            assert two.receive_text() == "You wrote: hi"
            assert two.receive_text() == "Client #2 says: hi"
            assert one.receive_text() == "Client #2 says: hi"
            assert len(client.manager.active_connections) == 2
        assert one.receive_text() == "Client #2 left the chat"
        assert len(client.manager.active_connections) == 1
        one.send_text("alone")
        assert one.receive_text() == "You wrote: alone"
        assert one.receive_text() == "Client #1 says: alone"
    assert client.manager.active_connections == []


def test_many_messages_keep_their_order_with_the_personal_ones_between_them(client):
    with client.websocket_connect("/ws/1") as one, client.websocket_connect("/ws/2") as two:
        for number in range(20):
            one.send_text(str(number))
        for number in range(20):
            assert one.receive_text() == f"You wrote: {number}"
            assert one.receive_text() == f"Client #1 says: {number}"
            assert two.receive_text() == f"Client #1 says: {number}"


def test_a_page_of_another_host_is_refused():
    manager = ConnectionManager()
    with TestClient(program(manager)) as client:
        with (
            pytest.raises(WebSocketDisconnect),
            client.websocket_connect("/ws/1", headers={"origin": "http://evil.example"}),
        ):
            pass
        assert manager.active_connections == []


@pytest.mark.parametrize("hub", ["redis://:secret@localhost", Broadcast, ConnectionManager()])
def test_a_manager_of_something_else_than_a_hub_is_a_type_error(hub):
    with pytest.raises(TypeError, match=r"needs a Broadcast, not \w+: write") as raised:
        ConnectionManager(hub)
    assert "secret" not in str(raised.value)


# Connect and disconnect


async def test_connect_accepts_and_registers():
    manager = ConnectionManager()
    peer = Peer()
    await manager.connect(peer.websocket)
    assert [message["type"] for message in peer.sent] == ["websocket.accept"]
    assert manager.active_connections == [peer.websocket]
    await manager.hub.disconnect()


async def test_connect_takes_a_client_that_was_accepted_before():
    manager = ConnectionManager()
    peer = Peer()
    await peer.websocket.accept()
    await manager.connect(peer.websocket)
    await manager.connect(peer.websocket)
    assert manager.active_connections == [peer.websocket]
    await manager.broadcast("once")
    assert peer.got == ["once"]
    assert len(peer.sent) == 2
    await manager.hub.disconnect()


async def test_connect_refuses_a_page_of_another_host():
    manager = ConnectionManager()
    peer = Peer({"host": "chat.example", "origin": "http://evil.example"})
    with pytest.raises(OriginRefused):
        await manager.connect(peer.websocket)
    assert peer.sent == []
    assert manager.active_connections == []


async def test_connect_of_a_client_that_has_left_raises_what_the_handler_is_ready_for():
    manager = ConnectionManager()
    peer = Peer()
    await peer.websocket.accept()
    await peer.websocket.close()
    with pytest.raises(WebSocketDisconnect):
        await manager.connect(peer.websocket)
    assert manager.active_connections == []


async def test_disconnect_is_a_plain_function_and_leaves_the_socket_open():
    manager = ConnectionManager()
    one, two = Peer(), Peer()
    await joined(manager, one, two)
    assert manager.disconnect(one.websocket) is None
    assert manager.active_connections == [two.websocket]
    await manager.broadcast("to two")
    await one.websocket.send_text("from the handler")
    assert one.got == ["from the handler"]
    assert two.got == ["to two"]
    assert one.closed is None
    await manager.hub.disconnect()


async def test_disconnect_is_harmless_twice_and_for_a_stranger():
    manager = ConnectionManager()
    one, stranger = Peer(), Peer()
    await joined(manager, one)
    for _ in range(2):
        manager.disconnect(stranger.websocket)
    assert manager.active_connections == [one.websocket]
    for _ in range(2):
        manager.disconnect(one.websocket)
    assert manager.active_connections == []
    assert stranger.sent == []
    await manager.hub.disconnect()


async def test_disconnect_may_be_called_from_a_thread():
    manager = ConnectionManager()
    peer = Peer()
    await joined(manager, peer)
    thread = threading.Thread(target=manager.disconnect, args=(peer.websocket,))
    thread.start()
    await until(lambda: not thread.is_alive())
    assert manager.active_connections == []
    await peer.websocket.send_text("open")
    assert peer.got == ["open"]
    await manager.hub.disconnect()


async def test_a_client_may_come_back_after_disconnect():
    manager = ConnectionManager()
    peer = Peer()
    await joined(manager, peer)
    manager.disconnect(peer.websocket)
    await manager.broadcast("away")
    await joined(manager, peer)
    await manager.broadcast("back")
    assert peer.got == ["back"]
    await manager.hub.disconnect()


# active_connections


async def test_removing_from_active_connections_unregisters_the_client():
    manager = ConnectionManager()
    one, two, stranger = Peer(), Peer(), Peer()
    await joined(manager, one, two)
    listed = manager.active_connections
    for _ in range(2):
        listed.remove(one.websocket)
        manager.active_connections.remove(one.websocket)
        manager.active_connections.remove(stranger.websocket)
    assert listed == manager.active_connections == [two.websocket]
    await manager.broadcast("to two")
    await one.websocket.send_text("from the handler")
    assert (one.got, two.got) == (["from the handler"], ["to two"])
    await manager.hub.disconnect()


async def test_active_connections_is_a_fresh_list_in_the_order_of_coming():
    manager = ConnectionManager()
    peers = [Peer() for _ in range(3)]
    await joined(manager, *peers)
    listed = manager.active_connections
    assert listed == [peer.websocket for peer in peers]
    assert listed is not manager.active_connections
    listed.clear()
    assert len(manager.active_connections) == 3
    listed = manager.active_connections
    manager.disconnect(peers[1].websocket)
    assert len(listed) == 3
    assert manager.active_connections == [peers[0].websocket, peers[2].websocket]
    await manager.hub.disconnect()


async def test_the_list_may_change_while_somebody_goes_through_it():
    manager = ConnectionManager()
    peers = [Peer() for _ in range(5)]
    await joined(manager, *peers)
    for websocket in manager.active_connections:
        manager.disconnect(websocket)
    assert manager.active_connections == []
    await manager.hub.disconnect()


# Broadcast


@pytest.mark.parametrize(
    ("message", "frame"), [("text", "text"), (b"\xff", b"\xff"), ({"a": [1]}, '{"a":[1]}')]
)
async def test_a_broadcast_reaches_everybody_in_its_type_of_frame(message, frame):
    manager = ConnectionManager()
    one, two = Peer(), Peer()
    await joined(manager, one, two)
    await manager.broadcast(message)
    assert one.got == two.got == [frame]
    await manager.hub.disconnect()


async def test_a_broadcast_to_nobody_is_harmless():
    await ConnectionManager().broadcast("hello?")


async def test_clients_may_come_and_go_during_a_broadcast():
    manager = ConnectionManager()
    peers = [Peer() for _ in range(4)]
    newcomer = Peer()
    await newcomer.websocket.accept()

    class Meddler(Peer):
        """Changes the list while it is sent to."""

        async def send(self, message: Any) -> None:
            await super().send(message)
            if message["type"] == "websocket.send":
                manager.disconnect(self.websocket)
                manager.disconnect(peers[0].websocket)
                manager.disconnect(peers[3].websocket)
                await manager.connect(newcomer.websocket)

    meddler = Meddler()
    await joined(manager, *peers[:2], meddler, *peers[2:])
    await manager.broadcast("first")
    await manager.broadcast("second")
    assert [peer.got for peer in peers[1:3]] == [["first", "second"]] * 2
    assert [peers[0].got, peers[3].got, meddler.got] == [["first"]] * 3
    assert newcomer.got == ["second"]
    assert set(manager.active_connections) == {
        *(peer.websocket for peer in peers[1:3]),
        newcomer.websocket,
    }
    await manager.hub.disconnect()


@pytest.mark.parametrize(
    "error", [OSError("gone"), RuntimeError("gone"), WebSocketDisconnect(1006)]
)
async def test_a_dead_client_stops_nobody_and_is_forgotten(error):
    manager = ConnectionManager()
    peers = [Peer(), Peer(), Peer()]
    await joined(manager, *peers)
    peers[1].fail = error
    await manager.broadcast("1")
    assert manager.active_connections == [peers[0].websocket, peers[2].websocket]
    await manager.broadcast("2")
    assert peers[0].got == peers[2].got == ["1", "2"]
    await manager.hub.disconnect()


async def test_a_client_that_does_not_read_delays_nobody():
    manager = ConnectionManager()
    slow, quick = Peer(), Peer()
    await joined(manager, slow, quick)
    slow.open.clear()
    for number in range(5):
        await manager.broadcast(str(number))
        assert quick.got[-1] == str(number)
    slow.open.set()
    await until(lambda: slow.got == quick.got)
    await manager.hub.disconnect()


async def test_a_message_that_cannot_be_sent_is_an_error_of_the_one_who_sends_it():
    manager = ConnectionManager()
    peer = Peer()
    await joined(manager, peer)
    with pytest.raises(EncodingError):
        await manager.broadcast(object())
    await manager.broadcast("fine")
    assert peer.got == ["fine"]
    await manager.hub.disconnect()


# Personal messages


@pytest.mark.parametrize(
    ("message", "frame"), [("text", "text"), (b"\xff", b"\xff"), ({"a": [1]}, '{"a":[1]}')]
)
@pytest.mark.parametrize("registered", [True, False])
async def test_a_personal_message_reaches_one_client_registered_or_not(registered, message, frame):
    manager = ConnectionManager()
    one, two = Peer(), Peer()
    await joined(manager, two)
    if registered:
        await joined(manager, one)
    else:
        await one.websocket.accept()
    await manager.send_personal_message(message, one.websocket)
    assert one.got == [frame]
    assert two.got == []
    assert (one.websocket in manager.active_connections) is registered
    await manager.hub.disconnect()


async def test_a_personal_message_after_disconnect_still_arrives_and_overtakes_nothing():
    manager = ConnectionManager()
    peer = Peer()
    await joined(manager, peer)
    manager.hub.publish_nowait("default", "first")
    manager.disconnect(peer.websocket)
    await manager.send_personal_message("second", peer.websocket)
    assert peer.got == ["first", "second"]
    await manager.hub.disconnect()


async def test_personal_messages_keep_their_place_between_broadcasts_to_a_slow_client():
    manager = ConnectionManager()
    slow = Peer()
    await joined(manager, slow)
    slow.open.clear()
    await manager.broadcast("1")
    await manager.send_personal_message("2", slow.websocket)
    await manager.broadcast("3")
    await manager.send_personal_message("4", slow.websocket)
    slow.open.set()
    await until(lambda: len(slow.got) == 4)
    assert slow.got == ["1", "2", "3", "4"]
    await manager.hub.disconnect()


@pytest.mark.parametrize("registered", [True, False])
async def test_a_personal_message_to_a_client_that_has_left_is_no_error(registered):
    manager = ConnectionManager()
    peer = Peer()
    await peer.websocket.accept()
    if registered:
        await joined(manager, peer)
    peer.leave()
    with pytest.raises(WebSocketDisconnect):
        await peer.websocket.receive_text()
    assert not await by_another(manager.send_personal_message("too late", peer.websocket))
    assert peer.got == []
    await manager.hub.disconnect()


async def test_a_personal_message_to_a_registered_client_that_died_unnoticed_is_no_error():
    manager = ConnectionManager()
    peer = Peer()
    await joined(manager, peer)
    peer.fail = OSError("gone")
    await by_another(manager.send_personal_message("1", peer.websocket))
    assert not await by_another(manager.send_personal_message("2", peer.websocket))
    assert manager.active_connections == []
    await manager.hub.disconnect()


async def test_a_personal_message_to_a_stranger_that_died_unnoticed_is_no_error():
    manager = ConnectionManager()
    peer = Peer()
    await peer.websocket.accept()
    peer.fail = OSError("gone")
    await manager.send_personal_message("1", peer.websocket)
    assert peer.got == []


async def test_a_personal_message_that_cannot_be_sent_is_an_error_for_strangers_too():
    manager = ConnectionManager()
    one, stranger = Peer(), Peer()
    await joined(manager, one)
    await stranger.websocket.accept()
    for peer in (one, stranger):
        with pytest.raises(EncodingError):
            await manager.send_personal_message(object(), peer.websocket)
        assert peer.got == []
    await manager.hub.disconnect()


# A hub of yours


async def test_a_manager_has_a_hub_of_its_own():
    one, two = ConnectionManager(), ConnectionManager()
    assert one.hub is not two.hub
    peers = [Peer(), Peer()]
    await joined(one, peers[0])
    await joined(two, peers[1])
    await one.broadcast("for one")
    assert [peer.got for peer in peers] == [["for one"], []]
    await one.hub.disconnect()
    await two.hub.disconnect()


@pytest.mark.parametrize("by_keyword", [True, False])
async def test_a_manager_takes_a_hub_of_yours(by_keyword):
    hub = Broadcast(dumps=lambda value: f"<{value}>")
    manager = ConnectionManager(broadcast=hub) if by_keyword else ConnectionManager(hub)
    assert manager.hub is hub
    one, two, stranger = Peer(), Peer(), Peer()
    await joined(manager, one)
    await hub.connect(two.websocket, "room")
    await stranger.websocket.accept()
    assert manager.active_connections == [one.websocket, two.websocket]
    await manager.broadcast("to the default channel")
    await hub.publish("room", "to the room")
    await manager.send_personal_message(7, two.websocket)
    await manager.send_personal_message(8, stranger.websocket)
    assert one.got == ["to the default channel"]
    assert two.got == ["to the room", "<7>"]
    assert stranger.got == ["<8>"]
    await hub.disconnect()
    assert manager.active_connections == []


async def test_the_message_comes_first(caplog):
    manager, peer = ConnectionManager(), Peer()
    await manager.connect(peer.websocket)
    with pytest.raises(TypeError, match="the message comes first: send_personal_message"):
        await manager.send_personal_message(peer.websocket, "hello")
    assert peer.got == []
