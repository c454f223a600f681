"""A client whose cable is cut: server and client in network namespaces of their own.

See docs/reference/faults.md, 2.

It needs Linux, root and `ip`, and is skipped without. The same with a proxy that goes silent is in
test_uvicorn.py, and runs anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import websockets
from starlette.applications import Starlette
from starlette.routing import Mount

from starcast import SSE, Broadcast, Tuning
from support import DEADLINE, starcast_tasks, until
from test_uvicorn import KIB, PROTOCOL, App, read_until

pytestmark = pytest.mark.anyio

SERVER, CLIENT = names = [f"starcast-{os.getpid()}-{side}" for side in ("server", "client")]
HOST = "10.0.0.1"  # in the namespace SERVER; the client's ends in 2


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=DEADLINE)


@pytest.fixture
def cable() -> Iterator[None]:
    """The namespaces SERVER and CLIENT, and a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("`ip`, which makes network namespaces, is not installed")
    try:
        for name in names:
            ip("netns", "add", name)
        ends = ["cable", "type", "veth", "peer", "name", "cable", "netns", CLIENT]
        ip("-n", SERVER, "link", "add", *ends)
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.0.0.{number}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield
    except subprocess.CalledProcessError as exc:
        pytest.skip(f"no network namespaces here: {exc.stderr.decode().strip()}")
    finally:
        for command in (
            ["-n", SERVER, "link", "delete", "cable"],  # both ends, whoever still has a socket
            ["netns", "delete", CLIENT],
            ["netns", "delete", SERVER],
        ):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip(*command)


def inside(namespace: str, make: Callable[[], socket.socket]) -> socket.socket:
    """Call it in that network. The socket that it returns stays there."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter() -> socket.socket:  # this thread alone
        with open(f"/run/netns/{namespace}") as handle:
            assert libc.setns(handle.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
        return make()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(enter).result(DEADLINE)


@pytest.mark.parametrize(("ws", "unsent"), [(PROTOCOL, False), (PROTOCOL, True), ("auto", True)])
async def test_a_client_whose_cable_is_cut(cable, serve, ws, unsent):
    """Nothing comes back from it, not even that its TCP connection is gone."""
    app = App()
    listening = inside(SERVER, lambda: socket.create_server((HOST, 0)))
    server = await serve(app, sock=listening, ws=ws, ws_ping_interval=0.2, ws_ping_timeout=0.2)

    def connect(namespace: str) -> websockets.connect:
        address = (HOST, server.port)
        sock = inside(namespace, lambda: socket.create_connection(address, DEADLINE))
        return server.connect("/ws/x", sock=sock, ping_interval=None, compression=None)

    async with connect(SERVER) as healthy:
        await until(lambda: len(app.hub) == 1)
        client = await connect(CLIENT)
        await until(lambda: len(app.hub) == 2)
        await app.hub.publish("x", "hello")
        assert await client.recv() == await healthy.recv() == "hello"
        ip("-n", CLIENT, "link", "set", "cable", "down")
        if unsent:
            connections = server.server.server_state.connections
            reading = asyncio.create_task(read_until(healthy, "the last"))
            while not app.ended and all(its.writable.is_set() for its in connections):
                await app.hub.publish("x", random.randbytes(64 * KIB))
            await app.hub.publish("x", "the last")
            await reading
        await until(lambda: len(app.ended) == 1, 2)
        assert len(app.hub) == 1
        assert len(server.server.server_state.connections) == 1
        await app.hub.publish("x", "alive")
        assert await healthy.recv() == "alive"
        client.transport.abort()
        await client.wait_closed()
    await until(lambda: not starcast_tasks())


async def test_a_stream_whose_cable_is_cut(cable, serve):
    """There are no pings and answers, but the system knows that no heartbeat has arrived."""
    hub = Broadcast(tuning=Tuning(send_timeout=0.5))
    listening = inside(SERVER, lambda: socket.create_server((HOST, 0)))
    server = await serve(
        Starlette(routes=[Mount("/", hub.app(sse=SSE(heartbeat=0.2)))]), sock=listening
    )
    client = inside(CLIENT, lambda: socket.create_connection((HOST, server.port), DEADLINE))
    client.sendall(b"GET /x HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n")
    await until(lambda: hub.channels == {"x": 1})
    await asyncio.sleep(1)  # as long as it answers, it stays
    assert hub.channels == {"x": 1}
    ip("-n", CLIENT, "link", "set", "cable", "down")
    await until(lambda: hub.channels == {}, 5)
    await until(lambda: not starcast_tasks())
    client.close()
