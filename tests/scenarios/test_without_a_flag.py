"""The fast path on every way to start uvicorn, with nothing to configure."""

from __future__ import annotations

import asyncio
import json

import pytest

from server_process import HERE, ServerProcess
from support import DEADLINE

pytestmark = pytest.mark.anyio

UVICORN = ["uvicorn", "plain_app:app", "--port", "{port}"]
GUNICORN = ["gunicorn", "plain_app:app", "--bind", "127.0.0.1:{port}", "--no-control-socket"]
GUNICORN += ["--worker-class", "uvicorn_worker.UvicornWorker"]
FASTAPI = ["plain_app.py", "--host", "127.0.0.1", "--port", "{port}"]

COMMANDS = {
    "uvicorn": UVICORN,
    "uvicorn --workers": [*UVICORN, "--workers", "2", "--timeout-graceful-shutdown", "1"],
    "uvicorn --reload": [*UVICORN, "--reload"],
    "uvicorn --loop asyncio": [*UVICORN, "--loop", "asyncio"],
    "uvicorn --ws": [*UVICORN, "--ws", "starcast.uvicorn:BroadcastProtocol"],
    "uvicorn.run": ["plain_app", "{port}"],
    "fastapi run": ["fastapi", "run", *FASTAPI],
    "fastapi dev": ["fastapi", "dev", *FASTAPI],
    "gunicorn": GUNICORN,
}


@pytest.fixture(params=COMMANDS)
def server(request, tmp_path):
    module = COMMANDS[request.param][0]
    if module in ("fastapi", "gunicorn"):  # they come with the extra `dev`, and not with `test`
        pytest.importorskip("fastapi_cli" if module == "fastapi" else module)
    server = ServerProcess(COMMANDS[request.param], tmp_path / "log", HERE)
    yield server
    server.kill()


async def test_clients_are_on_the_fast_path(server):
    async with server.connect("/ws") as one, server.connect("/ws", compression=None) as two:
        for client in (one, two):
            await client.send("stats")
            fast_path, asgi = json.loads(await asyncio.wait_for(client.recv(), DEADLINE))
            assert fast_path >= 1  # workers count for themselves
            assert asgi == {}
        for client in (one, two):
            await client.send("x" * 3000)
            assert await asyncio.wait_for(client.recv(), DEADLINE) == "x" * 3000
