"""Turns the runs into figures, tables and a page."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from . import plots
from .scenarios import SCENARIOS, workers_of
from .servers import BROKERS, SERVERS

BEGIN = "<!-- written by python -m benchmarks: begin -->"
END = "<!-- written by python -m benchmarks: end -->"

Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Figure:
    """The median of some repeats, with the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Figure:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        if self.low == self.high:
            return number(self.median)
        return f"{number(self.median)} ({number(self.low)} - {number(self.high)})"


def number(value: float) -> str:
    """Write a number with about three digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def values(
    results: Results, scenario: str, server: str, key: str, variant: str = ""
) -> dict[int, float]:
    """Return what was measured, by repeat."""
    return {
        run["repeat"]: run[key]
        for run in results["runs"]
        if (run["scenario"], run["server"], run["variant"]) == (scenario, server, variant)
        and run.get(key) is not None
    }


def figure(
    results: Results, scenario: str, server: str, key: str, variant: str = ""
) -> Figure | None:
    found = values(results, scenario, server, key, variant)
    return Figure.of(list(found.values())) if found else None


def failure(results: Results, scenario: str, server: str, variant: str = "") -> str:
    """Say why there is no figure."""
    if server in results["not_run"]:
        return "not run"
    for run in results["runs"]:
        if (run["scenario"], run["server"], run["variant"]) == (scenario, server, variant):
            return run.get("failed", "")
    return ""


def servers_of(results: Results, *scenarios: str) -> list[str]:
    """Return who took part in one of these, or was to."""
    took_part = {run["server"] for run in results["runs"] if run["scenario"] in scenarios}
    return [
        name
        for name in SERVERS
        if name in took_part
        or (name in results["not_run"] and any(name in SCENARIOS[key].servers for key in scenarios))
    ]


# The figures to reach


@dataclasses.dataclass(frozen=True)
class Goal:
    """A ratio that must not be more than `at_most`. A side is scenario, server, variant."""

    title: str
    ours: tuple[str, str, str]
    theirs: tuple[str, str, str]
    at_most: float
    key: str = "cpu_us"
    cores: int = 1  # that the machine has to have; with less it would say nothing


_TRIPS = {"redis": "trip_redis", "nats": "trip_nats", "postgres": "trip_asyncpg"}
_OURS, _FASTAPI, _MANAGER = "starcast", "starcast_fastapi", "connection_manager"
_BEHIND, _MANAGER_BEHIND = "starcast_wrapped", "connection_manager_wrapped"

GOALS = (
    Goal("300 clients, 128 B, one at a time / floor", ("A", _OURS, ""), ("A", "floor", ""), 1.10),
    Goal("the same / ConnectionManager", ("A", _OURS, ""), ("A", _MANAGER, ""), 0.55),
    Goal(
        "the same, `fastapi run` / ConnectionManager",
        ("A", _FASTAPI, ""),
        ("A", _MANAGER, ""),
        0.55,
    ),
    Goal("32 in flight / ConnectionManager", ("B", _OURS, ""), ("B", _MANAGER, ""), 0.06),
    Goal("32 in flight / socketify", ("B", _OURS, ""), ("B", "socketify_app", ""), 1.25),
    Goal("1 KiB JSON, deflate / ConnectionManager", ("C", _OURS, ""), ("C", _MANAGER, ""), 0.25),
    *(
        Goal(
            f"behind a middleware that wraps send, {variant} / ConnectionManager behind it",
            ("M", _BEHIND, variant),
            ("M", _MANAGER_BEHIND, variant),
            1.15,  # on Python 3.11; 1.0 from 3.12 on, where tasks start eagerly
        )
        for variant in SCENARIOS["M"].variants
    ),
    Goal("16 KiB JSON, deflate / ConnectionManager", ("D", _OURS, ""), ("D", _MANAGER, ""), 0.10),
    Goal("1,000 rooms of 10 / floor", ("E", _OURS, ""), ("E", "floor", ""), 1.20),
    Goal(
        "rooms of 2 in which all talk / a dict of lists",
        ("N", _OURS, "rooms of 2"),
        ("N", "rooms_by_hand", "rooms of 2"),
        0.50,
    ),
    Goal(
        "rooms of 1 / a dict of lists",
        ("N", _OURS, "rooms of 1"),
        ("N", "rooms_by_hand", "rooms of 1"),
        0.55,
    ),
    Goal(
        "rooms of 1 / picows",
        ("N", _OURS, "rooms of 1"),
        ("N", "picows_rooms", "rooms of 1"),
        2.00,
    ),
    *(
        Goal(
            f"a connection, {variant} / ConnectionManager",
            ("O", _OURS, variant),
            ("O", _MANAGER, variant),
            0.67,  # one and a half times as many a second
        )
        for variant in SCENARIOS["O"].variants
    ),
    Goal("8,000 connections at once / bare uvicorn", ("P", _OURS, ""), ("P", "bare", ""), 1.15),
    Goal(
        "10,000 clients, until the last one has a message / floor",
        ("H", _OURS, "10,000 clients"),
        ("H", "floor", "10,000 clients"),
        1.15,
        "p50_ms",
    ),
    Goal(
        "one in 20 never reads / the same without it",
        ("F", _OURS, "285 read, 15 don't"),
        ("F", _OURS, "285 read"),
        1.10,
    ),
    *(
        Goal(
            f"memory per idle connection, {variant} / ConnectionManager",
            ("G", _OURS, variant),
            ("G", _MANAGER, variant),
            at_most,
            "memory_kib",
        )
        for variant, at_most in zip(SCENARIOS["G"].variants, (0.80, 0.30, 0.30), strict=True)
    ),
    *(
        Goal(
            f"32 in flight over {name} / memory",
            ("J", _OURS, name),
            ("J", _OURS, "memory"),
            1.30,
        )
        for name in BROKERS
    ),
    *(
        Goal(
            f"32 in flight with a history, {name} / without",
            ("Q", "starcast_history", name),
            ("Q", _OURS, name),
            1.25 if name == "memory" else 1.50,
        )
        for name in SCENARIOS["Q"].variants
    ),
    # Two cores deliver 1.6 times what one does only if a delivery costs at most 2 / 1.6 as much.
    *(
        Goal(
            f"CPU per delivery, two workers over {name} / one",
            ("K", _OURS, workers_of(name, 2)),
            ("K", _OURS, workers_of(name, 1)),
            1.25,
        )
        for name in BROKERS
    ),
    # The other way round: 1 / 1.6. Workers, load and broker have a core each from four on.
    *(
        Goal(
            f"deliveries a second, one worker over {name} / two",
            ("K", _OURS, workers_of(name, 1)),
            ("K", _OURS, workers_of(name, 2)),
            0.63,
            "deliveries_per_second",
            cores=4,
        )
        for name in BROKERS
    ),
    *(
        Goal(
            f"from one process to another over {name}, {key} / {SERVERS[bare].title}",
            ("L", "trip_starcast", name),
            ("L", bare, name),
            1.50,
            f"trip_{key}_us",
        )
        for name, bare in _TRIPS.items()
        for key in ("p50", "p99")
    ),
)


def ratio(results: Results, goal: Goal) -> Figure | None:
    """Return the ratio of the medians, and how far it went in single repeats."""
    (scenario, server, variant), (other, against, its) = goal.ours, goal.theirs
    ours = values(results, scenario, server, goal.key, variant)
    theirs = values(results, other, against, goal.key, its)
    if not (repeats := ours.keys() & theirs.keys()):
        return None
    single = [ours[repeat] / theirs[repeat] for repeat in repeats]
    median = statistics.median(ours.values()) / statistics.median(theirs.values())
    return Figure(median, min(single), max(single))


def goals(results: Results) -> str:
    rows = []
    for goal in GOALS:
        found = ratio(results, goal)
        if found is None or results["machine"]["cores"] < goal.cores:
            continue
        reached = "yes" if found.median <= goal.at_most else "**no**"
        spread = f"{found.low:.2f} - {found.high:.2f}"
        rows.append([goal.title, f"{goal.at_most:.2f}", f"{found.median:.2f}", spread, reached])
    return table(["ours / against", "at most", "measured", "single repeats", "reached"], rows)


# Tables


def table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _side_by_side(results: Results, scenarios: list[str], key: str) -> str:
    """A row for each server, a column for each scenario."""
    present = [key for key in scenarios if servers_of(results, key)]
    rows = []
    for name in servers_of(results, *present):
        cells = [
            str(figure(results, scenario, name, key) or failure(results, scenario, name))
            for scenario in present
        ]
        rows.append([SERVERS[name].title, *cells])
    return table(["", *(SHORT[scenario] for scenario in present)], rows)


def _variants(results: Results, scenario: str, keys: dict[str, str]) -> str:
    """A row for each server and variant, a column for each figure."""
    rows = []
    for variant in SCENARIOS[scenario].variants:
        for name in servers_of(results, scenario):
            if not SCENARIOS[scenario].takes(name, variant):
                continue
            cells = [str(figure(results, scenario, name, key, variant) or "") for key in keys]
            if not any(cells):
                cells[0] = failure(results, scenario, name, variant)
            rows.append([variant, SERVERS[name].title, *cells])
    if not any(SCENARIOS[scenario].variants):
        rows = [row[1:] for row in rows]
        return table(["", *keys.values()], rows)
    return table(["", "", *keys.values()], rows)


SHORT = {
    "A": "128 B, one at a time",
    "B": "128 B, 32 in flight",
    "C": "1 KiB JSON, deflate",
    "D": "16 KiB JSON, deflate",
}

CPU, RATE, P50, P99 = (
    "server CPU, us per delivery",
    "deliveries a second",
    "last one has it, p50 ms",
    "p99 ms",
)


PINGS = {
    "ping_p50_ms": "a ping is answered, p50 ms",
    "ping_p99_ms": "p99 ms",
    "ping_max_ms": "at the latest, ms",
}
MESSAGE = "server CPU, us per message received"
CONNECTION, CONNECTIONS = "server CPU, us per connection", "connections a second"


_MEANWHILE = {
    "cpu_us": CONNECTION,
    "connections_per_second": CONNECTIONS,
    "p50_ms": "the client's message, p50 ms",
    "p99_ms": P99,
}


def sections(results: Results) -> list[tuple[str, str]]:
    """Return the titles and the content of what there is to show."""
    everybody = list(SHORT)
    parts = [
        ("Server CPU per delivery, microseconds", _side_by_side(results, everybody, "cpu_us")),
        ("Deliveries a second", _side_by_side(results, everybody, "deliveries_per_second")),
        (
            "Until the last of 300 clients has a message, p50, milliseconds",
            _side_by_side(results, ["A", "C", "D"], "p50_ms"),
        ),
        ("The same, p99", _side_by_side(results, ["A", "C", "D"], "p99_ms")),
        (
            "Bytes per delivery, with compression",
            _side_by_side(results, ["C", "D"], "bytes_per_delivery"),
        ),
        (
            SCENARIOS["E"].title,
            _variants(
                results,
                "E",
                {
                    "cpu_us": CPU,
                    "deliveries_per_second": RATE,
                    "p50_ms": P50,
                    "p99_ms": P99,
                    **PINGS,
                },
            ),
        ),
        (
            SCENARIOS["F"].title,
            _variants(
                results,
                "F",
                {"cpu_us": CPU, "deliveries_per_second": RATE, "p50_ms": P50, "p99_ms": P99},
            ),
        ),
        *(
            (
                SCENARIOS[scenario].title,
                _variants(results, scenario, keys),
            )
            for scenario, keys in (
                ("N", {"cpu_us": MESSAGE, "deliveries_per_second": "messages a second"}),
                ("O", {"cpu_us": CONNECTION, "connections_per_second": CONNECTIONS}),
                ("P", _MEANWHILE),
                ("R", _MEANWHILE),
            )
        ),
        (SCENARIOS["G"].title, _variants(results, "G", {"memory_kib": "KiB"})),
        (
            SCENARIOS["H"].title,
            _variants(
                results,
                "H",
                {
                    "cpu_us": CPU,
                    "p50_ms": P50,
                    "p99_ms": P99,
                    **PINGS,
                },
            ),
        ),
        *(
            (
                SCENARIOS[scenario].title,
                _variants(
                    results,
                    scenario,
                    {"cpu_us": CPU, "deliveries_per_second": RATE, "p50_ms": P50, "p99_ms": P99},
                ),
            )
            for scenario in ("J", "K", "Q")
        ),
        (
            SCENARIOS["L"].title,
            _variants(
                results,
                "L",
                {
                    "trip_p50_us": "p50 us",
                    "trip_p99_us": "p99 us",
                    "cpu_us": "CPU of who receives, us per message",
                },
            ),
        ),
        (
            "The load's own CPU per delivery, microseconds",
            _side_by_side(results, everybody, "load_cpu_us"),
        ),
        (
            "How busy the load's core was, 1 is fully",
            _side_by_side(results, everybody, "load_busy"),
        ),
    ]
    return [(_capital(title), content) for title, content in parts if content]


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]


def about(results: Results) -> str:
    machine = results["machine"]
    pinned = (
        "the server pinned to one core, the load to another"
        if results["pinned"]
        else "**server and load shared the only core**"
    )
    if results["pinned"] and any(
        run["scenario"] in ("J", "K", "L", "Q") for run in results["runs"]
    ):
        alone = results["broker_alone"]
        pinned += f", a broker to {'a third' if alone else 'the core of the load'}"
    return (
        f"Measured on {results['date']}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['kernel']}, {machine['python']}; {pinned}. "
        f"{results['repeats']} repeats of {results['seconds']:g} seconds each, "
        f"{results['minutes']:g} minutes in all. "
        + ("The load never slept. " if results["spin"] else "")
        + f"When it began, {results['busy']:.1f} other processes were running on average.\n"
    )


def versions(results: Results) -> str:
    found = {}
    for packages in results["versions"].values():
        found |= packages
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items())) + ".\n"


def not_run(results: Results) -> str:
    lines = [f"- {SERVERS[name].title}: {why}" for name, why in results["not_run"].items()]
    return "\n".join(lines) + "\n" if lines else ""


def summary(results: Results, pictures: list[str] | None = None) -> str:
    """Return it all in Markdown."""
    parts = [about(results)]
    if reached := goals(results):
        parts += ["## The figures to reach\n", reached]
    for title, content in sections(results):
        parts += [f"## {title}\n", content]
        parts += [
            f"![{title}](img/{name})\n" for name in pictures or () if plots.TITLES[name] == title
        ]
    if missing := not_run(results):
        parts += ["## Not run\n", missing]
    parts += ["## Versions\n", versions(results)]
    return "\n".join(parts)


def write(results: Results, path: Path, page: Path | None) -> list[Path]:
    """Write the results, and if there is a page its plots and its tables. Return what was written.

    What stands in the page outside of the two marks stays.
    """
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    written = [path]
    if page is not None:
        pictures = plots.draw(results, page.parent / "img")
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        content = summary(results, [picture.name for picture in pictures])
        page.write_text(f"{before}{BEGIN}\n\n{content}\n{END}{after}")
        written += [*pictures, page]
    return written
