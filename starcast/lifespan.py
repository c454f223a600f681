"""Lifespan: call the startup and shutdown handlers that the hub's lifespan would switch off.

FastAPI ignores the handlers of `on_event`, `on_startup` and `on_shutdown` if it is given a
`lifespan=`. Passing the hub's lifespan must not disable handlers that a program relies on.
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
    """Open the hub, and call the handlers that `lifespan` has switched off while it is open."""
    async with hub:
        await _call(_find_ignored(app, lifespan, "on_startup"))
        try:
            yield
        finally:
            await _call(_find_ignored(app, lifespan, "on_shutdown"))


def _find_ignored(app: object, lifespan: object, kind: str) -> list[Handler]:
    router = getattr(app, "router", None)
    lifespans = list(_split_merged(getattr(router, "lifespan_context", None)))
    if lifespan not in lifespans:
        return []  # the app has a lifespan of its own, which decides what is called
    # The app also lists the handlers of included routers, but their default lifespan calls them.
    routers = [getattr(each, "_router", None) for each in lifespans]
    called = [handler for each in routers for handler in getattr(each, kind, ())]
    return [handler for handler in getattr(router, kind, ()) if handler not in called]


def _split_merged(lifespan: Any) -> Iterator[object]:
    """Yield the lifespans that `include_router` has merged into this one, or this one."""
    merged = getattr(lifespan, "__wrapped__", None)
    if inspect.isfunction(merged) and merged.__module__ == "fastapi.routing":
        for cell in merged.__closure__ or ():
            yield from _split_merged(cell.cell_contents)
    else:
        yield lifespan


async def _call(handlers: list[Handler]) -> None:
    for handler in handlers:
        result = handler()
        if inspect.isawaitable(result):
            await result
