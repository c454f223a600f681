"""Forks: tell open hubs that they have been inherited by a child process.

Their clients, their connections to the broker and their event loops belong to the parent. If the
child used them, it would disturb the parent or reach no client.
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
    """An object that has to know when it is in a child process."""

    def after_fork(self) -> None: ...


_hubs: weakref.WeakSet[Inheritable] = weakref.WeakSet()


def watch(hub: Inheritable) -> None:
    """Call the hub's `after_fork` in child processes. Only a weak reference to it is kept."""
    _hubs.add(hub)


def after_fork() -> None:
    """Tell all hubs, in a child process. Python calls this."""
    for hub in list(_hubs):
        hub.after_fork()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # Windows has no fork
    os.register_at_fork(after_in_child=after_fork)
