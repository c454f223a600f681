"""Claims: which hubs of this process are open on which broker, and under which name.

Two hubs with the same name on the same broker share their channels. That is right if it was asked
for it, and a leak if both of them just have the default name: then the second one does not open.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import weakref
from collections.abc import Iterator

from ..exceptions import ConfigurationError

_lock = threading.Lock()
_held: weakref.WeakSet[Claim] = weakref.WeakSet()


class Claim:
    """One hub's claim to its name on its broker. The hub keeps it; it ends with the hub.

    Args:
        address: Where the channels are: see `Backend`. None if that is unknown, which conflicts
            with no other hub.
        name: The name of the hub there.
        chosen: Whether the hub was given that name on purpose.
    """

    def __init__(self, address: str | None, name: str, chosen: bool) -> None:
        self.name = name
        self._address = address
        self._chosen = chosen

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the claim in the block, and after it until `release`. From any thread.

        If the block raises, a claim that was not held before is released again.

        Raises:
            ConfigurationError: Another open hub has the same name on the same broker, and at least
                one of the two was not given it on purpose.
        """
        was_held = self._acquire()
        try:
            yield
        except BaseException:
            if not was_held:
                self.release()
            raise

    def waive(self) -> None:
        """Conflict with no other hub: this one only publishes."""
        self._address = None

    def release(self) -> None:
        """Release the claim, if it is held. From any thread."""
        with _lock:
            _held.discard(self)

    def _acquire(self) -> bool:
        """Hold the claim; return whether it was held already."""
        with _lock:
            if self in _held:
                return True
            conflict = self._conflicts()
        if conflict:
            # The other hub may be garbage that was not collected yet: hubs are in reference cycles.
            gc.collect()
        with _lock:
            if self._conflicts():
                raise ConfigurationError(
                    f"this process has another hub named {self.name!r} open on {self._address}; "
                    "each would get what is published to the other. To keep them apart, give each "
                    'a name of its own: Broadcast(url, name="staff"). To share the channels, give '
                    "the same name= to both"
                )
            _held.add(self)
        return False

    def _conflicts(self) -> bool:
        return self._address is not None and any(
            (other._address, other.name) == (self._address, self.name)
            and not (self._chosen and other._chosen)
            for other in _held
        )


def forget_all() -> None:
    """Forget the claims in a child process: its parent's hubs are not open here."""
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it
    _held.clear()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=forget_all)
