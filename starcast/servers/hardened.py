"""uvicorn's default WebSocket protocol, hardened against clients that misbehave.

No client can harm another, whatever it sends and however it leaves. uvicorn by itself waits
indefinitely for a client that has left without reading everything, and a shutdown while certain
clients are leaving crashes the whole server. For what they send, see `reading`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.utils import ClientDisconnected
from websockets.frames import Frame

from .. import logs
from ..close_codes import ABNORMAL, NO_STATUS
from . import served
from .reading import ReadingProtocol

if TYPE_CHECKING:
    from uvicorn._types import ASGISendEvent

logger = logging.getLogger("starcast")


class HardenedProtocol(ReadingProtocol):
    """See the module.

    However a connection ends, its socket is closed `close_timeout` seconds later at the latest,
    and what the client has not read by then is dropped.
    """

    # These are class attributes, so that an object of uvicorn's class can become one of this class.
    _deadline: asyncio.TimerHandle | None = None
    _unsent = 0  # bytes that were unsent when the last ping was sent

    async def run_asgi(self) -> None:
        try:
            await super().run_asgi()
        finally:
            self._abort_later()

    def take_over(self) -> None:
        """Take over a connection in progress, whose object was of uvicorn's class until now.

        The transport and the event loop's timers may hold bound methods of that class.
        """
        self._is_paused = vars(self).pop("read_paused")
        self.transport.set_protocol(self)
        now = self.loop.time  # uvloop has no timer, which would tell its time, for what is due now
        if self.ping_timer is not None:
            self.ping_timer.cancel()
            when = getattr(self.ping_timer, "when", now)
            self.ping_timer = self.loop.call_at(when(), self.send_keepalive_ping)
        if self.pong_timer is not None:
            self.pong_timer.cancel()
            when = getattr(self.pong_timer, "when", now)
            self.pong_timer = self.loop.call_at(when(), self.keepalive_timeout)
        task = served.task_of(self)
        if task is not None:
            task.add_done_callback(self._on_app_ended)

    def _on_app_ended(self, task: asyncio.Task[Any]) -> None:
        self._abort_later()

    # What is sent

    async def send(self, message: ASGISendEvent) -> None:
        closes = message["type"] == "websocket.close"
        if not closes and not self.handshake_complete and self.transport.is_closing():
            raise ClientDisconnected  # uvicorn would accept it silently, and then refuse messages
        await super().send(message)
        if self.close_sent:
            self._abort_later()

    def send_500_response(self) -> None:
        if not self.conn.eof_sent:  # nothing may follow the end of a failed handshake
            super().send_500_response()

    # How it ends

    def handle_close(self, event: Frame) -> None:
        if self.close_sent:  # the client's answer
            self._close_transport()
        else:
            super().handle_close(event)
        self._abort_later()

    def eof_received(self) -> None:
        """Treat a client that will send nothing more as one that has left."""
        self._has_eof = True
        self.stop_keepalive()
        code = NO_STATUS if self.handshake_complete else ABNORMAL
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code})
        self._abort_later()

    def handle_parser_exception(self) -> None:
        if self._has_ended:
            return  # it was read before the connection ended, and nobody is there to be told
        closed = self.conn.close_sent
        if closed is None:  # before the handshake is over, no close frame can be sent
            self.queue.put_nowait({"type": "websocket.disconnect", "code": ABNORMAL})
            self._close_transport()
        else:
            host, port = self.client or ("?", 0)
            logger.warning(
                "closed the client %s:%d with %d: %s",
                logs.escape(host),
                port,
                closed.code,
                logs.escape(closed.reason),
            )
            super().handle_parser_exception()
        self._abort_later()

    def send_keepalive_ping(self) -> None:
        super().send_keepalive_ping()
        self._unsent, self._heard = self.transport.get_write_buffer_size(), False

    def keepalive_timeout(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        slowly_reads = self._pongs_wait and unsent < self._unsent
        is_alive = self._heard or self._is_paused or slowly_reads
        if is_alive and self.ping_timeout is not None:
            # The pong may be queued behind data that is not read yet, because the channel or the
            # app cannot keep up, or because the client reads its own pongs slowly.
            self._unsent, self._heard = unsent, False
            self.pong_timer = self.loop.call_later(self.ping_timeout, self.keepalive_timeout)
            return
        super().keepalive_timeout()
        if unsent:
            self.abort()  # the client will not read it
        self._abort_later()

    def shutdown(self) -> None:
        if self.conn.close_sent is not None or self.close_sent or self.transport.is_closing():
            # To some of these, uvicorn would send a second close frame, an error that ends the
            # whole server.
            self.stop_keepalive()
            self._close_transport()
        else:
            super().shutdown()
        self._abort_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def abort(self) -> None:
        """Drop the connection at once, together with what is still unsent."""
        if not self.disconnected:  # asyncio's transport raises AttributeError once it is closed
            self.transport.abort()

    def _abort_later(self) -> None:
        """Drop the connection after `close_timeout` if the client does not read the rest."""
        if self.disconnected:
            return
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.close_timeout, self.abort)
        if self.close_timer is not self._deadline:
            if self.close_timer is not None:
                self.close_timer.cancel()
            # While it has a timer, uvicorn does not close the transport again when the app ends.
            self.close_timer = self._deadline
