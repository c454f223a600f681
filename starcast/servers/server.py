"""What the library knows about the ASGI server that runs it.

ASGI tells an app of a shutdown last: the server first waits for every response to end. A response
that a subscriber feeds would wait for the hub, and the hub closes in that very last step. So while
an event loop has subscribers, it asks the server whether it is shutting down, and ends them then.

No server says so in a scope, nor how many processes it has started. This module looks at what each
of them leaves within reach; a server that it does not know never stops and has one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

logger = logging.getLogger("starcast")

# Seconds between two looks at the server. uvicorn and hypercorn look at their own flags as often.
POLL_INTERVAL = 0.1


class Stream(Protocol):
    """What ends with the server."""

    def end(self) -> None: ...


class _Streams(weakref.WeakSet[Stream]):
    """The streams of one event loop, and the uvicorn server that runs on it without signals."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.server = None
        # What the handler of SIGTERM says is enough on the main thread. Looking at all tasks is no
        # work to be done whenever a busy server has its first stream.
        if not (threading.current_thread() is threading.main_thread() and _is_uvicorn(_handler())):
            self.server = _find_uvicorn(loop)


# Those of each event loop that has any, or had when it last looked.
_streams: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Streams]
_streams = weakref.WeakKeyDictionary()


class _SigtermNote:
    """A signal handler that takes a note, and leaves the rest to the handler that was there."""

    def __init__(self, previous: Callable[[int, FrameType | None], object]) -> None:
        self.previous = previous
        self.received = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.received = True
        self.previous(signum, frame)


def is_stopping() -> bool:
    """Whether the server is shutting down, as far as it can be known. On an event loop."""
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, _SigtermNote) and handler.received:
        return True
    # A uvicorn in a thread, as test suites have it, handles no signals, and stops by a flag.
    streams = _streams.get(asyncio.get_running_loop())
    own = None if streams is None else streams.server
    if _uvicorn_stops(_handler()) or _uvicorn_stops(own):
        return True
    arguments = _process_arguments()
    if not _is_a(arguments.get("config"), "hypercorn.config", "Config"):
        return False
    return bool(getattr(arguments.get("shutdown_event"), "is_set", bool)())


def _handler() -> object:
    """Return the object whose method handles SIGTERM: with uvicorn its server."""
    return getattr(signal.getsignal(signal.SIGTERM), "__self__", None)


def _is_uvicorn(value: object) -> bool:
    return _is_a(value, "uvicorn.server", "Server")


def _uvicorn_stops(server: Any) -> bool:
    """Whether it is a uvicorn server that shuts down."""
    if not _is_uvicorn(server):
        return False
    # It stops without `should_exit` when it has served as many requests as it may. One that waits
    # for no task has stopped: where several run in turn, its handler may be left behind.
    listening = getattr(server, "servers", ())
    stops = server.should_exit or not all(each.is_serving() for each in listening)
    return stops and bool(server.server_state.tasks)


def _find_uvicorn(loop: asyncio.AbstractEventLoop) -> Any:
    """Return the uvicorn server that one of the loop's tasks runs, however it came to that."""
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
    """End a stream of this event loop when the server shuts down, unless it is forgotten before.

    It is not kept alive by this.
    """
    loop = asyncio.get_running_loop()
    if loop in _streams:
        _streams[loop].add(stream)
    else:
        _streams[loop] = _Streams(loop)
        _streams[loop].add(stream)
        _poll(loop)


def forget(stream: Stream) -> None:
    """Do not end a stream of this event loop any more."""
    with contextlib.suppress(RuntimeError):  # the loop was closed under it
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
    """Take note of SIGTERM on servers that have a handler for it and keep no flag to be read."""
    handler = signal.getsignal(signal.SIGTERM)
    known = isinstance(handler, _SigtermNote) or _is_uvicorn(_handler())
    # Without a handler of the program's, SIGTERM ends the process, and shall go on doing so.
    if callable(handler) and not known:
        with contextlib.suppress(ValueError):  # not the main thread, which alone may do this
            signal.signal(signal.SIGTERM, _SigtermNote(handler))


def _remove_note() -> None:
    """Put the handler that was there back, unless the note is still needed or was replaced."""
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, _SigtermNote) and not handler.received:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, handler.previous)


def worker_processes() -> int:
    """Return how many processes serve the app, as far as it can be known; else 1."""
    config: Any = _process_arguments().get("config")
    if _is_a(config, "uvicorn.config", "Config"):
        return 1 if config.reload else int(config.workers)  # with both, it ignores the workers
    if _is_a(config, "hypercorn.config", "Config"):
        return int(config.workers)
    # A worker of gunicorn's replaces the master's signal handlers, but for those that say how many
    # workers the master shall have.
    sigttin = getattr(signal, "SIGTTIN", None)  # not on Windows
    master: Any = sigttin and getattr(signal.getsignal(sigttin), "__self__", None)
    if _is_a(master, "gunicorn.arbiter", "Arbiter"):
        return int(master.num_workers)
    # A worker of granian's is told its number alone: the first one cannot know of others.
    process = _current_process()
    match getattr(process, "name", ""), getattr(process, "_args", ()):
        case "granian-worker", (int(number), *_):
            return number
    return 1


@functools.cache
def warn_of_workers() -> None:
    """Log, once in a process, that hubs in memory do not reach the server's other processes."""
    if worker_processes() > 1:
        logger.warning(
            "this hub is on memory:// and the server runs several worker processes: a message "
            "reaches the clients of this process only. Run one worker, or give Broadcast the URL "
            "of a broker that all of them use: redis://, nats:// or postgresql://"
        )


def _is_a(value: object, module: str, name: str) -> bool:
    """Whether it is an instance of a class in a module, which is not imported for that."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)


def _current_process() -> Any:
    multiprocessing = sys.modules.get("multiprocessing.process")
    return None if multiprocessing is None else multiprocessing.current_process()


def _process_arguments() -> dict[str, Any]:
    """Return the keyword arguments that a server has started this process with."""
    return getattr(_current_process(), "_kwargs", {})
