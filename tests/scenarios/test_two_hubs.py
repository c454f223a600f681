"""Two hubs are two rooms on every broker, unless they were told to share."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from starcast import Broadcast, ConfigurationError
from starcast.backends import from_url
from support import joined, until

pytestmark = pytest.mark.anyio


async def test_a_stranger_on_a_public_mount_does_not_read_a_guarded_hub(url, serve):
    public = Broadcast(url)
    staff = Broadcast(url, name="staff")
    app = Starlette(
        routes=[
            Mount("/live", public.app(publish=True)),
            Mount("/staff", staff.app(authorize=lambda websocket, channel: True)),
        ]
    )
    async with public, staff:
        server = await serve(app)
        guesses = ["payroll", "staff:payroll", "default:payroll", ":payroll", "staff.payroll"]
        strangers = [await server.connect(f"/live/{guess}") for guess in guesses]
        async with server.connect("/staff/payroll") as insider:
            await staff.publish("payroll", "secret")
            assert await insider.recv() == "secret"
            for stranger in strangers:  # nor can they write there
                await stranger.send("forged")
                assert await stranger.recv() == "forged"
            await public.publish("payroll", "for the public")
            assert await strangers[0].recv() == "for the public"
            await staff.publish("payroll", "after")
            assert await insider.recv() == "after"
        for stranger in strangers:
            await stranger.close()


async def test_the_same_name_on_purpose_is_the_same_room(url):
    async with Broadcast(url, name="both") as one, Broadcast(url, name="both") as two:
        peers = [await joined(hub, "room") for hub in (one, two)]
        await one.publish("room", "1")
        await two.publish("room", "2")
        for peer in peers:
            await until(lambda peer=peer: sorted(peer.got) == ["1", "2"])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST"])
async def test_the_default_name_twice_does_not_open(url, host):
    second = Broadcast(url.replace("127.0.0.1", host))
    async with Broadcast(url) as first:
        with pytest.raises(ConfigurationError, match=r'name="staff"') as raised:
            await second.connect()
        assert "127.0.0.1" in str(raised.value)
        assert "@" not in str(raised.value)
        assert await first.healthy()
    assert host != "127.0.0.1" or await _opens(second)


async def _opens(hub: Broadcast) -> bool:
    async with hub:
        return await hub.healthy()


async def test_another_prefix_is_another_room(url):
    backend = type(from_url(url))(url, prefix="other:")
    async with Broadcast(url) as one, Broadcast(backend=backend) as two:
        peers = [await joined(hub, "room") for hub in (one, two)]
        await one.publish("room", "1")
        await two.publish("room", "2")
        await until(lambda: [peer.got for peer in peers] == [["1"], ["2"]])
