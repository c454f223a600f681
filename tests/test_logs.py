from __future__ import annotations

import logging
import threading

import pytest
from starlette.exceptions import WebSocketException

from starcast import Broadcast, BroadcastEndpoint, logs
from support import Peer

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
