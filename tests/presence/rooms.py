"""Workers whose rooms have members, and what a test wants to know of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator

from starcast import Broadcast, Member, MemberCounts, Presence, Tuning
from support import Broker, Bus, Peer, starcast_tasks, until

QUICK = Presence(ttl=0.6, grace=0.3, interval=0.02)
TUNING = Tuning(first_backoff=0.01, max_backoff=0.05)


@contextlib.asynccontextmanager
async def hubs(count: int, presence: Presence = QUICK) -> AsyncIterator[list[Broadcast]]:
    """Those of so many workers."""
    broker = Broker()
    async with contextlib.AsyncExitStack() as stack:
        made = [
            Broadcast(backend=Bus(broker), presence=presence, tuning=TUNING) for _ in range(count)
        ]
        yield [await stack.enter_async_context(hub) for hub in made]
    await until(lambda: not starcast_tasks())


async def member(hub: Broadcast, id: str, channel: str = "room", **options: object) -> Peer:
    peer = Peer()
    await hub.connect(peer.websocket, channel, member=Member(id), **options)
    return peer


async def ids(hub: Broadcast, channel: str = "room") -> list[str]:
    return sorted(it.id for it in await hub.members(channel))


async def are(hub: Broadcast, *expected: str, channel: str = "room") -> None:
    """Wait until these are the members, as this hub sees it."""
    for _ in range(1000):
        if await ids(hub, channel) == sorted(expected):
            return
        await asyncio.sleep(0.01)
    assert await ids(hub, channel) == sorted(expected)


def told(peer: Peer) -> list[tuple[list[str], list[str]]]:
    """Who joined and who left, as a client was told it."""
    texts = [json.loads(it["text"]) for it in peer.sent if it.get("text") is not None]
    return [
        ([it["id"] for it in text["joined"]], [it["id"] for it in text["left"]]) for text in texts
    ]


async def until_counts(hub: Broadcast, counts: MemberCounts, channel: str = "room") -> None:
    """Wait until a channel has so many clients and members, as this hub sees it."""
    for _ in range(1000):
        if (await hub.member_counts([channel]))[channel] == counts:
            return
        await asyncio.sleep(0.01)
    assert (await hub.member_counts([channel]))[channel] == counts


async def receive_all(peer: Peer) -> None:
    with contextlib.suppress(Exception):
        while True:
            await peer.websocket.receive_text()


WORKER = """
import asyncio, sys
from starcast import Broadcast, Member, Presence
from support import Peer

async def main():
    presence = Presence(ttl=float(sys.argv[4]), grace=0.3, interval=0.02)
    async with Broadcast(sys.argv[1], name=sys.argv[2], presence=presence) as hub:
        for _ in range(int(sys.argv[3])):
            await hub.connect(Peer().websocket, "room", member=Member("ada"))
        print("here", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def worker(
    url: str, name: str, ttl: float = QUICK.ttl, clients: int = 1
) -> AsyncIterator[Process]:
    """Another worker, in a process of its own, with so many clients of one member."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WORKER, url, name, str(clients), str(ttl)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert await process.stdout.readline() == b"here\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
