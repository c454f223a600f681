"""The command `starcast`: publish, subscribe and check, from a terminal or a cron job.

A URL is never printed, because it may contain a password. `EPILOG` lists the exit codes.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import sys
from collections.abc import Coroutine, Sequence
from typing import Any, NoReturn

from .. import __version__, backends
from ..broker.naming import DEFAULT_NAME, check_name
from ..exceptions import (
    BackendUnavailable,
    ConfigurationError,
    StarcastError,
    SubscriberLagged,
)
from ..logs import escape
from ..tuning import check_positive
from . import check, publish, subscribe
from .common import say

# A broker's URL that is malformed or in the wrong place.
_LIKE_A_URL = re.compile(rf"(?:{'|'.join(backends.SCHEMES)})(?::/|//|:.*@).*", re.DOTALL)

EPILOG = """\
The broker's URL comes from the environment variable STARCAST_URL. It may be given as the first
argument too, but then anyone who can list the processes of this machine can read its password.
A first argument that contains :// is taken for the URL.

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
  0    success
  1    the broker could not be reached or did not answer
  2    the command is not valid, or the message is too large
  130  the command was interrupted
"""


class _Parser(argparse.ArgumentParser):
    """A parser that does not repeat URLs in its error messages."""

    def error(self, message: str) -> NoReturn:
        super().error(re.sub(r"[^\s']*(?::/|//|@)[^\s']*", "(a URL)", message))


def make_parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """Return the parser of the whole command line, and the parser of each command."""
    parser = _Parser(
        prog="starcast",
        description="Talk to a broker as starcast does.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, words: str, summary: str, description: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            usage=f"starcast {name} [options] [URL]{words}",
            help=summary,
            description=description,
            epilog="Without a URL, the variable STARCAST_URL is used: see starcast --help.",
        )
        command.add_argument("words", nargs="*", help=argparse.SUPPRESS)
        command.add_argument(
            "--name",
            default=DEFAULT_NAME,
            help="of the hub, as in Broadcast(url, name=...); default: %(default)s",
        )
        command.add_argument(
            "--prefix",
            type=_prefix,
            help="what names on the broker begin with, as in RedisBackend(url, prefix=...); "
            "default: starcast:",
        )
        return command

    publishing = add(
        "publish",
        " CHANNEL [MESSAGE]",
        "publish a message",
        "Publish MESSAGE to CHANNEL. Without a MESSAGE, or if it is -, read it from standard "
        "input, without the line break at its end. It is sent as text if it is UTF-8, else as a "
        "binary message.",
    )
    form = publishing.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="refuse a message that is not JSON")
    form.add_argument("--binary", action="store_true", help="a binary message, byte for byte")
    publishing.add_argument("--file", metavar="PATH", help="read the message from this file")
    publishing.add_argument("-q", "--quiet", action="store_true", help="print nothing on success")
    add(
        "subscribe",
        " CHANNEL...",
        "print messages: as text on a terminal, else as one JSON object a line",
        "Print the messages of each CHANNEL: as text on a terminal, else as one JSON object a "
        "line. A * stands for any characters, on Redis and NATS.",
    )
    checking = add(
        "check",
        "",
        "test the connection to the broker, step by step",
        "Resolve the name of the broker, connect, log in, subscribe, publish, and wait for the "
        "message. If a step fails, print which one, why, and what to do.",
    )
    checking.add_argument(
        "--timeout",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="how long each step may take; default: %(default)g",
    )
    return parser, commands.choices


def _prefix(text: str) -> str:
    if not text.isprintable():
        raise argparse.ArgumentTypeError("a prefix must be printable")
    return text


def _seconds(text: str) -> float:
    try:
        return check_positive("the timeout", float(text))
    except ValueError:
        raise argparse.ArgumentTypeError("a timeout must be a number above 0") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: The arguments of the command line. Default: `sys.argv[1:]`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    everything, parsers = make_parsers()
    command = arguments[0] if arguments else ""
    if command not in parsers:
        everything.parse_args(arguments)  # exits: the version, the help or an error
    # argparse does not allow options between the words of a subcommand: parse it by itself.
    parser = parsers[command]
    options, words = list(arguments[1:]), []
    if "--" in options:  # argparse refuses it at the beginning
        end = options.index("--")
        options, words = options[:end], options[end + 1 :]
    chosen = parser.parse_intermixed_args(options)
    chosen.words += words
    log: logging.Handler = logging.NullHandler()  # the command prints its errors itself
    if command == "subscribe" and sys.stderr.isatty():
        log = logging.StreamHandler()  # the log says when the connection is lost and restored
        log.setFormatter(logging.Formatter("starcast: %(message)s"))
    logging.getLogger("starcast").addHandler(log)
    try:
        asyncio.run(_make_command(command, parser, chosen))
        sys.stdout.flush()
    except StarcastError as exc:
        print(f"starcast: {exc}", file=sys.stderr)
        return 1 if isinstance(exc, BackendUnavailable | SubscriberLagged) else 2
    except BrokenPipeError:
        # The reader of our output has closed the pipe. Without this, Python would fail to flush the
        # rest at exit, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        logging.getLogger("starcast").removeHandler(log)
    return 0


def _make_command(
    command: str, parser: argparse.ArgumentParser, chosen: argparse.Namespace
) -> Coroutine[Any, Any, None]:
    """Return the coroutine that runs the command."""
    url = _take_url(chosen.words, command)
    options = {} if chosen.prefix is None else {"prefix": chosen.prefix}
    if command == "check":
        options["connect_timeout"] = chosen.timeout
    backend = backends.from_url(url, **options)
    if backend is None:
        raise ConfigurationError(
            "memory:// does not reach other processes: give the URL of a broker"
        )
    name = check_name(chosen.name)
    words: list[str] = chosen.words
    if command != "check" and not words:
        parser.error("a CHANNEL is missing")
    if command == "subscribe":
        return subscribe.subscribe(backend, name, words, sys.stdout)
    most = 0 if command == "check" else 1 if chosen.file else 2
    if len(words) > most:
        parser.error(f"too many arguments: {' '.join(map(escape, words[most:]))}")
    if command == "check":
        tls = url.startswith(("rediss://", "valkeys://", "tls://"))
        return check.check(backend, name, tls, chosen.timeout, say)
    message, encoding = publish.read_message(chosen, words[1] if len(words) > 1 else "-")
    return publish.publish(backend, name, words[0], message, encoding, chosen.quiet)


def _take_url(words: list[str], command: str) -> str:
    """Remove the URL from the words and return it, or return the one in the environment."""
    url = words.pop(0) if words and "://" in words[0] else ""
    # Channels are printed, and a URL among them may contain a password. A message may be anything.
    if any(map(_LIKE_A_URL.match, words[:1] if command == "publish" else words)):
        raise ConfigurationError(
            "a CHANNEL looks like a URL, which comes first: redis://user:password@host:6379"
        )
    if url := (url or os.environ.get("STARCAST_URL", "")).strip():
        return url
    raise ConfigurationError(
        "which broker? Set the environment variable STARCAST_URL, as in "
        "STARCAST_URL=redis://localhost, or give the URL first"
    )
