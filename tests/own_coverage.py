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
OWN: dict[str, list[str]] = {}

# Modules whose own tests leave something to others, and why that is as it should be.
EXEMPT: dict[str, str] = {}


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
