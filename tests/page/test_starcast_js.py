"""starcast.js in a real browser, with a server that says what the test wants."""

from __future__ import annotations

import asyncio

import pytest
from starlette.routing import WebSocketRoute

from chromium import chromium
from page.scripted import Peer, Script, app, open_page, run, seen, wait
from support import Served, until

pytestmark = [pytest.mark.anyio, pytest.mark.browser, pytest.mark.timeout(180)]

PING = 25  # seconds, as a real server has it


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def world(anyio_backend):
    """A browser and a server for all of these tests."""
    script = Script()
    script.server = Served(script.app)
    await script.server.start()
    async with chromium() as browser:
        yield await browser.new_context(), script
    await script.server.stop()


@pytest.fixture
def script(world):
    script = world[1]
    script.begin()
    return script


@pytest.fixture
async def context(world):
    context = world[0]
    yield context
    await asyncio.gather(*(page.close() for page in context.pages))


@pytest.fixture
async def page(context, script):
    return await open_page(context, script.server)


async def lost(page, peer: Peer, script: Script, **result) -> Peer:
    """Break a connection, and return the next one."""
    await peer.close()
    return await script.connected(**result)


async def subscribed(peer: Peer, **result) -> dict:
    return await peer.answer("subscribe", **result)


def pub(number: int, **more) -> dict:
    return {"data": number, "offset": number, **more}


# Connecting


async def test_connect(page, script):
    await run(
        page,
        """
          window.live = connect("socket",
            { token: "t", data: { a: 1 }, ...logs("onConnect", "onDisconnect") })
          seen.push([live.ready, live.ended])
        """,
    )
    peer = await script.accept()
    assert peer.websocket.url.path == "/page/socket"  # relative to the page
    command = await peer.answer("connect", client="c", data={"hello": "page"})
    assert command == {"id": 1, "token": "t", "data": {"a": 1}, "subs": {}, "name": "starcast.js"}
    assert await seen(page, "onConnect", count=1) == [[{"client": "c", "data": {"hello": "page"}}]]
    assert await page.evaluate("[seen[0], live.ready, live.client]") == [[False, None], True, "c"]
    await page.evaluate("live.close()")
    await until(peer.over.is_set)
    ended = {"code": 1000, "reason": "closed", "retryIn": None}
    assert await seen(page, "onDisconnect", count=1) == [[ended]]
    assert await page.evaluate("[live.ready, !!live.ended]") == [False, True]
    await page.evaluate("live.close(); live.open(); live.open()")
    await script.connected()
    await seen(page, "onConnect", count=2)
    assert script.made == 2


async def test_urls(page, script):
    """A path of the server, a whole URL, and that of a page in TLS."""
    for url in "/page/socket", f"ws://127.0.0.1:{script.server.port}/page/socket":
        await page.evaluate("url => { connect(url) }", url)
        await script.accept()
    urls = await run(
        page,
        """
          const urls = []
          window.WebSocket = class { constructor(url) { urls.push(String(url)) } }
          connect("https://example.org/live?a=b")
          connect("//example.org/live")
          return urls
        """,
    )
    assert urls == ["wss://example.org/live?a=b", "ws://example.org/live"]


async def test_commands_of_one_turn_are_one_frame(page, script):
    await run(
        page,
        """
          window.live = connect("socket")
          window.rooms = ["a", "b", "c"].map(name => live.channel(name, logs("onMessage")))
          live.rpc("first", 1).then(log("rpc"))
          rooms[0].publish("before").then(log("published"))
        """,
    )
    peer = await script.connected()
    calls = [await peer.next("rpc"), *[await peer.next("subscribe") for _ in "abc"]]
    assert len(peer.frames) == 2
    assert [call.get("channel") for call in calls] == [None, "a", "b", "c"]
    # The replies of one frame are handled one after another, and publications after them.
    await peer.send(
        *({"id": call["id"], "subscribe": {}} for call in calls[1:]),
        *({"push": {"channel": name, "pub": {"data": name}}} for name in "abc"),
        {"id": calls[0]["id"], "rpc": {"data": {"result": 2}}},
    )
    assert [call[0] for call in await seen(page, "onMessage", count=3)] == ["a", "b", "c"]
    assert await seen(page, "rpc", count=1) == [[{"result": 2}]]
    assert (await peer.answer("publish"))["data"] == "before"  # it has waited
    await seen(page, "published", count=1)
    await run(
        page,
        """
          for (let n = 0; n < 9; n++) live.publish("x", "\u20ac".repeat(9000)).catch(log("failed"))
        """,
    )
    for _ in range(9):
        await peer.answer("publish")
    assert max(len(frame.encode()) for frame in peer.frames) < 65_536
    assert len(peer.frames) == 3 + 5


async def test_calls(page, script):
    await run(
        page,
        """
          window.live = connect("socket")
          window.room = live.channel("room")
          window.asked = Promise.all([
            room.history({ limit: 2, reverse: true }), room.presence(), room.presence(),
            room.history(), live.rpc("odd"), failure(live.rpc("none")), failure(room.publish(7)),
          ])
        """,
    )
    peer = await script.connected()
    rpcs = await peer.next("rpc"), await peer.next("rpc")
    await subscribed(peer)
    members = {"x": {"client": "x", "user": "7"}, "y": {"client": "y", "user": ""}}
    past = {"publications": [pub(2), pub(1)], "epoch": "e", "offset": 2}
    history = await peer.answer("history", **past)
    assert history == {"id": history["id"], "channel": "room", "limit": 2, "reverse": True}
    assert (await peer.answer("presence", presence=members))["channel"] == "room"
    await peer.answer("presence")
    assert set(await peer.answer("history", epoch="e", offset=2)) == {"id", "channel"}
    await peer.refuse("publish", 103)
    assert (rpcs[0]["method"], rpcs[1]["method"]) == ("odd", "none")
    await peer.send(
        {"id": 4711, "rpc": {"data": "a reply to nothing"}},
        {"id": rpcs[1]["id"], "error": {"code": 104, "message": "method not found"}},
        {"id": rpcs[0]["id"], "rpc": {}},
    )
    assert await page.evaluate("asked") == [
        past,
        list(members.values()),
        [],
        {"epoch": "e", "offset": 2},
        None,
        {"code": 104, "message": "method not found", "temporary": False},
        {"code": 103, "message": "no", "temporary": False},
    ]


async def test_calls_that_get_no_answer(context, script):
    page = await open_page(context, script.server, clock=True)
    await run(
        page,
        """
          window.live = connect("socket", logs("onDisconnect"))
          window.room = live.channel("room")
          window.waited = failure(room.publish(1))  // never sent
          window.sent = failure(live.rpc("slow"))
        """,
    )
    peer = await script.connected(ping=PING)
    await peer.next("rpc")
    await subscribed_later(page, peer)
    timeout = {"code": 1, "message": "timeout", "temporary": True}
    assert await page.evaluate("Promise.all([waited, sent])") == [timeout, timeout]

    # A connection whose subscriptions are not answered is given up.
    assert (await seen(page, "onDisconnect", count=1))[0][0]["reason"] == "timeout"
    await run(page, "window.lost = failure(live.rpc('x'))")
    await page.clock.run_for(200)
    peer = await script.connected()
    await peer.next("rpc")
    await peer.next("subscribe")
    await peer.close()
    assert await page.evaluate("lost") == {
        "code": 2,
        "message": "connection lost",
        "temporary": True,
    }
    closed = await run(
        page,
        """
          const waits = failure(live.rpc("x"))
          const waitsToo = failure(room.publish(1))
          live.close()
          return Promise.all([waits, waitsToo, failure(live.rpc("x")), failure(room.history())])
        """,
    )
    assert closed == [{"code": 3, "message": "closed", "temporary": False}] * 4


async def subscribed_later(page, peer: Peer) -> None:
    """Let the seconds pass in which the page waits for an answer."""
    await peer.next("subscribe")
    await page.clock.run_for(10_000)


# Resuming


async def test_a_page_gets_what_it_has_missed_once_and_in_order(page, script):
    await run(
        page,
        """
          window.live = connect("socket")
          window.room = live.channel("room", { data: 1, ...logs("onMessage", "onSubscribe") })
        """,
    )
    peer = await script.connected()
    position = {"recoverable": True, "epoch": "e"}
    command = await subscribed(peer, **position, offset=4, data="hello")
    assert command == {
        "id": 2,
        "channel": "room",
        "data": 1,
        "recover": False,
        "join_leave": False,
    }
    info = {"user": "7", "client": "x"}
    await peer.push("room", pub=pub(5, info=info, tags={"a": "b"}))
    await peer.push("room", pub=pub(5))
    await peer.push("room", pub=pub(6))
    await peer.push("other", pub=pub(7))  # of which it knows nothing
    calls = await seen(page, "onSubscribe", "onMessage", count=3)
    assert calls[0] == ["onSubscribe", {"channel": "room", "missed": 0, "data": "hello"}]
    assert calls[1] == [
        "onMessage",
        5,
        {"channel": "room", "offset": 5, "info": info, "tags": {"a": "b"}},
    ]
    assert await page.evaluate("[room.ready, room.epoch, room.offset]") == [True, "e", 6]

    peer = await lost(page, peer, script)
    command = await peer.next("subscribe")
    assert (command["recover"], command["epoch"], command["offset"]) == (True, "e", 6)
    result = {
        **position,
        "offset": 6,
        "was_recovering": True,
        "recovered": True,
        "publications": [pub(6), pub(7), pub(8)],
    }
    await peer.send(
        {"id": command["id"], "subscribe": result},
        {"push": {"channel": "room", "pub": pub(8)}},
        {"push": {"channel": "room", "pub": pub(9)}},
    )
    calls = (await seen(page, "onSubscribe", "onMessage", count=7))[3:]
    again = {"channel": "room", "missed": 3, "recovered": True}
    assert calls[0] == ["onSubscribe", again]
    assert [call[1] for call in calls[1:]] == [7, 8, 9]

    # Some servers name the newest offset at once, with everything that comes before it.
    peer = await lost(page, peer, script)
    everything = {**result, "offset": 11, "publications": [pub(10), pub(11)]}
    assert (await subscribed(peer, **everything))["offset"] == 9
    await seen(page, "onMessage", count=7)

    # In another epoch offsets begin again.
    peer = await lost(page, peer, script)
    past = {"recovered": False, "epoch": "f", "offset": 2}
    assert (await subscribed(peer, recoverable=True, **past))["offset"] == 11
    await peer.push("room", pub=pub(3))
    assert (await seen(page, "onSubscribe", count=4))[-1][0]["recovered"] is False
    assert [call[0] for call in await seen(page, "onMessage", count=8)][-2:] == [11, 3]

    # A channel without a history has nothing of what was missed.
    peer = await lost(page, peer, script)
    await subscribed(peer)
    peer = await lost(page, peer, script)
    assert not (await subscribed(peer))["recover"]
    assert [call[0]["recovered"] for call in (await seen(page, "onSubscribe", count=6))[-2:]] == [
        False,
        False,
    ]


async def test_a_page_that_was_loaded_again_goes_on_where_it_was(page, script):
    await run(
        page,
        """
          const since = { epoch: "e", offset: 4 }
          window.room = connect("socket").channel("room", { since, ...logs("onSubscribe") })
        """,
    )
    peer = await script.connected()
    past = {"epoch": "e", "offset": 4, "recovered": True, "publications": [pub(5)]}
    command = await subscribed(peer, **past)
    assert (command["recover"], command["epoch"], command["offset"]) == (True, "e", 4)
    assert (await seen(page, "onSubscribe", count=1))[0][0]["recovered"] is True
    assert await page.evaluate("[room.epoch, room.offset]") == ["e", 5]


async def test_a_handler_that_fails_and_one_that_closes(page, script):
    await run(
        page,
        """
          window.live = connect("socket")
          window.room = live.channel("room", { onMessage(data) {
            seen.push(["onMessage", data])
            if (data === 1) throw new Error("a bug of the page")
            if (data === 5) live.close()
          } })
        """,
    )
    peer = await script.connected()
    past = {"epoch": "e", "recovered": True, "offset": 4, "publications": [pub(1), pub(2)]}
    await subscribed(peer, **past)
    await peer.send(*({"push": {"channel": "room", "pub": pub(number)}} for number in (5, 6, 7)))
    await until(peer.over.is_set)
    assert await seen(page, "onMessage", count=3) == [[1], [2], [5]]
    assert page.errors == ["a bug of the page"]

    # What has come and was not handled is asked for.
    await page.evaluate("live.open()")
    peer = await script.connected()
    past = {"epoch": "e", "recovered": True, "offset": 5, "publications": [pub(5), pub(6), pub(7)]}
    assert (await subscribed(peer, **past))["offset"] == 5
    await seen(page, "onMessage", count=5)

    await run(page, "room.options.onSubscribe = () => room.unsubscribe()")
    peer = await lost(page, peer, script)
    await subscribed(peer, **past | {"publications": [pub(8)]})
    assert (await peer.answer("unsubscribe"))["channel"] == "room"
    await run(page, "live.rpc('x').then(log('rpc'))")
    await peer.answer("rpc")
    await seen(page, "rpc", count=1)
    await seen(page, "onMessage", count=5)


# Codes


async def test_close_codes(context, serve):
    """After some the page comes back, after others it does not."""

    async def close(websocket) -> None:
        await websocket.accept()
        await websocket.receive_text()
        await websocket.close(int(websocket.path_params["code"]), "why")

    server = await serve(app(WebSocketRoute("/page/{code}", close)))
    page = await open_page(context, server)
    come_back = [1000, 1001, 1008, 1011, 1012, 1013, 3000, 3499, 4000, 4499]
    stay_away = [1009, 3500, 3999, 4500, 4999]
    ends = await page.evaluate(
        """codes => Promise.all(codes.map(code => new Promise(resolve => {
          const live = connect(`${code}`, { onDisconnect(end) { resolve(end), live.close() } })
        })))""",
        come_back + stay_away,
    )
    assert [(end["code"], end["reason"]) for end in ends] == [
        (code, "why") for code in come_back + stay_away
    ]
    assert [end["retryIn"] is None for end in ends] == [
        code in stay_away for code in come_back + stay_away
    ]


async def test_unsubscribe_codes(page, script):
    await run(
        page,
        """
          window.live = connect("socket")
          window.room = live.channel("room", logs("onError", "onSubscribe"))
        """,
    )
    peer = await script.connected()
    await subscribed(peer, epoch="e", offset=3)
    await peer.push("room", unsubscribe={"code": 2500, "reason": "insufficient state"})
    command = await subscribed(peer, epoch="e", offset=3, recovered=True)
    assert (command["recover"], command["offset"]) == (True, 3)
    assert len(await seen(page, "onSubscribe", count=2)) == 2
    await run(page, "failure(room.publish(1)).then(log('failure'))")
    await peer.next("publish")
    await peer.push("room", unsubscribe={"code": 2000, "reason": "server unsubscribe"})
    await seen(page, "onError", count=1)
    assert await page.evaluate("[room.ended.code, room.ready]") == [2000, False]
    assert (await page.evaluate("failure(room.publish(1))"))["message"] == "closed"
    # There may be another channel of that name now.
    await run(page, "live.channel('room', logs('onSubscribe'))")
    assert not (await subscribed(peer))["recover"]
    await seen(page, "onSubscribe", count=3)


async def test_errors_of_subscriptions(page, script):
    await run(
        page,
        """
        window.live = connect("socket")
        for (const name of ["busy", "secret", "expired"]) {
          window[name] = live.channel(name, logs("onError", "onSubscribe"))
        }
        """,
    )
    peer = await script.connected()
    await peer.refuse("subscribe", 111, temporary=True)
    await peer.refuse("subscribe", 103)
    await peer.refuse("subscribe", 109)
    assert (await subscribed(peer))["channel"] == "busy"
    await seen(page, "onError", count=3)
    assert await page.evaluate("[busy, secret, expired].map(room => room.ended?.code)") == [
        None,
        103,
        109,
    ]
    assert await page.evaluate("[busy, secret, expired].map(room => room.ready)") == [
        True,
        False,
        False,
    ]


async def test_tokens_of_channels(page, script):
    await run(
        page,
        """
        window.live = connect("socket")
        let number = 0
        live.channel("a", { token: "first", getToken: (name) => name + ++number })
        live.channel("none", { getToken: () => null, ...logs("onError") })
        const late = new Promise((resolve) => { window.give = resolve })
        live.channel("late", { getToken: () => late })
        let failed = false
        live.channel("thrown", { ...logs("onError"), async getToken() {
          if (failed) return "at last"
          failed = true
          throw new Error("the network is away")
        } })
        """,
    )
    peer = await script.connected()
    assert (await peer.refuse("subscribe", 109))["token"] == "first"
    tokens = {
        command["channel"]: command["token"] for command in [await subscribed(peer) for _ in "ab"]
    }
    assert tokens == {"a": "a1", "thrown": "at last"}
    errors = [call[0] for call in await seen(page, "onError", count=2)]
    assert errors == [
        {"code": 101, "message": "unauthorized", "temporary": False},
        {"code": 4, "message": "no token: Error: the network is away", "temporary": True},
    ]
    await run(page, "give('late')")
    assert (await subscribed(peer))["token"] == "late"


async def test_errors_of_connections(page, script):
    await run(
        page,
        """
        let number = 0
        const getToken = () => ++number === 2 ? Promise.reject("the network is away") : `${number}`
        window.live = connect("socket", { getToken, ...logs("onDisconnect") })
        """,
    )
    refused: list[tuple[str, int, bool]] = []
    for code, temporary in (100, True), (109, False), (101, False):
        peer = await script.accept()
        command = await peer.refuse("connect", code, temporary=temporary)
        refused.append((command["token"], code, temporary))
        await until(peer.over.is_set)
    assert refused == [("1", 100, True), ("1", 109, False), ("3", 101, False)]
    ends = [call[0] for call in await seen(page, "onDisconnect", count=4)]
    assert [end["code"] for end in ends] == [100, 109, 4, 101]
    assert [end["retryIn"] for end in ends] == [0.1, 0.1, 0.1, None]
    # A token that is a text cannot be renewed; and without any, a page does not even try.
    await run(page, "live = connect('socket', { token: 't', ...logs('onDisconnect') })")
    await (await script.accept()).refuse("connect", 109)
    await seen(page, "onDisconnect", count=5)
    await run(page, "connect('socket', { getToken: async () => null, ...logs('onDisconnect') })")
    ends = [call[0] for call in await seen(page, "onDisconnect", count=6)]
    assert [(end["code"], end["retryIn"]) for end in ends[-2:]] == [(109, None), (101, None)]
    assert script.made == 4


# Pings, and tokens that expire


async def test_pings(context, script):
    page = await open_page(context, script.server, clock=True)
    await run(page, "window.live = connect('socket', logs('onDisconnect'))")
    peer = await script.connected(ping=PING, pong=True)
    await wait(page, "live.ready")
    for _ in range(3):
        await page.clock.run_for(1000 * PING)
        await peer.send({})
        await peer.next("pong")
    assert script.made == 1
    await page.clock.run_for(1000 * (PING + 10))
    assert (await seen(page, "onDisconnect", count=1))[0][0]["retryIn"] == 0.1
    await page.clock.run_for(100)

    peer = await script.connected(ping=PING)  # it wants no pongs
    await wait(page, "live.ready")
    await peer.send({}, {}, {"push": {"message": {"data": 1}}})
    await run(page, "live.rpc('x')")
    await peer.answer("rpc")
    peer = await lost_later(page, peer, script)
    await wait(page, "live.ready")
    await page.clock.run_for(1000 * 3600)  # it sends no pings
    assert await page.evaluate("live.ready")

    # A server that accepts and never answers is given up.
    await peer.close()
    await seen(page, "onDisconnect", count=3)
    await page.clock.run_for(100)
    await (await script.accept()).next("connect")
    await page.clock.run_for(10_000)
    await seen(page, "onDisconnect", count=4)


async def lost_later(page, peer: Peer, script: Script) -> Peer:
    await peer.close()
    await wait(page, "!live.ready")
    await page.clock.run_for(100)
    return await script.connected()


async def test_tokens_are_renewed(context, script):
    page = await open_page(context, script.server, clock=True)
    await run(
        page,
        """
        let number = 0
        const getToken = () => `token ${++number}`
        window.live = connect("socket", { getToken, ...logs("onDisconnect") })
        window.room = live.channel("room", { getToken, ...logs("onSubscribe", "onError") })
        """,
    )
    peer = await script.connected(expires=True, ttl=100)
    await subscribed(peer, expires=True, ttl=150)
    await seen(page, "onSubscribe", count=1)
    await page.clock.run_for(99_000)
    assert not peer.commands
    await page.clock.run_for(1000)
    assert (await peer.answer("refresh", expires=True, ttl=100))["token"] == "token 3"
    await page.clock.run_for(50_000)
    command = await peer.answer("sub_refresh", expires=True, ttl=2**40)
    assert (command["channel"], command["token"]) == ("room", "token 4")
    await page.clock.run_for(50_000)

    # A token that the server does not take: another one, with another connection.
    assert (await peer.refuse("refresh", 109))["token"] == "token 5"
    assert (await seen(page, "onDisconnect", count=1))[0][0]["code"] == 109
    await page.clock.run_for(100)
    peer = await script.accept()
    assert (await peer.answer("connect", client="c"))["token"] == "token 6"
    assert (await subscribed(peer, expires=True, ttl=10))["token"] == "token 4"
    await seen(page, "onSubscribe", count=2)
    await page.clock.run_for(10_000)
    assert (await peer.refuse("sub_refresh", 100, temporary=True))["token"] == "token 7"
    await seen(page, "onError", count=1)
    await peer.answer("unsubscribe")
    await page.clock.run_for(100)
    assert (await subscribed(peer, expires=True, ttl=10))["token"] == "token 7"
    await seen(page, "onSubscribe", count=3)
    await page.clock.run_for(10_000)
    await peer.refuse("sub_refresh", 103)
    await seen(page, "onError", count=2)
    assert await page.evaluate("[room.ended.code, live.ready]") == [103, True]


# What the server subscribes the page to


async def test_server_side_subscriptions(page, script):
    await run(
        page,
        """
        window.live = connect("socket", logs("onMessage", "onSubscribe", "onError", "onConnect"))
        window.own = live.channel("own", { onMessage: log("own") })
        """,
    )
    news = {"epoch": "e", "offset": 2}
    peer = await script.connected(subs={"news": news, "own": {}, "constructor": {}})
    await peer.send(
        {"push": {"message": {"data": "to the user"}}},
        {"push": {"channel": "news", "pub": pub(3)}},
        {"push": {"channel": "own", "pub": {"data": "own"}}},
        {"push": {"channel": "later", "pub": pub(1)}},
        {"push": {"channel": "later", "subscribe": {"data": "hello"}}},
        {"push": {"channel": "later", "pub": {"data": "later"}}},
    )
    calls = await seen(page, "onMessage", "onSubscribe", "onConnect", count=7)
    assert calls == [
        ["onConnect", {"client": "c"}],
        ["onSubscribe", {"channel": "news", "missed": 0}],
        ["onSubscribe", {"channel": "constructor", "missed": 0}],
        ["onMessage", "to the user", {}],
        ["onMessage", 3, {"channel": "news", "offset": 3}],
        ["onSubscribe", {"channel": "later", "missed": 0, "data": "hello"}],
        ["onMessage", "later", {"channel": "later"}],
    ]
    await seen(page, "own", count=1)
    assert not peer.commands  # it has asked for none of them

    await peer.close()
    peer = await script.accept()
    recovered = {"epoch": "e", "offset": 3, "recovered": True, "publications": [pub(4)]}
    command = await peer.answer("connect", client="c", subs={"news": recovered, "constructor": {}})
    assert command["subs"]["news"] == {"recover": True, "epoch": "e", "offset": 3}
    assert set(command["subs"]) == {"news", "own", "constructor", "later"}
    calls = await seen(page, "onMessage", "onSubscribe", "onError", count=10)
    assert calls[-4:] == [
        ["onError", {"code": 3, "message": "closed", "temporary": False}],  # later
        ["onSubscribe", {"channel": "news", "missed": 1, "recovered": True}],
        ["onMessage", 4, {"channel": "news", "offset": 4}],
        ["onSubscribe", {"channel": "constructor", "missed": 0, "recovered": False}],
    ]
    # What the page wants too, it asks for now.
    assert (await subscribed(peer))["channel"] == "own"

    await run(page, "live.channel('news', { onMessage: log('taken over') })")
    await peer.push("news", pub=pub(5))
    await seen(page, "taken over", count=1)
    await peer.push("news", unsubscribe={"code": 2500, "reason": "insufficient state"})
    command = await subscribed(peer)
    assert (command["channel"], command["recover"], command["offset"]) == ("news", True, 5)
    await peer.push("constructor", unsubscribe={"code": 2500, "reason": "insufficient state"})
    await seen(page, "onError", count=2)


async def test_a_page_that_closes_in_a_handler_of_the_connection(page, script):
    await run(page, "window.live = connect('socket', { onConnect: () => live.close() })")
    peer = await script.connected(subs={"news": {}})
    await until(peer.over.is_set)
    assert await page.evaluate("[live.ready, !!live.ended]") == [False, True]
    assert page.errors == []


# Trying again


async def test_the_longest_waits(context, serve):
    """Twice as long each time, up to 20 seconds."""
    page = await open_page(context, await serve(app()), random=0.999999, clock=True)
    await run(page, "window.live = connect('socket', logs('onDisconnect'))")
    waits = []
    for count in range(1, 10):
        waits.append((await seen(page, "onDisconnect", count=count))[-1][0]["retryIn"])
        await page.clock.run_for(round(waits[-1] * 1000))
    assert [round(wait, 2) for wait in waits] == [0.5, 1, 2, 4, 8, 16, 20, 20, 20]


async def test_a_connection_that_lasted_is_no_failure(context, script):
    page = await open_page(context, script.server, random=0.999999, clock=True)
    await run(page, "window.live = connect('socket', logs('onDisconnect'))")
    waits = []
    for lasts in (0, 0, 19_000, 21_000, 0):
        peer = await script.connected()
        await wait(page, "live.ready")
        await page.clock.run_for(lasts)
        await peer.close()
        count = len(waits) + 1
        waits.append((await seen(page, "onDisconnect", count=count))[-1][0]["retryIn"])
        await page.clock.run_for(5000)
    assert [round(wait, 2) for wait in waits] == [0.5, 1, 2, 0.5, 1]


async def test_offline_and_online(context, script):
    page = await open_page(context, script.server, clock=True)
    await run(page, "window.live = connect('socket', logs('onDisconnect', 'onConnect'))")
    peer = await script.connected(ping=PING)
    await seen(page, "onConnect", count=1)
    await context.set_offline(True)
    await wait(page, "navigator.onLine === false")
    await page.clock.run_for(5000)  # it has asked whether the server is there
    end = (await seen(page, "onDisconnect", count=1))[0][0]
    assert end["retryIn"] == 60  # and not 0.1
    await page.clock.run_for(59_000)
    assert script.made == 1
    await context.set_offline(False)
    await script.connected()
    await seen(page, "onConnect", count=2)
    await seen(page, "onDisconnect", count=1)
    await until(peer.over.is_set)


async def test_a_page_that_was_hidden(context, script):
    page = await open_page(context, script.server, random=0.999999, clock=True)
    await run(
        page,
        """
        window.show = (shown) => {
          Object.defineProperty(document, "hidden", { get: () => !shown, configurable: true })
          document.dispatchEvent(new Event("visibilitychange", { bubbles: true }))
        }
        window.live = connect("socket", logs("onConnect", "onDisconnect"))
        """,
    )
    peer = await script.connected(ping=PING)
    await seen(page, "onConnect", count=1)
    await run(page, "show(false); show(true)")  # something was heard just now
    await page.clock.run_for(6000)
    await run(page, "show(false)")
    assert not peer.commands
    await run(page, "show(true)")
    await peer.answer("ping")
    await page.clock.run_for(6000)
    assert script.made == 1

    # One that is not answered is dead.
    await run(page, "show(true)")
    await peer.next("ping")
    await page.clock.run_for(5000)
    await seen(page, "onDisconnect", count=1)
    await run(page, "show(false)")
    assert script.made == 1  # it waits
    await run(page, "show(true)")  # and now it does not
    await script.connected()
    await seen(page, "onConnect", count=2)


# Who is here


def member(client: str, user: str = "") -> dict:
    return {"client": client, "user": user}


async def test_members(page, script):
    await run(
        page,
        """
        window.live = connect("socket")
        live.channel("room", logs("onMembers", "onJoin", "onLeave", "onError"))
        live.channel("quiet", logs("onMessage"))
        """,
    )
    peer = await script.connected()
    assert (await subscribed(peer))["join_leave"] is True
    assert (await subscribed(peer))["join_leave"] is False
    ask = await peer.next("presence")
    ann, ben, cleo, dan = member("1", "ann"), member("2", "ben"), member("3"), member("4")
    # What comes before the answer is newer than what that says.
    await peer.send(
        {"push": {"channel": "room", "join": {"info": dan}}},
        {"push": {"channel": "room", "leave": {"info": ben}}},
        {"push": {"channel": "quiet", "join": {"info": dan}}},
        {"id": ask["id"], "presence": {"presence": {"1": ann, "2": ben, "3": cleo, "5": ann}}},
        {"push": {"channel": "room", "leave": {"info": cleo}}},
        {"push": {"channel": "room", "leave": {"info": cleo}}},
        {"push": {"channel": "room", "join": {"info": ben}}},
    )
    shown = [call[0] for call in await seen(page, "onMembers", count=4)]
    names = [[it["user"] or it["client"] for it in members] for members in shown]
    assert names == [["ann", "3", "4"], ["ann", "4"], ["ann", "4"], ["ann", "4", "ben"]]
    assert await seen(page, "onJoin", count=2) == [[dan], [ben]]
    await seen(page, "onLeave", count=3)

    peer = await lost(page, peer, script)
    for _ in range(2):
        await subscribed(peer)
    await peer.answer("presence", presence={"3": cleo})
    assert (await seen(page, "onMembers", count=5))[-1] == [[cleo]]

    # A presence that nobody may see is an error, and the channel goes on.
    peer = await lost(page, peer, script)
    for _ in range(2):
        await subscribed(peer)
    await peer.refuse("presence", 108)
    await seen(page, "onError", count=1)
    await peer.push("room", join={"info": dan})
    await seen(page, "onJoin", count=3)
    await seen(page, "onMembers", count=5)


async def test_members_that_are_not_known_for_now(context, script):
    page = await open_page(context, script.server, clock=True)
    await run(page, "connect('socket').channel('room', logs('onMembers', 'onError'))")
    peer = await script.connected()
    await subscribed(peer)
    await peer.refuse("presence", 100, temporary=True)
    assert (await seen(page, "onError", count=1))[0][0]["temporary"]
    await page.clock.run_for(5000)
    await peer.answer("presence", presence={"1": member("1")})
    assert await seen(page, "onMembers", count=1) == [[[member("1")]]]


async def test_a_channel_is_left(page, script):
    await run(
        page,
        """
        window.live = connect("socket")
        window.room = live.channel("room", { ...logs("onMessage", "onError") })
        """,
    )
    peer = await script.connected()
    await subscribed(peer)
    await peer.push("room", pub=pub(1))
    await seen(page, "onMessage", count=1)
    same = await run(page, "try { live.channel('room') } catch ({ message }) { return message }")
    assert same == "room is a channel already"
    # Commands are sent in their order, so that there can be another one at once.
    await run(page, "room.unsubscribe(); room.unsubscribe(); window.other = live.channel('room')")
    await peer.next("unsubscribe")
    command = await peer.next("subscribe")
    await peer.push("room", pub=pub(2))  # of the one that was left
    await peer.send({"id": command["id"], "subscribe": {}})
    await wait(page, "other.ready")
    await run(page, "other.unsubscribe(); live.close(); live.open()")
    await peer.next("unsubscribe")  # what was called before the end
    peer = await script.connected()
    await run(page, "live.rpc('x').then(log('rpc'))")
    await peer.answer("rpc")
    await seen(page, "onMessage", count=1)
    await seen(page, "onError", count=0)
