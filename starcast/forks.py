"""Forks: an open hub that a child process has inherited says so.

Its clients, its connection to the broker and the event loop of both are the parent's. Whatever the
child did with them would disturb the parent or reach nobody.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

INHERITED = (
    "this hub was opened before the process was forked, so its clients and its connection to the "
    "broker are the parent's: create and open a Broadcast of its own in the child, in the app's "
    "lifespan for example, or publish with a Publisher, which survives a fork"
)


class Inheritable(Protocol):
    """What is told in the child."""

    def after_fork(self) -> None: ...


_hubs: weakref.WeakSet[Inheritable] = weakref.WeakSet()


def watch(hub: Inheritable) -> None:
    """Tell it when it finds itself in a child process. It is not kept alive by this."""
    _hubs.add(hub)


def _after_fork() -> None:
    for hub in list(_hubs):
        hub.after_fork()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)
