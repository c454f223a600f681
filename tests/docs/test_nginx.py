"""The nginx configuration of the documentation, in front of an app, where there is an nginx."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import ssl
import subprocess
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import trustme
import websockets
from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.websockets import WebSocket

from event_source import EventSource
from starcast import SSE, Broadcast, BroadcastEndpoint
from support import free_port, until, until_sync

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="there is no nginx here"),
]

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "nginx.conf"
NAME = "chat.example.com"


def make_app():
    hub = Broadcast()
    app = FastAPI(lifespan=hub.lifespan)

    @app.get("/url")
    async def url(request: Request):
        return {"url": str(request.url), "client": request.client.host}

    @app.websocket("/ws/{channel}")
    class Chat(BroadcastEndpoint):
        broadcast = hub

        async def on_connect(self, websocket: WebSocket) -> None:
            await super().on_connect(websocket)
            await hub.send(str(websocket.url), to=websocket)

    return app


@contextlib.contextmanager
def nginx(folder, port, app_port, shop_port):
    authority = trustme.CA()
    certificate = authority.issue_cert(NAME)
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    text = EXAMPLE.read_text().replace("listen 443", f"listen 127.0.0.1:{port}")
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{app_port}")
    text = text.replace("127.0.0.1:8001", f"127.0.0.1:{shop_port}")
    text = re.sub(r"(ssl_certificate(?:_key)? +)\S+;", rf"\1{folder}/both.pem;", text)
    text = text.replace("75s", "3s")
    with running(folder, text):
        trusted = ssl.create_default_context()
        authority.configure_trust(trusted)
        yield trusted


@contextlib.contextmanager
def running(folder, text):
    """An nginx with this configuration of its http block."""
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary}\n{text}\n}}"
    )
    process = subprocess.Popen(["nginx", "-c", config, "-e", folder / "error.log"])
    try:
        until_sync((folder / "pid").exists)
        yield
    finally:
        process.terminate()
        process.wait(10)


async def test_streams_behind_nginx_as_it_comes(serve, tmp_path):
    """Nothing but `proxy_pass`: it would buffer a response, and speaks HTTP/1.0 to the app."""
    hub = Broadcast()
    server = await serve(Starlette(routes=[Mount("/live", hub.app(sse=SSE(heartbeat=0.2)))]))
    port = free_port()
    text = (
        f"gzip on; gzip_types *; server {{ listen 127.0.0.1:{port};"
        f" location / {{ proxy_pass http://127.0.0.1:{server.port}; }} }}"
    )
    with running(tmp_path, text):
        front = SimpleNamespace(port=port)
        async with EventSource(front, "/live/a", Accept_Encoding="gzip") as source:
            assert hub.channels == {"a": 1}
            for number in range(3):
                await hub.publish("a", f"{number}")
                assert (await source.got(number + 1))[-1] == f"{number}"
            await until(lambda: source.comments)
        await until(lambda: hub.channels == {})  # nginx says at once that its client is gone


async def test_nginx(serve, tmp_path):
    # As uvicorn does with --forwarded-allow-ips 127.0.0.1, its default, and --root-path.
    server = await serve(make_app(), ws_ping_interval=0.3, proxy_headers=True)
    shop = await serve(make_app(), root_path="/shop")
    port = free_port()
    with nginx(tmp_path, port, server.port, shop.port) as trusted:

        def connect(path, **options):
            url = f"wss://{NAME}:{port}{path}"
            options = {"ssl": trusted, "host": "127.0.0.1", "proxy": None, **options}
            return websockets.connect(url, **options)

        page = f"https://{NAME}:{port}"
        async with connect("/ws/a", origin=page) as ann, connect("/ws/a", origin=page) as ben:
            assert await ann.recv() == await ben.recv() == f"wss://{NAME}/ws/a"
            await ann.send("hello")
            assert await ann.recv() == await ben.recv() == "hello"
            # Nobody says anything for longer than proxy_read_timeout: the server's pings do.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(3.5):
                    await ann.recv()
            await ann.send("still here")
            assert await ben.recv() == "still here"
        with pytest.raises(websockets.InvalidStatus) as info:
            await connect("/ws/a", origin="https://elsewhere.example")
        assert info.value.response.status_code == 403
        async with connect("/shop/ws/a", origin=page) as ann:
            assert await ann.recv() == f"wss://{NAME}/shop/ws/a"
        async with httpx.AsyncClient(verify=trusted, trust_env=False) as http:
            headers = {"Host": NAME}
            extensions = {"sni_hostname": NAME}
            url = f"https://127.0.0.1:{port}/url"
            answer = await http.get(url, headers=headers, extensions=extensions)
        assert answer.json()["url"] == f"https://{NAME}/url"
