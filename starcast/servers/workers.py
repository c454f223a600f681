"""How many worker processes the ASGI server runs, and the warning that memory:// needs just one.

ASGI does not say how many processes a server has started, so this module looks at what each server
leaves within reach. A server that it does not know is taken to run one process.
"""

from __future__ import annotations

import functools
import logging
import signal
import sys
from typing import Any

logger = logging.getLogger("starcast")


def is_instance(value: object, module: str, name: str) -> bool:
    """Return whether `value` is an instance of the class, without importing its module."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)


def _current_process() -> Any:
    multiprocessing = sys.modules.get("multiprocessing.process")
    return None if multiprocessing is None else multiprocessing.current_process()


def process_arguments() -> dict[str, Any]:
    """Return the keyword arguments with which a server has started this process."""
    return getattr(_current_process(), "_kwargs", {})


def worker_processes() -> int:
    """Return how many processes serve the app, or 1 if that is not known."""
    config: Any = process_arguments().get("config")
    if is_instance(config, "uvicorn.config", "Config"):
        return 1 if config.reload else int(config.workers)  # with both, uvicorn ignores `workers`
    if is_instance(config, "hypercorn.config", "Config"):
        return int(config.workers)
    # A gunicorn worker replaces the master's signal handlers, except for the ones that change the
    # number of workers.
    sigttin = getattr(signal, "SIGTTIN", None)  # missing on Windows
    master: Any = sigttin and getattr(signal.getsignal(sigttin), "__self__", None)
    if is_instance(master, "gunicorn.arbiter", "Arbiter"):
        return int(master.num_workers)
    # A granian worker only knows its own number, so the first one cannot know about the others.
    process = _current_process()
    match getattr(process, "name", ""), getattr(process, "_args", ()):
        case "granian-worker", (int(number), *_):
            return number
    return 1


@functools.cache
def warn_of_workers() -> None:
    """Warn, once in a process, if in-memory hubs do not reach the server's other processes."""
    if worker_processes() > 1:
        logger.warning(
            "this hub is on memory:// and the server runs several worker processes: a message "
            "reaches the clients of this process only. Run one worker, or give Broadcast the URL "
            "of a broker that all of them use: redis://, nats:// or postgresql://"
        )
