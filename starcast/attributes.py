"""Attributes: check the attributes of an endpoint class when the class is defined.

Python lets a class set any attribute, so a misspelt one would silently have no effect.
"""

from __future__ import annotations

import difflib
import inspect
import threading
from weakref import WeakKeyDictionary

from . import codec, logs
from .broadcast import Broadcast

# How similar two names have to be, from 0 to 1, for one to be a misspelling of the other. The ratio
# is 0.94 for "brodcast" and "broadcast", and 0.71 for "encode" and "encoding".
SIMILAR = 0.85

# Arguments of the hub that people may set on the endpoint by mistake, and where they belong.
SETTINGS = {
    name: "Broadcast"
    for name, parameter in inspect.signature(Broadcast).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in ("name", "backend", "history")
} | {"publish": "Broadcast.app"}


class OwnHub:
    """Stands where a class sets no hub, and gives each such class one of its own."""

    def __init__(self) -> None:
        self._hubs: WeakKeyDictionary[type, Broadcast] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def __get__(self, instance: object, owner: type) -> Broadcast:
        hub = self._hubs.get(owner)
        if hub is None:
            with self._lock:  # clients on two event loops may be the first ones
                hub = self._hubs.setdefault(owner, Broadcast())
        return hub


def check(cls: type, base: type) -> None:
    """Check the attributes of a subclass of `base`, an endpoint. Log those with no effect.

    Raises:
        TypeError: `broadcast` is not a hub (but a URL, for example), or `get_channel` is async.
        ConfigurationError: `encoding` is not valid.
    """
    hub = inspect.getattr_static(cls, "broadcast")
    if not (hub is None or isinstance(hub, Broadcast) or hasattr(type(hub), "__get__")):
        # The value is not shown, because it may be a URL with a password.
        raise TypeError(
            f"{cls.__name__}.broadcast needs a Broadcast, not {type(hub).__name__}: write "
            "broadcast = Broadcast(url)"
        )
    for name in ("get_channel", "get_member"):
        if inspect.iscoroutinefunction(inspect.getattr_static(cls, name, None)):
            raise TypeError(
                f"{cls.__name__}.{name} is not awaited: write def, and look up what it needs in "
                "on_connect, before it calls super().on_connect(...)"
            )
    encoding = inspect.getattr_static(cls, "encoding", None)
    if not hasattr(type(encoding), "__get__"):
        codec.check_encoding(encoding)
    inherited = {name for parent in cls.__mro__[1:] for name in vars(parent)}
    for name, value in vars(cls).items():
        if name.startswith("_") or name in inherited:
            continue
        if hint := _hint(cls, base, value, name):
            kind = ("attribute", cls.__module__, cls.__qualname__, name)
            where = f"{cls.__qualname__}.{name}"
            logs.once(kind, "%s does not read %s: %s", base.__name__, where, hint)


def _hint(cls: type, base: type, value: object, name: str) -> str:
    """Return what an attribute that is never read was probably meant to be, or ""."""
    unset = inspect.getattr_static(cls, "broadcast") is vars(base)["broadcast"]
    if isinstance(value, Broadcast) and unset:
        return "its hub is the attribute named broadcast, which this class does not set"
    # If the class sets the similar name too, they are two different attributes.
    names = [each for each in dir(base) if each[0] != "_" and each not in vars(cls)]
    for meant in difflib.get_close_matches(name, names, 1, SIMILAR):
        return f"did you mean {meant}?"
    if not callable(value):  # a function may be a helper method of the class
        for meant in difflib.get_close_matches(name, SETTINGS, 1, SIMILAR):
            return f"it is an argument of the hub, {SETTINGS[meant]}({meant}=...)"
    return ""
