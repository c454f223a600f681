"""Hooks: call the app's own functions that admit or refuse clients, and log their refusals.

`authorize=` is such a function, and `origins=` may be one. Hooks fail closed: only True admits a
client; False, None and a `PermissionError` refuse it. Any other result is a mistake in the hook,
most often a lookup that returns what it found. It is raised as `ConfigurationError`, and the client
is not admitted either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import WebSocketException
from starlette.requests import HTTPConnection

from .. import logs
from ..close_codes import POLICY_VIOLATION
from ..exceptions import ConfigurationError

Refuse = Literal["http", "close"]


def check_refuse(refuse: Refuse | None) -> Refuse | None:
    """Return `refuse` if it is valid, or raise `ConfigurationError`."""
    if refuse not in ("http", "close", None):
        raise ConfigurationError(f"refuse must be http or close, not {refuse!r}")
    return refuse


class Refused(WebSocketException):
    """A hook has refused the client; `ask` has logged why."""

    def __init__(self) -> None:
        super().__init__(POLICY_VIOLATION, "not authorized")


async def ask(
    parameter: str,
    hook: Callable[..., object],
    *args: object,
    client: HTTPConnection,
    about: str,
) -> bool:
    """Return whether a hook admits a client. A plain function is called in a thread.

    Args:
        parameter: The name of the parameter that took the hook, for the log and for errors.
        hook: The function, plain or async.
        args: The arguments to call it with.
        client: The client.
        about: What the client asked for. It is logged, so it must not contain a secret.

    Raises:
        ConfigurationError: The hook returned something other than True, False or None.
    """
    is_async = inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(
        getattr(hook, "__call__", None)  # noqa: B004  # an object with an async __call__
    )
    try:
        answer = hook(*args) if is_async else await run_in_threadpool(hook, *args)
        if inspect.isawaitable(answer):
            answer = await answer
    except PermissionError:
        why = "raised PermissionError"  # its text is not logged: it may name a token or a user
    else:
        if answer is True:
            return True
        if answer is not None and answer is not False:
            # The value is not shown, because it may be a user with a password.
            raise ConfigurationError(
                f"{parameter} returned an object of type {type(answer).__name__}, not True or "
                "False; if it looks up a user, write `return user is not None`"
            )
        why = f"returned {answer}"
        if answer is None:
            why += (
                ", which admits no client; write `return True` for a client that may connect "
                "and `return False` for one that may not"
            )
    what = logs.client(client.scope)
    logs.once((parameter, why), "refused %s (%s): %s %s", what, about, parameter, why)
    return False
