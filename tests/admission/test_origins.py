from __future__ import annotations

import asyncio
import logging

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from starcast import Broadcast, ConfigurationError, OriginRefused
from starcast.admission.origins import Origins
from starcast.logs import MAX_ALIKE, MAX_KINDS, once
from support import Peer

pytestmark = pytest.mark.anyio

HOST = "chat.example:8000"


def let_in(rule: Origins, *origins: str, host: str | None = HOST) -> bool:
    peer = Peer()
    if host is not None:
        peer.scope["headers"].append((b"host", host.encode("latin-1")))
    peer.scope["headers"] += [(b"origin", origin.encode("latin-1")) for origin in origins]
    try:
        asyncio.run(rule.check(peer.websocket))
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
        ("http://chat.example.", "chat.example"),
        ("http://chat.example", "chat.example."),
        ("http://chat.example/", "chat.example"),
        ("http://chat.example:x", "chat.example"),
        ("http://chat.example:99999", "chat.example"),
        ("http://chat.example:80:80", "chat.example"),
        ("http://evil.example:80@chat.example", "chat.example"),
        ("http://chat.example:80@evil.example", "chat.example"),
        ("http://chat.example\\.evil.example", "chat.example"),
        ("http://chat\t.example", "chat.example"),
        ("http://chat.example", "user@chat.example"),
        ("http://chat.example", "chat.example:x"),
        ("file://", ""),
        ("file://", "chat.example"),
        ("http://chat.example, http://evil.example", "chat.example"),
        ("http://evil.example http://chat.example", "chat.example"),
    ],
)
def test_any_other_page_is_refused(origin, host):
    assert not let_in(Origins(None), origin, host=host)


def test_a_page_is_refused_if_there_is_no_host_to_compare():
    assert not let_in(Origins(None), "http://chat.example", host=None)
    assert not let_in(Origins(None), "null", host=None)


# This machine

LOOPBACK = [
    "localhost",
    "127.0.0.1",
    "127.0.0.53",
    "127.255.255.255",
    "[::1]",
    "LocalHost",
    "app.localhost",
    "a.b-c.localhost",
]


@pytest.mark.parametrize("server", LOOPBACK)
@pytest.mark.parametrize("page", LOOPBACK)
def test_a_page_and_a_server_of_this_machine_are_of_one_host(page, server):
    assert let_in(Origins(None), f"http://{page}:5173", host=f"{server}:8000")
    assert let_in(Origins(None), f"https://{page}", host=server)


FOREIGN = [
    "localhost.evil.example",
    "127.evil.example",
    "127.0.0.1.evil.example",
    "127.0.0.1.evil",
    "localhost.",
    "app.localhost.",
    "127.0.0.1.",
    ".localhost",
    "a..localhost",
    "evillocalhost",
    "evil-localhost",
    "localhost.localdomain",
    "localhost.com",
    "2130706433",
    "017700000001",
    "0x7f000001",
    "0x7f.0.0.1",
    "0177.0.0.1",
    "127.1",
    "127.0.0.01",
    "127.0.0.256",
    "127.0.0",
    "127.0.0.1.1",
    "128.0.0.1",
    "126.255.255.255",
    "1.0.0.127",
    "0.0.0.0",
    "192.168.0.1",
    "[::]",
    "[::2]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[::1%25lo]",
    "[::1].evil.example",
    "[127.0.0.1]",
    "::1",
    "localhost@evil.example",
    "evil.example@localhost",
    "evil.example:80@localhost",
    "localhost:80@evil.example",
    "localhost:@evil.example",
    "localhost:evil.example",
    "localhost:80.evil.example",
    "localhost:80:80",
    "localhost:-1",
    "localhost:65536",
    "localhost:0x50",
    "localhost:",
    "localhost/",
    "localhost/.evil.example",
    "localhost#.evil.example",
    "localhost?.evil.example",
    "localhost\\.evil.example",
    "localhost\\@evil.example",
    "localhost;.evil.example",
    "localhost&.evil.example",
    "localhost%00.evil.example",
    "localhost%2eevil.example",
    "localhost .evil.example",
    "localhost\t",
    "local\thost",
    "local\xadhost",
    "localh\xf6st",
    "\xb9\xb2\xb7.0.0.1",
    "evil.example#localhost",
    "evil.example/localhost",
    "evil.example\\localhost",
    "evil.example, http://localhost",
    "evil.example http://localhost",
    "http://localhost",
    "*.localhost",
    "",
    "@localhost",
    "/localhost",
]


@pytest.mark.parametrize("page", FOREIGN)
def test_a_page_that_only_looks_like_this_machine_stays_out(page):
    for server in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "app.localhost"):
        assert not let_in(Origins(None), f"http://{page}", host=server)
    assert not let_in(Origins(None), f"http://{page}:5173", host="127.0.0.1:8000")


@pytest.mark.parametrize("server", [*FOREIGN, "evil.example", "chat.example:8000"])
def test_a_page_of_this_machine_stays_out_of_every_other_host(server):
    for page in ("http://localhost", "http://127.0.0.1", "http://[::1]", "http://app.localhost"):
        assert not let_in(Origins(None), page, host=server)


@pytest.mark.parametrize(
    "origin",
    ["localhost", "//localhost", "http:localhost", "http:/localhost", ":", "1://localhost"],
)
def test_what_names_this_machine_and_is_no_origin_stays_out(origin):
    assert not let_in(Origins(None), origin, host="localhost:8000")


@pytest.mark.parametrize("name", ["x-forwarded-host", "forwarded", "x-original-host", "x-host"])
def test_what_a_proxy_says_about_the_host_is_not_trusted(name):
    headers = {"host": "chat.example", "origin": "http://evil.example", name: "evil.example"}
    for rule in (Origins(None), Origins(["http://chat.example"])):
        with pytest.raises(OriginRefused):
            asyncio.run(rule.check(Peer(headers).websocket))


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
        "file://",
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
        "NULL ",
        "file:///",
        "file://x/",
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
        "https://*",
        "https://*.",
        "https://*chat.example",
        "https://*-chat.example",
        "https://**.chat.example",
        "https://*.*.example",
        "https://a.*.example",
        "https://*..example",
        "https://*.chat.example.",
        "https://*.chat.example/",
        "https://*.chat.example:*",
        "https://*.[::1]",
        "https://user@*.chat.example",
        "*://chat.example",
        "*://*.chat.example",
        "*.chat.example",
        "://*.chat.example",
        "https://chat.example:*",
        "https://cha\u017f.example",
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


def test_a_star_in_a_list_is_refused_with_what_to_write():
    with pytest.raises(ConfigurationError, match=r'write origins="\*"$'):
        Broadcast(origins=["*"])


@pytest.mark.parametrize("origin", ["null", "file://"])
def test_a_page_without_a_host_can_be_on_the_list(origin):
    assert let_in(Origins(["https://chat.example", origin]), origin)
    assert not let_in(Origins(["https://chat.example"]), origin)
    assert not let_in(Origins(None), origin)


@pytest.mark.parametrize(
    "origin",
    [
        "capacitor://localhost",
        "ionic://localhost",
        "tauri://localhost",
        "http://tauri.localhost",
        "app://obsidian.md",
        "app://.",
        "chrome-extension://bmnlcjabgnpnenekpadlanbbkooimhnj",
        "moz-extension://5f1c7e7c-3b5b-4f5e-9d0b-0a3a8f8b8c11",
        "vscode-webview://0k5l8m",
    ],
)
def test_the_scheme_of_a_shell_can_be_on_the_list(origin):
    rule = Origins([origin])
    assert let_in(rule, origin)
    scheme, _, host = origin.partition("://")
    for other in (
        f"https://{host}",
        f"x{scheme}://{host}",
        f"{origin}.evil.example",
        f"{origin}:1",
    ):
        assert not let_in(rule, other), other
    assert not let_in(Origins(None), origin)


@pytest.mark.parametrize(
    "origin",
    [
        "https://a.example.com",
        "https://A.Example.COM",
        "https://a.b.example.com",
        "https://a.b.c.d.example.com",
        "https://xn--bcher-kva.example.com",
        "https://a_b.example.com",
        "https://example.com.example.com",
    ],
)
def test_a_pattern_lets_in_subdomains_however_deep(origin):
    assert let_in(Origins(["https://*.example.com"]), origin)
    assert let_in(Origins(["https://chat.example", "https://*.Example.com"]), origin)


@pytest.mark.parametrize(
    "origin",
    [
        "https://example.com",
        "https://.example.com",
        "https://a..example.com",
        "https://..example.com",
        "https://evil-example.com",
        "https://evilexample.com",
        "https://a.example.com.evil.example",
        "https://a.example.com.",
        "https://a.example.co",
        "https://a.example.com:8443",
        "https://a.example.com:443",
        "http://a.example.com",
        "wss://a.example.com",
        "https://*.example.com",
        "https://evil.example/a.example.com",
        "https://evil.example#a.example.com",
        "https://evil.example?a.example.com",
        "https://evil.example:80.example.com",
        "https://evil.example@a.example.com",
        "https://a.example.com@evil.example",
        "https://evil.example\\.example.com",
        "https://evil.example\t.example.com",
        "https://https://a.example.com",
        "https://[::1].example.com",
        "null",
        "",
    ],
)
def test_a_pattern_lets_in_nothing_else(origin):
    assert not let_in(Origins(["https://*.example.com"]), origin, host="a.example.com")


def test_a_pattern_has_a_port():
    rule = Origins(["http://*.example.com:8080", "http://*.localhost:5173"])
    assert let_in(rule, "http://a.example.com:8080")
    assert let_in(rule, "http://a.localhost:5173")
    for origin in ("http://a.example.com", "http://a.example.com:80", "http://a.localhost:8080"):
        assert not let_in(rule, origin)


# A function


def only_chat(origin, websocket):
    return origin == "https://chat.example"


async def only_chat_async(origin, websocket):
    return origin == "https://chat.example"


class OnlyChat:
    async def __call__(self, origin, websocket):
        return origin == "https://chat.example"


@pytest.mark.parametrize("function", [only_chat, only_chat_async, OnlyChat()])
def test_a_function_decides(function):
    assert let_in(Origins(function), "https://chat.example")
    assert not let_in(Origins(function), "https://evil.example", host="evil.example")


def test_a_function_gets_the_origin_and_the_websocket():
    called = []

    def decide(origin, websocket):
        called.append((origin, websocket.headers["host"]))
        return True

    assert let_in(Origins(decide), "HTTPS://Chat.Example", host="one.example")
    assert let_in(Origins(decide), "null", host="two.example")
    assert called == [("https://chat.example", "one.example"), ("null", "two.example")]


@pytest.mark.parametrize("origins", [("http://x/.chat.example",), ("",), ("http://a",) * 2])
def test_a_function_is_not_asked_about_what_is_no_origin(origins):
    called = []
    assert not let_in(Origins(lambda *args: called.append(args) or True), *origins)
    assert called == []


def test_a_function_that_forgets_to_return_lets_nobody_in(caplog):
    assert not let_in(Origins(lambda origin, websocket: None), "https://chat.example")
    (record,) = caplog.records
    assert "origins returned None" in record.getMessage()
    assert "'https://chat.example'" in record.getMessage()


def test_a_function_that_says_no(caplog):
    def denies(origin, websocket):
        raise PermissionError("the key k-secret is not known")

    assert not let_in(Origins(denies), "https://chat.example")
    assert not let_in(Origins(lambda *args: False), "https://chat.example")
    raised, returned = (record.getMessage() for record in caplog.records)
    assert "origins raised PermissionError" in raised
    assert "secret" not in raised
    assert "origins returned False" in returned


@pytest.mark.parametrize("answer", [1, "yes", object(), [True]])
def test_a_function_that_returns_something_else_is_a_mistake(answer):
    with pytest.raises(ConfigurationError, match="origins returned"):
        let_in(Origins(lambda *args: answer), "https://chat.example")


@pytest.mark.parametrize("how", ["mount", "serve"])
def test_a_function_is_asked_once_for_a_client(how):
    called = []

    def decide(origin, websocket):
        called.append(origin)
        return True

    hub = Broadcast(origins=decide)
    app = hub

    async def endpoint(websocket):
        await hub.serve(websocket)

    if how == "serve":
        app = Starlette(routes=[WebSocketRoute("/x", endpoint)])
    for number in (1, 2):
        connecting = TestClient(app).websocket_connect(
            "/x", headers={"origin": "https://a.example"}
        )
        with connecting:
            assert called == ["https://a.example"] * number


@pytest.mark.parametrize("origins", ["https://chat.example", "", "**", "https://a.example,*", 7])
def test_a_str_in_place_of_a_list_is_refused_with_its_value(origins):
    with pytest.raises(ConfigurationError) as raised:
        Broadcast(origins=origins)
    assert repr(origins) in str(raised.value)


# Every rule


@pytest.mark.parametrize("rule", [None, "*", [], ["https://chat.example"], lambda *args: False])
def test_a_client_without_an_origin_is_no_browser_and_let_in(rule):
    assert let_in(Origins(rule))
    assert let_in(Origins(rule), host=None)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://[", "\xff"])
def test_a_star_lets_everybody_in(origin):
    assert let_in(Origins("*"), origin)


@pytest.mark.parametrize("rule", [None, ["http://chat.example:8000"], lambda *args: True])
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
        asyncio.run(Origins(None).check(peer.websocket))
    assert "'http://evil.example'" in str(raised.value)
    assert f"'{HOST}'" in str(raised.value)
    assert raised.value.code == 1008


def test_a_refusal_is_logged_once_for_each_page(caplog):
    rule = Origins(None)
    for _ in range(3):
        for origin in ("http://evil.example", "http://localhost:5173"):
            assert not let_in(rule, origin, host="one.example")
    assert {(record.name, record.levelno) for record in caplog.records} == {
        ("starcast", logging.WARNING)
    }
    evil, local = (record.getMessage() for record in caplog.records)
    assert "'http://evil.example'" in evil
    assert "'one.example'" in evil
    assert evil.endswith('write origins=["http://evil.example"]')
    assert local.endswith('write origins=["http://localhost:5173"]')


@pytest.mark.parametrize(
    "origin", ["http://localhost:5173", "null", "file://", "capacitor://localhost"]
)
@pytest.mark.parametrize("rule", [None, [], ["https://chat.example", "https://*.example.com"]])
def test_what_the_log_says_to_write_lets_in(caplog, rule, origin):
    assert not let_in(Origins(rule), origin)
    advice = caplog.records[0].getMessage().rpartition("write origins=")[2]
    listed = eval(advice, {})
    if rule is not None:
        assert listed.pop(0) is ...
    assert listed == [origin]
    assert let_in(Origins([*(rule or ()), *listed]), origin)


def test_what_is_logged_stays_on_one_line(caplog):
    assert not let_in(Origins(None), "http://evil\r\nfake line", host="\x1b[31m")
    assert not let_in(Origins(None), "http://evil.example", host="\x1b[31m\r\n" + "x" * 9999)
    for record in caplog.records:
        assert record.getMessage().isprintable()
        assert len(record.getMessage()) < 500
    assert "is not one origin" in caplog.records[0].getMessage()


def test_who_is_let_in_is_not_logged(caplog):
    assert let_in(Origins(None), "http://chat.example")
    assert let_in(Origins(["http://a.example"]), "http://a.example")
    assert let_in(Origins("*"), "http://evil.example")
    assert caplog.records == []


def test_a_stranger_with_ever_new_values_cannot_fill_the_log(caplog):
    rule = Origins(None)
    for number in range(MAX_KINDS + 50):
        assert not let_in(rule, f"http://evil{number}.example")
    assert len(caplog.records) == MAX_ALIKE
    once(("another", "kind"), "is still said")
    assert caplog.records[-1].getMessage() == "is still said"


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
