"""The programs that are compared, each the shortest idiomatic use of a library.

`python -m benchmarks.servers.<name> PORT` starts one on 127.0.0.1. In each, what a client sends
reaches everybody, itself included.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Server:
    """What the load has to know about one of the programs."""

    name: str  # its module
    title: str
    packages: tuple[str, ...]  # whose versions are of interest
    path: str = "/ws"
    deflate: bool = True  # whether it can do permessage-deflate
    socketio: bool = False


_UVICORN = ("uvicorn", "websockets", "uvloop")

SERVERS = {
    server.name: server
    for server in (
        Server(
            "starcast_frames",
            "starcast, `--ws starcast.uvicorn:BroadcastProtocol`",
            ("starcast", "starlette", *_UVICORN),
            "/ws/{room}",
        ),
        Server(
            "starcast",
            "starcast, uvicorn as it comes",
            ("starcast", "starlette", *_UVICORN),
            "/ws/{room}",
        ),
        Server(
            "connection_manager",
            "ConnectionManager of FastAPI's page, uvicorn",
            ("fastapi", "starlette", *_UVICORN),
        ),
        Server(
            "broadcaster",
            "encode/broadcaster, memory, uvicorn",
            ("broadcaster", "starlette", *_UVICORN),
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
        Server("socketify_app", "socketify (uWebSockets, C++)", ("socketify",)),
        Server(
            "floor",
            "the floor: transport.write of a ready frame, uvloop",
            ("uvloop",),
            "/ws/{room}",
            deflate=False,
        ),
    )
}
