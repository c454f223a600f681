"""What setup.cfg requires is what the README, the pages and the description of the package say."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

SAID = re.compile(r"\b(Python|Starlette|FastAPI|uvicorn)\s+(\d+(?:\.\d+)+)\s+or\s+newer")
FLOOR = re.compile(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)")

Version = tuple[int, ...]


def version(text: str) -> Version:
    return tuple(map(int, text.split(".")))


def floors(text: str) -> dict[str, Version]:
    return {package: version(floor) for package, floor in FLOOR.findall(text)}


def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def required() -> dict[str, Version]:
    """The oldest versions of Python and of each package that the library works with."""
    setup = config()
    every = {"python": version(setup["options"]["python_requires"].removeprefix(">="))}
    for extra, text in setup["options.extras_require"].items():
        if extra not in ("test", "dev", "docs", "lint"):
            every |= floors(text)
    return every | floors(setup["options"]["install_requires"])


def test_no_page_promises_less_than_is_required():
    said = [
        (page.name, name, version(number))
        for page in PAGES
        for name, number in SAID.findall(page.read_text())
    ]
    assert {name for _, name, _ in said} >= {"Python", "uvicorn"}
    for page, name, number in said:
        assert number >= required()[name.lower()], (page, name)


def test_the_description_says_what_is_required():
    setup = config()
    said = re.findall(r"(Python|Starlette) ([\d.]+\d)", setup["metadata"]["description"])
    floor = required()
    assert {name.lower(): version(number) for name, number in said} == {
        name: floor[name] for name in ("python", "starlette")
    }
    pythons = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    assert min(map(version, pythons)) == floor["python"]


def test_the_readme_says_it_in_its_first_lines():
    first = (ROOT / "README.md").read_text().partition("```")[0]
    said = re.findall(r"(Python|Starlette) ([\d.]+\d)", first)
    floor = required()
    assert {name.lower(): version(number) for name, number in said} == {
        name: floor[name] for name in ("python", "starlette")
    }


def test_the_demo_has_a_fastapi_that_takes_starlette_1():
    """0.130 to 0.132 need a Starlette below 1, and pip would try them one after another."""
    assert floors(config()["options.extras_require"]["demo"])["fastapi"] >= (0, 133)


def test_the_tests_run_on_what_is_required_or_newer():
    test = floors(config()["options.extras_require"]["test"])
    for name, floor in required().items():
        assert test.get(name, floor) >= floor, name
