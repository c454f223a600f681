"""The life of a hub: opening and closing."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import FastAPI, WebSocket
from starlette.testclient import TestClient

from starcast import BackendUnavailable, Broadcast, ConfigurationError, forks
from support import Bus, Peer, joined, until

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "options",
    [
        {"url": "carrier-pigeon://x"},
        {"url": "memory"},
        {"max_buffer": 0},
        {"max_buffer": "1 MiB"},
        {"overflow": "explode"},
        {"origins": "https://example.com"},
        {"origins": ["example.com"]},
    ],
)
async def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigurationError):
        Broadcast(**options)


async def test_an_unknown_url_is_refused_without_its_password():
    with pytest.raises(ConfigurationError) as caught:
        Broadcast("carrier-pigeon://user:secret@host")
    assert "carrier-pigeon" in str(caught.value)
    assert "memory://" in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_every_way_of_opening_and_closing():
    hub = Broadcast()
    assert not hub.stats().open
    await hub.connect()
    await hub.connect()
    assert hub.stats().open
    await hub.disconnect()
    await hub.disconnect()
    assert not hub.stats().open
    async with hub as entered:
        assert entered is hub
        assert hub.stats().open
    async with hub.lifespan(object()):
        assert hub.stats().open
    assert not hub.stats().open
    peer = await joined(hub)  # on first use
    assert hub.stats().open
    await hub.disconnect()
    assert peer.closed == 1001
    assert len(hub) == 0


async def test_a_closed_hub_can_be_opened_again():
    hub = Broadcast()
    await joined(hub)
    await hub.disconnect()
    with pytest.raises(BackendUnavailable, match="hub is not open; open it with the app"):
        hub.publish_nowait("default", "to nobody")
    with pytest.raises(BackendUnavailable, match="hub is not open; open it with the app"):
        await hub.publish("default", "last words of an on_disconnect")
    assert not hub.stats().open
    peer = await joined(hub)
    await hub.send("again")
    assert peer.got == ["again"]


async def test_a_hub_in_memory_that_was_never_opened_may_be_published_to():
    """Its first client opens it, and who publishes does not know whether that has come."""
    hub = Broadcast()
    hub.publish_nowait("room", "to nobody")
    assert not hub.stats().open
    await hub.publish("room", "to nobody")
    assert (hub.stats().open, hub.stats().published) == (True, 2)
    await hub.disconnect()


async def test_a_closed_hub_says_so_to_all_who_publish_until_a_client_opens_it():
    hub = Broadcast()
    async with hub:
        pass
    before = hub.stats().published
    for publish in (hub.publish, hub.send):
        with pytest.raises(BackendUnavailable, match=r"await hub\.connect\(\)"):
            await publish(*(["room", "x"] if publish == hub.publish else ["x"]))
    with pytest.raises(BackendUnavailable, match=r"await hub\.connect\(\)"):
        hub.publish_nowait("room", "x")
    assert hub.stats().published == before
    peer = await joined(hub)
    hub.publish_nowait("default", "again")
    await until(lambda: peer.got == ["again"])
    await hub.disconnect()


def test_the_lifespan_of_an_app():
    hub = Broadcast()
    app = FastAPI(lifespan=hub.lifespan)

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        await hub.serve(websocket)

    with TestClient(app) as client:
        assert hub.stats().open
        with client.websocket_connect("/ws") as websocket:
            websocket.send_text("hello")
            assert websocket.receive_text() == "hello"
    assert not hub.stats().open


async def test_a_backend_of_ones_own():
    backend = Bus()
    hub = Broadcast(backend=backend)
    peer = await joined(hub, "room")
    await hub.publish("room", "hello")
    assert backend.broker.calls[-1] == ("publish", [("default:room", b"hello")])
    await until(lambda: peer.got == ["hello"])
    await hub.disconnect()


class Slow(Bus):
    """A backend that connects slowly, and fails as often as a test wants."""

    def __init__(self, failures: int = 0) -> None:
        super().__init__(on_connect=self.wait)
        self.failures = failures
        self.go = asyncio.Event()

    async def wait(self, bus, proceed):
        await self.go.wait()
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the broker is down")
        return await proceed()


async def test_everybody_waits_for_a_backend_that_connects_slowly():
    backend = Slow()
    hub = Broadcast(backend=backend)
    peer = Peer()
    tasks = [asyncio.create_task(hub.connect()), asyncio.create_task(hub.connect(peer.websocket))]
    await until(lambda: backend.connects)
    publishing = asyncio.create_task(hub.send("hello"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not any(task.done() for task in [*tasks, publishing])
    assert not hub.stats().open
    backend.go.set()
    await asyncio.gather(*tasks, publishing)
    assert backend.connects == 1
    assert hub.stats().open


async def test_a_backend_that_fails_to_connect_is_tried_again():
    backend = Slow(failures=2)
    backend.go.set()
    hub = Broadcast(backend=backend)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await hub.connect()
        assert not hub.stats().open
    await hub.connect()
    assert hub.stats().open


async def test_an_opening_that_is_cancelled_is_taken_over():
    backend = Slow()
    hub = Broadcast(backend=backend)
    first = asyncio.create_task(hub.connect())
    await until(lambda: backend.connects == 1)
    second = asyncio.create_task(hub.connect())
    await asyncio.sleep(0)
    first.cancel()
    await until(lambda: backend.connects == 2)
    backend.go.set()
    await second
    assert hub.stats().open


async def test_all_who_wait_for_an_attempt_share_its_outcome():
    backend = Slow(failures=1)
    hub = Broadcast(backend=backend)
    tasks = [asyncio.create_task(hub.connect()) for _ in range(40)]
    await until(lambda: backend.connects == 1)
    backend.go.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ConnectionError}
    assert backend.connects == 1
    await hub.connect()
    assert hub.stats().open


async def test_opening_waits_until_closing_is_done():
    async def close(connection, proceed):
        stopping.set()
        await go.wait()
        await proceed()

    stopping, go = asyncio.Event(), asyncio.Event()
    backend = Bus(on_close=close)
    hub = Broadcast(backend=backend)
    await hub.connect()
    closing = asyncio.create_task(hub.disconnect())
    await stopping.wait()
    peer = Peer()
    connecting = asyncio.create_task(hub.connect(peer.websocket))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not connecting.done()
    go.set()
    await asyncio.gather(closing, connecting)
    assert list(backend.broker.connections) == [backend.connection]
    await hub.send("hello")
    await until(lambda: peer.got == ["hello"])
    await hub.disconnect()


async def test_clients_are_closed_although_the_connection_fails_to_close(caplog):
    async def close(connection, proceed):
        raise ConnectionError("the broker is down")

    hub = Broadcast(backend=Bus(on_close=close))
    peer = await joined(hub)
    await hub.disconnect()
    assert "the broker is down" in caplog.text
    assert peer.closed == 1001
    assert not hub.stats().open


async def test_a_child_process_does_not_close_the_hub_of_its_parent():
    hub = Broadcast(backend=Bus())
    peer = await joined(hub)
    forks.after_fork()
    with pytest.raises(ConfigurationError, match="before the process was forked"):
        await hub.connect()
    await hub.disconnect()
    assert peer.closed is None
    assert len(hub) == 1
