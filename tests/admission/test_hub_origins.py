"""Which pages a hub lets in."""

from __future__ import annotations

import pytest

from starcast import (
    Broadcast,
    OriginRefused,
)
from support import Peer

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("how", ["connect", "serve", "mount"])
async def test_a_page_of_another_host_is_refused_before_accept(how, caplog):
    hub = Broadcast()
    peer = Peer({"origin": "https://evil.example", "host": "good.example"}, {"channel": "x"})
    if how == "mount":
        peer.scope |= {"path": "/x", "root_path": ""}
        await hub(peer.scope, peer.receive, peer.send)
        assert [m["type"] for m in peer.sent] == ["websocket.close"]
    else:
        with pytest.raises(OriginRefused, match=r"evil\.example"):
            await getattr(hub, how)(peer.websocket)
        assert peer.sent == []
    assert len(hub) == 0
    (record,) = caplog.records
    assert "'https://evil.example'" in record.getMessage()
    assert "'good.example'" in record.getMessage()


async def test_a_websocket_that_the_app_accepted_is_not_checked():
    hub = Broadcast()
    peer = Peer({"origin": "https://evil.example", "host": "good.example"})
    await peer.websocket.accept()
    await hub.connect(peer.websocket)
    assert len(hub) == 1
