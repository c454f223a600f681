"""Lifespan: the startup and shutdown handlers of an app that was given the hub's lifespan.

FastAPI calls the handlers of `on_event`, `on_startup` and `on_shutdown` only as long as it has no
`lifespan=`. Giving it the hub's must not switch off what a program has always done at its start.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

Handler = Callable[[], object]


@contextlib.asynccontextmanager
async def with_handlers(
    app: object, lifespan: object, hub: AbstractAsyncContextManager[None]
) -> AsyncIterator[None]:
    """Open the hub, and while it is open call the handlers that `lifespan` has switched off."""
    async with hub:
        await _call(_silenced(app, lifespan, "on_startup"))
        try:
            yield
        finally:
            await _call(_silenced(app, lifespan, "on_shutdown"))


def _silenced(app: object, lifespan: object, kind: str) -> list[Handler]:
    router = getattr(app, "router", None)
    lifespans = list(_unmerged(getattr(router, "lifespan_context", None)))
    if lifespan not in lifespans:
        return []  # somebody's own calls it, and says itself what happens at the start
    # The handlers of an included router are the app's too, but its default lifespan calls them.
    routers = [getattr(each, "_router", None) for each in lifespans]
    called = [handler for each in routers for handler in getattr(each, kind, ())]
    return [handler for handler in getattr(router, kind, ()) if handler not in called]


def _unmerged(lifespan: Any) -> Iterator[object]:
    """Take apart what `include_router` has merged: the app's lifespan and the router's."""
    merged = getattr(lifespan, "__wrapped__", None)
    if inspect.isfunction(merged) and merged.__module__ == "fastapi.routing":
        for cell in merged.__closure__ or ():
            yield from _unmerged(cell.cell_contents)
    else:
        yield lifespan


async def _call(handlers: list[Handler]) -> None:
    for handler in handlers:
        result = handler()
        if inspect.isawaitable(result):
            await result
