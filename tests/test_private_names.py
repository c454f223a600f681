"""Tests know public names only, so that the code can change behind them.

What a test needs to see of a hub is in `stats()` or in `starcast.testing`, and what it needs to be
shorter is an argument.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent

SUSPICIOUS = re.compile(r"(?<!\bself)(?<!\bcls)\._[a-z]|import .*\b_[a-z]|\bset(attr|item)\(")

# By file: names that are private to somebody, and the reason why a test uses them all the same.
ALLOWED: dict[str, dict[str, str]] = {
    "backends/test_redis_history.py": {
        "starcast.backends.redis_history.POSITION_TTL": "it would take a day",
    },
    "broker/conftest.py": {
        "starcast.hub.NamedBackend": "the hub's name would be before every channel of these tests",
    },
    "broker/test_link_shutdown.py": {
        "_is_owned": "of threading.RLock, which tells it in no other way",
        "_log_destroy_pending": "of asyncio's tasks, which are left behind on purpose",
    },
    "broker/test_takeover.py": {
        "_log_destroy_pending": "of asyncio's tasks, which are left behind on purpose",
    },
    "cli/test_cli.py": {
        "subscribe.open_hub": "the command makes its hub itself",
        "subscribe.subscribe": "the command is interrupted here",
    },
    "cli/test_patterns.py": {"subscribe.open_hub": "the command makes its hub itself"},
    "history/test_checks.py": {"testing.DEADLINE": "it is for users to change"},
    "history/test_memory.py": {
        "starcast.broker.memory_log.MAX_KEYS": "it would take 10,000 messages",
        "starcast.broker.memory_log.time": "a clock that the test moves",
        "starcast.resume.MAX_SHARED": "it would take 16 MiB",
        "starcast.resume.SHARED_FOR": "it would take seconds",
    },
    "scenarios/test_shutdown.py": {"_num_workers": "of gunicorn, which is not started for this"},
    "servers/test_server.py": {"workers.worker_processes": "no other processes are started"},
    "servers/test_watch.py": {
        "watch.SLICE": "it would take more than a thousand sockets",
        "_callbacks": "of asyncio's tasks, which do not tell their number",
    },
    "test_frames.py": {"frames.make": "counts how often it is called"},
    "test_publisher.py": {
        "_worker": "what a thread holds at the moment in which another one closes the publisher",
        "_loop": "of such a worker",
        "_stop": "of such a worker",
        "_error": "of such a worker",
    },
    "test_shard.py": {
        "shard.time": "a clock that the test moves",
        "Connection.offer": "no input makes a delivery raise",
    },
    "test_shortcut.py": {"Event.frame": "no input makes a delivery raise"},
    "test_sse.py": {"stopping.is_stopping": "a server takes no request once it stops"},
    "test_testing.py": {"testing.DEADLINE": "it is for users to change"},
    "test_uvicorn.py": {"Wire.write": "counts how often it is called"},
}


def private_names(tree: ast.Module) -> Iterator[str]:
    """Yield the private names of other objects and the patched attributes of starcast."""
    modules = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("starcast")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own:
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("starcast"):
            yield from (alias.name for alias in node.names if _is_private(alias.name))
        elif isinstance(node, ast.Call) and _is_patch(node.func) and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and str(target.value).startswith("starcast."):
                yield str(target.value)
            elif isinstance(target, ast.Name) and target.id in modules and len(node.args) > 1:
                yield f"{target.id}.{getattr(node.args[1], 'value', '?')}"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_replace"


def _is_patch(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and function.attr in ("setattr", "setitem")


def test_no_test_knows_what_is_private():
    found: dict[str, set[str]] = {}
    for path in sorted(TESTS.rglob("*.py")):
        text = path.read_text()
        if not SUSPICIOUS.search(text):  # most files need not be parsed
            continue
        names = set(private_names(ast.parse(text)))
        if names:
            found[str(path.relative_to(TESTS))] = names
    assert found == {file: set(names) for file, names in ALLOWED.items()}


def test_what_counts_as_private():
    source = """
from starcast import hub as module, _private
self._own
hub.__class__
hub._hub.find
monkeypatch.setattr(module, "SECONDS", 0)
monkeypatch.setattr("starcast.relay.SECONDS", 0)
monkeypatch.setattr(sys, "argv", [])
"""
    names = ["_private", "_hub", "module.SECONDS", "starcast.relay.SECONDS"]
    assert sorted(private_names(ast.parse(source))) == sorted(names)
