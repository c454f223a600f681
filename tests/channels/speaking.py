"""A client that speaks the protocol in JSON, and a server for one endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import websockets
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from starcast import Broadcast, ChannelsEndpoint, Client, Subscription
from support import DEADLINE, Served


class Talker:
    """Sends commands and keeps what comes, each in its order."""

    def __init__(self, socket: websockets.ClientConnection) -> None:
        self.socket = socket
        self.frames: list[str] = []
        self.waiting: list[dict[str, Any]] = []
        self._id = 0

    async def raw(self, frame: str | bytes) -> None:
        await self.socket.send(frame)

    async def send(self, *commands: dict[str, Any]) -> None:
        await self.raw("\n".join(map(json.dumps, commands)))

    async def next(self) -> dict[str, Any]:
        """Return the next reply or push."""
        while not self.waiting:
            frame = await asyncio.wait_for(self.socket.recv(), DEADLINE)
            assert isinstance(frame, str)
            self.frames.append(frame)
            self.waiting += [json.loads(line) for line in frame.split("\n")]
        return self.waiting.pop(0)

    async def push(self) -> dict[str, Any]:
        """Return the next push, past pings."""
        while "push" not in (reply := await self.next()):
            assert reply == {}, reply
        push: dict[str, Any] = reply["push"]
        return push

    async def ask(self, method: str, /, **params: Any) -> dict[str, Any]:
        """Send a command, and return its reply without its id. Pushes before it are dropped."""
        self._id += 1
        await self.send({"id": self._id, method: params})
        while (reply := await self.next()).get("id") != self._id:
            assert reply == {} or "push" in reply, reply
        del reply["id"]
        return reply

    async def get(self, method: str, /, **params: Any) -> Any:
        """Return the result of a command, which succeeds."""
        reply = await self.ask(method, **params)
        assert list(reply) == [method], reply
        return reply[method]

    async def error(self, method: str, /, **params: Any) -> int:
        """Return the code of a command's error."""
        reply = await self.ask(method, **params)
        assert list(reply) == ["error"], reply
        return int(reply["error"]["code"])

    async def closed(self) -> tuple[int, str]:
        """Return the code with which the server closes it."""
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                await asyncio.wait_for(self.socket.recv(), DEADLINE)
        assert self.socket.close_code is not None
        return self.socket.close_code, self.socket.close_reason or ""


class Open(ChannelsEndpoint):
    """Allows everything."""

    async def on_connect(self, websocket, token, data):
        return Client(user=token)

    async def on_subscribe(self, websocket, channel, token, data):
        return Subscription(history=True)

    async def on_publish(self, websocket, channel, data):
        return data


class Room:
    """A server for one endpoint."""

    def __init__(self, served: Served, hub: Broadcast) -> None:
        self.served = served
        self.hub = hub

    @contextlib.asynccontextmanager
    async def socket(self, **options: Any) -> AsyncIterator[Talker]:
        async with self.served.connect("/", **{"ping_interval": None, **options}) as socket:
            yield Talker(socket)

    @contextlib.asynccontextmanager
    async def talker(self, token: str = "", **params: Any) -> AsyncIterator[Talker]:
        """A client that is connected."""
        async with self.socket() as talker:
            await talker.get("connect", token=token, **params)
            yield talker


@contextlib.asynccontextmanager
async def narrow(room: Room) -> AsyncIterator[Talker]:
    """A client whose system takes little for it, so that the rest soon waits in the server."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (room.served.host, room.served.port))
    async with room.socket(sock=sock, compression=None) as talker:
        await talker.get("connect")
        yield talker


@contextlib.asynccontextmanager
async def serving(
    endpoint: type[ChannelsEndpoint] = Open, hub: Broadcast | None = None, **config: Any
) -> AsyncIterator[Room]:
    """A server on a socket for an endpoint, which may have a hub of its own."""
    chosen = hub or Broadcast()

    class Endpoint(endpoint):  # type: ignore[valid-type,misc]  # a class that is a variable
        broadcast = chosen

    app = Starlette(routes=[WebSocketRoute("/", Endpoint)], lifespan=chosen.lifespan)
    served = Served(app, **config)
    await served.start()
    try:
        yield Room(served, chosen)
    finally:
        await served.stop()
