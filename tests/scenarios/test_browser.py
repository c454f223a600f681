"""The demo in a real browser: headless Chromium, a real server, three tabs; and ready-made frames.

It runs where a Chromium is found: STARCAST_CHROMIUM, or one of the usual names on the path. With
CI_REQUIRE_BROWSER=1 a missing one is a failure. STARCAST_SCREENSHOTS names a folder that gets the
pictures of the documentation.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import random
import re
import runpy
import socket
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from backends.redis_server import RedisServer
from server_process import ServerProcess
from starcast import BackendUnavailable, Broadcast
from support import DEADLINE, Served, until
from test_frames import content

pytestmark = [pytest.mark.anyio, pytest.mark.browser, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"

ATTACK = "<img src=x onerror=window.hacked=1>"
TALK = [
    ("Mira", "Morning! The new board is up at the north gate."),
    ("Mira", "Three tabs open here, and each of them keeps up."),
    ("Jonas", "I see it in Lisbon too. No refresh."),
    ("Ada", "Same here. What if I pull the network cable?"),
    ("Jonas", "The page says so, tries again by itself, and carries on."),
    ("Mira", f"And {ATTACK} stays what I typed."),
    ("Ada", "Lovely. Let’s show it to the others at noon."),  # noqa: RUF001  # as people type it
]


async def open_tab(context, server: Served, name: str | None = None, query: str = ""):
    """Open the demo in a tab, wait until it is connected, and give its user a name."""
    page = await context.new_page()
    page.set_default_timeout(DEADLINE * 1000)
    if name is not None:  # what an earlier visit has left
        await page.add_init_script(f"try {{ sessionStorage.chatName ??= {name!r} }} catch {{}}")
    await page.goto(f"http://127.0.0.1:{server.port}/{query}")
    if name is not None and await page.input_value("#name") != name:  # there is no storage
        await page.fill("#name", name)
        await page.press("#name", "Enter")
    await wait_for(page, "document.querySelector('#status').textContent.endsWith(' here')")
    return page


async def wait_for(page, condition: str, argument=None) -> None:
    await page.wait_for_function(condition, arg=argument)


async def say(page, text: str) -> None:
    await page.fill("#text", text)
    await page.press("#text", "Enter")
    assert await page.input_value("#text") == ""


async def texts(page) -> list[str]:
    return await page.locator("article p").all_text_contents()


async def wait_for_texts(page, expected: list[str]) -> None:
    """Wait until the tab has as many messages, then compare them."""
    await wait_for(page, "n => document.querySelectorAll('article').length >= n", len(expected))
    assert await texts(page) == expected


async def assert_no_html(page) -> None:
    """What was typed made no element and ran no script."""
    assert await page.locator("img, script:not([type=module])").count() == 0
    assert await page.evaluate("[window.hacked, window.z]") == [None, None]


async def test_three_tabs_see_every_message_as_it_was_typed(serve, browser, demo_app):
    folder = os.environ.get("STARCAST_SCREENSHOTS")
    server = await serve(demo_app.app)
    context = await browser.new_context(locale="en-GB", viewport={"width": 1280, "height": 800})
    tabs = {name: await open_tab(context, server, name) for name in ("Mira", "Jonas", "Ada")}
    for tab in tabs.values():
        await wait_for(tab, "document.querySelector('#status').textContent === '3 here'")

    said: list[str] = []
    for name, text in TALK:
        await say(tabs[name], text)
        said.append(text)
        for tab in tabs.values():
            await wait_for_texts(tab, said)
    for name, tab in tabs.items():
        mine = await tab.locator("article.mine p").all_text_contents()
        assert mine == [text for author, text in TALK if author == name]
        authors = set(await tab.locator("article:not(.mine) bdi").all_text_contents())
        assert authors == {*tabs} - {name}
        await assert_no_html(tab)

    await tabs["Mira"].press("#text", "a")
    await wait_for(
        tabs["Ada"],
        # The name is isolated: one that is written from right to left turns nothing else around.
        "document.querySelector('#typing').textContent === '\\u2068Mira\\u2069 is typing'",
    )
    assert await tabs["Mira"].text_content("#typing") == ""
    if folder:
        await take_pictures(tabs["Ada"], Path(folder))


async def take_pictures(page, folder: Path) -> None:
    await page.focus("#text")
    await page.screenshot(path=folder / "demo-desktop.png")
    await page.set_viewport_size({"width": 390, "height": 844})
    await page.evaluate("document.querySelector('#code').open = false")
    await page.emulate_media(color_scheme="dark")
    await page.screenshot(path=folder / "demo-phone.png")


async def test_names_and_rooms_are_no_html_either(serve, browser, demo_app):
    server = await serve(demo_app.app)
    context = await browser.new_context()
    name = "<img src=x onerror=z=1>"
    assert len(name) <= demo_app.MAX_NAME
    query = "?room=%3Cimg%20src%3Dx%20onerror%3Dwindow.z%3D1%3E"
    tabs = [await open_tab(context, server, name, query) for _ in range(2)]
    await tabs[0].press("#text", "h")  # typing
    await wait_for(tabs[1], "document.querySelector('#typing').textContent.endsWith('is typing')")
    await say(tabs[0], ATTACK)
    await say(tabs[0], "later")  # whatever the first one would have loaded had its time
    for tab in tabs:
        await wait_for_texts(tab, [ATTACK, "later"])
        assert await tab.text_content("h1") == "<img src=x onerror=window.z=1>"
        await assert_no_html(tab)
    assert await tabs[1].locator("article bdi").all_text_contents() == [name, name]
    assert await tabs[1].locator("#here bdi").all_text_contents() == [name, "You"]


async def test_a_page_reconnects_by_itself(serve, browser, demo_app):
    first = await serve(demo_app.app)
    context = await browser.new_context()
    tabs = [await open_tab(context, first, name) for name in ("Mira", "Jonas")]
    await say(tabs[0], "before")
    for tab in tabs:
        await wait_for_texts(tab, ["before"])
    await first.stop()
    for tab in tabs:
        await wait_for(tab, "document.querySelector('#status').textContent.includes('Next try')")
        await wait_for(tab, "document.querySelector('#ticker').matches('.off')")
    await tabs[0].fill("#text", "kept")
    await tabs[0].press("#text", "Enter")
    assert await tabs[0].input_value("#text") == "kept"  # not lost, not sent

    second = Served(demo_app.app, sock=socket.create_server(("127.0.0.1", first.port)))
    try:
        await second.start()
        for tab in tabs:
            await wait_for(tab, "document.querySelector('#status').textContent === '2 here'")
            await wait_for(tab, "!document.querySelector('#ticker').matches('.off')")
            assert await tab.locator(".rule").last.text_content() == "Connected again"
        await tabs[0].press("#text", "Enter")
        await wait_for_texts(tabs[1], ["before", "kept"])
        await say(tabs[1], "and back")
        await wait_for_texts(tabs[0], ["before", "kept", "and back"])
    finally:
        await second.stop()


async def test_a_tab_that_was_away_gets_what_was_said_meanwhile_once(serve, browser, demo_app):
    server = await serve(demo_app.app)
    mira = await open_tab(await browser.new_context(), server, "Mira")
    context = await browser.new_context()
    jonas = await open_tab(context, server, "Jonas")
    await say(mira, "before")
    await wait_for_texts(jonas, ["before"])

    async def go_away() -> None:
        await context.set_offline(True)  # no new connections
        for client in demo_app.hub.clients("room:lobby")[1:]:
            await demo_app.hub.close(client, 1012)
        await wait_for(jonas, "document.querySelector('#status').textContent.includes('Next try')")

    await go_away()
    said = [f"meanwhile {number}" for number in range(5)]
    for text in said:
        await say(mira, text)
    await wait_for_texts(mira, ["before", *said])
    await context.set_offline(False)
    await wait_for_texts(jonas, ["before", *said])
    await say(mira, "after")
    await wait_for_texts(jonas, ["before", *said, "after"])
    notices = jonas.locator(".rule")
    assert await notices.last.text_content() == "While you were away"
    # Only what was seen live has a latency, and the first message after the notice has a name.
    assert await jonas.locator("article:has(small) p").all_text_contents() == ["before", "after"]
    assert await jonas.locator(".rule + article:not(.more) p").all_text_contents() == [
        "before",
        said[0],
    ]

    newcomer = await open_tab(await browser.new_context(), server)
    await wait_for_texts(newcomer, ["before", *said, "after"])
    assert await newcomer.locator(".rule").count() == 1  # the day

    await go_away()
    for number in range(demo_app.MAX_KEPT + 1):
        await demo_app.hub.publish(
            "room:lobby", {"type": "message", "author": "Ada", "text": str(number)}
        )
    await context.set_offline(False)
    await wait_for_texts(
        jonas, ["before", *said, "after", *map(str, range(1, demo_app.MAX_KEPT + 1))]
    )
    assert await notices.last.text_content() == "Connected again. Some messages may be missing."


async def test_a_server_that_is_killed_and_started_again_loses_no_line(browser, tmp_path):
    """With a broker, which keeps what the others say meanwhile."""

    def start(name: str, port: int | None = None) -> ServerProcess:
        command = ["uvicorn", "demo_app:app", "--port", "{port}"]
        return ServerProcess(command, tmp_path / name, ROOT, port, STARCAST_URL=broker.url)

    with RedisServer() as broker, contextlib.ExitStack() as stack:
        one, two = start("one"), start("two")
        stack.callback(two.kill)
        stack.callback(lambda: one.kill())  # whichever it is then
        mira = await open_tab(await browser.new_context(), one, "Mira")
        jonas = await open_tab(await browser.new_context(), two, "Jonas")
        for tab in (mira, jonas):
            await wait_for(tab, "document.querySelector('#status').textContent === '2 here'")
        await say(mira, "before")
        await wait_for_texts(jonas, ["before"])
        one.kill()
        await wait_for(mira, "document.querySelector('#status').textContent.includes('Next try')")
        said = [f"meanwhile {number}" for number in range(5)]
        for text in said:
            await say(jonas, text)
        await wait_for_texts(jonas, ["before", *said])
        one = start("one", one.port)
        await wait_for_texts(mira, ["before", *said])
        assert await mira.locator(".rule").last.text_content() == "While you were away"
        await say(mira, "after")
        for tab in (mira, jonas):
            await wait_for_texts(tab, ["before", *said, "after"])
        await wait_for(mira, "document.querySelector('#status').textContent === '2 here'")


async def test_a_page_takes_whatever_the_server_sends(serve, browser, demo_app):
    server = await serve(demo_app.app)
    context = await browser.new_context()
    page = await open_tab(context, server)
    errors: list[object] = []
    page.on("pageerror", lambda error: errors.append(error))
    room, hub = "room:lobby", demo_app.hub
    await hub.publish(room, "{ not JSON", encoding="text")
    await hub.publish(room, b"\x00")
    for odd in (None, 7, "text", [], {}, {"type": 7}, {"type": "here"}, {"type": "message"}):
        await hub.publish(room, odd, encoding="json")
    await hub.publish(room, {"type": "message", "text": {"a": 1}, "author": [], "time": []})
    await hub.publish(room, {"type": "message", "text": "no more than a text"})
    await hub.publish(room, {"type": "message", "text": "odd time", "time": "soon", "id": 7})
    for odd in ({}, {"values": 7}, {"values": "x"}, {"values": [None, "1"]}, {"delivered": "x"}):
        await hub.publish(demo_app.TICKER, odd)
    await wait_for_texts(page, ["no more than a text", "odd time"])
    assert await page.locator("article bdi").first.text_content() == "Somebody"
    await say(page, "still alive")
    await wait_for_texts(page, ["no more than a text", "odd time", "still alive"])
    ticks = await page.text_content("#facts")
    await wait_for(page, "old => document.querySelector('#facts').textContent !== old", ticks)
    assert errors == []


async def test_a_ticker_without_ticks_is_dimmed(serve, browser, monkeypatch, demo_app):
    async def away(*args, **kwargs):
        raise BackendUnavailable("the broker did not answer in time")

    server = await serve(demo_app.app)
    page = await open_tab(await browser.new_context(), server)
    await wait_for(page, "!document.querySelector('#ticker').matches('.off')")
    with monkeypatch.context() as patch:
        patch.setattr(demo_app.hub, "publish", away)
        await wait_for(page, "document.querySelector('#ticker').matches('.off')")
    await wait_for(page, "!document.querySelector('#ticker').matches('.off')")


async def test_a_page_says_that_the_broker_is_away(serve, browser, monkeypatch, demo_app):
    server = await serve(demo_app.app)
    page = await open_tab(await browser.new_context(), server)
    amber = "getComputedStyle(document.querySelector('#status'), '::before').color"
    green = await page.evaluate(amber)
    with monkeypatch.context() as patch:
        patch.setattr(demo_app, "broker_is_away", lambda: True)
        await wait_for(page, "document.querySelector('#status').textContent === 'Broker away'")
        assert await page.evaluate(amber) != green
    await wait_for(page, "document.querySelector('#status').textContent === '1 here'")
    assert await page.evaluate(amber) == green


async def test_a_page_shows_who_is_here(serve, browser, demo_app):
    server = await serve(demo_app.app)
    mira = await open_tab(await browser.new_context(), server, "Mira")
    number = demo_app.WORKER.partition("-")[0]
    assert await mira.text_content("#worker") == f"worker {number}"
    context = await browser.new_context()
    jonas = await open_tab(context, server, "Jonas")
    here = "names => document.querySelector('#here').innerText.split(/\\s+/).join() === names"
    await wait_for(mira, here, "You,Jonas")
    await wait_for(jonas, here, "Mira,You")
    elsewhere = await open_tab(context, server, "Jonas", "?room=tea")
    await wait_for(elsewhere, here, "You")

    # Who has another name comes with it, and leaves with the old one.
    await jonas.fill("#name", "Jo")
    await jonas.press("#name", "Enter")
    await wait_for(mira, here, "You,Jo")
    assert await mira.text_content("#status") == "2 here"


async def test_a_connection_that_is_cut_comes_back_by_itself(serve, browser, demo_app):
    server = await serve(demo_app.app)
    mira = await open_tab(await browser.new_context(), server, "Mira")
    context = await browser.new_context()
    await (jonas := await context.new_page()).clock.install()
    jonas.set_default_timeout(DEADLINE * 1000)
    await jonas.goto(f"http://127.0.0.1:{server.port}/")
    await wait_for(jonas, "document.querySelector('#status').textContent === '2 here'")
    await jonas.click("#cut")
    assert await jonas.text_content("#status") == "Cut. Back in 10 s"
    assert await jonas.is_disabled("#cut")
    assert await jonas.is_hidden("#here")
    await say(mira, "Can you hear me?")
    await jonas.clock.run_for(9000)
    assert await jonas.text_content("#status") == "Cut. Back in 10 s"
    await jonas.clock.run_for(1000)
    await wait_for_texts(jonas, ["Can you hear me?"])
    assert await jonas.locator(".rule").first.text_content() == "While you were away"
    await wait_for(jonas, "document.querySelector('#status').textContent === '2 here'")
    await jonas.click("#cut")
    await jonas.clock.run_for(10_000)
    await wait_for(jonas, "document.querySelector('#log').textContent.includes('Connected again')")


async def test_names_keep_different_colours_and_messages_show_their_latency(
    serve, browser, demo_app
):
    server = await serve(demo_app.app)
    page = await open_tab(await browser.new_context(), server)
    names = [f"{number}" for number in range(11)]  # and that of this tab
    for name in names * 2:
        message = {"type": "message", "id": name, "author": name, "text": name}
        await demo_app.hub.publish("room:lobby", message)
    await wait_for_texts(page, names * 2)
    await wait_for(page, "document.querySelector('#here').textContent === 'You'")
    colours = await page.evaluate(
        "[...document.querySelectorAll('article bdi')].map(name => getComputedStyle(name).color)"
    )
    assert len(set(colours)) == len(names)
    assert colours[: len(names)] == colours[len(names) :]
    await say(page, "now")
    await wait_for(page, "document.querySelector('#log').lastChild.textContent.includes('now')")
    assert re.fullmatch(r"(<1|\d+) ms", await page.locator("small").last.text_content())


async def test_a_message_that_the_broker_does_not_take_is_in_the_input_line_again(
    serve, browser, monkeypatch, demo_app
):
    on_publish, is_away = demo_app.Live.on_publish, True

    async def fail(*args):
        if is_away:
            raise BackendUnavailable("the broker did not answer in time")
        return await on_publish(*args)

    monkeypatch.setattr(demo_app.Live, "on_publish", fail)
    server = await serve(demo_app.app)
    page = await open_tab(await browser.new_context(), server)
    await page.fill("#text", "kept")
    await page.press("#text", "Enter")
    await wait_for(page, "document.querySelector('#log').textContent.includes('not sent')")
    assert await page.locator(".rule").last.text_content() == "Perhaps not sent: kept"
    is_away = False
    await wait_for(page, "document.querySelector('#text').value === 'kept'")
    await page.press("#text", "Enter")
    await wait_for_texts(page, ["kept"])


async def test_a_page_keeps_its_size_on_a_small_phone(serve, browser, demo_app):
    server = await serve(demo_app.app)
    context = await browser.new_context(viewport={"width": 360, "height": 640})
    page = await open_tab(context, server, "W" * demo_app.MAX_NAME, "?room=" + "w" * 60)
    await say(page, "w" * demo_app.MAX_TEXT)
    height = "document.querySelector('aside').offsetHeight"
    header = await page.evaluate(height)
    assert header < 180  # whatever the room is called
    await page.evaluate("document.querySelector('#worker').textContent = 'worker 4194304'")
    await page.evaluate("document.querySelector('#status').textContent = 'Broker away'")
    assert await page.evaluate(height) == header  # nothing moves when the broker goes away
    last = {"type": "message", "id": "x", "author": "W" * 24, "text": "last"}
    for number in range(250):
        await demo_app.hub.publish("room:" + "w" * 40, {**last, "text": f"line {number}"})
    await demo_app.hub.publish("room:" + "w" * 40, {**last, "type": "typing"})
    await demo_app.hub.publish("room:" + "w" * 40, last)
    await wait_for(page, "document.querySelector('#log').lastChild.textContent.includes('last')")
    assert await page.locator("#log > :not(#empty)").count() == 200
    assert await page.evaluate("document.documentElement.scrollWidth") == 360
    assert await page.evaluate("document.documentElement.scrollHeight") == 640
    assert await page.evaluate("document.querySelector('#log').scrollWidth") <= 360
    at_bottom = "(log => log.scrollHeight - log.scrollTop - log.clientHeight)"
    assert await page.evaluate(f"{at_bottom}(document.querySelector('#log'))") < 2

    await page.evaluate("document.querySelector('#log').scrollTop = 100")
    await page.evaluate("new Promise(requestAnimationFrame)")
    await demo_app.hub.publish("room:" + "w" * 40, {**last, "text": "unseen"})
    await wait_for(page, "document.querySelector('#log').lastChild.textContent.includes('unseen')")
    assert await page.evaluate(f"{at_bottom}(document.querySelector('#log'))") > 100  # stays there


async def test_a_new_tab_has_a_name_of_its_own_until_one_is_chosen(serve, browser, demo_app):
    server = await serve(demo_app.app)
    context = await browser.new_context()
    first = await open_tab(context, server)
    guest = await first.input_value("#name")
    assert guest.strip()
    await first.reload()
    assert await first.input_value("#name") == guest
    await first.fill("#name", "  Mira ")
    await first.press("#name", "Enter")
    assert await first.input_value("#name") == "Mira"
    await first.fill("#name", "   ")
    await first.press("#name", "Enter")
    assert await first.input_value("#name") == "Mira"
    second = await open_tab(context, server)
    assert await second.input_value("#name") == "Mira"
    await asyncio.gather(first.close(), second.close())


@pytest.mark.parametrize("storage", ["null", "(() => { throw new DOMException('no') })()"])
async def test_a_page_works_where_storage_is_switched_off(serve, browser, storage, demo_app):
    server = await serve(demo_app.app)
    context = await browser.new_context()
    for name in ("localStorage", "sessionStorage"):
        await context.add_init_script(
            f"Object.defineProperty(window, '{name}', {{ get: () => {storage} }})"
        )
    page = await open_tab(context, server, "Mira")
    await say(page, "hello")
    await wait_for_texts(page, ["hello"])
    assert await page.input_value("#name") == "Mira"


# The contrast of each text with what is behind it, as WCAG computes it: [contrast, text] of the
# ones below 4.5, which is level AA.
PALE = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true })
  const rgba = color => {
    context.clearRect(0, 0, 1, 1), context.fillStyle = color, context.fillRect(0, 0, 1, 1)
    return [...context.getImageData(0, 0, 1, 1).data]
  }
  const luminance = color => color.slice(0, 3).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0)
  function contrast(element, color) {
    let back = element, opacity = 1
    while (rgba(getComputedStyle(back).backgroundColor)[3] < 255) back = back.parentElement
    for (let e = element; e; e = e.parentElement) opacity *= getComputedStyle(e).opacity
    back = rgba(getComputedStyle(back).backgroundColor)
    color = rgba(color).map((value, i) => value * opacity + back[i] * (1 - opacity))
    const [light, dark] = [luminance(color), luminance(back)].sort((a, b) => b - a)
    return (light + 0.05) / (dark + 0.05)
  }
  const texts = [...document.querySelectorAll("body :not(style, script, input)")]
    .filter(e => [...e.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
    .map(e => [contrast(e, getComputedStyle(e).color), e.textContent])
  const inputs = [...document.querySelectorAll("input")].map(e =>
    [contrast(e, getComputedStyle(e, e.placeholder ? "::placeholder" : "").color), e.id])
  return [...texts, ...inputs].filter(([value]) => value < 4.5)
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_text_has_enough_contrast(serve, browser, scheme, demo_app):
    server = await serve(demo_app.app)
    page = await open_tab(await browser.new_context(color_scheme=scheme), server, "Mira")
    await say(page, "hello")
    for name in map(str, range(11)):  # each has a colour of its own
        message = {"type": "message", "id": name, "author": name, "text": name}
        await demo_app.hub.publish("room:lobby", message)
    await wait_for(page, "document.querySelectorAll('article').length === 12")
    await page.evaluate("document.querySelector('#empty').hidden = false")
    for off in ("remove", "add"):
        await page.evaluate(f"document.querySelector('#ticker').classList.{off}('off')")
        assert await page.evaluate(PALE) == []


# Ready-made frames, compressed: Chromium inflates with one context for the whole connection, so
# one wrong frame makes it fail or garbles whatever follows.

RECEIVER = """
<!doctype html>
<script>
  const got = []
  let ended = null
  const socket = new WebSocket(`ws://${location.host}/ws`)
  socket.binaryType = "arraybuffer"
  socket.onmessage = ({data}) => { got.push(data); socket.send(data) }
  socket.onclose = ({code, reason}) => { ended = [code, reason] }
  function base64(data) {
    const bytes = typeof data === "string" ? new TextEncoder().encode(data) : new Uint8Array(data)
    let binary = ""
    for (const byte of bytes) binary += String.fromCharCode(byte)
    return btoa(binary)
  }
  function differing(expected) {  // the numbers of those that are not what was sent
    return expected.flatMap(([kind, payload], number) =>
      typeof got[number] === kind && base64(got[number]) === payload ? [] : [number])
  }
</script>
"""


@pytest.mark.parametrize("ws", ["auto", "starcast.uvicorn:BroadcastProtocol"])
async def test_compressed_frames_and_the_handlers_own_in_chromium(serve, browser, ws):
    hub = Broadcast()
    websockets: list[WebSocket] = []
    returned: list[str | bytes] = []

    async def endpoint(websocket: WebSocket) -> None:
        await hub.connect(websocket)
        websockets.append(websocket)
        try:
            while True:
                received = await websocket.receive()
                if received["type"] == "websocket.disconnect":
                    break
                text = received.get("text")
                returned.append(received["bytes"] if text is None else text)
        finally:
            await hub.disconnect(websocket)

    routes = [
        Route("/", lambda request: HTMLResponse(RECEIVER)),
        WebSocketRoute("/ws", endpoint),
    ]
    app = Starlette(routes=routes)

    server = await serve(app, ws=ws)
    page = await (await browser.new_context()).new_page()
    page.set_default_timeout(DEADLINE * 1000)
    await page.goto(f"http://127.0.0.1:{server.port}/")
    await until(lambda: websockets)
    (websocket,) = websockets
    assert hub.stats().fast_path == 1
    assert "permessage-deflate" in await page.evaluate("socket.extensions")

    sent: list[str | bytes] = []
    for number, size in enumerate([128, 129, 500, 4096, 5000, 40_000, 65_535, 65_536] * 2):
        payload = content(size, number % 3)  # some come again, and refer far back
        text = payload.decode()
        umlauts = "\u00e4\U0001f7e2" * (size // 6)
        noise = random.Random(number).randbytes(size)  # sent as it is
        await hub.send(text)
        await websocket.send_text(text)
        hub.publish_nowait("default", payload)  # these four are joined
        hub.publish_nowait("default", noise)
        hub.publish_nowait("default", umlauts)
        hub.publish_nowait("default", text)
        await websocket.send_bytes(payload)
        await hub.send(umlauts, to=websocket)
        await websocket.send_text("short")
        sent += [text, text, payload, noise, umlauts, text, payload, umlauts, "short"]
    await wait_for(page, "count => got.length >= count || ended", len(sent))
    expected = [
        ["object", base64.b64encode(its).decode()]
        if isinstance(its, bytes)
        else ["string", base64.b64encode(its.encode()).decode()]
        for its in sent
    ]
    assert await page.evaluate("[got.length, ended]") == [len(sent), None]
    assert await page.evaluate("differing", expected) == []
    await until(lambda: len(returned) >= len(sent))
    assert returned == sent
    assert hub.stats().dropped == 0
    await hub.close(websocket, 4000, "enough")
    await wait_for(page, "ended")
    assert await page.evaluate("ended") == [4000, "enough"]
    await until(lambda: len(hub) == 0)


# Who may connect, as Chromium asks


DOOR = """
<!doctype html>
<script>
  function connect(url, protocols) {
    return new Promise(resolve => {
      const socket = new WebSocket(url, protocols)
      const got = []
      socket.onopen = () => { socket.send("ping") }
      socket.onmessage = ({data}) => { got.push(data); if (data === "hello") socket.close(4000) }
      socket.onclose = ({code}) => resolve([socket.protocol, got, code])
    })
  }
</script>
"""


async def test_a_token_in_the_subprotocol_in_chromium(serve, browser):
    hub = Broadcast()
    plain = Broadcast()  # accepts without a subprotocol
    token = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.s3cr3t"
    asked = []

    async def authorize(websocket, channel):
        asked.append(websocket.scope["subprotocols"])
        return asked[-1] == ["bearer", token]

    heartbeats = {"ping": "pong"}
    app = Starlette(
        routes=[
            Route("/", lambda request: HTMLResponse(DOOR)),
            Mount(
                "/live",
                hub.app(authorize=authorize, subprotocols=["bearer"], heartbeats=heartbeats),
            ),
            Mount("/plain", plain.app(heartbeats=heartbeats)),
            Mount(
                "/told",
                hub.app(authorize=authorize, subprotocols=["bearer"], refuse="close"),
            ),
        ]
    )
    server = await serve(app)
    page = await (await browser.new_context()).new_page()
    page.set_default_timeout(DEADLINE * 1000)
    await page.goto(f"http://127.0.0.1:{server.port}/")

    connecting = asyncio.create_task(
        page.evaluate("url => connect(url[0], url[1])", [server.url("/live/a"), ["bearer", token]])
    )
    await until(lambda: hub.channels == {"a": 1})
    await hub.publish("a", "hello")
    protocol, got, code = await connecting
    assert (protocol, code) == ("bearer", 4000)
    assert set(got) <= {"pong", "hello"}

    connect = "url => connect(url[0], url[1])"
    refused = await page.evaluate(connect, [server.url("/live/a"), ["bearer", "another"]])
    assert refused == ["", [], 1006]
    told = await page.evaluate(connect, [server.url("/told/a"), ["bearer", "another"]])
    assert told == ["bearer", [], 1008]
    # Without an answer to what it offered, Chromium closes.
    dropped = await page.evaluate(connect, [server.url("/plain/a"), ["bearer", token]])
    assert dropped == ["", [], 1006]
    assert asked == [["bearer", token], ["bearer", "another"], ["bearer", "another"]]


async def test_a_page_tells_a_login_from_a_server_that_is_away(serve, browser):
    example = runpy.run_path(str(EXAMPLES / "refuse_close.py"))
    server = await serve(example["app"])
    context = await browser.new_context()
    page = await context.new_page()
    page.set_default_timeout(DEADLINE * 1000)
    await page.goto(f"http://127.0.0.1:{server.port}/")
    await page.get_by_text("Please log in (4401: log in)").wait_for()
    cookie = {"name": "session", "value": "s-ann", "url": f"http://127.0.0.1:{server.port}"}
    await context.add_cookies([cookie])
    await page.reload()
    await page.get_by_text("Connected").wait_for()
    await server.stop()
    await page.get_by_text("The server is away").wait_for()


async def opens(page, url: str) -> bool:
    """Whether a script of this page, or of this frame, can open a WebSocket."""
    script = """url => new Promise(resolve => {
      const socket = new WebSocket(url)
      socket.onopen = () => { resolve(true); socket.close() }
      socket.onclose = () => resolve(false)
    })"""
    return await page.evaluate(script, url)


async def test_origins_in_chromium(serve, browser, tmp_path):
    """Which Origin a page has is up to the browser: on this machine, of a file, in a sandbox."""
    same = Broadcast()
    hostless = Broadcast(origins=["null", "file://"])
    app = Starlette(
        routes=[
            Route("/", lambda request: HTMLResponse(DOOR)),
            Route("/frame", lambda request: HTMLResponse("<iframe sandbox=allow-scripts src=/>")),
            Mount("/same", same),
            Mount("/hostless", hostless),
        ]
    )
    server = await serve(app)
    page = await (await browser.new_context()).new_page()
    page.set_default_timeout(DEADLINE * 1000)

    for host in ("localhost", "127.0.0.1", "app.localhost"):
        await page.goto(f"http://{host}:{server.port}/")
        # Chromium makes 127.0.0.1 of the last two, before it writes the Host header.
        for target in ("localhost", "127.0.0.1", "2130706433", "127.1"):
            assert await opens(page, f"ws://{target}:{server.port}/same/a"), (host, target)
        assert not await opens(page, server.url("/hostless/a"))

    file = tmp_path / "page.html"
    file.write_text(DOOR)
    await page.goto(file.as_uri())
    assert not await opens(page, server.url("/same/a"))
    assert await opens(page, server.url("/hostless/a"))

    await page.goto(f"http://127.0.0.1:{server.port}/frame")
    (frame,) = page.main_frame.child_frames
    await frame.wait_for_load_state()
    assert not await opens(frame, server.url("/same/a"))
    assert await opens(frame, server.url("/hostless/a"))
