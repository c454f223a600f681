"""`python -m benchmarks.presence`: what it costs to know who is in a room.

With `--broker URL` over a broker, with two workers; otherwise in memory. The rooms of a run are
bounded, and it ends by itself. `benchmarks.channels` has the first figure for clients of channels.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import time
import tracemalloc
import uuid
from typing import Any

import websockets
from starlette.websockets import WebSocket

from starcast import Broadcast, Member, Presence

from .channels import server

CLIENTS = 1000
WITHIN = 5.0  # seconds
SIZES = (1000, 10_000, 50_000)


async def drain(client: websockets.ClientConnection, frames: list[tuple[float, int, int]]) -> None:
    """Note when a client gets an update, its bytes, and how many joined."""
    with contextlib.suppress(websockets.ConnectionClosed):
        async for frame in client:
            frames.append((time.monotonic(), len(frame), len(json.loads(frame)["joined"])))


async def joining(broker: str) -> dict[str, float]:
    """1,000 clients join a room within 5 seconds, and each is told of those after it."""
    async with contextlib.AsyncExitStack() as stack:
        count = 2 if broker else 1
        workers = [await stack.enter_async_context(server(broker)) for _ in range(count)]
        before = [(await it.get("/look"))["cpu"] for it in workers]
        clients = []
        frames: list[tuple[float, int, int]] = []  # of the first one
        others: list[tuple[float, int, int]] = []
        began = time.monotonic()
        for number in range(CLIENTS):
            client = await workers[number % count].connect(f"/present?user=user{number}")
            task = asyncio.create_task(drain(client, others if clients else frames))
            clients.append((client, task))
            if (ahead := (number + 1) / CLIENTS * WITHIN - (time.monotonic() - began)) > 0:
                await asyncio.sleep(ahead)
        took = time.monotonic() - began
        for _ in range(1000):
            if sum(joined for _, _, joined in frames) == CLIENTS:
                break
            await asyncio.sleep(0.01)
        last = frames[-1][0] - began
        after = [(await it.get("/look"))["cpu"] for it in workers]
        for client, task in clients:
            task.cancel()
            client.transport.abort()
        return {
            "seconds in which they came": took,
            "seconds until the first knew all": last,
            "updates a second": len(frames) / last,
            "KiB to the first": sum(size for _, size, _ in frames) / 1024,
            "bytes a join": sum(size for _, size, _ in frames) / CLIENTS,
            "KiB of the largest update": max(size for _, size, _ in frames) / 1024,
            "CPU of a worker, seconds": sum(after) / count - sum(before) / count,
        }


async def nowhere(message: Any) -> None:
    pass


def websocket() -> WebSocket:
    """One whose client takes everything."""
    inbox = asyncio.Queue[Any]()
    inbox.put_nowait({"type": "websocket.connect"})
    scope = {"type": "websocket", "path": "/", "query_string": b"", "headers": []}
    return WebSocket(scope, inbox.get, nowhere)


async def sizes(broker: str, size: int) -> dict[str, float]:
    """A room of a size: what a member takes, and how long it takes to know them."""
    presence = Presence()
    # A name that no other run on this broker has. In memory there is one worker.
    url, name = broker or "memory://", uuid.uuid4().hex
    async with contextlib.AsyncExitStack() as stack:
        here = await stack.enter_async_context(Broadcast(url, name=name, presence=presence))
        clients = [websocket() for _ in range(size)]
        for client in clients:
            await here.connect(client, "room")
        await here.connect(clients[0], "another", member=Member("a"))  # it is imported now
        gc.collect()
        tracemalloc.start()
        traced = tracemalloc.get_traced_memory()[0]
        for number, client in enumerate(clients):
            await here.connect(client, "room", member=Member(f"user{number}"))
        assert len(await here.members("room")) == size
        gc.collect()
        own = tracemalloc.get_traced_memory()[0] - traced
        figures = {"bytes of a member, where its client is": own / size}
        there = here
        if broker:
            traced = tracemalloc.get_traced_memory()[0]
            there = await stack.enter_async_context(Broadcast(url, name=name, presence=presence))
            await until_known(there, size)
            gc.collect()
            traced = tracemalloc.get_traced_memory()[0] - traced
            figures["bytes of a member, elsewhere"] = traced / size
            tracemalloc.stop()
            third = await stack.enter_async_context(Broadcast(url, name=name, presence=presence))
            cpu, began = time.process_time(), time.monotonic()
            await until_known(third, size)
            figures["ms until a new worker knows them"] = (time.monotonic() - began) * 1000
            figures["CPU ms of all workers for that"] = (time.process_time() - cpu) * 1000
        tracemalloc.stop()
        repeats = max(3, 20_000 // size)
        began = time.perf_counter()
        for _ in range(repeats):
            await there.members("room")
        figures["ms of members()"] = (time.perf_counter() - began) / repeats * 1000
        async with there.watch_members("room"):
            cpu = time.process_time()
            for number in range(20):
                client = websocket()
                await here.connect(client, "room", member=Member(f"guest{number}"))
                await asyncio.sleep(0.1)
            figures["CPU ms of an update, beside what it is sent to"] = (
                (time.process_time() - cpu) / 20 * 1000
            )
        return figures


async def until_known(hub: Broadcast, size: int) -> None:
    for _ in range(1000):
        if len(await hub.members("room")) == size:
            return
        await asyncio.sleep(0.01)
    raise RuntimeError("not all members are known")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.presence", description=__doc__)
    parser.add_argument("--broker", default=os.environ.get("BROKER_URL", ""), help="its URL")
    broker = parser.parse_args().broker
    for name, figure in asyncio.run(joining(broker)).items():
        print(f"{CLIENTS:,} that join within {WITHIN:g} s, {name}: {figure:,.2f}")
    for size in SIZES:
        for name, figure in asyncio.run(sizes(broker, size)).items():
            print(f"a room of {size:,}, {name}: {figure:,.2f}")


if __name__ == "__main__":
    main()
