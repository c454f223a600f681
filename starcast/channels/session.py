"""Session: one connection that speaks the client protocol, from its first command to its end.

It is NEW until its `connect` command was answered, then CONNECTED, and in the end CLOSED. Commands
are handled one after another, in the order in which they came, but for calls of methods (`rpc`),
which may take long and of which several run at the same time.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from starlette.exceptions import WebSocketException
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from .. import serving
from ..connection import Connection
from ..exceptions import (
    BackendUnavailable,
    CommandError,
    DisconnectClient,
    EncodingError,
    InvalidChannel,
    PayloadTooLarge,
    PublishQueueFull,
    StarcastError,
)
from ..history import Wish
from ..hub import Hub
from ..internal import LOCAL
from ..outbox import Item, Replay
from ..people import Identity
from ..relay import Relay, close_sender
from . import codes
from .clock import Clock, remaining, ttl
from .codes import Code
from .formats import Format, Malformed, Raw, raw, text
from .hooks import Hooks
from .model import Client, Limits
from .subscriptions import CHANNEL_COMMANDS, Subscriptions

logger = logging.getLogger("starcast")

# Commands of one message after which other tasks have a turn, if none of them had to wait.
COMMANDS_AT_ONCE = 64

# What every connection is a member of, so that it is one of the hub's clients without a channel.
EVERYBODY = LOCAL + "protocol"

# Characters of what a client sends that go into the log or into an error.
SHOWN = 100


class Session:
    """See the module. It belongs to the event loop of its websocket.

    Attributes:
        id: The name of the connection, which others see.
        client: Who it is; None until it is connected.
        members: What the hub has of it, in a tuple. It is always the same tuple, so that a shard
            writes what it sends in one turn as one frame.
    """

    def __init__(
        self, hub: Hub, websocket: WebSocket, hooks: Hooks, limits: Limits, writer: Format
    ) -> None:
        self.hub = hub
        self.websocket = websocket
        self.hooks = hooks
        self.limits = limits
        self.writer = writer
        self.id = str(uuid.uuid4())
        self.client: Client | None = None
        self.relay = Relay(hub, websocket, close_sender)
        self.clock = Clock(limits)
        self.channels = Subscriptions(self)
        self.members: tuple[Connection, ...] = ()
        self._calls: set[asyncio.Task[None]] = set()
        self._busy = 0  # commands that are being handled
        self._heard = True  # something has come since the last ping

    async def accept(self, subprotocol: str | None) -> None:
        """Accept the client, which has to send its first command soon."""
        outbox = self.hub.settings.outbox(overflow="disconnect", form=self.writer.form)
        outbox.shed = self.channels.shed
        await self.hub.connect(self.websocket, EVERYBODY, outbox, subprotocol, None, Wish())
        connection = self.hub.find(self.websocket)
        assert connection is not None
        self.members = (connection,)
        self.clock.call("connect", self.limits.connect_timeout, self.disconnect, codes.STALE)

    # What comes in

    async def receive(self, message: Message) -> None:
        """Handle a message of the client's.

        Raises:
            DisconnectClient: The client has to be closed.
        """
        self._heard = True
        try:
            commands = self.writer.read(message)
        except Malformed as exc:
            raise DisconnectClient(codes.BAD_COMMAND.number, f"bad request: {exc}") from None
        self._busy += 1
        try:
            for number, command in enumerate(commands):
                if command:  # an empty one is a pong
                    await self._handle(command)
                if number % COMMANDS_AT_ONCE == COMMANDS_AT_ONCE - 1:
                    await asyncio.sleep(0)
        finally:
            self._busy -= 1
            self._heard = True

    async def _handle(self, command: dict[str, Any]) -> None:
        id = command.get("id", 0)
        method = next((name for name in command if name != "id"), "")
        params = command.get(method) or {}
        if type(id) is not int or not 0 <= id < 2**32 or not isinstance(params, dict):
            raise DisconnectClient(*codes.BAD_COMMAND[:2])
        if (method == "connect") is not (self.client is None):
            raise DisconnectClient(*codes.BAD_COMMAND[:2])
        if method == "send":
            raise DisconnectClient(*codes.SEND_NOT_AVAILABLE[:2])
        if not id:
            raise DisconnectClient(*codes.BAD_COMMAND[:2])
        if not self.clock.take():
            self.fail(id, codes.TOO_MANY_REQUESTS)
        elif method == "rpc":
            await self._begin_call(lambda: self._guard(id, self._rpc(id, params)))
        elif method in COMMANDS:
            await self._guard(id, COMMANDS[method](self, id, params))
        elif method in CHANNEL_COMMANDS:
            await self._guard(id, CHANNEL_COMMANDS[method](self.channels, id, params))
        else:
            self.fail(id, codes.METHOD_NOT_FOUND)

    async def _guard(self, id: int, handling: Coroutine[Any, Any, None]) -> None:
        """Handle a command, and answer with an error if that fails."""
        try:
            await handling
        except CommandError as exc:
            self.fail(id, Code(exc.code, exc.message, exc.temporary))
        except PermissionError:
            self.fail(id, codes.PERMISSION_DENIED)
        except (InvalidChannel, EncodingError) as exc:
            self.fail(id, Code(codes.BAD_REQUEST.number, str(exc)[:SHOWN]))
        except PayloadTooLarge:
            self.fail(id, codes.LIMIT_EXCEEDED)
        except (BackendUnavailable, PublishQueueFull) as exc:
            if self.hub.lost_limit.allows("protocol"):
                logger.warning("commands of clients fail: %s", exc)
            self.fail(id, codes.INTERNAL)
        except (DisconnectClient, WebSocketException, WebSocketDisconnect):
            raise
        except Exception:
            logger.exception("a hook of the channels endpoint raised")
            self.fail(id, codes.INTERNAL)

    async def _begin_call(self, call: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if len(self._calls) >= self.limits.max_calls:
            await asyncio.wait(self._calls, return_when=asyncio.FIRST_COMPLETED)
        self.spawn(call)

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do something for as long as the connection lasts."""

        async def run() -> None:
            try:
                await work()
            except DisconnectClient as exc:
                await self.hub.close_client(self.websocket, exc.code, exc.reason)
            except (StarcastError, WebSocketException, WebSocketDisconnect) as exc:
                # This is no task of the app's, whose handlers could answer the client.
                code = serving.code_for(self.hub, self.websocket, exc)
                await self.hub.close_client(self.websocket, code, getattr(exc, "reason", ""))

        task = asyncio.create_task(run())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    # What goes out

    def send(self, item: Item) -> None:
        """Send something, after everything that was sent or published before."""
        registry = self.hub.registry
        with self.hub.lock:
            is_here = self.members[0] in registry.connections
            wake = registry.queue(item, self.members) if is_here else []
        registry.wake(wake)

    def fail(self, id: int, code: Code) -> None:
        """Answer a command with an error."""
        error: dict[str, Any] = {"code": code.number, "message": code.reason}
        if code.temporary:
            error["temporary"] = True
        self.reply(id, "error", error)

    def reply(self, id: int, method: str, result: Mapping[str, Any]) -> None:
        """Answer a command."""
        self.send(self.writer.reply(id, method, result))

    def raw(self, data: Any) -> Raw:
        """Write data of the app's."""
        return raw(data, self.hub.settings.dumps)

    def info(self, channel_info: Any = None) -> dict[str, Any]:
        """Return who the client is, for others."""
        assert self.client is not None
        info: dict[str, Any] = {"user": self.client.user, "client": self.id}
        if self.client.info is not None:
            info["conn_info"] = self.raw(self.client.info)
        if channel_info is not None:
            info["chan_info"] = self.raw(channel_info)
        return info

    # Commands

    async def _connect(self, id: int, params: dict[str, Any]) -> None:
        token, data = text(params, "token"), params.get("data")
        client = await self.hooks.connect(self.websocket, token, data)
        if client.expires_at is not None and remaining(client.expires_at) <= 0:
            raise CommandError(*codes.TOKEN_EXPIRED)
        self.clock.cancel("connect")
        self.client = client
        identity = Identity(client.user or None, client.info, self.channels)
        outbox = self.hub.settings.outbox()  # it has one already
        await self.hub.connect(self.websocket, EVERYBODY, outbox, None, None, Wish(), identity)
        hold = Replay(asyncio.get_running_loop())  # what is published goes behind the reply
        self.send(hold)
        reply = None
        try:
            subs = await self.channels.begin(client.subscriptions, params.get("subs"))
            result: dict[str, Any] = {"client": self.id, "version": "starcast"}
            if client.expires_at is not None:
                result |= self.expire(client.expires_at)
            if client.data is not None:
                result["data"] = self.raw(client.data)
            if subs:
                result["subs"] = subs
            result |= {"ping": max(1, round(self.limits.ping_interval)), "pong": True}
            reply = self.writer.reply(id, "connect", result)
        except (BackendUnavailable, CommandError):
            raise DisconnectClient(*codes.SERVER_ERROR[:2]) from None
        finally:
            hold.begin([] if reply is None else [reply])
        self.clock.call("ping", self.limits.ping_interval, self._ping)

    async def _refresh(self, id: int, params: dict[str, Any]) -> None:
        expires_at = await self.hooks.refresh(self.websocket, text(params, "token"))
        if remaining(expires_at) <= 0:
            raise CommandError(*codes.TOKEN_EXPIRED)
        self.reply(id, "refresh", {"client": self.id, **self.expire(expires_at)})

    async def _rpc(self, id: int, params: dict[str, Any]) -> None:
        method = text(params, "method")
        result = await self.hooks.rpc(self.websocket, method, params.get("data"))
        self.reply(id, "rpc", {"data": self.raw(result)})

    async def _pong(self, id: int, params: dict[str, Any]) -> None:
        self.reply(id, "ping", {})

    # Timers

    def expire(self, expires_at: float) -> dict[str, Any]:
        """Close the client then, and return what it is told of it."""
        self.clock.call("expire", remaining(expires_at), self.disconnect, codes.EXPIRED)
        return {"expires": True, "ttl": ttl(expires_at)}

    def _ping(self) -> None:
        self._heard = False
        self.send(self.writer.ping)
        self.clock.call("pong", self.limits.pong_timeout, self._check_pong)
        self.clock.call("ping", self.limits.ping_interval, self._ping)

    def _check_pong(self) -> None:
        # While a command is handled, nothing is read.
        if not self._heard and not self._busy:
            self.disconnect(codes.NO_PONG)

    def disconnect(self, code: Code) -> None:
        """Close the client with a code of the protocol, after what it still has to get."""
        self.spawn(lambda: self.hub.close_client(self.websocket, code.number, code.reason))

    async def close(self, code: int) -> None:
        """Let go of everything, once the connection has ended."""
        self.clock.close()
        for task in self._calls:
            task.cancel()
        for connection in self.members:
            connection.outbox.shed = None  # which refers to the connection
        if self.client is not None:
            await self.hooks.disconnect(self.websocket, code)


COMMANDS = {
    "connect": Session._connect,
    "refresh": Session._refresh,
    "ping": Session._pong,
}
