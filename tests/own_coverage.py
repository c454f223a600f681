"""Which lines its own tests leave out, of each module: `python tests/own_coverage.py`.

Reads `.coverage`, as `pytest --cov --cov-context test` leaves it. `tests/x/test_y.py` is about
`starcast/x/y.py`, and `OWN` names what else is. A module that is tested in one place can be changed
in one place.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import coverage

ROOT = Path(__file__).parents[1]

# What else tests a module, and is about it: a file or a folder in tests/.
OWN: dict[str, list[str]] = {
    "__main__.py": ["cli/test_cli.py"],
    "admission/origins.py": ["admission/test_hub_origins.py"],
    "admission/refusals.py": ["admission/test_refuse_close.py"],
    "backends/__init__.py": ["backends/test_urls.py", "backends/test_backends.py"],
    "backends/base.py": ["backends/test_backends.py", "scenarios/test_refused.py"],
    "backends/nats_client.py": ["backends/test_nats.py"],
    "backends/nats_connection.py": ["backends/test_nats.py"],
    "backends/nats_names.py": ["backends/test_nats.py", "backends/test_urls.py"],
    "backends/postgres_connection.py": ["backends/test_postgres.py"],
    "backends/postgres_messages.py": ["backends/test_postgres.py"],
    "backends/postgres_session.py": ["backends/test_postgres.py"],
    "backends/postgres_tables.py": ["backends/test_postgres_history.py"],
    "backends/postgres_url.py": ["backends/test_postgres.py", "backends/test_urls.py"],
    "backends/redis.py": ["scenarios/test_startup.py"],
    "backends/redis_connection.py": ["backends/test_redis.py", "cli/test_patterns.py"],
    "backends/redis_url.py": ["backends/test_redis.py", "backends/test_urls.py"],
    "backends/urls.py": ["backends/test_urls.py"],
    "broadcast.py": ["test_hub.py", "test_arguments.py", "test_serving.py", "test_lifecycle.py"],
    "broker/health.py": ["broker/test_link.py", "broker/test_link_shutdown.py"],
    "broker/link.py": [
        "broker/test_link_shutdown.py",
        "broker/test_races.py",
        "broker/test_takeover.py",
        "broker/test_round_trips.py",
    ],
    "broker/local.py": ["test_hub.py", "test_pressure.py", "test_lifecycle.py"],
    "broker/naming.py": ["scenarios/test_refused.py"],
    "broker/probe.py": [
        "broker/test_link.py",
        "broker/test_link_shutdown.py",
        "broker/test_opening.py",
    ],
    "broker/sender.py": ["broker/test_link.py"],
    "broker/session.py": [
        "broker/test_link.py",
        "broker/test_link_shutdown.py",
        "broker/test_races.py",
        "broker/test_round_trips.py",
        "broker/test_takeover.py",
        "scenarios/test_refused.py",
    ],
    "broker/subscriptions.py": [
        "broker/test_link.py",
        "broker/test_link_shutdown.py",
        "broker/test_races.py",
    ],
    "broker/supervisor.py": [
        "broker/test_link.py",
        "broker/test_link_shutdown.py",
        "broker/test_takeover.py",
        "broker/test_races.py",
    ],
    "cli/__init__.py": ["cli/test_cli.py", "cli/test_check.py"],
    "cli/common.py": ["cli/test_cli.py"],
    "cli/publish.py": ["cli/test_cli.py"],
    "cli/subscribe.py": ["cli/test_cli.py", "cli/test_patterns.py"],
    "connection.py": ["test_pressure.py", "servers/test_watch.py", "test_registry.py"],
    "endpoint.py": ["test_relay.py", "test_serving.py"],
    "fastpath.py": ["test_adoption.py", "test_uvicorn.py"],
    "group.py": ["test_shard.py"],
    "handler.py": ["test_connection.py", "test_heartbeats.py"],
    "hub.py": ["test_registry.py", "test_lifecycle.py", "test_dispatcher.py", "test_personal.py"],
    "journal.py": ["test_logs.py"],
    "logs.py": ["scenarios/test_refused.py"],
    "missed.py": ["broker/test_link.py", "scenarios/test_slow_networks.py"],
    "mount.py": ["test_mount_channels.py"],
    "outbox.py": ["test_personal.py", "test_relay.py"],
    "registry.py": ["test_hub.py", "test_shard.py", "test_lifecycle.py", "test_subscriber.py"],
    "servers/daphne.py": ["scenarios/test_servers.py"],
    "servers/hardened.py": ["test_uvicorn.py", "test_adoption.py", "scenarios/test_bad_clients.py"],
    "servers/reading.py": [
        "servers/test_incoming.py",
        "servers/test_lean.py",
        "servers/test_reading.py",
        "scenarios/test_bad_clients.py",
        "test_adoption.py",
    ],
    "servers/served.py": ["test_fastpath.py", "servers/test_watch.py", "test_adoption.py"],
    "servers/stopping.py": ["servers/test_server.py", "scenarios/test_shutdown.py"],
    "servers/watch.py": ["scenarios/test_stalled.py", "admission/test_refuse_close.py"],
    "servers/wire.py": ["test_uvicorn.py", "test_adoption.py", "test_connection.py"],
    "servers/workers.py": ["servers/test_server.py", "scenarios/test_shutdown.py"],
    "serving.py": ["test_endpoint.py", "test_relay.py", "test_mount_channels.py"],
    "settings.py": ["test_arguments.py", "test_hub.py", "broker/test_link.py", "test_tuning.py"],
    "subscriber.py": ["scenarios/test_stalled.py", "servers/test_server.py", "test_pressure.py"],
    "sync/deadline.py": ["scenarios/test_blocked_loop.py", "scenarios/test_slow_networks.py"],
    "sync/space.py": ["test_pressure.py", "test_personal.py"],
    "testing.py": ["backends/test_backends.py"],
    "uvicorn.py": ["test_adoption.py"],
}

# Modules whose own tests leave something to others, and why that is as it should be.
EXEMPT: dict[str, str] = {
    "endpoint.py": "the hubs of endpoint classes are one object, made when the module is imported",
}


def own_tests(module: str) -> list[str]:
    """Return the files in tests/ that are about a module, such as `broker/link.py`."""
    folder, _, name = module.rpartition("/")
    mirrored = "/".join(filter(None, [folder, f"test_{name}"]))
    return [mirrored, *OWN.get(module, [])]


def missing(module: str) -> list[int]:
    """Return the lines that only the tests of other modules reach."""
    measured = coverage.Coverage(data_file=str(ROOT / ".coverage"))
    measured.load()
    names = "|".join(map(re.escape, own_tests(module)))
    # What is run by an import has no context, or that of whichever test came first.
    measured.get_data().set_query_contexts([rf"^tests/({names})"])
    _, lines, _, left, _ = measured.analysis2(str(ROOT / "starcast" / module))
    top_level = import_lines(ROOT / "starcast" / module)
    return [line for line in left if line in lines and line not in top_level]


def import_lines(path: Path) -> set[int]:
    """Return the lines that run when a module is imported: all that are in no function."""
    inside: set[int] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            body = node.body if isinstance(node.body, list) else [node.body]
            inside.update(range(body[0].lineno, (body[-1].end_lineno or 0) + 1))
    return set(range(1, len(path.read_text().splitlines()) + 1)) - inside


def main() -> int:
    bad = 0
    for path in sorted((ROOT / "starcast").rglob("*.py")):
        module = path.relative_to(ROOT / "starcast").as_posix()
        lines = missing(module)
        if lines and module not in EXEMPT:
            bad += 1
            print(f"{module}: {', '.join(own_tests(module))} leave out {lines}")
        elif module in EXEMPT and not lines:
            bad += 1
            print(f"{module} needs no exemption any more")
    print(f"{bad} modules are not covered by their own tests" if bad else "each module is covered")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
