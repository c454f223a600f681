"""Publisher: publishing for code that has no event loop.

A `Publisher` has one thread per process, which runs an event loop and a hub without clients.
`publish` hands a message to that loop and waits. The thread starts with the first message, and a
forked process starts its own.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, Self

from . import codec
from .backends import Backend
from .broadcast import Broadcast
from .broker.opening import Backoff
from .codec import Channel, Dumps, Encoding
from .event import Event
from .exceptions import BackendUnavailable, ConfigurationError, StarcastError
from .history import History
from .stats import BackendStats
from .sync.waiter import running_loop

# Seconds that `publish` waits for the broker, and after which an idle connection is closed.
TIMEOUT = 5.0
IDLE = 60.0

# Seconds that `close` and the interpreter's exit wait for the connection to be closed.
CLOSE_TIMEOUT = 3.0

# The longest waits, in seconds, before the second attempt to connect and between later ones.
FIRST_BACKOFF = 0.1
MAX_BACKOFF = 0.5

# How often to check whether the hub has restored its connection, in seconds.
POLL_INTERVAL = 0.02

# After this many seconds without a message, the event loop first runs for some iterations, in which
# it notices if the connection has been lost meanwhile.
STALE_AFTER = 0.01
ITERATIONS = 8

CLOSED = "the publisher is closed"


def _check_seconds(name: str, seconds: object) -> None:
    # Not `seconds <= 0`, which NaN would pass.
    if not (isinstance(seconds, int | float) and seconds > 0):
        raise ConfigurationError(f"{name} is a number of seconds above 0, not {seconds!r}")


class Publisher:
    """Publishes from Celery tasks, cron scripts, Django views: from any code without an event loop.

        publisher = Publisher("redis://localhost")
        publisher.publish("user:42", {"state": "paid"})

    Create one per program, at module level. That neither connects nor starts a thread; the first
    `publish` in each process does. Later calls reuse the connection, from any thread, and it is
    restored after an outage. Publishers and hubs with the same URL and name share their channels.

    A publisher survives `os.fork()`: the child opens its own connection with its first message and
    does not touch the parent's. It needs a real thread, so it raises an error where gevent or
    eventlet has replaced threads.

    Its connection is closed at the interpreter's exit, and when nothing refers to the publisher any
    more.

    Args:
        url: The broker, as for `Broadcast`. `memory://` is refused, because no other process can
            reach it.
        backend: A function that returns a new backend, instead of a URL:
            `lambda: RedisBackend("redis://localhost", prefix="")`. It is called once per process,
            and once when the publisher is created.
        name: The name of the hubs to publish to, as given to them with `name=`.
        dumps: Writes JSON, as for `Broadcast`. It is called on the thread that publishes.
        timeout: Seconds that `publish` waits for the broker, 5 by default.
        idle: Seconds without a message after which the connection is closed, 60 by default. The
            next message opens it again. `None` keeps it open.
        history: As for the `Broadcast` objects of the app: what is published without it is
            delivered, but not kept.

    Raises:
        ConfigurationError: An argument is not valid.
    """

    def __init__(
        self,
        url: object = None,
        *,
        backend: Callable[[], Backend] | None = None,
        name: str | None = None,
        dumps: Dumps | None = None,
        timeout: float = TIMEOUT,
        idle: float | None = IDLE,
        history: History | Mapping[str, History | None] | None = None,
    ) -> None:
        if (url is None) == (backend is None):
            raise ConfigurationError(
                "a Publisher takes the URL of a broker, or backend=; if the URL comes from an "
                "environment variable, it is not set"
            )
        if backend is not None and not callable(backend):
            raise ConfigurationError(
                "a Publisher takes a function that makes a backend, because each process needs "
                f"its own: backend=lambda: {type(backend).__name__}(...)"
            )
        _check_seconds("timeout", timeout)
        if idle is not None:
            _check_seconds("idle", idle)
        self._url = url
        self._backend = backend
        self._name = name
        self._dumps: Dumps = codec.dumps if dumps is None else dumps
        self._timeout = timeout
        self._idle = idle
        self._history = history
        self._closed = False
        self._worker: _Worker | None = None  # changed under `_lock`
        if self._make_hub().stats().backend is None:
            raise ConfigurationError(
                "memory:// connects nobody outside of this process, so a Publisher would publish "
                "to nobody; give it the URL of the broker that the app uses, such as "
                "redis://localhost"
            )

    def _make_hub(self) -> Broadcast:
        backend = None if self._backend is None else self._backend()
        # The worker tries again itself, for as long as a caller waits.
        hub = Broadcast(
            self._url or "memory://",
            backend=backend,
            name=self._name,
            history=self._history,
            open_timeout=0,
        )
        hub._hub.claim.waive()  # a hub without clients receives no other hub's messages
        return hub

    def publish(
        self,
        channel: Channel,
        message: Any,
        *,
        encoding: Encoding | None = None,
        timeout: float | None = None,
        idempotency_key: str | None = None,
    ) -> str | None:
        """Publish a message to a channel, and return when the broker has it.

        May be called from any thread that does not run an event loop. Messages of one thread keep
        their order. While the broker is away, it waits for it, up to the timeout.

        Args:
            channel: 1 to 200 characters without control characters. An int or a UUID names the
                channel of its `str()`.
            message: `str` goes out as a text frame, bytes as a binary frame, anything else as JSON
                in a text frame.
            encoding: `"json"` sends a `str` as JSON too; `"text"` and `"bytes"` require that type.
            timeout: Seconds to wait for the broker instead of the publisher's own `timeout`.
            idempotency_key: On a channel that has a history, what makes it safe to try again. See
                `Broadcast.publish`.

        Returns:
            The id of the event; None if the channel has no history.

        Raises:
            BackendUnavailable: There was no connection to the broker for `timeout` seconds, the
                broker did not confirm the message within two seconds or refused it, or the
                publisher is closed. If the connection was lost before the message was confirmed,
                the broker may still have it.
            PayloadTooLarge: The message is larger than the broker accepts.
            EncodingError: The message does not fit the encoding or cannot be written as JSON.
            InvalidChannel: The name is not valid.
            ConfigurationError: `encoding`, `timeout` or `idempotency_key` makes no sense.
            PublishQueueFull: More than 16 MiB of other threads' messages wait for the broker.
            RuntimeError: An event loop runs on this thread, and waiting would block it; or gevent
                or eventlet has replaced this process's threads.
        """
        if running_loop() is not None:
            raise RuntimeError(
                "Publisher.publish blocks, and an event loop runs on this thread: use "
                "`await hub.publish(...)` of a Broadcast, or "
                "`await asyncio.to_thread(publisher.publish, ...)`"
            )
        name = codec.check_channel(channel)
        codec.check_encoding(encoding)
        if timeout is not None:
            _check_seconds("timeout", timeout)
        # Here and not on the other thread: a model's own code may expect the caller's thread.
        content, payload = codec.encode(message, encoding, self._dumps)
        event = Event(name, content, payload, is_json=codec.is_json(message, encoding))
        seconds = self._timeout if timeout is None else timeout
        return self._get_worker().publish(event, seconds, idempotency_key)

    def _get_worker(self) -> _Worker:
        """Return this process's worker, started if need be."""
        worker = self._worker
        if worker is None or not worker.usable:
            with _lock:
                if self._closed:
                    raise BackendUnavailable(CLOSED)
                worker = self._worker
                if worker is None or not worker.usable:
                    worker = self._worker = _Worker(self._make_hub(), self._idle)
                    weakref.finalize(self, worker.stop).atexit = False  # see `at_exit`
        return worker

    def close(self) -> None:
        """Close the connection and stop publishing. A second call does nothing.

        Waits up to 3 seconds for what other threads are publishing.
        """
        with _lock:
            self._closed = True
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()
            worker.join(CLOSE_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Loop(asyncio.SelectorEventLoop):
    """The event loop of a worker."""

    async def getaddrinfo(self, *args: Any, **kwargs: Any) -> Any:
        # asyncio resolves names on an executor's threads, which take no more work once the main
        # thread has ended. Other threads may go on publishing then. While a name is resolved this
        # loop is not connected, so it has nothing else to do.
        return socket.getaddrinfo(*args, **kwargs)


class _Worker:
    """The thread, the event loop and the hub of one publisher in one process.

    It does not refer to its publisher, which the garbage collector could not delete otherwise.
    """

    def __init__(self, hub: Broadcast, idle: float | None) -> None:
        self._pid = os.getpid()
        self._hub = hub
        self._idle = idle
        self._selector = selectors.DefaultSelector()
        self._loop = _Loop(self._selector)
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="starcast-publisher", daemon=True)
        self._creator = threading.get_native_id()
        self._error = ""  # why there is no connection
        # On the loop:
        self._publishing = 0
        self._used = self._loop.time()  # when something was published last
        self._connecting: set[asyncio.Task[Any] | None] = set()
        try:
            self._thread.start()
        except RuntimeError as exc:  # no more threads, or the interpreter is about to exit
            self._loop.close()
            raise BackendUnavailable(f"the publisher cannot start its thread: {exc}") from None
        _running.add(self)
        if self._is_green:
            raise RuntimeError(
                "a Publisher needs a thread of its own, and gevent or eventlet has replaced the "
                "threads of this process: publish with the broker's own client instead"
            )

    # From any thread

    @property
    def usable(self) -> bool:
        """Whether it belongs to this process and has not ended."""
        return self._pid == os.getpid() and not self._loop.is_closed()

    def publish(self, event: Event, timeout: float, key: str | None = None) -> str | None:
        """Publish, wait for it, and return the event's id."""
        work = self._publish(event, key)
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # another thread has closed the publisher meanwhile
            work.close()
            raise BackendUnavailable(CLOSED) from None
        try:
            return future.result(min(timeout, threading.TIMEOUT_MAX))
        except TimeoutError:
            because = f": {self._error}" if self._error else ""
            raise BackendUnavailable(
                f"the broker did not take the message within {timeout:g} seconds{because}"
            ) from None
        except CancelledError:
            raise BackendUnavailable(CLOSED) from None
        except StarcastError as exc:
            raise exc.with_traceback(None) from None  # the frames of this module are no help
        finally:
            future.cancel()  # an interrupted caller does not want it published later

    def stop(self) -> None:
        """Start to stop. Does not wait, because the garbage collector may call it."""
        if self._pid == os.getpid():
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._stop.set)

    def join(self, timeout: float) -> None:
        if self._pid == os.getpid():
            self._thread.join(timeout)

    def sever(self) -> None:
        """Replace copies of the parent's sockets by /dev/null, in a forked child.

        If the child ever closed a transport, it would tell the broker goodbye on the parent's
        connection. As long as it has copies, the broker does not notice that the parent has closed
        its own.
        """
        null = os.open(os.devnull, os.O_RDWR)
        for key in (self._selector.get_map() or {}).values():
            os.dup2(null, key.fd)
        os.close(null)

    # On the loop

    @property
    def _is_green(self) -> bool:
        """Whether the thread is a greenlet, which the operating system does not know."""
        return self._thread.native_id == self._creator

    def _run(self) -> None:
        try:
            if not self._is_green:  # the loop would block all greenlets
                self._loop.run_until_complete(self._main())
        finally:
            # Not `shutdown_default_executor`, which starts a thread, and at exit none may start.
            self._loop.close()
            _running.discard(self)

    async def _main(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds_left()):
                    await self._stop.wait()
            if self._seconds_left() == 0:
                await self._hub.disconnect()
                self._used = self._loop.time()
        for task in self._connecting:
            assert task is not None
            task.cancel()
        await self._hub.disconnect()
        publishing = asyncio.all_tasks() - {asyncio.current_task()}
        for task in publishing:
            task.cancel()
        if publishing:
            await asyncio.wait(publishing, timeout=CLOSE_TIMEOUT)

    def _seconds_left(self) -> float | None:
        """Return the seconds until an idle connection is closed; None if it never is."""
        if self._idle is None:
            return None
        if self._publishing:
            return self._idle
        return max(0, self._used + self._idle - self._loop.time())

    async def _publish(self, event: Event, key: str | None) -> str | None:
        if self._stop.is_set():
            raise BackendUnavailable(CLOSED)
        self._publishing += 1
        try:
            if self._loop.time() > self._used + STALE_AFTER:
                # The process may have been suspended, or busy in code that holds the interpreter's
                # lock. Read first what has arrived meanwhile, such as the end of the connection.
                for _ in range(ITERATIONS):
                    await asyncio.sleep(0)
            if self._backend.state != "connected":
                await self._connect()
            return await self._hub._hub.publish(event, key)
        finally:
            self._publishing -= 1
            self._used = self._loop.time()

    @property
    def _backend(self) -> BackendStats:
        backend = self._hub.stats().backend
        assert backend is not None
        return backend

    async def _connect(self) -> None:
        """Wait until there is a connection, however long that takes."""
        task = asyncio.current_task()
        self._connecting.add(task)
        backoff = Backoff(FIRST_BACKOFF, MAX_BACKOFF)
        try:
            while (backend := self._backend).state != "connected":
                if backend.state == "reconnecting":  # the hub does it
                    self._error = backend.error or ""
                    await asyncio.sleep(POLL_INTERVAL)
                    continue
                try:
                    await self._hub.connect()
                except BackendUnavailable as exc:
                    self._error = str(exc)
                    await asyncio.sleep(backoff.next())
            self._error = ""
        finally:
            self._connecting.discard(task)


# Guards the start and the end of workers.
_lock = threading.RLock()

_running: set[_Worker] = set()  # in this process

# Workers of processes that this one was forked from. The garbage collector would close their
# transports, and so end what the parent is sending.
inherited: list[_Worker] = []


def after_fork() -> None:
    """Forget the parent's workers, in the child."""
    global _lock
    _lock = threading.RLock()  # a thread that does not exist in the child may have held it
    for worker in _running:
        worker.sever()
    inherited.extend(_running)
    _running.clear()


def at_exit() -> None:
    """Close what is open. Threads that are not daemons have ended by now, and none may start."""
    workers = list(_running)
    for worker in workers:
        worker.stop()
    deadline = time.monotonic() + CLOSE_TIMEOUT
    for worker in workers:
        worker.join(max(0, deadline - time.monotonic()))


atexit.register(at_exit)
with contextlib.suppress(AttributeError):  # Windows has no fork
    os.register_at_fork(after_in_child=after_fork)
