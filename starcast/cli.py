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
import statistics
import sys
import time
import uuid
from collections.abc import Sequence
from typing import TextIO

from . import __version__
from .broadcast import Broadcast
from .event import Event
from .exceptions import (
    BackendUnavailable,
    ConfigurationError,
    InvalidChannel,
    PayloadTooLarge,
    SubscriberLagged,
)
from .gap import Gap
from .logs import escape
from .naming import DEFAULT_NAME
from .subscriber import GapSubscriber

ROUND_TRIPS = 20

EPILOG = """\
examples:
  starcast publish redis://localhost room 'the kettle is on'
  date | starcast publish redis://localhost room
  starcast subscribe redis://localhost room another
  starcast publish --name staff redis://localhost room 'for the hub with name="staff"'

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="starcast",
        description="Talk to a broker as starcast does.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    publish = commands.add_parser("publish", help="publish a message")
    subscribe = commands.add_parser(
        "subscribe", help="print messages: for people on a terminal, else a JSON object a line"
    )
    check = commands.add_parser("check", help="connect and time some round trips")
    for command in (publish, subscribe, check):
        command.add_argument("url", metavar="URL", help="of the broker: redis://localhost, say")
        command.add_argument(
            "--name",
            default=DEFAULT_NAME,
            help="of the hub, as in Broadcast(url, name=...); default: %(default)s",
        )
    publish.add_argument("channel", metavar="CHANNEL")
    publish.add_argument(
        "message",
        metavar="MESSAGE",
        nargs="?",
        default="-",
        help="standard input if it is - or missing",
    )
    subscribe.add_argument("channels", metavar="CHANNEL", nargs="+")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. `arguments` are those of the command line."""
    chosen = _parser().parse_args(arguments)
    log: logging.Handler = logging.NullHandler()  # the output says it all
    if chosen.command == "subscribe" and sys.stderr.isatty():
        log = logging.StreamHandler()  # which says when the broker is away
        log.setFormatter(logging.Formatter("starcast: %(message)s"))
    logging.getLogger("starcast").addHandler(log)
    try:
        if chosen.command == "publish":
            work = _publish(_hub(chosen), chosen.channel, _content(chosen.message))
        elif chosen.command == "subscribe":
            work = _subscribe(_hub(chosen), chosen.channels, sys.stdout)
        else:
            work = _check(_hub(chosen))
        asyncio.run(work)
    except (ConfigurationError, InvalidChannel, PayloadTooLarge) as exc:
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


def _hub(chosen: argparse.Namespace) -> Broadcast:
    if chosen.url.startswith("memory://"):
        raise ConfigurationError("memory:// is one process alone: there is nobody to talk to")
    # A person, or a cron job, learns at once what is wrong, and can try again.
    return Broadcast(chosen.url, name=chosen.name, open_timeout=0)


def _content(message: str) -> str | bytes:
    if message == "-" and sys.stdin.isatty():
        print("starcast: reading the message from standard input", file=sys.stderr)
    content = sys.stdin.buffer.read() if message == "-" else os.fsencode(message)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return content
    return text.removesuffix("\n").removesuffix("\r") if message == "-" else text


async def _publish(hub: Broadcast, channel: str, message: str | bytes) -> None:
    async with hub:
        await hub.publish(channel, message)


async def _subscribe(hub: Broadcast, channels: list[str], out: TextIO) -> None:
    show = _for_people if out.isatty() else _for_programs

    async def follow(subscriber: GapSubscriber) -> None:
        async for item in subscriber:
            print(show(subscriber.channel, item), file=out, flush=True)

    async with hub, contextlib.AsyncExitStack() as stack:
        subscribers = [
            await stack.enter_async_context(hub.subscribe(channel, gaps=True))
            for channel in channels
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


async def _check(hub: Broadcast) -> None:
    began = time.perf_counter()
    async with hub:
        print(f"connected in {1000 * (time.perf_counter() - began):.1f} ms")
        channel = f"starcast-check-{uuid.uuid4().hex}"
        took = []
        async with hub.subscribe(channel) as subscriber:
            for number in range(ROUND_TRIPS):
                began = time.perf_counter()
                await hub.publish(channel, str(number))
                try:
                    async with asyncio.timeout(2):
                        await anext(subscriber)
                except TimeoutError:
                    raise BackendUnavailable("a message did not come back within 2 s") from None
                took.append(1000 * (time.perf_counter() - began))
        print(
            f"{ROUND_TRIPS} round trips: median {statistics.median(took):.2f} ms, "
            f"slowest {max(took):.2f} ms"
        )
