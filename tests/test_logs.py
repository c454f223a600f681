from __future__ import annotations

import logging
import threading

import pytest
from starlette.exceptions import WebSocketException
from starlette.routing import Router, WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint, logs
from support import Broker, Bus, Peer, joined, until

NASTY = "a\nb\x1b[31m\x9b2J\u202e\u2028\udc80"
ESCAPED = r"a\nb\x1b[31m\x9b2J\u202e\u2028\udc80"


def test_a_kind_is_logged_once(caplog):
    for number in range(3):
        logs.once(("door", "None"), "number %d", number)
    logs.once(("door", "False"), "another")
    assert [(r.name, r.levelno, r.getMessage()) for r in caplog.records] == [
        ("starcast", logging.WARNING, "number 0"),
        ("starcast", logging.WARNING, "another"),
    ]


def test_after_a_reset_it_is_logged_again(caplog):
    logs.once(("door",), "one")
    logs.reset()
    logs.once(("door",), "two")
    assert [record.getMessage() for record in caplog.records] == ["one", "two"]


def test_a_process_logs_a_hundred_kinds(caplog):
    for number in range(logs.MAX_KINDS + 10):
        logs.once((str(number),), "x")
    assert len(caplog.records) == logs.MAX_KINDS == 100


def test_one_cause_does_not_use_up_the_lines_of_the_others(caplog):
    for number in range(500):
        logs.once(("origin", str(number)), "x")
    assert len(caplog.records) == logs.MAX_ALIKE
    logs.once(("authorize", "None"), "is heard")
    assert caplog.records[-1].getMessage() == "is heard"


def test_from_threads_it_is_logged_once_too(caplog):
    start = threading.Barrier(8)

    def say() -> None:
        start.wait()
        for number in range(10):
            logs.once(("kind", str(number)), "x")

    threads = [threading.Thread(target=say) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caplog.records) == 10


def test_what_moves_a_cursor_or_begins_a_line_is_escaped():
    assert logs.escape(NASTY) == ESCAPED
    assert logs.escape("Gr\xfc\xdfe an \N{GRINNING FACE}") == "Gr\xfc\xdfe an \N{GRINNING FACE}"


@pytest.mark.anyio
async def test_what_a_client_says_of_itself_does_no_harm_in_the_log(caplog):
    """uvicorn takes X-Forwarded-For for the client's host, if it was told to trust everybody."""
    peer = Peer()
    peer.scope["client"] = (NASTY, 4711)
    peer.say("hello")
    assert await Broadcast().serve(peer.websocket, publish=False) == 1008
    assert caplog.messages == [f"closed the client {ESCAPED}:4711 with 1008: listen only"]


@pytest.mark.anyio
async def test_what_an_app_repeats_of_a_client_does_no_harm_in_the_log(caplog):
    class Chat(BroadcastEndpoint):
        async def on_connect(self, websocket):
            raise WebSocketException(4000, NASTY)

    peer = Peer()
    await Chat(peer.scope, peer.receive, peer.send).dispatch()
    (line,) = caplog.messages
    assert ESCAPED in line


# What happens, at DEBUG


def rooms(hub: Broadcast) -> Router:
    async def endpoint(websocket):
        await hub.serve(websocket, websocket.path_params["room"])

    return Router([WebSocketRoute("/{room}", endpoint)])


@pytest.mark.anyio
async def test_at_debug_joins_leaves_and_publishes_are_logged_with_their_counts(caplog, serve):
    caplog.set_level(logging.DEBUG, "starcast")
    hub = Broadcast()
    server = await serve(rooms(hub))
    async with server.connect("/tea") as one, server.connect("/tea"), hub.subscribe("tea"):
        await one.send("a secret")
        await until(lambda: hub.stats().published == 1)
        hub.publish_nowait("tea\u2028\u202e", b"\0" * 1000)
    await until(lambda: len(hub) == 0)
    lines = [r.getMessage() for r in caplog.records if r.name == "starcast"]
    here = "on this hub in this process"
    assert lines[:5] == [
        f"a client on the fast path joined 'tea': 1 client {here}",
        f"a client on the fast path joined 'tea': 2 clients {here}",
        f"a subscriber joined 'tea': 2 clients and 1 subscriber {here}",
        f"published 8 bytes to 'tea': 2 clients and 1 subscriber {here}",
        rf"published 1000 bytes to 'tea\u2028\u202e': 0 clients {here}",
    ]
    assert lines[5] == f"a subscriber left 'tea': 2 clients {here}"
    assert lines[6:] == [
        f"a client left 'tea': 1 client {here}",
        f"a client left 'tea': 0 clients {here}",
    ]
    assert "secret" not in caplog.text


@pytest.mark.anyio
async def test_at_debug_both_ends_of_a_brokers_way_are_logged(caplog):
    caplog.set_level(logging.DEBUG, "starcast")
    broker = Broker()
    here = Broadcast(backend=Bus(broker))
    async with (
        Broadcast(backend=Bus(broker)) as there,
        here,
        here.subscribe("room"),
        here.subscribe("room"),
    ):
        caplog.clear()
        await there.publish("room", "hello")
        await until(lambda: len(caplog.records) == 2)
    assert {record.getMessage() for record in caplog.records[:2]} == {
        "published 5 bytes to 'room' through the broker: 0 clients on this hub in this process",
        "received 5 bytes for 'room' from the broker: 0 clients and 2 subscribers on this hub "
        "in this process",
    }


@pytest.mark.anyio
async def test_a_client_that_leaves_one_of_its_rooms_or_is_closed_is_logged(caplog):
    hub = Broadcast()
    peers = [await joined(hub, "one", "two") for _ in range(2)]
    caplog.set_level(logging.DEBUG, "starcast")
    await hub.disconnect(peers[0].websocket, "one")
    await hub.close(peers[0].websocket)
    await hub.disconnect()
    assert sorted(caplog.messages) == [
        "a client left 'one': 0 clients on this hub in this process",
        "a client left 'one': 1 client on this hub in this process",
        "a client left 'two': 0 clients on this hub in this process",
        "a client left 'two': 1 client on this hub in this process",
    ]


@pytest.mark.anyio
async def test_a_log_handler_may_look_at_the_hub_while_another_thread_publishes(caplog):
    """It has its own lock by then, so nothing may be logged while the hub's is held."""
    hub = Broadcast()

    class Looking(logging.Handler):
        held = 0

        def emit(self, record: logging.LogRecord) -> None:
            looking = threading.Thread(target=hub.stats)
            looking.start()
            looking.join(1)
            self.held += looking.is_alive()

    handler = Looking()
    logger = logging.getLogger("starcast")
    caplog.set_level(logging.DEBUG, "starcast")
    logger.addHandler(handler)
    try:
        peers = [await joined(hub, "one", "two") for _ in range(2)]
        async with hub.subscribe("one"):
            await hub.publish("one", "x")
            await hub.disconnect(peers[0].websocket, "one")
            await hub.close(peers[0].websocket)
            peers[1].fail = OSError("reset")
            await hub.publish("one", "x")
            await until(lambda: len(hub) == 0)
            await joined(hub, "one")
        await hub.disconnect()
    finally:
        logger.removeHandler(handler)
    assert len(caplog.records) == 14
    assert handler.held == 0


@pytest.mark.anyio
async def test_without_debug_nothing_is_noted_for_later(caplog):
    caplog.set_level(logging.INFO, "starcast")
    hub = Broadcast()
    peer = await joined(hub, "room")
    await hub.publish("room", "hello")
    await hub.disconnect(peer.websocket)
    assert caplog.messages == []
    caplog.set_level(logging.DEBUG, "starcast")
    await joined(hub, "another")
    assert caplog.messages
    assert not any("'room'" in line for line in caplog.messages)
    await hub.disconnect()


# Nobody


@pytest.mark.anyio
async def test_publishing_in_memory_before_anybody_came_is_logged_once(caplog):
    """Most likely in a job, whose clients are those of another process."""
    caplog.set_level(logging.INFO, "starcast")
    hub = Broadcast()
    hub.publish_nowait("news", "nobody")
    await hub.publish("news", "nobody")
    await Broadcast().publish("news", "nobody")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "memory:// hub that has had no client" in record.getMessage()
    assert "starcast.Publisher" in record.getMessage()


@pytest.mark.anyio
async def test_publishing_to_a_channel_that_nobody_has_is_no_reason_for_that_line(caplog):
    caplog.set_level(logging.INFO, "starcast")
    async with Broadcast() as hub, Broadcast(backend=Bus()) as other:
        await joined(hub, "room")
        await hub.publish("empty", "nobody")
        await other.publish("empty", "perhaps somebody elsewhere")
    assert caplog.records == []


def test_a_level_that_is_off_does_not_use_up_a_line(caplog):
    with caplog.at_level(logging.ERROR, "starcast"):
        logs.once(("door",), "one")
    logs.once(("door",), "two")
    assert caplog.messages == ["two"]
