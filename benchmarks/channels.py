"""`python -m benchmarks.channels`: what clients of many channels cost, beside plain ones.

Each figure is the median of `REPEATS` runs of a server in a process of its own. The load of a run
is bounded, and ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import websockets

REPEATS = 3
TURNS = 15
CLIENTS = 300
KINDS = ("plain", "json", "protobuf")


class Server:
    """A server, and what it says of itself."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def get(self, path: str) -> dict[str, Any]:
        def read() -> dict[str, Any]:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as it:
                answer: dict[str, Any] = json.load(it)
                return answer

        return await asyncio.to_thread(read)

    async def connect(self, path: str) -> websockets.ClientConnection:
        return await websockets.connect(
            f"ws://127.0.0.1:{self.port}{path}",
            compression=None,
            ping_interval=None,
            max_queue=None,
            max_size=None,
            proxy=None,
        )


@contextlib.asynccontextmanager
async def server(broker: str = "") -> AsyncIterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    process = subprocess.Popen(  # noqa: ASYNC220  # nothing else runs meanwhile
        [sys.executable, "-m", "benchmarks.servers.starcast_channels", str(port)],
        env={**os.environ, "BROKER_URL": broker},
    )
    try:
        it = Server(port)
        for _ in range(200):
            with contextlib.suppress(OSError):
                await it.get("/look")
                break
            await asyncio.sleep(0.05)
        yield it
    finally:
        process.terminate()
        process.wait(10)


async def drain(client: websockets.ClientConnection, counts: dict[str, int]) -> None:
    """Read whatever comes, as a client that does nothing with it."""
    with contextlib.suppress(websockets.ConnectionClosed):
        async for frame in client:
            counts["frames"] += 1
            counts["bytes"] += len(frame)


async def deliveries(batch: int) -> dict[str, float]:
    """Return the server's CPU per delivery to each kind of client, in microseconds.

    All are connected to one server, each kind on a channel of its own, and the channels take turns.
    """
    async with server() as it:
        clients = []
        counts = {"frames": 0, "bytes": 0}
        for kind in KINDS:
            for _ in range(CLIENTS):
                if kind == "plain":
                    client = await it.connect("/plain")
                else:
                    client = await it.connect(f"/channels?cf_protocol={kind}")
                    await client.send(COMMANDS[kind])
                clients.append(client)
        draining = [asyncio.create_task(drain(client, counts)) for client in clients]
        for kind in KINDS:
            await until_members(it, kind)
        figures: dict[str, list[float]] = {kind: [] for kind in KINDS}
        count = 50 if batch == 1 else 640
        for turn in range(TURNS + 1):
            for kind in KINDS:
                path = f"/publish?channel={kind}&count={count}&batch={batch}"
                cpu = (await it.get(path))["cpu"]
                if turn:  # the first one makes it warm
                    figures[kind].append(cpu / CLIENTS / count * 1e6)
        for task in draining:
            task.cancel()
        for client in clients:
            client.transport.abort()
        return {kind: statistics.median(figures[kind]) for kind in KINDS}


async def until_members(it: Server, channel: str) -> None:
    for _ in range(200):
        if (await it.get(f"/look?channel={channel}"))["members"] == CLIENTS:
            return
        await asyncio.sleep(0.05)
    raise RuntimeError("not all clients have subscribed")


# Connect, and subscribe to the channel of the kind.
COMMANDS: dict[str, str | bytes] = {
    "json": '{"id":1,"connect":{}}\n{"id":2,"subscribe":{"channel":"json"}}',
    "protobuf": b"\x04\x08\x01\x22\x00" + b"\x0e\x08\x02\x2a\x0a\x0a\x08protobuf",
}


async def subscribes() -> float:
    """Return how many subscriptions a second one server makes: by its CPU."""
    async with server() as it:
        client = await it.connect("/channels")
        await client.send('{"id":1,"connect":{}}')
        await client.recv()
        before = (await it.get("/look"))["cpu"]
        number = 0
        for turn in range(20):
            batch = [
                json.dumps({"id": 10 + n, "subscribe": {"channel": f"room:{turn}:{n}"}})
                for n in range(50)
            ]
            await client.send("\n".join(batch))
            got = 0
            while got < 50:
                got += str(await client.recv()).count("\n") + 1
            number += 50
        cpu = (await it.get("/look"))["cpu"] - before
        client.transport.abort()
        return number / float(cpu)


async def memory() -> float:
    """Return the bytes that a subscription takes: 1,000 clients with 20 channels each."""
    async with server() as it:
        clients = []
        for _ in range(1000):
            client = await it.connect("/channels")
            await client.send('{"id":1,"connect":{}}')
            await client.recv()
            clients.append(client)
        before = (await it.get("/look?trace=1"))["memory"]
        for number, client in enumerate(clients):
            batch = [
                json.dumps({"id": 10 + n, "subscribe": {"channel": f"room:{(number + n) % 200}"}})
                for n in range(20)
            ]
            await client.send("\n".join(batch))
            got = 0
            while got < 20:
                got += str(await client.recv()).count("\n") + 1
        after = (await it.get("/look"))["memory"]
        for client in clients:
            client.transport.abort()
        return (float(after) - before) / 20_000


async def gathering(broker: str = "") -> dict[str, float]:
    """Return what one of 1,000 clients gets that join a room with presence within 5 seconds."""
    async with server(broker) as it:
        clients = []
        for number in range(1000):
            client = await it.connect("/channels")
            await client.send(json.dumps({"id": 1, "connect": {"token": f"user {number}"}}))
            await client.recv()
            clients.append(client)
        counts = [{"frames": 0, "bytes": 0} for _ in clients]
        draining = [
            asyncio.create_task(drain(client, count))
            for client, count in zip(clients, counts, strict=True)
        ]
        before = (await it.get("/look"))["cpu"]
        began = time.monotonic()
        for number, client in enumerate(clients):
            await client.send('{"id":2,"subscribe":{"channel":"present"}}')
            if (ahead := number / 200 - (time.monotonic() - began)) > 0:
                await asyncio.sleep(ahead)
        took = time.monotonic() - began
        await asyncio.sleep(1)
        cpu = (await it.get("/look"))["cpu"] - before
        for task in draining:
            task.cancel()
        for client in clients:
            client.transport.abort()
        first = counts[0]
        return {
            "seconds": took,
            "frames a second": first["frames"] / took,
            "bytes, the first to join": first["bytes"],
            "server CPU, seconds": cpu,
        }


def repeat(measure: Any, *arguments: Any) -> float:
    return statistics.median(asyncio.run(measure(*arguments)) for _ in range(REPEATS))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.channels", description=__doc__)
    parser.add_argument("--broker", default="", help="the URL of a broker, for presence")
    broker = parser.parse_args().broker
    for batch in (1, 32):
        figures = asyncio.run(deliveries(batch))
        for kind, figure in figures.items():
            ratio = figure / figures["plain"]
            print(f"{batch:3} at a time, {kind:9}: {figure:6.3f} us a delivery, {ratio:.2f}")
    print(f"subscriptions a second of CPU: {repeat(subscribes):,.0f}")
    print(f"memory of a subscription: {repeat(memory):,.0f} bytes")
    for name, figure in asyncio.run(gathering(broker)).items():
        print(f"1,000 that join within 5 s, {name}: {figure:,.2f}")


if __name__ == "__main__":
    main()
