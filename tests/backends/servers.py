"""A server of each kind for the whole run, started when the first test needs it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from backends.nats_server import NatsServer
from starcast.backends import Backend, from_url
from support import Broker, Bus

BROKERS = {
    "redis": "RedisServer",
    "nats": "NatsServer",
    "postgres": "PostgresServer",
}


@contextlib.contextmanager
def running(name: str) -> Iterator[Any]:
    """A server, with `url`, `kill()`, `start()`, `freeze()` and `thaw()`."""
    server = getattr(importlib.import_module(f"backends.{name}_server"), BROKERS[name])()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def urls() -> Iterator[Callable[[str], str]]:
    """`urls("redis")` is the URL of a server that nobody stops."""
    found: dict[str, str] = {}
    with contextlib.ExitStack() as stack:

        def url(name: str) -> str:
            if name not in found:
                found[name] = stack.enter_context(running(name)).url
            return found[name]

        yield url


@pytest.fixture(params=["bus", *BROKERS])
def make_backend(
    request: pytest.FixtureRequest, urls: Callable[[str], str]
) -> Callable[[], Backend]:
    """Makes backends that talk to the same broker."""
    if request.param == "bus":
        broker = Broker()
        return lambda: Bus(broker)
    url = urls(request.param)
    return lambda: from_url(url)


@pytest.fixture(params=BROKERS)
def url(request: pytest.FixtureRequest, urls: Callable[[str], str]) -> str:
    """The URL of each broker."""
    return urls(request.param)


@pytest.fixture(params=BROKERS)
def server(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A server of each kind that the test may kill."""
    with running(request.param) as server:
        yield server


@pytest.fixture
def own_nats() -> Iterator[Callable[..., NatsServer]]:
    """`own_nats("max_subscriptions: 4")` starts a server of NATS with lines of configuration."""
    servers: list[NatsServer] = []

    def start(config: str = "") -> NatsServer:
        servers.append(NatsServer(config))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.close()
