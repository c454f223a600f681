"""The command `starcast`: publish, subscribe and check, from a terminal or a cron job.

A URL is never repeated, because it may hold a password. The exit codes are in `EPILOG`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from . import __version__, backends
from .backends import Backend
from .broadcast import Broadcast
from .check import check
from .codec import Encoding
from .event import Event
from .exceptions import (
    BackendUnavailable,
    ConfigurationError,
    EncodingError,
    InvalidChannel,
    PayloadTooLarge,
    SubscriberLagged,
)
from .gap import Gap
from .logs import escape
from .naming import DEFAULT_NAME, check_name
from .patterns import ALL, AllChannels, reader
from .subscriber import GapSubscriber

# A URL of a broker that is not quite right, or not where it belongs.
_LIKE_A_URL = re.compile(rf"(?:{'|'.join(backends.SCHEMES)})(?::/|//|:.*@).*", re.DOTALL)

EPILOG = """\
The broker's URL comes from the environment variable STARCAST_URL. It may be given as the first
argument too, but then everybody who can list the processes of this machine can read it, with its
password. What contains :// is taken for the URL.

examples:
  export STARCAST_URL=redis://localhost
  starcast publish room 'the kettle is on'
  starcast publish --json room '{"kettle": "on"}'
  date | starcast publish room
  starcast publish --binary --file kettle.png room
  starcast subscribe room another 'room:*'
  starcast publish --name staff room 'for the hub with name="staff"'
  starcast check redis://localhost

URLs:
  redis://user:password@host:6379    rediss:// with TLS    unix:///path/redis.sock
  valkey://user:password@host:6379   valkeys:// with TLS
  nats://user:password@host:4222     tls:// with TLS
  postgresql://user:password@host:5432/database

exit codes:
  0    all went well
  1    the broker could not be reached or did not answer
  2    the command was not understood, or the message is too large
  130  it was interrupted
"""


class _Parser(argparse.ArgumentParser):
    """Says what was not understood, but for URLs."""

    def error(self, message: str) -> NoReturn:
        super().error(re.sub(r"[^\s']*(?::/|//|@)[^\s']*", "(a URL)", message))


def _parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands, and the one of all of them under the name ''."""
    everything = _Parser(
        prog="starcast",
        description="Talk to a broker as starcast does.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    everything.add_argument("--version", action="version", version=__version__)
    commands = everything.add_subparsers(dest="command", required=True, metavar="COMMAND")
    found: dict[str, argparse.ArgumentParser] = {"": everything}

    def add(name: str, words: str, summary: str, description: str) -> argparse.ArgumentParser:
        usage = f"starcast {name} [options] [URL]{words}"
        parser = commands.add_parser(name, usage=usage, help=summary, description=description)
        parser.epilog = "Without a URL, the variable STARCAST_URL has it: see starcast --help."
        found[name] = parser
        parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
        parser.add_argument(
            "--name",
            default=DEFAULT_NAME,
            help="of the hub, as in Broadcast(url, name=...); default: %(default)s",
        )
        parser.add_argument(
            "--prefix",
            type=_prefix,
            help="what names on the broker begin with, as in RedisBackend(url, prefix=...); "
            "default: starcast:",
        )
        return parser

    publish = add(
        "publish",
        " CHANNEL [MESSAGE]",
        "publish a message",
        "Publish MESSAGE to CHANNEL; standard input if it is - or missing. It is text "
        "if it is UTF-8, without the line break at the end of what was read, and else binary.",
    )
    form = publish.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="refuse what is not JSON")
    form.add_argument("--binary", action="store_true", help="a binary message, byte for byte")
    publish.add_argument("--file", metavar="PATH", help="read the message from this file")
    publish.add_argument("-q", "--quiet", action="store_true", help="do not say what was done")
    add(
        "subscribe",
        " CHANNEL...",
        "print messages: for people on a terminal, else a JSON object a line",
        "Print the messages of each CHANNEL: for people on a terminal, else a JSON "
        "object a line. A * stands for any characters, on Redis and NATS.",
    )
    add(
        "check",
        "",
        "go the way to the broker and back, step by step",
        "Resolve the name of the broker, connect, log in, subscribe, publish, and wait "
        "for what was published. If a step fails, say which, why, and what to do.",
    )
    return found


def _prefix(text: str) -> str:
    if not text.isprintable():
        raise argparse.ArgumentTypeError("a prefix must be printable")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. `arguments` are those of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parsers = _parsers()
    command = arguments[0] if arguments and arguments[0] in parsers else ""
    # Options may stand between the words, which argparse does not allow for commands of a parser.
    parser = parsers[command]
    if not command:
        parser.parse_args(arguments)  # which ends it: the version, the help or a mistake
    options, words = list(arguments[1:]), []
    if "--" in options:  # which argparse takes for an error if it comes first
        end = options.index("--")
        options, words = options[:end], options[end + 1 :]
    chosen = parser.parse_intermixed_args(options)
    chosen.words += words
    log: logging.Handler = logging.NullHandler()  # the output says it all
    if command == "subscribe" and sys.stderr.isatty():
        log = logging.StreamHandler()  # which says when the broker is away
        log.setFormatter(logging.Formatter("starcast: %(message)s"))
    logging.getLogger("starcast").addHandler(log)
    try:
        url = _url(chosen, command)
        backend, name = _backend(url, chosen.prefix), check_name(chosen.name)
        if command == "publish":
            work = _publish(backend, name, *_message(chosen, parser), chosen.quiet)
        elif command == "subscribe":
            channels = _count(chosen, parser, 1, len(chosen.words))
            work = _subscribe(backend, name, channels, sys.stdout)
        else:
            _count(chosen, parser, 0, 0)
            tls = url.startswith(("rediss://", "valkeys://", "tls://"))
            work = check(backend, name, tls, _say)
        asyncio.run(work)
        sys.stdout.flush()
    except (ConfigurationError, InvalidChannel, EncodingError, PayloadTooLarge) as exc:
        return _complain(exc, 2)
    except (BackendUnavailable, SubscriberLagged) as exc:
        return _complain(exc, 1)
    except BrokenPipeError:
        # Who read our output has gone. Python would try to write the rest at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        logging.getLogger("starcast").removeHandler(log)
    return 0


def _complain(error: Exception, code: int) -> int:
    print(f"starcast: {error}", file=sys.stderr)
    return code


def _say(line: str, out: TextIO | None = None) -> None:
    """Print a line at once, whatever the terminal can show of it."""
    out = sys.stdout if out is None else out
    encoding = out.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=out, flush=True)


def _url(chosen: argparse.Namespace, command: str) -> str:
    """Take the URL out of the words, or out of the environment."""
    url = str(chosen.words.pop(0)) if chosen.words and "://" in chosen.words[0] else ""
    # Channels are shown, and a URL among them may hold a password; a message may be anything.
    if any(map(_LIKE_A_URL.match, chosen.words[:1] if command == "publish" else chosen.words)):
        raise ConfigurationError(
            "a CHANNEL looks like a URL, which comes first: redis://user:password@host:6379"
        )
    if url := (url or os.environ.get("STARCAST_URL", "")).strip():
        return url
    raise ConfigurationError(
        "which broker? Set the environment variable STARCAST_URL, as in "
        "STARCAST_URL=redis://localhost, or give the URL first"
    )


def _backend(url: str, prefix: str | None) -> Backend:
    backend = backends.from_url(url, prefix)
    if backend is None:
        raise ConfigurationError("memory:// is one process alone: there is nobody to talk to")
    return backend


def _hub(backend: Backend, name: str) -> Broadcast:
    # A person, or a cron job, learns at once what is wrong, and can try again.
    return Broadcast(backend=backend, name=name, open_timeout=0)


def _count(
    chosen: argparse.Namespace, parser: argparse.ArgumentParser, least: int, most: int
) -> list[str]:
    words: list[str] = chosen.words
    if len(words) < least:
        parser.error("a CHANNEL is missing")
    if len(words) > max(least, most):
        parser.error(f"too many arguments: {' '.join(map(escape, words[most:]))}")
    return words


# Publish


def _message(
    chosen: argparse.Namespace, parser: argparse.ArgumentParser
) -> tuple[str, Any, Encoding | None]:
    """Return the channel, what to publish there, and its encoding if that is not to be seen."""
    channel, *rest = _count(chosen, parser, 1, 1 if chosen.file else 2)
    content = _content(chosen.file, rest[0] if rest else "-")
    if chosen.binary:
        return channel, content, None
    try:
        text = content.decode()
    except UnicodeDecodeError:
        if chosen.json:
            raise ConfigurationError("the message is not JSON: it is not even UTF-8") from None
        return channel, content, None
    if chosen.json:
        return channel, _json(text), "json"
    if not rest or rest[0] == "-":  # it was read
        text = text.removesuffix("\n").removesuffix("\r")
    return channel, text, None


def _content(file: str | None, message: str) -> bytes:
    if file is not None:
        try:
            return Path(file).read_bytes()
        except (OSError, ValueError) as exc:  # a NUL in its name
            reason = getattr(exc, "strerror", None) or exc
            raise ConfigurationError(f"{escape(file)} cannot be read: {reason}") from None
    if message != "-":
        return os.fsencode(message)
    if sys.stdin.isatty():
        print("starcast: reading the message from standard input", file=sys.stderr)
    return sys.stdin.buffer.read()


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise ConfigurationError(f"the message is not JSON: {exc}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is none of its numbers")


async def _publish(
    backend: Backend, name: str, channel: str, message: Any, encoding: Encoding | None, quiet: bool
) -> None:
    async with _hub(backend, name) as hub:
        await hub.publish(channel, message, encoding=encoding)
        receivers = getattr(backend, "receivers", None)
    if quiet:
        return
    if encoding == "json":
        what = "JSON"
    elif isinstance(message, str):
        what = f"text of {_bytes(len(message.encode()))}"
    else:
        what = f"a binary message of {_bytes(len(message))}"
    heard = "" if receivers is None else f"; {_heard(receivers)}"
    _say(f"published {what} to {channel!r} of the hub {name!r}{heard}")


def _bytes(size: int) -> str:
    return "1 byte" if size == 1 else f"{size} bytes"


def _heard(receivers: int) -> str:
    if receivers == 0:
        return "nobody is subscribed to it"
    return f"{receivers} {'process is' if receivers == 1 else 'processes are'} subscribed to it"


# Subscribe


async def _subscribe(backend: Backend, name: str, channels: list[str], out: TextIO) -> None:
    channels = list(dict.fromkeys(channels))
    wanted, read = channels, None
    if any("*" in channel for channel in channels):
        backend, wanted, read = AllChannels(backend), [ALL], reader(channels)
    show = _for_people if out.isatty() else _for_programs

    async def follow(subscriber: GapSubscriber) -> None:
        async for item in subscriber:
            for channel, one in [(subscriber.channel, item)] if read is None else read(item):
                _say(show(channel, one), out)

    async with _hub(backend, name) as hub, contextlib.AsyncExitStack() as stack:
        subscribers = [
            await stack.enter_async_context(hub.subscribe(channel, gaps=True)) for channel in wanted
        ]
        if sys.stderr.isatty():
            names = ", ".join(map(escape, channels))
            print(f"starcast: listening to {names}", file=sys.stderr, flush=True)
        try:
            async with asyncio.TaskGroup() as group:
                for subscriber in subscribers:
                    group.create_task(follow(subscriber))
        except* (BrokenPipeError, SubscriberLagged) as exc:
            raise exc.exceptions[0] from None


def _for_programs(channel: str, item: Event | Gap) -> str:
    line: dict[str, object] = {"channel": channel}
    if isinstance(item, Gap):
        line["gap"] = {"since": item.since, "seconds": item.seconds}
    elif isinstance(item.message, str):
        line["text"] = item.message
    else:
        line["base64"] = base64.b64encode(item.message).decode()
    return json.dumps(line)


def _for_people(channel: str, item: Event | Gap) -> str:
    start = f"{time.strftime('%H:%M:%S')} {escape(channel)}"
    if isinstance(item, Gap):
        return f"{start} -- messages of the last {item.seconds:.1f} s may be missing"
    message = item.message if isinstance(item.message, str) else repr(item.message)
    return f"{start}: {escape(message)}"
