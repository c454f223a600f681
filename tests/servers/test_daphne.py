"""Close codes for Daphne, played by a stub here; scenarios/test_servers.py runs the real one."""

from __future__ import annotations

import asyncio
import functools

import pytest
from starlette.types import Message
from starlette.websockets import WebSocket

from starcast import Broadcast
from support import Peer

pytestmark = pytest.mark.anyio


class Server:
    """Daphne's, which hands the app a partial of its method."""

    __module__ = "daphne.server"

    async def handle_reply(self, peer: Peer, message: Message) -> None:
        code = message.get("code", 1000)
        if code != 1000 and not 3000 <= code <= 4999:
            raise ValueError(f"invalid close code {code}")
        await peer.send(message)


async def served(peer: Peer, app) -> None:
    """Run the app for this client as Daphne does, in a task of its own."""
    send = functools.partial(Server().handle_reply, peer)
    await asyncio.create_task(app(peer.scope, peer.receive, send))


@pytest.mark.parametrize(
    ("code", "sent"), [(1000, 1000), (1001, 4001), (1013, 4013), (3000, 3000), (4013, 4013)]
)
@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("middleware", [True, False])
async def test_a_client_of_daphne_is_closed_with_a_code_that_it_takes(
    code, sent, registered, middleware
):
    hub = Broadcast()
    peer = Peer()

    async def endpoint(scope, receive, send):
        websocket = WebSocket(scope, receive, send)
        if registered:
            await hub.connect(websocket)
        else:
            await websocket.accept()
        await hub.close(websocket, code)

    async def app(scope, receive, send):
        async def wrapped(message):
            await send(message)

        await endpoint(dict(scope), receive, wrapped if middleware else send)

    await served(peer, app)
    assert peer.closed == sent


async def test_the_handlers_own_closes_too():
    hub = Broadcast()
    peer = Peer()

    async def app(scope, receive, send):
        websocket = WebSocket(scope, receive, send)
        await hub.connect(websocket, "a")
        await hub.connect(websocket, "b")
        await hub.publish("a", "hello")
        await websocket.close(1011, "sorry")

    await served(peer, app)
    assert peer.got == ["hello"]
    assert peer.sent[-1] == {"type": "websocket.close", "code": 4011, "reason": "sorry"}


async def test_clients_of_other_servers_get_the_code_itself():
    hub = Broadcast()
    peer = Peer()
    await hub.connect(peer.websocket)
    await hub.close(peer.websocket, 1013)
    assert peer.closed == 1013
