"""`python -m benchmarks`: run everything, write the results, the table and the plots."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import accounting, report
from .load import Failed
from .run import NotRun, cores, measure, versions
from .scenarios import SCENARIOS, Point
from .servers import BROKERS, SERVERS

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="A, B and C once, under two minutes")
    parser.add_argument("--scenario", help="such as A,B; all by default")
    parser.add_argument("--servers", help=f"of {','.join(SERVERS)}; all by default")
    parser.add_argument("--seconds", type=float, help="of one run, 2 by default, at most 15")
    parser.add_argument("--repeats", type=int, help="5 by default")
    parser.add_argument(
        "--spin",
        action="store_true",
        help="the load never sleeps, so that no write of a server has to wake it",
    )
    parser.add_argument(
        "--docs",
        action="store_true",
        help="write the page and the plots in docs/; done anyway when everything was run",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        help="measure nothing, write the page and the plots from this file of results",
    )
    chosen = parser.parse_args(arguments)
    everything = not (chosen.quick or chosen.scenario or chosen.servers)
    chosen.docs = chosen.docs or everything
    chosen.label = "" if everything else "partial-"
    chosen.scenario = _names(parser, chosen.scenario, SCENARIOS, "A,B,C" if chosen.quick else None)
    chosen.servers = _names(parser, chosen.servers, SERVERS)
    chosen.seconds = chosen.seconds or (0.7 if chosen.quick else 2.0)
    chosen.repeats = chosen.repeats or (1 if chosen.quick else 5)
    if not 0 < chosen.seconds <= 15:
        parser.error("--seconds is more than 0 and at most 15")
    return chosen


def _names(
    parser: argparse.ArgumentParser,
    given: str | None,
    known: dict[str, Any],
    default: str | None = None,
) -> list[str]:
    names = (given or default or ",".join(known)).split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def main() -> int:
    chosen = parse()
    if chosen.source:
        results = json.loads(chosen.source.read_text())
        report.write(results, chosen.source, PAGE)
        print(report.summary(results))
        return 0
    busy = os.getloadavg()[0]
    began = time.monotonic()
    not_run: dict[str, str] = {}
    runs: list[dict[str, Any]] = []
    for key in chosen.scenario:
        scenario = SCENARIOS[key]
        print(f"\n{key}: {scenario.title}")
        points = scenario.points(chosen.servers)
        for repeat in range(chosen.repeats):
            # One after the other, and back again: what drifts meets everybody alike.
            for point in points if repeat % 2 == 0 else reversed(points):
                if point.server.name not in not_run:
                    runs.append(once(point, chosen, repeat, not_run))
    results = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "busy": busy,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "seconds": chosen.seconds,
        "repeats": chosen.repeats,
        "spin": chosen.spin,
        "pinned": cores().load not in cores().workers,
        "broker_alone": cores().broker != cores().load,
        "machine": accounting.machine(),
        "versions": {name: versions(SERVERS[name].packages) for name in chosen.servers}
        | {"brokers": versions(tuple(BROKERS.values()))},
        "not_run": not_run,
        "runs": [run for run in runs if run],
    }
    path = HERE / "results" / f"{chosen.label}{results['date']}.json"
    written = report.write(results, path, PAGE if chosen.docs else None)
    print("\n" + report.summary(results))
    print("Written:", *(path.relative_to(HERE.parent) for path in written))
    return 0


def once(
    point: Point, chosen: argparse.Namespace, repeat: int, not_run: dict[str, str]
) -> dict[str, Any] | None:
    """Measure a point, and say so in a line."""
    name = point.server.name
    run: dict[str, Any] = {
        "scenario": point.scenario,
        "variant": point.variant,
        "server": name,
        "repeat": repeat,
    }
    if point.settings.get("deflate") and not point.server.deflate:
        if repeat:
            return None
        run["failed"] = "no permessage-deflate"
    else:
        try:
            run |= measure(point, chosen.seconds, spin=chosen.spin)
        except NotRun as exc:
            not_run[name] = str(exc)
            print(f"  {name}: not run: {exc}")
            return None
        except Failed as exc:
            run["failed"] = str(exc)
    label = f"{name} {point.variant}".strip()
    if "failed" in run:
        print(f"  {label}: {run['failed']}")
    elif "memory_kib" in run:
        print(f"  {label}: {run['memory_kib']:.1f} KiB a connection")
    elif "trip_p50_us" in run:
        print(
            f"  {label}: p50 {run['trip_p50_us']:.0f} us, p99 {run['trip_p99_us']:.0f} us, "
            f"{run['cpu_us']:.1f} us CPU of who receives"
        )
    elif "connections_per_second" in run:
        print(
            f"  {label}: {run['cpu_us']:.0f} us CPU, "
            f"{run['connections_per_second']:,.0f} connections/s"
        )
    else:
        print(
            f"  {label}: {run['cpu_us']:.2f} us CPU, "
            f"{run['deliveries_per_second']:,.0f}/s, "
            f"p50 {run['p50_ms']:.2f} ms, p99 {run['p99_ms']:.2f} ms, "
            f"{run['bytes_per_delivery']:.0f} bytes, load {run['load_cpu_us']:.2f} us"
        )
    sys.stdout.flush()
    return run


if __name__ == "__main__":
    sys.exit(main())
