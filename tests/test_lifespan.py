"""The hub's lifespan in apps that have startup and shutdown handlers too."""

from __future__ import annotations

import contextlib

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.testclient import TestClient

from starcast import Broadcast


class Log(list[str]):
    """What was called, in order, and whether the hub was open."""

    def __init__(self, hub: Broadcast) -> None:
        self.hub = hub

    def handler(self, name: str, run_async: bool = False):
        def handle() -> None:
            assert self.hub.stats().open, "a handler may publish"
            self.append(name)

        async def handle_async() -> None:
            handle()

        return handle_async if run_async else handle


@pytest.fixture
def hub() -> Broadcast:
    return Broadcast()


@pytest.fixture
def log(hub: Broadcast) -> Log:
    return Log(hub)


def run(app) -> None:
    with TestClient(app):
        pass


def test_the_apps_own_handlers_run_while_the_hub_is_open(hub, log):
    app = FastAPI(
        lifespan=hub.lifespan,
        on_startup=[log.handler("start"), log.handler("start async", run_async=True)],
        on_shutdown=[log.handler("stop"), log.handler("stop async", run_async=True)],
    )
    with pytest.warns(DeprecationWarning, match="on_event"):
        app.on_event("startup")(log.handler("start on_event"))
    run(app)
    assert log == ["start", "start async", "start on_event", "stop", "stop async"]
    assert not hub.stats().open


def test_each_handler_runs_once_with_included_routers(hub, log):
    app = FastAPI(lifespan=hub.lifespan, on_startup=[log.handler("app")])
    app.include_router(APIRouter(on_startup=[log.handler("router")]))
    own = APIRouter(
        lifespan=lambda app: contextlib.nullcontext(), on_startup=[log.handler("router's own")]
    )
    app.include_router(own)
    run(app)
    assert sorted(log) == ["app", "router", "router's own"]


def test_an_included_router_with_the_hubs_lifespan(hub, log):
    app = FastAPI(
        on_startup=[lambda: log.append("start")], on_shutdown=[lambda: log.append("stop")]
    )
    app.include_router(APIRouter(lifespan=hub.lifespan))
    run(app)
    assert log == ["start", "stop"]


def test_a_lifespan_that_calls_the_hubs_decides_itself(hub, log):
    @contextlib.asynccontextmanager
    async def lifespan(app):
        async with hub.lifespan(app):
            log.append("own")
            yield

    run(FastAPI(lifespan=lifespan, on_startup=[log.handler("never")]))
    assert log == ["own"]


def test_starlette_and_no_app(hub):
    run(Starlette(lifespan=hub.lifespan))
    run(hub)


@pytest.mark.anyio
async def test_the_shutdown_handlers_run_when_the_app_fails(hub, log):
    app = FastAPI(lifespan=hub.lifespan, on_shutdown=[log.handler("stop")])
    with pytest.raises(ZeroDivisionError):
        async with app.router.lifespan_context(app):
            raise ZeroDivisionError
    assert log == ["stop"]
