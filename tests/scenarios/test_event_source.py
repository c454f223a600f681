"""A browser's EventSource: which ids it keeps, what it asks for, and that it misses nothing."""

from __future__ import annotations

import json
import socket

import pytest
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Mount, Route

from starcast import SSE, Broadcast, History
from support import DEADLINE, Served, until

pytestmark = [pytest.mark.anyio, pytest.mark.browser, pytest.mark.timeout(180)]

PAGE = """
<!doctype html>
<script>
  const got = [], names = []
  let opened = 0
  const source = new EventSource("/live/" + location.hash.slice(1))
  source.onopen = () => { opened += 1 }
  for (const name of ["message", "bytes", "reset"])
    source.addEventListener(name, ({data, type}) => { got.push(data); names.push(type) })
</script>
"""


def make_app(hub):
    page = Route("/", lambda request: HTMLResponse(PAGE))
    return Starlette(routes=[page, Mount("/live", hub.app(sse=SSE(retry=50)))])


async def open_page(browser, server, what):
    page = await (await browser.new_context()).new_page()
    page.set_default_timeout(DEADLINE * 1000)
    await page.goto(f"http://127.0.0.1:{server.port}/#{what}")
    await page.wait_for_function("opened === 1")
    return page


async def cut(hub, page, count):
    """End its stream, and wait until it is back."""
    await hub.disconnect()
    await page.wait_for_function("count => opened === count", arg=count)
    await until(lambda: len(hub) == 1)


async def test_a_page_misses_nothing(serve, browser):
    hub = Broadcast(history=History(size=3))
    server = await serve(make_app(hub))
    page = await open_page(browser, server, "a")
    await until(lambda: len(hub) == 1)

    # It comes back with a position although it has got no message: an id alone is kept.
    await server.stop()
    await hub.publish("a", "while it was away\r\nand\ragain\n")
    second = Served(make_app(hub), sock=socket.create_server(("127.0.0.1", server.port)))
    try:
        await second.start()
        await page.wait_for_function("got.length === 1")
        await hub.publish("a", b"\xff\x00")
        await page.wait_for_function("got.length === 2")
        await cut(hub, page, 3)
        await hub.publish("a", " \u2028 ")
        await page.wait_for_function("got.length === 3")
        assert await page.evaluate("got") == ["while it was away\nand\nagain\n", "/wA=", " \u2028 "]
        assert await page.evaluate("names") == ["message", "bytes", "message"]

        await second.stop()
        for number in range(4):  # more than are kept
            await hub.publish("a", f"{number}")
        third = Served(make_app(hub), sock=socket.create_server(("127.0.0.1", server.port)))
        await third.start()
        await page.wait_for_function("names.includes('reset')")
        assert json.loads(await page.evaluate("got.at(-1)"))["recovered"] is False
        await hub.publish("a", "last")
        await page.wait_for_function("got.at(-1) === 'last'")
        await third.stop()
    finally:
        await second.stop()


async def test_two_channels_and_a_burst_across_reconnects(serve, browser):
    hub = Broadcast(history=History(size=1000))
    server = await serve(make_app(hub))
    page = await open_page(browser, server, "?channel=a&channel=b")
    expected = []
    for number in range(300):
        await hub.publish("ab"[number % 2], f"{number}")
        expected.append(f"{number}")
        if number % 100 == 50:
            await hub.disconnect()
            await hub.connect()
    await page.wait_for_function("count => got.length >= count", arg=len(expected))
    got = [json.loads(data) for data in await page.evaluate("got")]
    assert len(got) == len(expected)
    for channel, start in (("a", 0), ("b", 1)):
        of = [int(each["data"]) for each in got if each["channel"] == channel]
        assert of == list(range(start, 300, 2))
    await page.close()
    await until(lambda: len(hub) == 0)


async def test_a_page_is_refused_for_good(serve, browser):
    hub = Broadcast(origins=["https://elsewhere.example"])
    server = await serve(make_app(hub))
    page = await (await browser.new_context()).new_page()
    # To its own host the browser sends no Origin with a GET, so nothing is checked.
    await page.goto(f"http://127.0.0.1:{server.port}/#a")
    await page.wait_for_function("opened === 1")
    # To another host it does, and the page may not read what has no CORS headers either.
    url = f"http://localhost:{server.port}/live/a"
    state = """url => new Promise(done => {
      const source = new EventSource(url)
      source.onerror = () => done(source.readyState)
    })"""
    assert await page.evaluate(state, url) == 2  # CLOSED
    assert hub.channels == {"a": 1}
