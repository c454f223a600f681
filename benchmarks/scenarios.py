"""What is measured, and for whom."""

from __future__ import annotations

import dataclasses
from typing import Any

from .servers import BROKERS, SERVERS, Server

ROOMS = ("starcast_handler", "rooms_by_hand", "picows_rooms")
UNCOMMON = ("starcast_fastapi", "starcast_history", "bare")
WRAPPED = ("starcast_wrapped", "connection_manager_wrapped")
EVERYBODY = tuple(
    name
    for name, server in SERVERS.items()
    if server.path and name not in (*WRAPPED, *ROOMS, *UNCOMMON)
)
PLAIN = ("starcast", "starcast_fastapi", *EVERYBODY[1:])
TRIPS = tuple(name for name, server in SERVERS.items() if not server.path)
OURS = ("starcast", "connection_manager")


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement: the load's settings, and the server it is for."""

    scenario: str
    variant: str
    server: Server
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scenario:
    key: str
    title: str
    servers: tuple[str, ...]
    # What each variant changes of the load's settings; their names go into tables.
    variants: dict[str, dict[str, Any]]

    def points(self, names: list[str]) -> list[Point]:
        return [
            Point(self.key, variant, SERVERS[name], self._settings(SERVERS[name], settings))
            for variant, settings in self.variants.items()
            for name in names
            if self.takes(name, variant)
        ]

    def takes(self, name: str, variant: str) -> bool:
        """Whether a server takes part: not over a broker that it cannot use."""
        broker = self.variants[variant].get("broker")
        return name in self.servers and (not broker or broker in SERVERS[name].brokers)

    def _settings(self, server: Server, settings: dict[str, Any]) -> dict[str, Any]:
        path = server.path
        if settings.get("stuff") and path == "/ws/{room}":
            path = "/patient/{room}"
        return {"path": path, "socketio": server.socketio, **settings}


def workers_of(broker: str, count: int) -> str:
    """Return the name of a variant of K."""
    return f"{broker}, {count} worker{'s' if count > 1 else ''}"


_DEFLATE = {"deflate": True, "payload": "json"}

SCENARIOS = {
    scenario.key: scenario
    for scenario in (
        Scenario(
            "A",
            "300 clients, 128 bytes, one message at a time",
            PLAIN,
            {"": {"clients": 300}},
        ),
        Scenario(
            "B",
            "300 clients, 128 bytes, 32 messages in flight",
            PLAIN,
            {"": {"clients": 300, "batch": 32}},
        ),
        Scenario(
            "C",
            "300 clients, 1 KiB of JSON, permessage-deflate, one message at a time",
            PLAIN,
            {"": {"clients": 300, "size": 1024, **_DEFLATE}},
        ),
        Scenario(
            "D",
            "300 clients, 16 KiB of JSON, permessage-deflate, one message at a time",
            EVERYBODY,
            {"": {"clients": 300, "size": 16384, **_DEFLATE}},
        ),
        Scenario(
            "E",
            "1,000 rooms of 10 clients, 128 bytes, published to in turn, 40 rooms in flight",
            ("starcast", "floor"),
            {
                "": {
                    **{"kind": "rooms", "clients": 10_000, "rooms": 1000, "in_flight": 40},
                    "pings": True,
                }
            },
        ),
        Scenario(
            "N",
            "1,000 clients in small rooms, 128 bytes, each with one message in flight, "
            "CPU for each message received",
            ("starcast", *ROOMS),
            {
                f"rooms of {size}": {"kind": "talks", "clients": 1000, "rooms": 1000 // size}
                for size in (1, 2)
            },
        ),
        Scenario(
            "O",
            "2,000 clients connect, 64 at a time, CPU for each connection",
            (*OURS, "bare"),
            {
                "plain": {"kind": "storm", "clients": 2000},
                "deflate agreed": {"kind": "storm", "clients": 2000, "deflate": True},
            },
        ),
        Scenario(
            "P",
            "8,000 clients connect at once, while one that is there talks to itself",
            ("starcast", "bare"),
            {"": {"kind": "restart", "clients": 8000, "rooms": 801}},
        ),
        Scenario(
            "F",
            "one client in 20 never reads, 128 bytes, one message at a time",
            OURS,
            {
                "285 read": {"clients": 285, "stuff": 4 << 20},
                "285 read, 15 don't": {"clients": 300, "silent": 20, "stuff": 4 << 20},
            },
        ),
        Scenario(
            "G",
            "memory per idle connection, 1,000 connections",
            OURS,
            {
                "plain": {"kind": "memory", "clients": 1000},
                "deflate agreed": {"kind": "memory", "clients": 1000, "deflate": True},
                "deflate agreed, after 20 messages of 1 KiB": {
                    "kind": "memory",
                    "clients": 1000,
                    "size": 1024,
                    "messages": 20,
                    **_DEFLATE,
                },
            },
        ),
        Scenario(
            "H",
            "more and more clients, 128 bytes, one message at a time",
            (*OURS, "floor"),
            {
                f"{count:,} clients": {"clients": count, "pings": True}
                for count in (100, 1000, 10_000)
            },
        ),
        Scenario(
            "J",
            "over a broker: 300 clients, 128 bytes, 32 messages in flight",
            ("starcast", "broadcaster"),
            {
                "memory": {"clients": 300, "batch": 32},
                **{name: {"clients": 300, "batch": 32, "broker": name} for name in BROKERS},
            },
        ),
        Scenario(
            "K",
            "one worker and two: 300 clients, 128 bytes, 32 messages in flight",
            ("starcast",),
            {
                workers_of(name, count): {
                    "clients": 300,
                    "batch": 32,
                    "broker": name,
                    "workers": count,
                }
                for name in BROKERS
                for count in (1, 2)
            },
        ),
        Scenario(
            "R",
            "10,000 clients come back within 2 s to 100 rooms, each 100 messages behind, while "
            "one that is there talks to itself",
            ("starcast_history",),
            {
                "": {
                    **{"kind": "resume", "clients": 10_000, "rooms": 101, "messages": 100},
                    "ids_path": "/ids/{room}",
                    "spread": 2.0,
                }
            },
        ),
        Scenario(
            "Q",
            "with a history and without: 300 clients, 128 bytes, 32 messages in flight",
            ("starcast", "starcast_history"),
            {
                "memory": {"clients": 300, "batch": 32},
                **{name: {"clients": 300, "batch": 32, "broker": name} for name in BROKERS},
            },
        ),
        Scenario(
            "L",
            "over a broker from one process to another, 128 bytes, one message at a time",
            TRIPS,
            {name: {"kind": "trips", "broker": name} for name in BROKERS},
        ),
        Scenario(
            "M",
            "behind a middleware that wraps send: 300 clients, 128 bytes",
            WRAPPED,
            {
                "one message at a time": {"clients": 300},
                "32 messages in flight": {"clients": 300, "batch": 32},
            },
        ),
    )
}
