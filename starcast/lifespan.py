"""Lifespan: the startup and shutdown handlers of an app that was given the hub's lifespan.

FastAPI calls the handlers of `on_event`, `on_startup` and `on_shutdown` only while it has no
`lifespan=`. Giving it the hub's must not switch off what the program has always done at startup.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any


@contextlib.asynccontextmanager
async def with_handlers(
    app: object, lifespan: object, hub: AbstractAsyncContextManager[None]
) -> AsyncIterator[None]:
    """Open the hub, and inside of that call the app's handlers that `lifespan` has switched off."""
    async with hub:
        silenced = _is_given(app, lifespan)
        if silenced:
            await _call(app, "on_startup")
        try:
            yield
        finally:
            if silenced:
                await _call(app, "on_shutdown")


def _is_given(app: object, lifespan: object) -> bool:
    """Whether the app has it for its own, rather than calling it in one that somebody wrote."""
    return lifespan in _lifespans(app)


def _lifespans(app: object) -> list[object]:
    """Return the lifespans of an app and of the routers that it includes."""
    return list(_unmerged(getattr(getattr(app, "router", None), "lifespan_context", None)))


def _unmerged(lifespan: Any) -> Iterator[object]:
    function = getattr(lifespan, "__wrapped__", None)
    if inspect.isfunction(function) and function.__module__ == "fastapi.routing":
        # `include_router` merges the router's lifespan with the app's.
        for cell in function.__closure__ or ():
            yield from _unmerged(cell.cell_contents)
    else:
        yield lifespan


async def _call(app: Any, kind: str) -> None:
    # An included router's handlers are the app's too, and run by the router's default lifespan.
    routers = [getattr(lifespan, "_router", None) for lifespan in _lifespans(app)]
    run: list[Callable[[], object]] = [
        handler for router in routers for handler in getattr(router, kind, ())
    ]
    for handler in getattr(app.router, kind, ()):
        if handler in run:
            continue
        result = handler()
        if inspect.isawaitable(result):
            await result
