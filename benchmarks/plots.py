"""The pictures of the page. Without matplotlib there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import report
from .scenarios import SCENARIOS

CPU_TITLE = "Server CPU per delivery, microseconds"
CLIENTS_TITLE = "More and more clients, 128 bytes, one message at a time"
MEMORY_TITLE = "Memory per idle connection, 1,000 connections"

# Which section of the page a picture belongs to.
TITLES = {
    "bench-cpu.png": CPU_TITLE,
    "bench-deflate.png": CPU_TITLE,
    "bench-clients.png": CLIENTS_TITLE,
    "bench-memory.png": MEMORY_TITLE,
}

OURS, OTHERS, FLOOR = "#3949ab", "#757575", "#2e7d32"
COLOURS = {
    "starcast": OURS,
    "connection_manager": OTHERS,
    "floor": FLOOR,
}
NAMES = {
    "starcast": "starcast",
    "starcast_fastapi": "starcast, fastapi run",
    "connection_manager": "ConnectionManager",
    "broadcaster": "encode/broadcaster",
    "litestar_channels": "Litestar channels",
    "python_socketio": "python-socketio",
    "websockets_broadcast": "websockets broadcast()",
    "aiohttp_web": "aiohttp",
    "picows_server": "picows (Cython)",
    "socketify_app": "socketify (C++)",
    "floor": "floor: transport.write",
}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what there is to show, and return the files."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return []
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams["axes.spines.right"] = False
    folder.mkdir(exist_ok=True)
    drawn = []
    for name, figure in (
        ("bench-cpu.png", _compare(results, ["A", "B"])),
        ("bench-deflate.png", _compare(results, ["C", "D"])),
        ("bench-clients.png", _clients(results)),
        ("bench-memory.png", _memory(results)),
    ):
        if figure is not None:
            path = folder / name
            figure.savefig(path, dpi=130, metadata={"Software": None})
            drawn.append(path)
    return drawn


def _subplots(columns: int, height: float, **more: Any) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, **more)[0]


def _plain(axis: Any, steps: tuple[int, ...]) -> None:
    """Write 10 and 100 at a logarithmic axis instead of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _compare(results: dict[str, Any], scenarios: list[str]) -> Any:
    """A dot for each server at its median, with a line from the smallest to the largest."""
    names = [
        name
        for name in report.servers_of(results, *scenarios)
        if any(report.values(results, scenario, name, "cpu_us") for scenario in scenarios)
    ]
    if not names:
        return None
    first = scenarios[0]

    def cost(name: str) -> float:
        found = report.figure(results, first, name, "cpu_us")
        return found.median if found else 0.0

    names.sort(key=cost, reverse=True)
    figure, panels = _subplots(len(scenarios), 0.8 + 0.27 * len(names), sharey=True)
    for axes, scenario in zip(panels, scenarios, strict=True):
        for row, name in enumerate(names):
            found = report.figure(results, scenario, name, "cpu_us")
            if found is None:
                continue
            colour = COLOURS.get(name, OTHERS)
            axes.plot([found.low, found.high], [row, row], color=colour, lw=2)
            axes.plot(found.median, row, "o", color=colour)
            axes.annotate(
                report.number(found.median),
                (found.high, row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=colour,
            )
        axes.set_xscale("log")
        _plain(axes.xaxis, (1, 2, 5))
        axes.margins(x=0.18)
        axes.set_title(report.SHORT[scenario], fontsize=10)
        axes.set_xlabel("server CPU per delivery, us (log)")
        axes.grid(axis="both", alpha=0.25)
    panels[0].set_yticks(range(len(names)), [NAMES[name] for name in names])
    return figure


def _clients(results: dict[str, Any]) -> Any:
    names = report.servers_of(results, "H")
    if not any(run["scenario"] == "H" and "cpu_us" in run for run in results["runs"]):
        return None
    figure, panels = _subplots(2, 3.4)
    for axes, key, label in (
        (panels[0], "cpu_us", "server CPU per delivery, us"),
        (panels[1], "p50_ms", "last one has it, p50 ms (log)"),
    ):
        for name in names:
            points = [
                (settings["clients"], found)
                for variant, settings in SCENARIOS["H"].variants.items()
                if (found := report.figure(results, "H", name, key, variant))
            ]
            counts = [count for count, _ in points]
            colour = COLOURS.get(name, OTHERS)
            axes.plot(counts, [f.median for _, f in points], "o-", color=colour, label=NAMES[name])
            if points:
                lows, highs = [f.low for _, f in points], [f.high for _, f in points]
                axes.fill_between(counts, lows, highs, color=colour, alpha=0.15, lw=0)
        axes.set_xscale("log")
        _plain(axes.xaxis, (1,))
        axes.set_xlabel("clients (log)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    panels[0].set_ylim(bottom=0)
    panels[1].set_yscale("log")
    _plain(panels[1].yaxis, (1,))
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _memory(results: dict[str, Any]) -> Any:
    names = report.servers_of(results, "G")
    variants = list(SCENARIOS["G"].variants)
    if not any("memory_kib" in run for run in results["runs"]):
        return None
    figure, (axes,) = _subplots(1, 2.6)
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        rows, lengths = [], []
        for row, variant in enumerate(variants):
            if found := report.figure(results, "G", name, "memory_kib", variant):
                rows.append(row + index * height)
                lengths.append(found.median)
        colour = COLOURS.get(name, OTHERS)
        bars = axes.barh(rows, lengths, height * 0.9, color=colour, label=NAMES[name])
        axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(variants))], variants)
    axes.invert_yaxis()
    axes.set_xlabel("KiB of the server process per connection")
    axes.margins(x=0.1)
    axes.legend(frameon=False, fontsize=8)
    return figure
