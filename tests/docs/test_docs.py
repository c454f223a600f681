"""The pages: their programs run, their links lead somewhere, and nothing public is left out."""

from __future__ import annotations

import configparser
import functools
import inspect
import logging
import pkgutil
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml

import starcast

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
EXAMPLES = sorted(
    path
    for path in (DOCS / "examples").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
)

BLOCK = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.M | re.S)
TITLE = re.compile(r' title="([^"]+)"')


def name(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    return [
        textwrap.dedent(block)
        for _, lang, _, block in BLOCK.findall(path.read_text())
        if lang == language
    ]


def shown(path):
    """The (file, text) of the blocks that show a file of docs/examples, which is their title."""
    return [
        (title[1], textwrap.dedent(block))
        for _, _, info, block in BLOCK.findall(path.read_text())
        if (title := TITLE.search(info))
    ]


def programs():
    """Every Python block that is a program of its own."""
    return [
        pytest.param(block, id=f"{name(path)}-{number}")
        for path in FILES
        for number, block in enumerate(blocks(path, "python"), 1)
        if block not in [text for _, text in shown(path)]
    ]


@pytest.mark.parametrize("program", programs())
def test_programs_run(program, caplog):
    caplog.set_level(logging.INFO, "starcast")  # and whatever a program sets is undone after it
    exec(compile(program, "<page>", "exec"), {"__name__": "page"})


def test_there_are_programs_to_run():
    assert programs()
    assert all(blocks(ROOT / "README.md", language) for language in ("python", "shell"))


def test_the_program_of_the_readme_is_a_tested_one():
    assert blocks(ROOT / "README.md", "python") == [text for _, text in shown(ROOT / "README.md")]


def lines_of(text):
    """Its lines without their indentation from the left, which a page may have taken away."""
    return textwrap.dedent(text).strip("\n").split("\n")


def holds(text, part):
    """Whether the lines of `part` stand in `text`, one after another, at any indentation."""
    have, want = text.split("\n"), lines_of(part)
    return any(
        lines_of("\n".join(have[at : at + len(want)])) == want
        for at in range(len(have) - len(want) + 1)
    )


@pytest.mark.parametrize("path", FILES, ids=name)
def test_what_a_page_shows_is_in_the_example(path):
    assert "--8<--" not in path.read_text()  # a forge would show the mark and not the program
    for file, text in shown(path):
        named = [example for example in EXAMPLES if example.name == file]
        assert any(holds(it.read_text(), text) for it in named), f"{file} does not have\n{text}"


def test_holds():
    text = "a\n    b\n\n    c\nd\n"
    assert all(holds(text, part) for part in ["a\n", text, "    b\n\n    c\n", "b\n\nc\n"])
    assert not any(holds(text, part) for part in ["e\n", "b\nc\n", "b\n\n  c\n", text + "e\n"])


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_every_example_is_shown_and_tested(path):
    blocks = [text for page in FILES for file, text in shown(page) if file == path.name]
    assert any(holds(path.read_text(), text) for text in blocks)
    named = path.relative_to(DOCS / "examples")
    tests = "".join(test.read_text() for test in Path(__file__).parents[1].rglob("test_*.py"))
    assert any(f'"{each}"' in tests for each in (named, named.with_suffix("")))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_links_lead_to_files(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", path.read_text())):
        if not link.startswith(("https://", "#")):
            assert (path.parent / link.partition("#")[0]).is_file(), link


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_page_has_no_syntax_that_is_not_rendered(path):
    assert not re.search(r"^: {2,}", path.read_text(), re.M)  # a definition list


@pytest.mark.parametrize("start", [ROOT / "README.md", DOCS / "index.md"], ids=name)
def test_every_page_is_found_by_following_links(start):
    """On a forge there is no menu."""
    found, new = {start}, [start]
    while new:
        page = new.pop()
        links = re.findall(r"\]\(([^)#\s]+\.md)", BLOCK.sub("", page.read_text()))
        for link in {(page.parent / link).resolve() for link in links if "://" not in link}:
            if link not in found:
                found.add(link)
                new.append(link)
    assert {page for page in PAGES if page.name != "index.md"} <= found


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
        for base in cls.__mro__
        if base.__module__.startswith("starcast.")
        for item, value in vars(base).items()
        if item[0] != "_" and (callable(value) or isinstance(value, property))
    }
    assert public <= set(documented())


# The faults


def faults():
    """Each entry of the page: its heading, and its text."""
    text = (DOCS / "reference" / "faults.md").read_text()
    return re.findall(r"^## (\d+\. [^\n]+)\n(.*?)(?=^## |\Z)", text, re.M | re.S)


def named_in(text):
    """The (file, test) pairs that a text of the page names."""
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)


@functools.cache
def defined_in(path):
    return set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.M))


def files_with(test):
    paths = sorted((ROOT / "tests").rglob("*.py"))
    return [name(path) for path in paths if test in defined_in(path)]


@pytest.mark.parametrize(("heading", "text"), faults(), ids=[heading for heading, _ in faults()])
def test_each_fault_has_tests_or_is_planned(heading, text):
    named = named_in(text)
    assert named or "**Planned" in text
    missing = [
        f"{file} does not have {test}; it is in {files_with(test)}"
        for file, test in named
        if file not in files_with(test)
    ]
    assert not missing, "\n".join(missing)


def test_each_promise_has_tests():
    text = (DOCS / "what-history-promises.md").read_text()
    for section in text.split("\n## ")[1:]:
        named = named_in(section)
        assert named or section.endswith("-->\n") or "-->\n\n" in section, section
        assert [it for it in named if it[0] not in files_with(it[1])] == []


def test_the_faults_are_numbered():
    numbers = [int(heading.partition(".")[0]) for heading, _ in faults()]
    assert numbers == list(range(1, 35))


# The way of a message


@pytest.mark.parametrize("file", ["how-a-message-travels.md", "img/way.svg"])
def test_the_way_of_a_message_names_files_that_exist(file):
    named = re.findall(r"[`>]((?:\w+/)*\w+\.py|\w+/)[`<]", (DOCS / file).read_text())
    assert len(named) > 5
    assert [each for each in named if not (ROOT / "starcast" / each).exists()] == []


# The commands of the README


def lines():
    return [line for block in blocks(ROOT / "README.md", "shell") for line in block.splitlines()]


def test_the_commands_of_the_readme():
    install, demo, workers, tests = lines()  # test_demo.py runs the one with workers
    assert install.startswith("pip install starcast ")
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
