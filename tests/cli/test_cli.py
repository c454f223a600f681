"""The command line, with real brokers."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import pty
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from backends.redis_server import RedisServer
from starcast import Broadcast, Event, Gap, __version__, backends, cli
from starcast.backends.nats import NatsBackend
from starcast.backends.postgres import PostgresBackend
from starcast.backends.redis import RedisBackend
from starcast.cli import common, subscribe
from support import free_port, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def redis(urls):
    return urls("redis")


@pytest.fixture
def closed_port():
    return free_port()


async def run(*arguments: str) -> int:
    return await asyncio.to_thread(cli.main, arguments)


def standard_input(monkeypatch, content: bytes, terminal: bool = False) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(content))
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_publish(url):
    async with Broadcast(url, name="default") as hub, hub.subscribe("room") as subscriber:
        assert await run("publish", url, "room", "the kettle is on") == 0
        assert (await anext(subscriber)).message == "the kettle is on"


async def test_the_name_of_the_hub(url):
    async with (
        Broadcast(url, name="staff") as staff,
        Broadcast(url, name="default") as other,
        staff.subscribe("room") as subscriber,
        other.subscribe("room") as others,
    ):
        assert await run("publish", "--name", "staff", url, "room", "for the staff") == 0
        assert await run("publish", url, "room", "for the others") == 0
        assert (await anext(subscriber)).message == "for the staff"
        assert (await anext(others)).message == "for the others"


async def test_follow_a_hub_with_a_name(url):
    process = subscribing(url, "room", "--name", "staff", stdout=subprocess.PIPE)
    async with Broadcast(url, name="staff") as hub, Broadcast(url) as other:
        line = await told(hub, "room", "hello", process.stdout.readline)
        await other.publish("room", "not for them")
        await hub.publish("room", "the last")
        lines = [line]
        while "the last" not in lines[-1].decode():
            lines.append(await asyncio.to_thread(process.stdout.readline))
    assert {json.loads(line)["text"] for line in lines} == {"hello", "the last"}
    process.terminate()
    process.wait(10)
    process.stdout.close()


@pytest.mark.parametrize("command", ["publish", "subscribe", "check"])
async def test_what_is_no_name(command, capsys):
    arguments = [] if command == "check" else ["room"]
    code = await run(command, "redis://127.0.0.1:1", *arguments, "--name", "a:b")
    assert code == 2
    assert "1 to 64 ASCII letters" in capsys.readouterr().err


async def test_publish_an_argument_that_is_not_text(redis):
    async with Broadcast(redis, name="default") as hub, hub.subscribe("room") as subscriber:
        assert await run("publish", redis, "room", "\udcff") == 0
        assert (await anext(subscriber)).message == b"\xff"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a line\n", "a line"),
        (b"two\nlines\r\n", "two\nlines"),
        ("\N{GRINNING FACE}".encode(), "\N{GRINNING FACE}"),
        (b"\xfe\n", b"\xfe\n"),
        (b"", ""),
    ],
)
@pytest.mark.parametrize("dash", [["-"], []])
async def test_publish_what_comes_in(redis, monkeypatch, content, message, dash):
    standard_input(monkeypatch, content)
    async with Broadcast(redis, name="default") as hub, hub.subscribe("room") as subscriber:
        assert await run("publish", redis, "room", *dash) == 0
        assert (await anext(subscriber)).message == message


async def test_publish_what_is_typed(redis, monkeypatch, capsys):
    standard_input(monkeypatch, b"tea\n", terminal=True)
    async with Broadcast(redis, name="default") as hub, hub.subscribe("room") as subscriber:
        assert await run("publish", redis, "room") == 0
        assert (await anext(subscriber)).message == "tea"
    assert capsys.readouterr().err == "starcast: reading the message from standard input\n"


# What was done


@pytest.mark.parametrize(
    ("arguments", "message", "said"),
    [
        (["k\xf6nig"], "k\xf6nig", "text of 6 bytes"),
        (["--binary", "k\xf6nig"], "k\xf6nig".encode(), "a binary message of 6 bytes"),
        (["--json", ' {"a": [1, "\xf6"], "b": null} '], '{"a":[1,"\xf6"],"b":null}', "JSON"),
        (["--json", '"text"'], '"text"', "JSON"),
        (["--", "--json"], "--json", "text of 6 bytes"),
        (["-5"], "-5", "text of 2 bytes"),
        (["--file", "LINES"], "a\n", "text of 2 bytes"),
        (["--binary", "--file", "LINES"], b"a\n\n", "a binary message of 3 bytes"),
        (["--json", "--file", "LIST"], "[1]", "JSON"),
    ],
)
async def test_what_is_published_and_what_is_said_of_it(
    redis, monkeypatch, tmp_path, capsys, arguments, message, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "LINES").write_bytes(b"a\n\n")
    (tmp_path / "LIST").write_bytes(b"[ 1 ]\n")
    async with Broadcast(redis, name="default") as hub, hub.subscribe("r\xf6") as subscriber:
        assert await run("publish", redis, "r\xf6", *arguments) == 0
        assert (await anext(subscriber)).message == message
    output = capsys.readouterr()
    heard = "1 process is subscribed to it"
    assert output.out == f"published {said} to 'r\xf6' of the hub 'default'; {heard}\n"
    assert output.err == ""


async def test_who_has_heard_it(url, capsys):
    """As far as the broker tells."""
    assert await run("publish", "--name", "staff", url, "room", "x") == 0
    tail = "; nobody is subscribed to it" if url.startswith("redis") else ""
    assert capsys.readouterr().out == (
        f"published text of 1 byte to 'room' of the hub 'staff'{tail}\n"
    )
    async with (
        Broadcast(url, name="default") as one,
        Broadcast(url, name="default") as two,
        one.subscribe("room"),
        two.subscribe("room"),
    ):
        assert await run("publish", url, "room", "x") == 0
    tail = "; 2 processes are subscribed to it" if url.startswith("redis") else ""
    assert capsys.readouterr().out.endswith(f"'default'{tail}\n")


async def test_nothing_of_the_words_is_an_option(redis, monkeypatch):
    monkeypatch.setenv("STARCAST_URL", redis)
    async with Broadcast(redis, name="default") as hub, hub.subscribe("-q") as subscriber:
        assert await run("publish", "--binary", "--", "-q", "--json") == 0
        assert (await anext(subscriber)).message == b"--json"


async def test_nothing_is_said(redis, capsys):
    assert await run("publish", "--quiet", redis, "room", "x") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--json", "{"], "the message is not JSON: "),
        (["--json", "NaN"], "the message is not JSON: NaN is not JSON"),
        (["--json", "[" * 100_000], "the message is not JSON: "),
        (["--json", "1e999"], ""),
        (["--json", "\udcff"], "the message is not JSON: it is not even UTF-8"),
        (["--file", "no\nfile"], "no\\nfile cannot be read: No such file or directory"),
        (["--file", "no\0file"], "no\\x00file cannot be read: embedded null byte"),
        (["x", "--name", "a:b"], "1 to 64 ASCII letters"),
    ],
)
async def test_what_cannot_be_published(redis, capsys, arguments, said):
    assert await run("publish", redis, "room", *arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("starcast: ")
    assert said in output.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["publish", "URL"], "a CHANNEL is missing"),
        (["publish", "URL", "room", "a", "b\n"], "too many arguments: b\\n"),
        (["publish", "URL", "room", "a", "--file", "x"], "too many arguments: a"),
        (["publish", "URL", "room", "a", "URL"], "too many arguments: (a URL)\n"),
        (["publish", "--URL"], "unrecognized arguments: (a URL)\n"),
        (["publish", "URL", "room", "--json", "--binary"], "not allowed with argument"),
        (["subscribe", "URL"], "a CHANNEL is missing"),
        (["check", "URL", "room"], "too many arguments: room"),
        (["check", "URL", "--prefix", "a\nb"], "a prefix must be printable"),
    ],
)
def test_what_is_not_understood_of_a_command(capsys, arguments, said):
    with pytest.raises(SystemExit) as caught:
        cli.main([each.replace("URL", "redis://u:secret@127.0.0.1:1") for each in arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith(f"usage: starcast {arguments[0]} [options] [URL]")
    assert "secret" not in error


# Which broker


async def test_the_url_may_come_from_the_environment(redis, monkeypatch, capsys):
    monkeypatch.setenv("STARCAST_URL", f"{redis}\n")
    async with Broadcast(redis, name="default") as hub, hub.subscribe("room") as subscriber:
        assert await run("publish", "room", "hello") == 0
        assert (await anext(subscriber)).message == "hello"
    assert await run("check") == 0


@pytest.mark.parametrize("command", ["publish", "subscribe", "check"])
@pytest.mark.parametrize(
    "url", ["redis:/u:secret@h", "redis//u:secret@h", "nats:u:secret@h", "unix:/secret"]
)
def test_a_url_is_not_taken_for_a_channel(monkeypatch, capsys, command, url):
    """Which would be shown, with its password."""
    monkeypatch.setenv("STARCAST_URL", "redis://127.0.0.1:1")
    assert cli.main([command, url, "x"]) == 2
    if command != "check":
        assert cli.main([command, "redis://127.0.0.1:1", url, "x"]) == 2
    output = capsys.readouterr()
    assert "secret" not in output.out + output.err
    assert "a CHANNEL looks like a URL" in output.err


def test_a_url_is_not_taken_for_a_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["redis://u:secret@h", "publish", "room"])
    error = capsys.readouterr().err
    assert "invalid choice: '(a URL)' (choose from" in error


async def test_a_url_that_is_given_goes_before_the_environment(redis, monkeypatch):
    monkeypatch.setenv("STARCAST_URL", "redis://127.0.0.1:1")
    async with Broadcast(redis, name="default") as hub, hub.subscribe("room") as subscriber:
        assert await run("publish", redis, "room", "hello") == 0
        assert (await anext(subscriber)).message == "hello"


@pytest.mark.parametrize("value", [None, " "])
def test_no_url_at_all(monkeypatch, capsys, value):
    monkeypatch.delenv("STARCAST_URL", raising=False)
    if value is not None:
        monkeypatch.setenv("STARCAST_URL", value)
    assert cli.main(["publish", "localhost", "hello"]) == 2
    assert "Set the environment variable STARCAST_URL" in capsys.readouterr().err


def test_the_help_names_the_environment_first(capsys):
    """A URL among the arguments, and its password, is in what `ps` prints."""
    assert cli.EPILOG.startswith("The broker's URL comes from the environment variable STARCAST_")
    examples = [line for line in cli.EPILOG.splitlines() if line.startswith("  starcast p")]
    assert not [line for line in examples if "://" in line]
    for command in ("publish", "subscribe", "check"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert "STARCAST_URL" in capsys.readouterr().out


async def test_the_prefix_of_the_names_on_the_broker(url):
    backends_of = {"redis": RedisBackend, "nats": NatsBackend, "postgresql": PostgresBackend}
    backend = backends_of[url.partition("://")[0]](url, prefix="other.")
    hub = Broadcast(backend=backend, name="default")
    async with hub, hub.subscribe("room") as subscriber:
        assert await run("publish", url, "room", "not here") == 0
        assert await run("publish", "--prefix", "other.", url, "room", "here") == 0
        assert (await anext(subscriber)).message == "here"
    assert await run("check", "--prefix", "other.", url) == 0


def subscribing(redis: str, *channels: str, **options) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "starcast", "subscribe", redis, *channels]
    return subprocess.Popen(command, **options)


async def told(hub: Broadcast, channel: str, message: str | bytes, read: Callable[[], Any]) -> Any:
    """Publish until the command shows it: the broker has its subscription before it has."""
    reading = asyncio.create_task(asyncio.to_thread(read))
    while not reading.done():
        await hub.publish(channel, message)
        await asyncio.wait([reading], timeout=0.2)
    return await reading


async def test_subscribe_into_a_pipe(redis):
    process = subscribing(redis, "a", "b", stdout=subprocess.PIPE)
    async with Broadcast(redis, name="default") as hub:
        await until(lambda: _subscribers(redis, "a") and _subscribers(redis, "b"))
        line = first = await told(hub, "a", "te\nxt", process.stdout.readline)
        assert json.loads(line) == {"channel": "a", "text": "te\nxt"}
        await hub.publish("b", b"\0")
        while line == first:
            line = await asyncio.to_thread(process.stdout.readline)
        assert json.loads(line) == {"channel": "b", "base64": base64.b64encode(b"\0").decode()}
    process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(process.wait, 10) == 130
    process.stdout.close()


async def test_who_reads_the_pipe_goes(redis):
    process = subscribing(redis, "gone", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    async with Broadcast(redis, name="default") as hub:
        await until(lambda: _subscribers(redis, "gone"))
        process.stdout.close()
        assert await told(hub, "gone", "1", partial(process.wait, 10)) == 1
    assert process.stderr.read() == b""
    process.stderr.close()


async def test_subscribe_on_a_terminal(redis):
    ours, theirs = pty.openpty()
    process = subscribing(redis, "tty", stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    async with Broadcast(redis, name="default") as hub:
        await until(lambda: _subscribers(redis, "tty"))
        tea = "\x1b[2J tea \N{HOT BEVERAGE}"
        line = (await told(hub, "tty", tea, partial(os.read, ours, 1000))).decode()
        assert line.splitlines()[0][8:].strip() == "tty: \\x1b[2J tea \N{HOT BEVERAGE}"
        process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(process.wait, 10) == 130
    os.close(ours)
    assert process.stderr.read() == b""  # not a terminal
    process.stderr.close()


async def test_subscribe_says_on_a_terminal_what_goes_on(monkeypatch):
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with RedisServer() as broker:
        hub = Broadcast(broker.url, name="default")
        monkeypatch.setattr(subscribe, "open_hub", lambda backend, name: hub)
        running = asyncio.create_task(run("subscribe", broker.url, "one", "\u202etwo"))
        await until(lambda: err.getvalue() == "starcast: listening to one, \\u202etwo\n")
        broker.kill()
        await until(lambda: "starcast: lost the connection to the broker: " in err.getvalue())
        broker.start()
        await until(lambda: out.getvalue().count("\n") == 2)
        await hub.disconnect()
        assert await running == 0
    lines = [re.sub(r"[0-9.]+", "0", line[9:]) for line in out.getvalue().splitlines()]
    missing = "-- messages of the last 0 s may be missing"
    assert sorted(lines) == [f"\\u0etwo {missing}", f"one {missing}"]
    assert "starcast: connected to the broker again" in err.getvalue()
    assert not any(
        isinstance(handler, logging.StreamHandler) and handler.stream is err
        for handler in logging.getLogger("starcast").handlers
    )


def _subscribers(url: str, channel: str, name: str = "default") -> int:
    import redis

    with redis.Redis.from_url(url) as client:
        ((_, count),) = client.pubsub_numsub(f"starcast:{name}:{channel}")
    return count


async def test_follow_in_this_process(redis, capsys, monkeypatch):
    """What the tests above see from outside, and a hub that closes."""
    hub = Broadcast(redis, name="default")
    monkeypatch.setattr(subscribe, "open_hub", lambda backend, name: hub)
    following = asyncio.create_task(subscribe.subscribe(None, "default", ["in"], sys.stdout))
    await until(lambda: hub.stats().subscribers)
    await hub.publish("in", "hello")
    await until(lambda: hub.stats().delivered)
    await hub.disconnect()
    await following
    assert json.loads(capsys.readouterr().out) == {"channel": "in", "text": "hello"}


async def test_who_prints_too_slowly(redis, monkeypatch, capsys):
    class Closed(io.StringIO):
        encoding = "ascii"

        def write(self, text):
            raise BrokenPipeError

    hub = Broadcast(redis, name="default")
    monkeypatch.setattr(subscribe, "open_hub", lambda backend, name: hub)
    following = asyncio.create_task(subscribe.subscribe(None, "default", ["in"], Closed()))
    await until(lambda: hub.stats().subscribers)
    await hub.publish("in", "hello")
    with pytest.raises(BrokenPipeError):
        await following


def test_what_is_printed():
    gap = Gap(since=1.5, seconds=2.25, error="killed")
    assert json.loads(subscribe.format_json("room", gap)) == {
        "channel": "room",
        "gap": {"since": 1.5, "seconds": 2.25},
    }
    assert (
        subscribe.format_text("room", gap)[9:]
        == "room -- messages of the last 2.2 s may be missing"
    )
    binary = Event("a\u202eb", b"\0", b"\0")
    assert subscribe.format_text(binary.channel, binary)[9:] == "a\\u202eb: b'\\x00'"


def test_what_a_terminal_cannot_show():
    out = io.TextIOWrapper(io.BytesIO(), "latin-1")
    common.say("caf\xe9 \N{HOT BEVERAGE}", out)
    assert out.buffer.getvalue() == b"caf\xe9 \\u2615\n"


def test_errors(capsys, closed_port):
    url = f"redis://user:secret@127.0.0.1:{closed_port}"
    assert cli.main(["publish", url, "room", "x"]) == 1
    assert cli.main(["check", url]) == 1
    assert cli.main(["publish", "memory://", "room", "x"]) == 2
    assert cli.main(["publish", "pigeon://secret", "room", "x"]) == 2
    assert cli.main(["publish", url, "", "x"]) in (1, 2)
    output = capsys.readouterr()
    assert output.out == "name resolution: 127.0.0.1 is 127.0.0.1\n"
    assert len(output.err.splitlines()) == 6
    assert all(line.startswith(("starcast: ", "  check ")) for line in output.err.splitlines())
    assert "secret" not in output.err
    assert f"127.0.0.1:{closed_port}" in output.err


def test_interrupted(monkeypatch):
    def interrupt(work):
        work.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "run", interrupt)
    assert cli.main(["check", "redis://localhost"]) == 130


@pytest.mark.parametrize("arguments", [[], ["fly"], ["--fly"], ["--name", "x", "publish"]])
def test_a_command_that_is_not_understood(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: starcast" in capsys.readouterr().err


def test_its_help(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert not caught.value.code
    assert cli.EPILOG in capsys.readouterr().out
    for scheme in backends.SCHEMES.keys() - {"memory", "postgres"}:
        assert f"{scheme}://" in cli.EPILOG


def test_its_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert not caught.value.code
    assert capsys.readouterr().out.strip() == __version__


def test_as_a_module_here(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["starcast", "--version"])
    monkeypatch.delitem(sys.modules, "starcast.__main__", raising=False)  # another test's
    with pytest.raises(SystemExit):
        runpy.run_module("starcast", run_name="__main__")
    assert capsys.readouterr().out.strip() == __version__


async def test_subscribe_as_a_command(redis, monkeypatch):
    out = io.StringIO()
    hub = Broadcast(redis, name="default")
    monkeypatch.setattr(subscribe, "open_hub", lambda backend, name: hub)
    monkeypatch.setattr(sys, "stdout", out)
    running = asyncio.create_task(run("subscribe", redis, "one", "two"))
    await until(lambda: hub.stats().subscribers == 2)
    async with Broadcast(redis, name="default") as other:
        await other.publish("one", b"\0")
    await until(lambda: hub.stats().delivered)
    await hub.disconnect()
    assert await running == 0
    assert json.loads(out.getvalue()) == {"channel": "one", "base64": "AA=="}


async def test_a_pipe_that_is_gone(redis, monkeypatch, tmp_path):
    async def gone(backend, name, channels, out):
        raise BrokenPipeError

    monkeypatch.setattr(subscribe, "subscribe", gone)
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert await run("subscribe", redis, "room") == 1
        print("nobody reads this", file=out)
    assert not (tmp_path / "out").read_text()


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "starcast", "--version"], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


# The page


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "command-line.md"


async def test_the_commands_of_the_page(redis, monkeypatch, tmp_path, capsys):
    """Each runs as shown; what a shell does, and what never ends, is left out of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STARCAST_URL", redis)
    for name in ("kettle.txt", "kettle.png"):
        (tmp_path / name).write_bytes(b"\x89 on\n" if name.endswith("png") else b"on\n")
    shown = re.findall(r"^(?:.*\| )?starcast (.+)$", PAGE.read_text(), re.M)
    assert len(shown) == 12
    async with (
        Broadcast(redis, name="default") as hub,
        Broadcast(redis, name="staff") as staff,
        hub.subscribe("room") as all_of_it,
        staff.subscribe("room") as of_staff,
    ):
        for line in shown:
            command, *arguments = shlex.split(line.partition(" | ")[0])
            if command == "subscribe":
                cli.make_parsers()[1][command].parse_args(arguments)
                continue
            if command == "publish" and arguments == ["room"]:
                standard_input(monkeypatch, b"Thu Nov 26\n")
            assert await run(command, *arguments) == 0
        assert (await anext(of_staff)).message == "for the staff"
        messages = ["the kettle is on", "Thu Nov 26", "the kettle is on", '{"kettle":"on"}']
        for message in [*messages, "on", b"\x89 on\n"]:
            assert (await anext(all_of_it)).message == message
    said = capsys.readouterr().out
    line = "published text of 16 bytes to 'room' of the hub 'default'; 1 process is subscribed"
    assert line in said
    assert line.replace("1 process is", "2 processes are") in PAGE.read_text()
    step = re.compile(r"^(\w+(?: \w+)?): .* ms$|^(name resolution): ", re.M)
    assert step.findall(said) == step.findall(PAGE.read_text())
