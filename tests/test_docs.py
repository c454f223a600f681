"""The pages: their programs run, their links lead somewhere, and nothing public is left out."""

from __future__ import annotations

import configparser
import inspect
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import yaml

import starcast

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))

BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", re.M | re.S)
INCLUDE = re.compile(r"^--8<--\n([^:\n]+?)(?::([\w-]+))?\n--8<--$", re.M)


def name(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    return [block for _, lang, block in BLOCK.findall(path.read_text()) if lang == language]


def includes(path):
    """The (file, section or "") that a page includes."""
    return INCLUDE.findall(path.read_text())


def programs():
    """Every Python block that is not an include."""
    return [
        pytest.param(block, id=f"{name(path)}-{number}")
        for path in FILES
        for number, block in enumerate(blocks(path, "python"), 1)
        if not INCLUDE.fullmatch(block.strip())
    ]


@pytest.mark.parametrize("program", programs())
def test_programs_run(program):
    exec(compile(program, "<page>", "exec"), {"__name__": "page"})


def test_there_are_programs_to_run():
    assert any("README.md" in program.id for program in programs())
    assert all(blocks(ROOT / "README.md", language) for language in ("python", "shell"))


def test_the_program_of_the_readme_is_a_tested_one():
    assert blocks(ROOT / "README.md", "python") == [
        (DOCS / "examples" / "quickstart.py").read_text()
    ]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_includes(path):
    # Another way of writing them is code to `ruff format`, which would change it.
    assert path.read_text().count("8<") == 2 * len(includes(path))
    for file, section in includes(path):
        text = (DOCS / file).read_text()
        if section:
            assert text.count(f"[start:{section}]") == text.count(f"[end:{section}]") == 1


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_every_example_is_shown_and_tested(path):
    assert any(file == f"examples/{path.name}" for page in PAGES for file, _ in includes(page))
    tests = Path(__file__).with_name("test_examples.py").read_text()
    assert f'"{path.stem}"' in tests


@pytest.mark.parametrize("path", FILES, ids=name)
def test_links_lead_to_files(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not link.startswith(("https://", "#")):
            assert (path.parent / link.partition("#")[0]).is_file(), link


def test_every_page_is_in_the_menu():
    listed = re.findall(r"- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == [str(path.relative_to(DOCS)) for path in PAGES]


def documented():
    """The names that the reference has, with the members of those whose members are listed."""
    for path in (DOCS / "reference").glob("*.md"):
        found = re.findall(r"^::: ([\w.]+)\n((?:    .*\n)*)", path.read_text(), re.M)
        for identifier, options in found:
            target = pkgutil.resolve_name(identifier)
            if inspect.ismodule(target):
                yield from (item for item in vars(target) if not item.startswith("_"))
            else:
                yield target.__name__
                members = (yaml.safe_load(options) or {}).get("options", {}).get("members") or []
                assert all(hasattr(target, member) for member in members), identifier
                yield from (f"{target.__name__}.{member}" for member in members)


def test_every_public_name_is_documented():
    assert set(starcast.__all__) - {"__version__"} <= set(documented())


@pytest.mark.parametrize("cls", [starcast.Broadcast, starcast.BroadcastEndpoint])
def test_every_public_method_is_documented(cls):
    public = {
        f"{cls.__name__}.{item}"
        for item, value in vars(cls).items()
        if item[0] != "_" and (callable(value) or isinstance(value, property))
    }
    assert public <= set(documented())


# The commands of the README


def lines():
    return [line for block in blocks(ROOT / "README.md", "shell") for line in block.splitlines()]


def test_the_commands_of_the_readme():
    demo, workers, tests = lines()  # backends/test_demo.py runs the second one
    assert demo.endswith("&& uvicorn demo_app:app")
    assert workers.endswith("&& STARCAST_URL=redis://localhost uvicorn demo_app:app --workers 4")
    assert tests.endswith("&& pytest")
    environment = "python3 -m venv .venv && . .venv/bin/activate && "
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for line, start in (demo, environment), (workers, ""), (tests, environment):
        assert line.startswith(start + "pip install -e ")
        (extras,) = re.findall(r"^\.\[([\w,]+)\]$", "\n".join(shlex.split(line)), re.M)
        for extra in extras.split(","):
            assert setup.has_option("options.extras_require", extra)
    assert (ROOT / "demo_app.py").is_file()


def test_ci_runs_the_test_line_of_the_readme():
    run = (ROOT / ".ci" / "run").read_text()
    (variable, pattern) = re.findall(r"^(\w+)=\$\(grep -E '([^']+)' README\.md\)$", run, re.M)[0]
    readme = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in readme if re.search(pattern, line)] == [lines()[-1]]
    assert re.search(rf'^bash .*-c "\${variable}"$', run, re.M)


def test_contributing_names_what_ci_runs():
    contributing = "\n".join(blocks(ROOT / "CONTRIBUTING.md", "shell"))
    assert lines()[-1] in contributing
    run = (ROOT / ".ci" / "run").read_text()
    for command in (
        "ruff check .",
        "ruff format --check .",
        "mypy",
        "lint-imports",
        "mkdocs build",
    ):
        assert re.search(rf"^{re.escape(command)}", contributing, re.M), command
        assert re.search(rf"^{re.escape(command)}", run, re.M), command


@pytest.mark.parametrize("path", [*FILES, *EXAMPLES], ids=name)
def test_no_path_of_a_machine(path):
    assert not re.search(r"(?<![\w.])/(work|tmp|root|home)/", path.read_text())
