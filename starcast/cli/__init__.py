"""The command `starcast`: publish, subscribe and check, from a terminal or a cron job.

A URL is never repeated, because it may hold a password. The exit codes are in `EPILOG`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__, backends
from ..backends import Backend
from ..broker.naming import DEFAULT_NAME, check_name
from ..exceptions import (
    BackendUnavailable,
    ConfigurationError,
    EncodingError,
    InvalidChannel,
    PayloadTooLarge,
    SubscriberLagged,
)
from ..logs import escape
from . import check, publish, subscribe
from .common import say

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

    publishing = add(
        "publish",
        " CHANNEL [MESSAGE]",
        "publish a message",
        "Publish MESSAGE to CHANNEL; standard input if it is - or missing. It is text "
        "if it is UTF-8, without the line break at the end of what was read, and else binary.",
    )
    form = publishing.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="refuse what is not JSON")
    form.add_argument("--binary", action="store_true", help="a binary message, byte for byte")
    publishing.add_argument("--file", metavar="PATH", help="read the message from this file")
    publishing.add_argument("-q", "--quiet", action="store_true", help="do not say what was done")
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
            channel, *given = _count(chosen, parser, 1, 1 if chosen.file else 2)
            message, encoding = publish.read_message(chosen, given[0] if given else "-")
            work = publish.publish(backend, name, channel, message, encoding, chosen.quiet)
        elif command == "subscribe":
            channels = _count(chosen, parser, 1, len(chosen.words))
            work = subscribe.subscribe(backend, name, channels, sys.stdout)
        else:
            _count(chosen, parser, 0, 0)
            tls = url.startswith(("rediss://", "valkeys://", "tls://"))
            work = check.check(backend, name, tls, say)
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


def _count(
    chosen: argparse.Namespace, parser: argparse.ArgumentParser, least: int, most: int
) -> list[str]:
    words: list[str] = chosen.words
    if len(words) < least:
        parser.error("a CHANNEL is missing")
    if len(words) > max(least, most):
        parser.error(f"too many arguments: {' '.join(map(escape, words[most:]))}")
    return words
