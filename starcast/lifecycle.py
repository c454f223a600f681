"""Lifecycle: opens a hub, by hand, with its app or at first use, and closes it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator, Callable

from .answers import Answered
from .broker.claims import Claim
from .broker.link import Link
from .broker.local import LocalLink
from .close_codes import GOING_AWAY
from .connection import Connection
from .dispatcher import Dispatcher, State
from .outbox import Close
from .registry import Registry
from .sync.waiter import Lock


def _again(exc: Exception) -> Exception:
    """Return an error that another caller may raise. An `Answered` one keeps state, so copy it."""
    return copy.copy(exc) if isinstance(exc, Answered) else exc.with_traceback(None)


class Lifecycle:
    """See the module. Made on any thread; the methods may be called on any event loop.

    Args:
        dispatcher: Has the hub's state.
        registry: The clients, which are closed with the hub.
        link: The connection to the broker.
        claim: Claims the hub's name while it is open.
        open_timeout: How long to try to connect, in seconds.

    Attributes:
        switching: Held while the connection to the broker starts or stops.
        closings: How often the hub was closed.
        before_close: Called before it is closed, while messages can still be published.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        registry: Registry,
        link: Link | LocalLink,
        claim: Claim,
        open_timeout: float,
    ) -> None:
        self.switching = Lock()
        self.closings = 0
        self._dispatcher = dispatcher
        self._registry = registry
        self._link = link
        self._claim = claim
        self._open_timeout = open_timeout
        self._failures = 0
        self._failure: Exception | None = None  # why it did not start last
        self.before_close: Callable[[], None] | None = None

    @property
    def open(self) -> bool:
        return self._dispatcher.state is State.OPEN

    @property
    def running(self) -> bool:
        """Whether it is open, and its connection to the broker is supervised."""
        return self.open and self._link.alive

    async def ensure_open(self, patient: bool = False) -> None:
        """Open it, unless it is open.

        It waits for the broker for `open_timeout`. After a failed attempt it only does so if
        `patient`: not every client needs to wait as long as the first one did.
        """
        if self.running:
            return
        self._dispatcher.check_fork()
        failures = self._failures
        async with self.switching:
            if self.running:
                return
            if self._failure is not None and self._failures > failures:
                raise _again(self._failure)  # of the attempt that this call waited for
            try:
                seconds = self._open_timeout if patient or self._failure is None else 0.0
                with self._claim.held():
                    await self._link.start(seconds)
            except Exception as exc:
                self._failures += 1
                self._failure = exc
                raise
            self._dispatcher.open_here()
            self._failure = None

    async def ready(self) -> None:
        """Open it, and wait for a connection that this loop has just taken over."""
        await self.ensure_open(patient=True)
        await self._link.ready()

    async def reopen(self) -> None:
        """Open it at first use, but not again after it was closed."""
        if not self.running and self._dispatcher.state in (State.NEW, State.OPEN):
            await self.ensure_open()

    async def close(self) -> None:
        """Close all clients and the connection to the broker, within 11 seconds at most."""
        if self._dispatcher.state is State.INHERITED:
            return  # the parent closes it
        connections: list[Connection] = []
        self._link.stop_opening()
        try:
            async with self.switching:
                if self.before_close is not None and self.open:
                    self.before_close()
                self._dispatcher.state = State.CLOSED
                self.closings += 1
                connections = self._registry.close_all(Close(GOING_AWAY, "going away"))
                try:
                    await self._link.stop()
                finally:
                    self._claim.release()
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._registry.tuning.close_timeout + 1):
                    for connection in connections:
                        await connection.wait_ended()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """Open it for as long as an app runs."""
        await self.ready()
        try:
            yield
        finally:
            await self.close()
