"""starcast.js in a real browser, with real servers and a real broker, which are killed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from backends.redis_server import RedisServer
from chromium import chromium
from page.scripted import cable, open_page, run, seen, wait
from server_process import ServerProcess
from starcast import BackendUnavailable, Broadcast, History
from support import program, until

pytestmark = [pytest.mark.anyio, pytest.mark.browser, pytest.mark.timeout(180)]

APP = Path(__file__).parent / "live_app.py"
NUMBERS = 2000


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def one_browser(anyio_backend):
    async with chromium() as browser:
        yield browser


@pytest.fixture
async def context(one_browser):
    context = await one_browser.new_context()
    yield context
    await context.close()


def start(log: Path, port: int | None = None, **environment: str) -> ServerProcess:
    command = ["uvicorn", "page.live_app:app", "--port", "{port}"]
    return ServerProcess(command, log, port=port, **environment)


ROOM = """
  window.numbers = []
  const handlers = logs("onConnect", "onDisconnect", "onMessage")
  window.live = connect("socket", { token: "mira", ...handlers })
  window.room = live.channel("room:tea", {
    ...logs("onSubscribe", "onError"),
    onMessage(data, message) { numbers.push(data); log("room")(data, message) },
  })
"""


async def test_all_of_it(context, serve):
    live = program(APP)
    server = await serve(live.app)
    page = await open_page(context, server)
    await run(page, ROOM + "live.channel('secret', { onError: log('secret') })")
    assert (await seen(page, "secret", count=1))[0][0]["code"] == 103
    await seen(page, "onSubscribe", count=1)
    await live.hub.publish("room:tea", {"from": "the server"})
    await live.hub.publish("news", "news", encoding="json")
    await run(page, "await room.publish('from the page')")
    assert await seen(page, "onMessage", count=1) == [["news", {"channel": "news"}]]
    client = await page.evaluate("live.client")
    info = {"user": "mira", "client": client, "conn_info": {"name": "Mira"}}
    assert await seen(page, "room", count=2) == [
        [{"from": "the server"}, {"channel": "room:tea", "offset": 1}],
        ["from the page", {"channel": "room:tea", "offset": 2, "info": info}],
    ]
    assert await run(page, "return live.rpc('add', [1, 2])") == 3
    assert (await run(page, "return failure(live.rpc('none'))"))["code"] == 104
    past = await run(page, "return room.history({ limit: 1, reverse: true })")
    assert [it["data"] for it in past["publications"]] == ["from the page"]
    assert past["offset"] == 2
    await run(page, "room.unsubscribe(); await live.rpc('add', [])")
    assert "room:tea" not in live.hub.channels
    await page.close()
    await until(lambda: not live.hub.channels)


async def test_who_is_here(context, serve):
    live = program(APP)
    server = await serve(live.app)
    room = """
      window.live = connect("socket", { token: argument })
      window.room = live.channel("room:tea", logs("onMembers", "onJoin", "onLeave", "onError"))
      window.names = () => seen.findLast(([name]) => name === "onMembers")?.[1]
        .map(({ user, client, conn_info }) => user ? conn_info.name : client).sort().join()
    """
    here = "names => window.names() === names"
    mira = await open_page(context, server)
    await run(mira, room, "mira")
    await wait(mira, here, "Mira")
    jonas, same = await open_page(context, server), await open_page(context, server)
    await run(jonas, room, "jonas")
    for page in (mira, jonas):
        await wait(page, here, "Jonas,Mira")
    await run(same, room, "jonas")
    await wait(same, here, "Jonas,Mira")
    assert len(await run(same, "return room.presence()")) == 3  # clients

    # The same user in another tab has neither come nor gone; who leaves for good is gone.
    await same.close()
    await run(jonas, "room.unsubscribe()")
    await wait(mira, here, "Mira")
    (left,) = await seen(mira, "onLeave", count=1)
    assert left[0]["user"] == "jonas"
    assert await run(mira, "return seen.some(([name]) => name === 'onError')") is False
    await run(jonas, room.replace("room:tea", "other"), "")
    await wait(jonas, "window.names() && window.names() === live.client")  # nobody in particular


async def test_a_cable_that_is_cut(context, serve):
    live = program(APP)
    server = await serve(live.app)
    async with cable(server.port) as cut:
        page = await open_page(context, cut)
        await run(page, ROOM)
        await seen(page, "onSubscribe", count=1)
        await live.hub.publish("room:tea", 1)
        await seen(page, "room", count=1)
        cut.cut()
        await seen(page, "onDisconnect", count=1)
        for number in (2, 3, 4):
            await live.hub.publish("room:tea", number)
        cut.mend()
        await seen(page, "onConnect", count=2)
        (_, again) = await seen(page, "onSubscribe", count=2)
        assert again == [{"channel": "room:tea", "missed": 3, "recovered": True}]
        await wait(page, "numbers.length >= 4")
        assert await page.evaluate("numbers") == [1, 2, 3, 4]


async def test_a_server_in_memory_that_is_killed_has_forgotten(context, tmp_path):
    server = start(tmp_path / "log")
    try:
        page = await open_page(context, server)
        await run(page, ROOM + "await live.rpc('publish', 1)")
        await seen(page, "room", count=1)
        server.kill()
        await seen(page, "onDisconnect", count=1)
        server = start(tmp_path / "log", server.port)
        (_, again) = await seen(page, "onSubscribe", count=2)
        assert again == [{"channel": "room:tea", "missed": 0, "recovered": False}]
        await run(page, "await live.rpc('publish', 2)")
        await wait(page, "numbers.length >= 2")
        assert await page.evaluate("numbers") == [1, 2]
    finally:
        server.kill()


async def test_every_number_once_and_in_order(context, tmp_path):
    """The server is killed and started again while they are published, and so is the broker."""
    gates = {NUMBERS // 2: asyncio.Event(), NUMBERS * 3 // 4: asyncio.Event()}

    async def publish() -> None:
        """Publish the numbers, each until the broker has it."""
        async with Broadcast(broker.url, history=History(size=5000, ttl=600)) as hub:
            for number in range(1, NUMBERS + 1):
                if number in gates:
                    await gates[number].wait()
                while True:
                    with contextlib.suppress(BackendUnavailable):
                        await hub.publish("room:tea", number, idempotency_key=str(number))
                        break

    with RedisServer("--appendonly", "yes", "--appendfsync", "always") as broker:
        server = start(tmp_path / "log", STARCAST_URL=broker.url)
        publishing = None
        try:
            page = await open_page(context, server)
            await run(page, ROOM)
            await seen(page, "onSubscribe", count=1)
            publishing = asyncio.create_task(publish())
            await wait(page, "numbers.length > 100")
            server.kill()
            server = start(tmp_path / "log", server.port, STARCAST_URL=broker.url)
            first, second = gates
            await wait(page, "count => numbers.length >= count", first - 1)
            gates[first].set()
            await wait(page, "count => numbers.length >= count", first + 1)
            broker.kill()
            gates[second].set()
            broker.start()
            await publishing
            await wait(page, "count => numbers.length >= count", NUMBERS)
            assert await page.evaluate("numbers") == list(range(1, NUMBERS + 1))
            (_, *again) = await seen(page, "onSubscribe", count=2)
            assert [call[0]["recovered"] for call in again] == [True]
        finally:
            server.kill()
            if publishing is not None:
                publishing.cancel()
