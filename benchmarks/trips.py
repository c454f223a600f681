"""Round trips: how long from `publish` in this process until another one has the message.

`python -m benchmarks.trips` takes the place of the load: it publishes, one message at a time, and
reads a `Task` from standard input as the load does. The other process is one of the programs in
`servers/` that have `publishing` and `receiving`. It says over a socket what it got and when; the
clock is the same for all processes of a machine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import os
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from itertools import cycle

import uvloop

from . import accounting, payloads
from .load import HOST, STALL, WARM_UP, Failed, percentile

CHANNEL = "trips"

_ANSWER = struct.Struct("q8s")  # when it came, and the number that each message begins with


@dataclasses.dataclass
class Task:
    program: str
    url: str
    ports: list[int]
    pids: list[int]
    seconds: float
    size: int = 128
    kind: str = "trips"
    path: str = ""  # these are the load's
    socketio: bool = False
    spin: bool = False
    verify: bool = False


# Who receives


def receive(
    receiving: Callable[[str], AbstractAsyncContextManager[AsyncIterator[str | bytes]]],
) -> None:
    """Run a program: answer each message that arrives to who is connected to the port."""
    uvloop.run(_receive(receiving, os.environ["BROKER_URL"], int(sys.argv[1])))


async def _receive(receiving, url: str, port: int) -> None:
    writers: list[asyncio.StreamWriter] = []

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers[:] = [writer]
        writer.write(b"!")

    async with receiving(url) as messages, await asyncio.start_server(connected, HOST, port):
        async for message in messages:
            now = time.perf_counter_ns()
            number = message[:8]
            if isinstance(number, str):
                number = number.encode()
            writers[0].write(_ANSWER.pack(now, number))


# Who publishes


async def _publish(task: Task) -> dict:
    program = importlib.import_module(f"benchmarks.servers.{task.program}")
    reader, writer = await asyncio.open_connection(HOST, task.ports[0])
    await reader.readexactly(1)
    times: list[float] = []
    async with program.publishing(task.url) as publish:
        messages = cycle(content.decode() for content in payloads.text(task.size))
        pids = [pid for worker in task.pids for pid in accounting.family(worker)]
        await _trips(publish, reader, messages, min(WARM_UP, task.seconds))
        before = accounting.cpu_seconds(pids)
        times = await _trips(publish, reader, messages, task.seconds)
        cpu = accounting.cpu_seconds(pids) - before
    writer.close()
    return {
        "trips": len(times),
        "trip_p50_us": percentile(times, 50) / 1e3,
        "trip_p99_us": percentile(times, 99) / 1e3,
        "cpu_us": cpu / len(times) * 1e6,
    }


async def _trips(publish, reader: asyncio.StreamReader, messages, seconds: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        message = next(messages)
        try:
            async with asyncio.timeout(STALL):
                began = time.perf_counter_ns()
                await publish(message)
                got, number = _ANSWER.unpack(await reader.readexactly(_ANSWER.size))
        except TimeoutError:
            raise Failed(f"stalled: a message is missing for {STALL:g} seconds") from None
        except asyncio.IncompleteReadError:
            raise Failed("who receives has ended") from None
        if number != message[:8].encode():
            raise Failed("something else came than was sent")
        times.append(got - began)
    return times


def main() -> None:
    task = Task(**json.load(sys.stdin))
    try:
        result = uvloop.run(_publish(task))
    except Failed as exc:
        result = {"failed": str(exc)}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
