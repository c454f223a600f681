from __future__ import annotations

import logging

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from starcast import Broadcast, ConfigurationError, OriginRefused
from starcast.origins import MAX_LOGGED, Origins
from support import Peer

pytestmark = pytest.mark.anyio

HOST = "chat.example:8000"


def let_in(rule: Origins, *origins: str, host: str | None = HOST) -> bool:
    peer = Peer()
    if host is not None:
        peer.scope["headers"].append((b"host", host.encode("latin-1")))
    peer.scope["headers"] += [(b"origin", origin.encode("latin-1")) for origin in origins]
    try:
        rule.check(peer.websocket)
    except OriginRefused:
        return False
    return True


# The same host: the default


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://chat.example:8000", "chat.example:8000"),
        ("http://chat.example:5173", "chat.example:8000"),
        ("http://chat.example", "chat.example:8000"),
        ("http://chat.example:5173", "chat.example"),
        ("https://chat.example", "chat.example"),
        ("chrome-extension://chat.example", "chat.example"),
        ("http://CHAT.example", "chat.EXAMPLE"),
        ("http://localhost:5173", "localhost:8000"),
        ("http://127.0.0.1:5173", "127.0.0.1:8000"),
        ("http://[::1]:5173", "[::1]:8000"),
        ("http://[::1]", "[::1]"),
        ("http://[2001:DB8::1]", "[2001:db8::1]:8000"),
        ("http://xn--bcher-kva.example", "xn--bcher-kva.example"),
    ],
)
def test_a_page_of_the_same_host_is_let_in(origin, host):
    assert let_in(Origins(None), origin, host=host)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://evil.example", "chat.example"),
        ("http://chat.example.evil.example", "chat.example"),
        ("http://evil-chat.example", "chat.example"),
        ("http://sub.chat.example", "chat.example"),
        ("http://chat.example", "sub.chat.example"),
        ("http://example", "chat.example"),
        ("http://localhost", "127.0.0.1"),
        ("http://[::1]", "[::2]"),
        ("http://chat.example@evil.example", "chat.example"),
        ("http://evil.example/chat.example", "chat.example"),
        ("http://evil.example#@chat.example", "chat.example"),
        ("http://evil.example?chat.example", "chat.example"),
        ("null", "null"),
        ("null", "chat.example"),
        ("", "chat.example"),
        ("", ""),
        ("chat.example", "chat.example"),
        ("chat.example:8000", "chat.example:8000"),
        ("http:chat.example", "chat.example"),
        ("http://", "chat.example"),
        ("http://", ""),
        ("http://[", "chat.example"),
        ("http://[", "["),
        ("http://[::1", "[::1]"),
        ("http://[v1.x]", "["),
        ("http://chat.example", "["),
        ("http://chat.example", ""),
        ("\xff\x00", "chat.example"),
        ("http://chat.example, http://evil.example", "chat.example"),
        ("http://evil.example http://chat.example", "chat.example"),
    ],
)
def test_any_other_page_is_refused(origin, host):
    assert not let_in(Origins(None), origin, host=host)


def test_a_page_is_refused_if_there_is_no_host_to_compare():
    assert not let_in(Origins(None), "http://chat.example", host=None)
    assert not let_in(Origins(None), "null", host=None)


# An exact list


@pytest.mark.parametrize(
    "origin",
    [
        "https://chat.example",
        "http://localhost:5173",
        "http://[::1]:5173",
        "https://CHAT.example",
        "HTTPS://chat.example",
    ],
)
@pytest.mark.parametrize("make", [list, tuple, set, iter])
def test_a_list_lets_in_what_is_on_it(origin, make):
    allowed = ["https://chat.example", "http://localhost:5173", "http://[::1]:5173"]
    assert let_in(Origins(make(allowed)), origin, host="other.example")


def test_a_list_may_be_written_in_capitals():
    assert let_in(Origins(["https://Chat.Example"]), "https://chat.example")


@pytest.mark.parametrize(
    "origin",
    [
        "http://chat.example",
        "https://chat.example:443",
        "https://chat.example:8443",
        "https://chat.example/",
        "https://chat.example.",
        "https://sub.chat.example",
        "https://chat.example.evil.example",
        "https://chat.exampl",
        " https://chat.example",
        "null",
        "",
        "*",
    ],
)
def test_a_list_refuses_everything_else_the_same_host_too(origin):
    assert not let_in(Origins(["https://chat.example"]), origin, host="chat.example")


def test_an_empty_list_refuses_every_page():
    assert not let_in(Origins([]), "http://chat.example:8000")


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "*",
        "null",
        "chat.example",
        "chat.example:8000",
        "//chat.example",
        "https://",
        "https:chat.example",
        "https://chat.example/",
        "https://chat.example/path",
        "https://chat.example?query",
        "https://chat.example#fragment",
        "https://chat.example\n",
        " https://chat.example",
        "https://chat.example:99999",
        "https://chat.example:x",
        "https://user@chat.example",
        "https://*.chat.example",
        "https://chat\u00e9.example",
        "http://[",
        7,
        None,
    ],
)
def test_an_entry_that_is_no_origin_is_refused_with_its_value(entry):
    with pytest.raises(ConfigurationError, match="an origin looks like ") as raised:
        Broadcast(origins=["https://fine.example", entry])
    assert repr(entry) in str(raised.value)


@pytest.mark.parametrize("origins", ["https://chat.example", "", "**", "https://a.example,*", 7])
def test_a_str_in_place_of_a_list_is_refused_with_its_value(origins):
    with pytest.raises(ConfigurationError) as raised:
        Broadcast(origins=origins)
    assert repr(origins) in str(raised.value)


# Every rule


@pytest.mark.parametrize("rule", [None, "*", [], ["https://chat.example"]])
def test_a_client_without_an_origin_is_no_browser_and_let_in(rule):
    assert let_in(Origins(rule))
    assert let_in(Origins(rule), host=None)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://[", "\xff"])
def test_a_star_lets_everybody_in(origin):
    assert let_in(Origins("*"), origin)


@pytest.mark.parametrize("rule", [None, ["http://chat.example:8000"]])
@pytest.mark.parametrize(
    "origins",
    [
        ("http://chat.example:8000", "http://chat.example:8000"),
        ("http://chat.example:8000", "http://evil.example"),
        ("http://evil.example", "http://chat.example:8000"),
    ],
)
def test_two_origin_headers_are_refused_even_if_both_were_allowed(rule, origins):
    assert let_in(Origins(rule), "http://chat.example:8000")
    assert not let_in(Origins(rule), *origins)


# The log


def test_a_refusal_names_both_values():
    peer = Peer({"host": HOST, "origin": "http://evil.example"})
    with pytest.raises(OriginRefused) as raised:
        Origins(None).check(peer.websocket)
    assert "'http://evil.example'" in str(raised.value)
    assert f"'{HOST}'" in str(raised.value)
    assert raised.value.code == 1008


def test_a_refusal_is_logged_once_for_each_pair(caplog):
    rule = Origins(None)
    for _ in range(3):
        for origin in ("http://evil.example", "http://other.example"):
            for host in ("one.example", "two.example"):
                assert not let_in(rule, origin, host=host)
    logged = {(record.name, record.levelno) for record in caplog.records}
    assert logged == {("starcast", logging.WARNING)}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) == 4
    assert "'http://evil.example'" in said[0]
    assert "'one.example'" in said[0]
    assert "origins=[...]" in said[0]


def test_what_is_logged_stays_on_one_line(caplog):
    assert not let_in(Origins(None), "http://evil\r\nfake line", host="\x1b[31m")
    assert caplog.records[0].getMessage().isprintable()


def test_hubs_log_on_their_own(caplog):
    for _ in range(2):
        assert not let_in(Origins(None), "http://evil.example")
    assert len(caplog.records) == 2


def test_who_is_let_in_is_not_logged(caplog):
    assert let_in(Origins(None), "http://chat.example")
    assert let_in(Origins(["http://a.example"]), "http://a.example")
    assert let_in(Origins("*"), "http://evil.example")
    assert caplog.records == []


def test_a_stranger_with_ever_new_values_cannot_fill_the_log(caplog):
    rule = Origins(None)
    for number in range(MAX_LOGGED + 50):
        assert not let_in(rule, f"http://evil{number}.example")
    assert len(caplog.records) == MAX_LOGGED
    assert not let_in(rule, "http://evil.example")
    assert not let_in(rule, "http://evil0.example")
    assert len(caplog.records) == MAX_LOGGED


# In a hub


async def test_connect_refuses_a_foreign_page_before_it_is_accepted():
    hub = Broadcast()
    peer = Peer({"host": HOST, "origin": "http://evil.example"})
    with pytest.raises(OriginRefused):
        await hub.connect(peer.websocket)
    assert peer.sent == []
    assert len(hub) == 0
    await hub.disconnect()


async def test_a_websocket_that_the_app_accepted_is_not_checked():
    hub = Broadcast(origins=[])
    peer = Peer({"host": HOST, "origin": "http://evil.example"})
    await peer.websocket.accept()
    await hub.connect(peer.websocket)
    assert len(hub) == 1
    await hub.disconnect()


@pytest.mark.parametrize(
    ("origins", "origin", "welcome"),
    [
        (None, "http://testserver:5173", True),
        (None, "http://evil.example", False),
        (["http://evil.example"], "http://evil.example", True),
        (["http://evil.example"], "http://testserver", False),
        ("*", "http://evil.example", True),
    ],
)
def test_a_route_that_connects_answers_403_to_a_page_that_may_not(origins, origin, welcome):
    hub = Broadcast(origins=origins)

    async def endpoint(websocket):
        await hub.serve(websocket)

    app = Starlette(routes=[WebSocketRoute("/", endpoint)])
    with TestClient(app) as client:
        connecting = client.websocket_connect("/", headers={"origin": origin})
        if welcome:
            with connecting as socket:
                socket.send_text("hello")
                assert socket.receive_text() == "hello"
        else:
            with pytest.raises(WebSocketDisconnect), connecting:
                pass
    assert len(hub) == 0
