"""Clients that others wrote: npm's `centrifuge` in Node, and PyPI's `centrifuge-python`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import centrifuge
import pytest

from support import DEADLINE, until

NODE = Path(__file__).parents[1] / "clients"

Event = dict[str, Any]


class Official(Protocol):
    """Clients of one library, each with a name. What they are told is in `events`, in order."""

    events: list[Event]

    async def do(self, action: str, client: str, **arguments: Any) -> Any:
        """Let a client do something, and return what comes of it, or raise `Failed`."""


class Failed(Exception):
    """A command of a client failed with this code."""


def told(official: Official, client: str, event: str, **having: Any) -> list[Event]:
    """Return the events of a client that have this."""
    return [
        it
        for it in official.events
        if it["client"] == client
        and it["event"] == event
        and all(it.get(name) == value for name, value in having.items())
    ]


async def tell(official: Official, client: str, event: str, **having: Any) -> Event:
    """Wait for such an event, and return the last one."""
    try:
        await until(lambda: told(official, client, event, **having))
    except AssertionError:
        mine = [it for it in official.events if it["client"] == client]
        raise AssertionError(f"no {event} {having} among {mine[-20:]}") from None
    return told(official, client, event, **having)[-1]


def data(official: Official, client: str, channel: str, server: bool = False) -> list[Any]:
    """Return what a client has got of a channel."""
    events = told(official, client, "publication", channel=channel, server=server)
    return [it["data"] for it in events]


class Node:
    """A process of Node with any number of clients."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.events: list[Event] = []
        self._process = process
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            it = json.loads(line)
            if "answer" not in it:
                self.events.append(it)
            elif "error" in it:
                self._answers.pop(it["answer"]).set_exception(Failed(it["error"]))
            else:
                self._answers.pop(it["answer"]).set_result(it["result"])

    async def do(self, action: str, client: str, **arguments: Any) -> Any:
        """See `Official`."""
        assert self._process.stdin is not None
        id = len(self.events) * 1000 + len(self._answers)
        while id in self._answers:
            id += 1
        answer = self._answers[id] = asyncio.get_running_loop().create_future()
        command = {"id": id, "do": action, "client": client, **arguments}
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        return await asyncio.wait_for(answer, DEADLINE)

    async def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._reading


def read(data: Any) -> Any:
    """Return data of the Python library's: in Protobuf, it is bytes that hold JSON."""
    return (json.loads(data) if data else None) if isinstance(data, bytes) else data


class PythonClient:
    """One client of `centrifuge-python`, and its subscriptions."""

    def __init__(self, owner: Python, name: str, url: str, options: dict[str, Any]) -> None:
        self.owner = owner
        self.name = name
        tokens = options.get("tokens")

        async def get_token(*context: Any) -> str:
            return tokens.pop(0) if tokens else ""

        self.library = centrifuge.Client(
            url,
            events=self,
            token=options.get("token", ""),
            get_token=get_token if tokens else None,
            use_protobuf=options.get("protocol") == "protobuf",
            min_reconnect_delay=0.02,
            max_reconnect_delay=0.2,
        )
        self.subscriptions: dict[str, Any] = {}
        self.is_binary = options.get("protocol") == "protobuf"

    def written(self, arguments: dict[str, Any]) -> Any:
        """Return what the library takes for data: in Protobuf, bytes that hold JSON."""
        return json.dumps(arguments.get("data")).encode() if self.is_binary else arguments["data"]

    def __getattr__(self, name: str) -> Any:
        """Return what the library calls with an event."""
        if not name.startswith("on_"):
            raise AttributeError(name)
        event = name.removeprefix("on_")
        server = event in ("subscribing", "subscribed", "unsubscribed", "publication")
        server = server or event in ("join", "leave")

        async def on_event(context: Any) -> None:
            self.tell(event, context, server)

        return on_event

    def tell(self, event: str, context: Any, server: bool = False, channel: str = "") -> None:
        publication = getattr(context, "pub", None)
        info = getattr(context, "info", None) or getattr(publication, "info", None)
        self.owner.events.append(
            {
                "client": self.name,
                "event": event,
                "server": server,
                "channel": channel or getattr(context, "channel", None),
                "code": getattr(context, "code", None),
                "data": read(getattr(publication or context, "data", None)),
                "offset": getattr(publication, "offset", None),
                "recovered": getattr(context, "recovered", None),
                "wasRecovering": getattr(context, "was_recovering", None),
                "user": getattr(info, "user", None),
            }
        )

    def subscription(self, channel: str, options: dict[str, Any]) -> Any:
        if channel not in self.subscriptions:
            tokens = options.get("tokens")

            async def get_token(*context: Any) -> str:
                return tokens.pop(0) if tokens else ""

            self.subscriptions[channel] = self.library.new_subscription(
                channel,
                events=_Events(self, channel),
                get_token=get_token if tokens else None,
                join_leave=True,
                min_resubscribe_delay=0.02,
                max_resubscribe_delay=0.2,
            )
        return self.subscriptions[channel]


class _Events:
    def __init__(self, client: PythonClient, channel: str) -> None:
        self._client = client
        self._channel = channel

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)

        async def on_event(context: Any) -> None:
            self._client.tell(name.removeprefix("on_"), context, channel=self._channel)

        return on_event


class Python:
    """Any number of clients of `centrifuge-python`."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._clients: dict[str, PythonClient] = {}

    async def do(self, action: str, client: str, **arguments: Any) -> Any:
        """See `Official`."""
        try:
            return await asyncio.wait_for(self._do(action, client, arguments), DEADLINE)
        except centrifuge.ReplyError as exc:
            raise Failed(exc.code) from None

    async def _do(self, action: str, name: str, arguments: dict[str, Any]) -> Any:
        if action == "open":
            client = PythonClient(self, name, arguments.pop("url"), arguments)
            self._clients[name] = client
            return await client.library.connect()
        client = self._clients[name]
        if action in ("close", "reopen"):
            return await getattr(client.library, {"close": "disconnect"}.get(action, "connect"))()
        if action == "rpc":
            result = await client.library.rpc(arguments["method"], client.written(arguments))
            return read(result.data)
        channel = arguments.pop("channel")
        if action == "publish":
            await client.library.publish(channel, client.written(arguments))
            return None
        subscription = client.subscription(channel, arguments)
        if action in ("subscribe", "unsubscribe"):
            return await getattr(subscription, action)()
        if action == "history":
            past = await subscription.history(limit=arguments["limit"])
            return {"offset": past.offset, "data": [read(it.data) for it in past.publications]}
        if action == "presence":
            found = await subscription.presence()
            return [[info.user, read(info.conn_info)] for info in found.clients.values()]
        assert action == "counts"
        counts = await subscription.presence_stats()
        return [counts.num_clients, counts.num_users]

    async def end(self) -> None:
        for client in self._clients.values():
            await client.library.disconnect()


@contextlib.asynccontextmanager
async def clients_of(library: str) -> AsyncIterator[Official]:
    """Clients of `node` or `python`."""
    if library == "python":
        official = Python()
    else:
        if not (shutil.which("node") and (NODE / "node_modules").exists()):
            assert not os.environ.get("CI_REQUIRE_CLIENTS"), "run `npm ci` in tests/clients"
            pytest.skip("needs Node, and `npm ci` in tests/clients")
        official = Node(
            await asyncio.create_subprocess_exec(
                *("node", "driver.mjs"),
                cwd=NODE,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=16 * 1024 * 1024,
            )
        )
    try:
        yield official
    finally:
        await official.end()
