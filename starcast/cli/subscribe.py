"""`starcast subscribe`: prints messages as text on a terminal, and as lines of JSON elsewhere."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sys
import time
from typing import TextIO, cast

from ..backends import Backend
from ..event import Event, Gap
from ..exceptions import SubscriberLagged
from ..logs import escape
from ..subscriber import GapSubscriber
from .common import open_hub, say
from .patterns import ALL, AllChannels, reader


async def subscribe(backend: Backend, name: str, channels: list[str], out: TextIO) -> None:
    """Print the messages and the gaps of the channels until the hub is closed."""
    channels = list(dict.fromkeys(channels))
    wanted, read = channels, None
    if any("*" in channel for channel in channels):
        backend = cast(Backend, AllChannels(backend))
        wanted, read = [ALL], reader(channels)
    show = format_text if out.isatty() else format_json

    async def follow(subscriber: GapSubscriber) -> None:
        async for item in subscriber:
            for channel, one in [(subscriber.channel, item)] if read is None else read(item):
                say(show(channel, one), out)

    async with open_hub(backend, name) as hub, contextlib.AsyncExitStack() as stack:
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


def format_json(channel: str, item: Event | Gap) -> str:
    line: dict[str, object] = {"channel": channel}
    if isinstance(item, Gap):
        line["gap"] = {"since": item.since, "seconds": item.seconds}
    elif isinstance(item.message, str):
        line["text"] = item.message
    else:
        line["base64"] = base64.b64encode(item.message).decode()
    return json.dumps(line)


def format_text(channel: str, item: Event | Gap) -> str:
    start = f"{time.strftime('%H:%M:%S')} {escape(channel)}"
    if isinstance(item, Gap):
        return f"{start} -- messages of the last {item.seconds:.1f} s may be missing"
    message = item.message if isinstance(item.message, str) else repr(item.message)
    return f"{start}: {escape(message)}"
