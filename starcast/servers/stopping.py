"""Stopping: notice that the ASGI server is shutting down, and end its streams in time.

ASGI tells an app of a shutdown last: the server first waits for every response to end. A response
that a subscriber feeds would wait for the hub, and the hub closes in that very last step. So while
an event loop has subscribers, it asks several times a second whether the server is shutting down,
and ends them if it is.

No server says so in a scope, so this module looks at what each server leaves within reach. A server
that it does not know is never seen to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

from .workers import is_instance, process_arguments

# Seconds between two checks. uvicorn and hypercorn check their own flags as often.
POLL_INTERVAL = 0.1


class Stream(Protocol):
    """Something to end when the server shuts down."""

    def end(self) -> None: ...


class _Streams(weakref.WeakSet[Stream]):
    """The streams of one event loop, and the uvicorn server on it that handles no signals."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.server = None
        # On the main thread, the handler of SIGTERM leads to the server. Anywhere else all tasks
        # have to be searched, which is too slow to be done for every first stream.
        on_main_thread = threading.current_thread() is threading.main_thread()
        if not (on_main_thread and _is_uvicorn(_sigterm_owner())):
            self.server = _find_uvicorn(loop)


# The streams of each event loop that has any, or had some at the last check.
_streams: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Streams]
_streams = weakref.WeakKeyDictionary()


class _SigtermNote:
    """A signal handler that remembers the signal and calls the handler that it replaced."""

    def __init__(self, previous: Callable[[int, FrameType | None], object]) -> None:
        self.previous = previous
        self.received = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.received = True
        self.previous(signum, frame)


def is_stopping() -> bool:
    """Return whether the server is known to be shutting down. Call it on an event loop."""
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, _SigtermNote) and handler.received:
        return True
    # A uvicorn server in a thread, common in test suites, handles no signals: a flag stops it.
    streams = _streams.get(asyncio.get_running_loop())
    server = None if streams is None else streams.server
    if _is_stopping_uvicorn(_sigterm_owner()) or _is_stopping_uvicorn(server):
        return True
    arguments = process_arguments()
    if not is_instance(arguments.get("config"), "hypercorn.config", "Config"):
        return False
    return bool(getattr(arguments.get("shutdown_event"), "is_set", bool)())


def _sigterm_owner() -> object:
    """Return the object whose method handles SIGTERM. With uvicorn, that is its server."""
    return getattr(signal.getsignal(signal.SIGTERM), "__self__", None)


def _is_uvicorn(value: object) -> bool:
    return is_instance(value, "uvicorn.server", "Server")


def _is_stopping_uvicorn(server: Any) -> bool:
    """Return whether `server` is a uvicorn server that is shutting down."""
    if not _is_uvicorn(server):
        return False
    # `should_exit` is not set when it stops because of `limit_max_requests`. A server without tasks
    # has stopped already: where several servers run one after another, a handler may be left over.
    listening = getattr(server, "servers", ())
    stopping = server.should_exit or not all(each.is_serving() for each in listening)
    return stopping and bool(server.server_state.tasks)


def _find_uvicorn(loop: asyncio.AbstractEventLoop) -> Any:
    """Return the uvicorn server whose `serve` one of the loop's tasks is running, if any."""
    for task in asyncio.all_tasks(loop) if "uvicorn.server" in sys.modules else ():
        coroutine: Any = task.get_coro()
        while inspect.iscoroutine(coroutine):
            if coroutine.cr_code.co_name == "serve" and coroutine.cr_frame is not None:
                server = coroutine.cr_frame.f_locals.get("self")
                if _is_uvicorn(server):
                    return server
            coroutine = coroutine.cr_await
    return None


def end_with_server(stream: Stream) -> None:
    """End a stream of this event loop when the server shuts down, unless `forget` comes first.

    Only a weak reference to the stream is kept.
    """
    loop = asyncio.get_running_loop()
    is_first = loop not in _streams
    if is_first:
        _streams[loop] = _Streams(loop)
    _streams[loop].add(stream)
    if is_first:
        _poll(loop)


def forget(stream: Stream) -> None:
    """Stop watching the server for a stream of this event loop."""
    with contextlib.suppress(RuntimeError):  # the loop was closed before the stream ended
        if (streams := _streams.get(asyncio.get_running_loop())) is not None:
            streams.discard(stream)


def _poll(loop: asyncio.AbstractEventLoop) -> None:
    streams = _streams[loop]
    if not streams:
        del _streams[loop]
        _remove_note()
        return
    _install_note()
    if is_stopping():
        for stream in list(streams):
            stream.end()
    loop.call_later(POLL_INTERVAL, _poll, loop)


def _install_note() -> None:
    """Watch for SIGTERM on servers that handle it and have no flag that could be read instead."""
    handler = signal.getsignal(signal.SIGTERM)
    known = isinstance(handler, _SigtermNote) or _is_uvicorn(_sigterm_owner())
    # If the program has no handler, SIGTERM ends the process. That must not change.
    if callable(handler) and not known:
        with contextlib.suppress(ValueError):  # only the main thread may set a handler
            signal.signal(signal.SIGTERM, _SigtermNote(handler))


def _remove_note() -> None:
    """Restore the previous handler, unless SIGTERM has arrived or the note was replaced."""
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, _SigtermNote) and not handler.received:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, handler.previous)
