"""A client of the demo: a tab, as the server sees it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from channels.speaking import Talker
from support import DEADLINE


class Tab(Talker):
    """A tab that is connected, and is in a room."""

    room: str
    welcome: dict[str, Any]  # what the server has said when it connected
    joined: dict[str, Any]  # and when it came into the room

    async def join(self, room: str, name: str, secret: str, since: dict[str, Any]) -> None:
        self.room = f"room:{room}"
        connected = await self.get("connect", token=secret, data={"name": name})
        assert list(connected["subs"]) == [f"ticker:{connected['data']['worker']}"]
        self.welcome = connected["data"]
        self.joined = await self.get("subscribe", channel=self.room, **since)

    async def say(self, text: str) -> None:
        """Say something; the reply to that is left among what comes."""
        self._id += 1
        await self.send({"id": self._id, "publish": {"channel": self.room, "data": text}})

    async def heard(self) -> dict[str, Any]:
        """Return the next publication of the room, past everything else."""
        while True:
            push = (await self.next()).get("push", {})
            if push.get("channel") == self.room and "pub" in push:
                content: dict[str, Any] = push["pub"]
                return content

    async def hears(self) -> str:
        text: str = (await self.heard())["data"]["text"]
        return text

    async def told(self) -> dict[str, Any]:
        """Return the next message to this process's clients."""
        while True:
            push = (await self.next()).get("push", {})
            if "message" in push:
                content: dict[str, Any] = push["message"]["data"]
                return content

    async def ticks(self) -> dict[str, Any]:
        """Return the next tick."""
        while True:
            push = (await self.next()).get("push", {})
            if push.get("channel", "").startswith("ticker:"):
                content: dict[str, Any] = push["pub"]["data"]
                return content

    async def names(self) -> list[str]:
        """Return the names of those who are here."""
        clients = (await self.get("presence", channel=self.room))["presence"].values()
        return sorted(client["conn_info"]["name"] for client in clients)

    async def sees(self, *names: str) -> None:
        """Wait until these are here."""
        async with asyncio.timeout(DEADLINE):
            while await self.names() != sorted(names):  # noqa: ASYNC110  # another machine's state
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def tab(
    server: Any, name: str = "Mira", room: str = "lobby", secret: str = "", **since: Any
) -> AsyncIterator[Tab]:
    """A tab of somebody, in a room; `secret` is what tells it from others of that name."""
    async with server.connect("/live", ping_interval=None) as socket:
        made = Tab(socket)
        await made.join(room, name, secret, since)
        yield made
