"""Admission: the one rule for everybody who guards a door, and what a refusal says in the log.

A door asks a function of the app whether somebody may come in: `authorize=` does, and so does a
function that is given as `origins=`. Doors fail closed. Only True lets in; False, None and a
`PermissionError` refuse. Anything else is a mistake in the function, most often a lookup that
returned what it found, and is raised as `ConfigurationError`; nobody is let in then either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import WebSocketException

from .. import logs
from ..close_codes import POLICY_VIOLATION
from ..exceptions import ConfigurationError

Refuse = Literal["http", "close"]


def check_refuse(refuse: Refuse | None) -> Refuse | None:
    """Return a way to refuse if it is one, or raise `ConfigurationError`."""
    if refuse not in ("http", "close", None):
        raise ConfigurationError(f"refuse must be http or close, not {refuse!r}")
    return refuse


class Refused(WebSocketException):
    """A client was not let in; `ask` has logged why."""

    def __init__(self) -> None:
        super().__init__(POLICY_VIOLATION, "not authorized")


async def ask(door: str, guard: Callable[..., object], *args: object, about: str) -> bool:
    """Whether the app's function lets somebody in. A plain function runs in a thread.

    Args:
        door: The argument that the function was given as, for the log and for errors.
        guard: The function, plain or async.
        args: What it is called with.
        about: What was asked for. It stands in the log, so it must not hold a secret.

    Raises:
        ConfigurationError: The function returned something else than True, False or None.
    """
    is_async = inspect.iscoroutinefunction(guard) or inspect.iscoroutinefunction(
        getattr(guard, "__call__", None)  # noqa: B004  # an object with an async __call__
    )
    try:
        answer = guard(*args) if is_async else await run_in_threadpool(guard, *args)
        if inspect.isawaitable(answer):
            answer = await answer
    except PermissionError:
        # Its text is not logged: it may name a token or a user.
        logs.once(
            (door, "PermissionError"),
            "refused a WebSocket (%s): %s raised PermissionError",
            about,
            door,
        )
        return False
    if answer is True:
        return True
    if answer is None:
        logs.once(
            (door, "None"),
            "refused a WebSocket (%s): %s returned None, which lets nobody in; "
            "end it with `return True` where the client may come in and `return False` where not",
            about,
            door,
        )
    elif answer is False:
        logs.once((door, "False"), "refused a WebSocket (%s): %s returned False", about, door)
    else:  # its value is not shown: it may be a user with a password
        raise ConfigurationError(
            f"{door} returned an object of the type {type(answer).__name__}, not True or False; "
            "if it looks up a user, write `return user is not None`"
        )
    return False
