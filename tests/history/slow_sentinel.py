"""A failover by Sentinel, which takes its time: run by .ci/slow."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.asyncio.sentinel import Sentinel

from backends.redis_server import RedisServer, binary
from starcast import BackendUnavailable, Broadcast, History
from starcast.backends.redis import RedisBackend
from support import DEADLINE, free_port, until

pytestmark = pytest.mark.anyio


async def test_a_failover_by_sentinel(tmp_path):
    """The replica has what was published, and a hub goes on there."""
    kept = ("--appendonly", "yes")
    port = free_port()
    config = tmp_path / "sentinel.conf"
    with (
        RedisServer(*kept) as one,
        RedisServer(*kept, "--replicaof", "127.0.0.1", str(one.port)) as two,
    ):
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\n"
            f"sentinel monitor shop 127.0.0.1 {one.port} 1\n"
            "sentinel down-after-milliseconds shop 300\n"
        )
        with sentinel_of(config):
            client = Sentinel([("127.0.0.1", port)]).master_for("shop")
            backend = RedisBackend(client=client)
            assert backend.address == "the Redis that Sentinel calls 'shop', prefix 'starcast:'"
            await until_knows_replica(port)
            async with (
                Broadcast(backend=backend, history=History()) as hub,
                hub.subscribe("room", gaps=True) as subscriber,
            ):
                first = await hub.publish("room", "0")
                await until(lambda: two.command("EXISTS", "starcast:history:{default:room}"))
                one.kill()
                async with asyncio.timeout(DEADLINE):
                    while True:
                        try:
                            second = await hub.publish("room", "1", idempotency_key="1")
                            break
                        except BackendUnavailable:
                            await asyncio.sleep(0.05)
                    assert [(await subscriber.get()).id for _ in range(2)] == [first, second]
            assert second == first.replace("-1", "-2")
            await client.aclose()


@contextlib.contextmanager
def sentinel_of(config: Path) -> Iterator[None]:
    process = subprocess.Popen([binary(), str(config), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait(DEADLINE)


async def until_knows_replica(port: int) -> None:
    def knows() -> bool:
        with contextlib.suppress(redis.ConnectionError), redis.Redis(port=port) as sentinel:
            (master,) = sentinel.sentinel_masters().values()
            return master["num-slaves"] == 1
        return False

    await until(knows)
