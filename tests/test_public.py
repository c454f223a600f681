"""What the package promises as a whole: its names, their documentation, what an import costs."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import inspect
import pkgutil
import subprocess
import sys

import pytest

import starcast
from starcast import exceptions

MODULES = sorted(module.name for module in pkgutil.walk_packages(starcast.__path__, "starcast."))
CLASSES = sorted(
    (value for name in starcast.__all__ if inspect.isclass(value := getattr(starcast, name))),
    key=lambda cls: cls.__name__,
)


def members(cls: type) -> list[tuple[str, object]]:
    """Return the public methods and properties that our classes define or inherit from ours."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("starcast")]
    return [
        (name, value)
        for base in ours
        for name, value in vars(base).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod)))
    ]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Names


def test_the_names_are_there_once_and_sorted():
    assert starcast.__all__ == sorted(set(starcast.__all__))
    for name in starcast.__all__:
        assert hasattr(starcast, name)


def test_the_names_of_the_design_are_public():
    assert {
        "Broadcast",
        "BroadcastEndpoint",
        "ConnectionManager",
        "Event",
        "Subscriber",
        "StarcastError",
    } <= set(starcast.__all__)


def test_every_error_is_public():
    errors = {
        name
        for name, value in vars(exceptions).items()
        if inspect.isclass(value) and issubclass(value, exceptions.StarcastError)
    }
    assert "StarcastError" in errors
    assert errors <= set(starcast.__all__)


def test_every_class_that_the_package_shows_is_public():
    shown = {name for name, value in vars(starcast).items() if inspect.isclass(value)}
    assert shown <= set(starcast.__all__)
    assert all(cls.__module__.startswith("starcast.") for cls in CLASSES)


def test_a_star_import_brings_the_public_names():
    namespace: dict[str, object] = {}
    exec("from starcast import *", namespace)
    assert set(starcast.__all__) <= set(namespace)


def test_the_version_is_the_installed_one():
    assert importlib.metadata.version("starcast") == starcast.__version__


# Documentation


@pytest.mark.parametrize("module", ["starcast", *MODULES])
def test_every_module_has_a_docstring(module):
    assert importlib.import_module(module).__doc__


@pytest.mark.parametrize("cls", CLASSES)
def test_every_public_class_has_a_docstring_of_its_own(cls):
    assert vars(cls).get("__doc__")
    assert not cls.__doc__.startswith(f"{cls.__name__}(")  # what a dataclass writes by itself


@pytest.mark.parametrize(
    "member",
    [
        pytest.param(member, id=f"{cls.__name__}.{name}")
        for cls in CLASSES
        for name, member in members(cls)
    ],
)
def test_every_public_method_has_a_docstring(member):
    assert member.__doc__


def test_what_is_looked_at_above_is_not_nothing():
    found = {f"{cls.__name__}.{name}" for cls in CLASSES for name, _ in members(cls)}
    assert {
        "Broadcast.publish",
        "Broadcast.channels",
        "BroadcastEndpoint.on_receive",
        "ConnectionManager.active_connections",
        "Event.json",
        "Subscriber.get",
    } <= found


@pytest.mark.parametrize(
    "callable_",
    [
        starcast.Broadcast,
        starcast.Publisher,
        starcast.Publisher.publish,
        *(
            getattr(starcast.Broadcast, name)
            for name in ("connect", "send", "publish", "subscribe", "serve", "app", "close")
        ),
    ],
    ids=lambda callable_: callable_.__qualname__,
)
def test_every_argument_of_the_hub_is_explained(callable_):
    arguments = inspect.signature(callable_).parameters.keys() - {"self", "misplaced"}
    documented = callable_.__doc__.partition("Args:")[2]
    for argument in arguments:
        assert argument in documented


def test_the_error_tree_names_every_error_that_is_public():
    for name, value in vars(starcast).items():
        if inspect.isclass(value) and issubclass(value, Exception):
            assert f" {name} " in f"{exceptions.__doc__} ".replace("\n", " \n ")


# What an import costs


def test_the_import_brings_starlette_alone_and_no_warning():
    unwanted = {"fastapi", "pydantic", "uvicorn", "websockets", "httpx", "httpx2", "orjson"}
    loaded = set(run("import sys, starcast; print(*sys.modules, sep='\\n')").split())
    assert "starcast.broadcast" in loaded
    assert "starlette.websockets" in loaded
    assert not unwanted & loaded


def test_every_module_can_be_imported_first():
    """Each in a process of its own, which has only imported the package before, as all do."""
    code = f"""
import importlib, os, starcast
for name in {MODULES}:
    if (child := os.fork()) == 0:
        importlib.import_module(name)
        print(name, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    assert run(code).split() == MODULES


def test_dates_and_dataclasses_are_written_without_importing_pydantic():
    code = (
        "import datetime, sys; from starcast.codec import dumps;"
        "print(dumps(datetime.date(2024, 2, 29)), 'pydantic' in sys.modules)"
    )
    assert run(code) == '"2024-02-29" False\n'


def test_the_package_is_typed():
    assert importlib.resources.files("starcast").joinpath("py.typed").is_file()
