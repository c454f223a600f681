"""Servers that keep what was written to them when they are killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from backends.nats_server import NatsServer
from backends.postgres_server import PostgresServer
from backends.redis_server import RedisServer

SERVERS: dict[str, Callable[[], Any]] = {
    "redis": lambda: RedisServer("--appendonly", "yes", "--appendfsync", "always"),
    "postgres": PostgresServer,
    "nats": lambda: NatsServer(jetstream=True),
}


@pytest.fixture(scope="session", params=SERVERS)
def kept_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a server of each kind that nobody stops."""
    server = SERVERS[request.param]()
    try:
        server.start()
        yield server.url
    finally:
        server.close()
