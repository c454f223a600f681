"""The web pages of the documentation, in a real browser: see `scenarios/test_browser.py`."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.responses import FileResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles

from starcast import Broadcast, BroadcastEndpoint, History
from support import DEADLINE, Served, program, until
from test_tutorial import save

pytestmark = [pytest.mark.anyio, pytest.mark.browser, pytest.mark.timeout(180)]

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


async def tab(browser, url):
    page = await (await browser.new_context()).new_page()
    page.set_default_timeout(DEADLINE * 1000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(error))
    await page.goto(url)
    return page


async def shows(page, where, text):
    """Wait until an element has a text that contains this one."""
    await page.wait_for_function(
        "([where, text]) => document.querySelector(where)?.textContent.includes(text)",
        arg=[where, text],
    )


def again(app, server):
    """Another server for the app, at the address that this one had."""
    return Served(app, sock=socket.create_server(("127.0.0.1", server.port)))


async def test_the_page_of_the_readme(serve, browser):
    server = await serve(program(EXAMPLES / "main.py").app)
    url = f"http://127.0.0.1:{server.port}/"
    ann, ben = await tab(browser, url), await tab(browser, url)
    for page in (ann, ben):
        await page.wait_for_function("socket.readyState === WebSocket.OPEN")
    await ann.click("button")
    for page in (ann, ben):
        await shows(page, "li", "Order 7 is paid")


async def test_the_page_of_the_tutorial(serve, browser, tmp_path):
    save(5, tmp_path)
    app = program(tmp_path / "chat.py").app
    server = await serve(app)
    ann, ben = [
        await tab(browser, f"http://127.0.0.1:{server.port}/?room=tea&name={name}")
        for name in ("Ann", "Ben")
    ]
    await shows(ann, "#here", "Ann, Ben")
    await ann.fill("input", "hello <b>")
    await ann.press("input", "Enter")
    await shows(ben, "li", "Ann: hello <b>")
    await ben.wait_for_function("document.querySelector('#seconds').textContent !== '?'")

    await server.stop()
    await shows(ann, "#status", "Next try in")
    await ann.fill("input", "kept")
    await ann.press("input", "Enter")
    assert await ann.input_value("input") == "kept"
    second = again(app, server)
    try:
        await second.start()
        await shows(ann, "#status", "Connected")
        await shows(ben, "#status", "Connected")
        await ann.press("input", "Enter")
        await shows(ben, "li:last-child", "Ann: kept")
        assert await ann.input_value("input") == ""
        assert ann.errors == ben.errors == []
    finally:
        await second.stop()


async def test_the_page_of_starcast_js(serve, browser):
    rooms = program(EXAMPLES / "rooms.py")
    server = await serve(rooms.app)
    url = f"http://127.0.0.1:{server.port}/?name="
    ann, ben = await tab(browser, url + "Ann"), await tab(browser, url + "Ben")
    assert await ann.title() in (EXAMPLES / "rooms.html").read_text()
    for page in (ann, ben):
        await shows(page, "#here", "Ann")
        await shows(page, "#here", "Ben")
    await ann.fill("input", "hello <b>")
    await ann.press("input", "Enter")
    await shows(ben, "li", "Ann: hello <b>")
    cleo = await tab(browser, url + "Cleo")
    await shows(cleo, "li", "Ann: hello <b>")

    await ben.context.set_offline(True)
    for client in rooms.hub.clients("room:tea")[1:2]:
        await rooms.hub.close(client, 3012)
    await shows(ben, "#status", "Next try in")
    await cleo.fill("input", "meanwhile")
    await cleo.press("input", "Enter")
    await shows(ann, "li:last-child", "Cleo: meanwhile")
    await ben.context.set_offline(False)
    await shows(ben, "li:last-child", "Cleo: meanwhile")
    for page in (ann, ben, cleo):
        assert await lines(page) == ["Ann: hello <b>", "Cleo: meanwhile"]
        assert page.errors == []


async def lines(page):
    return await page.locator("li").all_text_contents()


async def test_the_page_of_the_tutorial_misses_nothing(serve, browser, tmp_path):
    save(6, tmp_path)
    chat = program(tmp_path / "chat.py")
    server = await serve(chat.app)
    ann, ben = [
        await tab(browser, f"http://127.0.0.1:{server.port}/?room=tea&name={name}")
        for name in ("Ann", "Ben")
    ]

    async def say(page, text):
        await page.fill("input", text)
        await page.press("input", "Enter")

    await shows(ann, "#here", "Ann, Ben")
    await say(ann, "hello <b>")
    await shows(ben, "li", "Ann: hello <b>")
    await ann.context.set_offline(True)
    await ann.evaluate("socket.close()")
    await shows(ann, "#status", "Next try in")
    await shows(ben, "#here", "Ben")
    await say(ben, "one")
    await say(ben, "two")
    await shows(ben, "li:last-child", "two")
    await say(ann, "three")
    await shows(ann, "#unsent", "Not sent yet: 1.")
    await ann.context.set_offline(False)
    said = ["Ann: hello <b>", "Ben: one", "Ben: two", "Ann: three"]
    for page in (ann, ben):
        await shows(page, "li:last-child", "three")
        assert await lines(page) == said
    await ann.wait_for_function("document.querySelector('#unsent').textContent === ''")

    # What the server has already, and has not confirmed, appears once.
    await ann.evaluate("socket.onmessage = () => {}")
    await say(ann, "four")
    await shows(ben, "li:last-child", "four")
    await ann.evaluate("socket.close()")
    await shows(ann, "li:last-child", "four")
    await ann.wait_for_function("document.querySelector('#unsent').textContent === ''")
    await say(ann, "five")
    await shows(ben, "li:last-child", "five")
    assert await lines(ben) == [*said, "Ann: four", "Ann: five"]
    await shows(ann, "li:last-child", "five")
    assert await lines(ann) == await lines(ben)

    # A server that was started anew has lost its history.
    await server.stop()
    await shows(ann, "#status", "Next try in")
    for number in range(21):
        await say(ann, f"kept {number}")
    assert await ann.input_value("input") == "kept 20"  # neither lost nor sent
    second = again(program(tmp_path / "chat.py").app, server)
    try:
        await second.start()
        for page in (ann, ben):
            await shows(page, "ul", "Some messages may be missing here.")
            await shows(page, "li:last-child", "Ann: kept 19")
        assert ann.errors == ben.errors == []
    finally:
        await second.stop()


async def test_a_page_that_reconnects(serve, browser):
    hub = Broadcast(refuse="close")
    heard = []
    tries = 0

    class Orders(BroadcastEndpoint):
        broadcast = hub
        open_to_all = True

        def get_channel(self, websocket):
            return "orders"

        async def on_connect(self, websocket):
            nonlocal tries
            tries += 1
            if not self.open_to_all:
                raise WebSocketException(1008, "log in")
            await super().on_connect(websocket)

        async def on_receive(self, websocket, data):
            heard.append(data)

    def file(name):
        return Route(f"/{name}", lambda request: FileResponse(EXAMPLES / name))

    routes = [file("reconnect.js"), file("reconnect.html"), WebSocketRoute("/ws/orders", Orders)]
    app = Starlette(routes=routes)
    server = await serve(app)
    page = await tab(browser, f"http://127.0.0.1:{server.port}/reconnect.html")
    await shows(page, "#status", "Connected")
    await hub.publish("orders", "order 7")
    await shows(page, "li", "order 7")
    assert await page.evaluate("orders.send('at once')")

    await server.stop()
    await shows(page, "#status", "Next try in")
    queued = "[...Array(101).keys()].map((number) => orders.send(`later ${number}`))"
    assert await page.evaluate(queued) == [True] * 100 + [False]
    second = again(app, server)
    try:
        await second.start()
        await until(lambda: len(heard) == 101)
        assert heard == ["at once", *(f"later {number}" for number in range(100))]
        await shows(page, "#status", "Connected")
        assert await page.locator("li").count() == 0  # it would load the list again

        Orders.open_to_all = False
        before = tries
        (client,) = hub.clients()
        await hub.close(client, 1012)
        await shows(page, "#status", "Please log in.")  # it came back once, and was sent away
        assert tries == before + 1
        assert not await page.evaluate("orders.send('never')")
        await page.evaluate("window.dispatchEvent(new Event('online'))")  # changes nothing
        await shows(page, "#status", "Please log in.")
        assert tries == before + 1
        assert page.errors == []
    finally:
        await second.stop()


async def test_a_page_with_an_event_source(serve, browser):
    module = program(EXAMPLES / "stream.py")
    server = await serve(module.app)
    page = await (await browser.new_context()).new_page()
    page.set_default_timeout(DEADLINE * 1000)
    await page.clock.install()
    away = "**/events*"
    await page.route(away, lambda route: route.fulfill(status=502))
    await page.goto(f"http://127.0.0.1:{server.port}/")
    await page.wait_for_timeout(100)
    assert module.hub.channels == {}
    await page.unroute(away)
    await page.clock.fast_forward(6000)  # the page tries again, which the browser does not
    await until(lambda: module.hub.channels == {"order:7": 1})
    await module.hub.publish("order:7", {"number": 7, "state": "paid"})
    await shows(page, "#state", "paid")


async def test_a_page_stops_when_it_is_told_to(serve, browser):
    hub = Broadcast()
    app = FastAPI()
    app.mount("/live", hub)
    app.router.routes.append(
        Route("/reconnect.js", lambda request: FileResponse(EXAMPLES / "reconnect.js"))
    )
    server = await serve(app)
    page = await tab(browser, f"http://127.0.0.1:{server.port}/docs-are-not-needed")
    script = """async (port) => {
      const { stayConnected } = await import("/reconnect.js");
      window.seen = [];
      const url = `ws://127.0.0.1:${port}/live/a`;
      window.live = stayConnected(url, () => {}, (...status) => window.seen.push(status[0]));
    }"""
    await page.evaluate(script, server.port)
    await until(lambda: hub.channels == {"a": 1})
    await page.wait_for_function("window.seen.length === 1")
    await page.evaluate("window.live.close()")
    await page.wait_for_function("window.seen.length === 2")
    assert await page.evaluate("window.seen") == ["open", "closed"]
    await until(lambda: not hub.channels)


async def test_a_page_that_resumes(serve, browser):
    hub = Broadcast(history=History(size=5))
    app = FastAPI()
    app.mount("/live", hub.app(ids=True, history=2))
    for name in ("reconnect.js", "resume.js"):
        app.router.routes.append(
            Route(f"/{name}", lambda request, name=name: FileResponse(EXAMPLES / name))
        )
    server = await serve(app)
    await hub.publish("a", "before")
    page = await tab(browser, f"http://127.0.0.1:{server.port}/docs-are-not-needed")
    script = """async (port) => {
      const { follow } = await import("/resume.js");
      window.seen = [];
      const see = (text) => window.seen.push(text);
      window.live = follow(`ws://127.0.0.1:${port}/live/a`, see, () => see("(a hole)"));
    }"""
    await page.evaluate(script, server.port)
    await page.wait_for_function("window.seen.length === 1")

    async def be_away_during(*texts):
        await page.context.set_offline(True)
        (client,) = hub.clients()
        await hub.close(client, 1012)
        for text in texts:
            await hub.publish("a", text)
        await page.context.set_offline(False)

    await be_away_during(*"12345")
    await page.wait_for_function("window.seen.length === 6")
    await be_away_during(*"abcdef")
    await page.wait_for_function("window.seen.length === 9")
    await be_away_during()
    await until(lambda: len(hub) == 1)
    await hub.publish("a", "after")
    await page.wait_for_function("window.seen.at(-1) === 'after'")
    assert await page.evaluate("window.seen") == [
        *("before", *"12345"),
        *("(a hole)", *"ef"),
        "after",
    ]
    await page.evaluate("window.live.close()")
    assert page.errors == []


# The page of FastAPI's tutorial connects to localhost whatever address it was opened by.
FASTAPI_PAGE = """
<!DOCTYPE html>
<title>Chat</title>
<form onsubmit="sendMessage(event)"><input id="messageText" autocomplete="off"></form>
<ul id="messages"></ul>
<script>
  const ws = new WebSocket(`ws://localhost:PORT/ws/${Date.now()}`)
  ws.onmessage = function (event) {
    const message = document.createElement("li")
    message.appendChild(document.createTextNode(event.data))
    document.getElementById("messages").appendChild(message)
  }
  function sendMessage(event) {
    ws.send(document.getElementById("messageText").value)
    event.preventDefault()
  }
</script>
"""


async def test_the_page_of_fastapis_tutorial(serve, browser):
    """Opened by the address that uvicorn prints, while it connects to ws://localhost."""
    module = program(EXAMPLES / "manager_chat.py")
    server = await serve(module.app)
    module.html = FASTAPI_PAGE.replace("PORT", str(server.port))
    pages = [
        await tab(browser, f"http://{host}:{server.port}/")
        for host in ("127.0.0.1", "localhost", "chat.localhost")
    ]
    await until(lambda: len(module.manager.active_connections) == 3)
    for page in pages:
        await page.fill("#messageText", "hello")
        await page.press("#messageText", "Enter")
        await shows(page, "#messages", "You wrote: hello")
    for page in pages:
        await page.wait_for_function("document.querySelectorAll('li').length === 4")


# The documentation itself, once CI has built it


WIDE = """() => document.documentElement.scrollWidth > innerWidth ? ["the page"] :
  [...document.querySelectorAll("table:not([class])")]
    .filter((table) => table.rows[0].cells.length <= 3)
    .filter((table) => table.getBoundingClientRect().right > innerWidth)
    .map((table) => table.textContent)"""


@pytest.mark.skipif("STARCAST_SITE" not in os.environ, reason="it is where CI has built the docs")
async def test_the_docs_fit_a_phone_and_begin_with_a_program(serve, browser):
    site = Path(os.environ["STARCAST_SITE"])
    server = await serve(Starlette(routes=[Mount("/", StaticFiles(directory=site, html=True))]))
    context = await browser.new_context(viewport={"width": 390, "height": 844})
    page = await context.new_page()
    here = f"http://127.0.0.1:{server.port}/"
    await page.route(lambda url: not url.startswith(here), lambda route: route.abort())
    found = await asyncio.to_thread(lambda: list(site.rglob("index.html")))
    tables = [path for path in found if "<table>" in path.read_text()]
    assert tables
    for path in (*tables, site / "tutorial" / "index.html"):
        await page.goto(f"{here}{path.parent.relative_to(site)}/")
        assert await page.evaluate(WIDE) == [], path
    await page.set_viewport_size({"width": 1280, "height": 800})
    await page.goto(here)
    code = await page.locator("pre").first.bounding_box()
    assert code["y"] < 400
