"""Relay: publishes what one client sends, and tells a hook what could not be published."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import WebSocketException
from starlette.websockets import WebSocket

from . import codec, pressure
from .answers import Answered
from .broker.sender import OnLost
from .close_codes import INTERNAL_ERROR, INVALID_DATA
from .codec import Channel, Encoding
from .event import Event
from .exceptions import (
    BackendUnavailable,
    EncodingError,
    InvalidMessage,
    PayloadTooLarge,
    PublishQueueFull,
)
from .hub import Hub

logger = logging.getLogger("starcast")

# Messages of one client that may be handed over before its next one waits for them.
MAX_UNCONFIRMED = 256

# The same in bytes: 256 clients that all send as much as they can just fill what may wait for a
# loop (`Tuning.max_pending`).
MAX_UNCONFIRMED_COST = 64 * 1024

PublishError = BackendUnavailable | PublishQueueFull
OnPublishError = Callable[[WebSocket, Any, PublishError], Awaitable[object] | object]


def close_sender(websocket: WebSocket, data: Any, exc: PublishError) -> None:
    """Close the client with 1013, so that it does not believe that the message was published."""
    raise exc


class Relay:
    """See the module. Made on the client's event loop, each time that the client is served.

    Args:
        on_error: The hook. What it raises closes the client as if its handler had raised it.
    """

    __slots__ = (
        "_ended",
        "_loop",
        "_lost",
        "_on_error",
        "_telling",
        "_unconfirmed",
        "_unconfirmed_cost",
        "hub",
        "max_unchecked",
        "shard",
        "websocket",
    )

    def __init__(self, hub: Hub, websocket: WebSocket, on_error: OnPublishError) -> None:
        self.hub = hub
        self.websocket = websocket
        self._on_error = on_error
        self._loop = asyncio.get_running_loop()
        self.shard = hub.registry.here()
        self.max_unchecked = pressure.max_unchecked(hub)
        self._unconfirmed = 0  # messages that were handed over since one of them was waited for,
        self._unconfirmed_cost = 0  # and what they cost
        # What was lost after `publish` had returned. While some of it is here, `publish` waits, so
        # this is at most what a client may have unconfirmed.
        self._lost: list[tuple[Any, PublishError]] = []
        self._telling: asyncio.Task[None] | None = None
        self._ended = False

    def event(self, channel: Channel, data: Any, encoding: Encoding | None) -> Event:
        """Return what is published for a message of the client.

        Raises:
            InvalidMessage: It can be read and not be sent on.
        """
        try:
            return self.hub.event(codec.check_channel(channel), data, None, encoding)
        except EncodingError as exc:
            # It could be read and cannot be written: a number too large for `dumps=`, say.
            raise InvalidMessage(INVALID_DATA, "cannot be sent on") from exc

    async def publish(self, channel: Channel, data: Any, encoding: Encoding | None) -> None:
        """Publish a message of the client, as soon as the channel's members can take it.

        It does not wait for that to be confirmed unless too much is unconfirmed.

        Raises:
            InvalidMessage: It can be read and not be sent on, or is too large for the broker.
            Exception: Whatever the hook raises.
        """
        hub = self.hub
        event = self.event(channel, data, encoding)
        # A hook that publishes the message again runs in that very task.
        if self._telling is not None and self._telling is not asyncio.current_task():
            await asyncio.wait([self._telling])
        try:
            if not hub.lifecycle.running:
                await hub.lifecycle.reopen()
            if self._is_crowded(event):
                await pressure.wait(hub, self.shard, event)
            connection = hub.find(self.websocket)
            if connection is not None and connection.is_closed:
                return  # while the message waited
            if connection is None or self._must_wait(event):
                await hub.dispatcher.publish_and_wait(event)
            else:
                await hub.dispatcher.publish_soon(event, self._on_lost(data))
        except PayloadTooLarge as exc:
            raise InvalidMessage(exc.code, exc.reason) from None
        except (PublishQueueFull, BackendUnavailable) as exc:
            if hub.lost_limit.allows("lost"):
                logger.error("messages of clients are being lost: %s", exc)
            await self._tell(data, exc)

    async def publish_and_wait(self, event: Event) -> None:
        """Publish an event as soon as the channel's members can take it, and wait until it is.

        Raises:
            BackendUnavailable, PayloadTooLarge, PublishQueueFull: See `Broadcast.publish`.
        """
        await self.hub.lifecycle.reopen()
        if self._is_crowded(event):
            await pressure.wait(self.hub, self.shard, event)
        await self.hub.dispatcher.publish_and_wait(event)

    def _is_crowded(self, event: Event) -> bool:
        """Whether so much is on its way that the event may have to wait."""
        shard = self.shard
        return (
            shard.queue.size + event.cost > self.max_unchecked
            or bool((others := shard.may_be_behind(event.channel)) and pressure.is_behind(others))
            or pressure.is_broker_busy(self.hub, event)
        )

    def _on_lost(self, data: Any) -> OnLost | None:
        return None if self.hub.link.is_local else functools.partial(self._lost_later, data)

    def _must_wait(self, event: Event) -> bool:
        """Count a message; whether the client has sent so much that it has to wait."""
        self._unconfirmed += 1
        self._unconfirmed_cost += event.cost
        if self._unconfirmed < MAX_UNCONFIRMED and self._unconfirmed_cost < MAX_UNCONFIRMED_COST:
            return False
        self._unconfirmed = self._unconfirmed_cost = 0
        return True

    def _lost_later(self, data: Any, why: str) -> None:
        """Take note of a message that was handed over and then lost. From any thread."""
        with contextlib.suppress(RuntimeError):  # the client's loop is closed, and so is the client
            self._loop.call_soon_threadsafe(self._add_lost, data, BackendUnavailable(why))

    def _add_lost(self, data: Any, exc: PublishError) -> None:
        if self._ended:
            return
        self._lost.append((data, exc))
        if self._telling is None:
            self._telling = self._loop.create_task(self._tell_lost())

    async def _tell_lost(self) -> None:
        try:
            while self._lost:
                await self._tell(*self._lost.pop(0))
        except (WebSocketException, Answered) as exc:
            await self.hub.close_client(self.websocket, exc.code, exc.reason)
        except Exception as exc:
            if self.hub.means_client_left(exc, self.websocket):
                return  # the hook has sent something to its client, which has left meanwhile
            logger.exception("on_publish_error raised")
            await self.hub.close_client(self.websocket, INTERNAL_ERROR, "")
        finally:
            self._lost.clear()  # of a client that is closed now, if anything is left
            self._telling = None

    async def _tell(self, data: Any, exc: PublishError) -> None:
        answer = self._on_error(self.websocket, data, exc)
        if inspect.isawaitable(answer):
            await answer

    async def end(self) -> None:
        """Let the hook finish with what was lost until now, for 10 seconds at most."""
        self._ended = True
        if self._telling is not None:
            telling = self._telling
            try:
                await asyncio.wait([telling], timeout=self.hub.settings.tuning.close_timeout)
            finally:
                telling.cancel()
