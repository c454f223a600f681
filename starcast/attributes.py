"""Attributes: what an endpoint class sets, checked where the class is defined.

Python lets a class set any attribute, so a misspelt one would change nothing and say nothing.
"""

from __future__ import annotations

import difflib
import inspect

from . import codec, logs
from .broadcast import Broadcast

# How alike two names are, from 0 to 1, if one is taken for the other misspelt: "brodcast" is 0.94
# like "broadcast", and "encode" 0.71 like "encoding".
ALIKE = 0.85

# What the hub is told, and not the endpoint.
SETTINGS = {
    name: "Broadcast"
    for name, parameter in inspect.signature(Broadcast).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in ("name", "backend")
} | {"publish": "Broadcast.app"}


def check(cls: type, base: type) -> None:
    """Check what a subclass of `base`, the endpoint, sets.

    Raises:
        TypeError: `broadcast` is not a hub but, say, a URL, or `get_channel` is async.
        ConfigurationError: `encoding` is none.
    """
    hub = inspect.getattr_static(cls, "broadcast")
    if not (hub is None or isinstance(hub, Broadcast) or hasattr(type(hub), "__get__")):
        kind = type(hub).__name__  # the value may be a URL with a password
        raise TypeError(
            f"{cls.__name__}.broadcast needs a Broadcast, not {kind}: write "
            "broadcast = Broadcast(url)"
        )
    if inspect.iscoroutinefunction(inspect.getattr_static(cls, "get_channel")):
        raise TypeError(
            f"{cls.__name__}.get_channel is not awaited: write def, and look up what it needs in "
            "on_connect, before super().on_connect(websocket)"
        )
    encoding = inspect.getattr_static(cls, "encoding")
    if not hasattr(type(encoding), "__get__"):
        codec.check_encoding(encoding)
    inherited = {name for parent in cls.__mro__[1:] for name in vars(parent)}
    for name, value in vars(cls).items():
        if name.startswith("_") or name in inherited:
            continue
        if hint := _hint(cls, base, value, name):
            line = ("attribute", cls.__module__, cls.__qualname__, name)
            where = f"{cls.__qualname__}.{name}"
            logs.once(line, "%s does not read %s: %s", base.__name__, where, hint)


def _hint(cls: type, base: type, value: object, name: str) -> str:
    """Return what was probably meant by an attribute that nothing here reads; "" if nothing was."""
    unset = inspect.getattr_static(cls, "broadcast") is vars(base)["broadcast"]
    if isinstance(value, Broadcast) and unset:
        return "its hub is the attribute named broadcast, which this class does not set"
    # Whoever sets both means two different things.
    names = [each for each in dir(base) if each[0] != "_" and each not in vars(cls)]
    for meant in difflib.get_close_matches(name, names, 1, ALIKE):
        return f"did you mean {meant}?"
    if not callable(value):  # a function may be a helper of the class
        for meant in difflib.get_close_matches(name, SETTINGS, 1, ALIKE):
            return f"it is an argument of the hub, {SETTINGS[meant]}({meant}=...)"
    return ""
