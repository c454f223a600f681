"""What an endpoint class sets and nothing reads: said where the class is defined."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from starlette.routing import Router, WebSocketRoute

from starcast import Broadcast, BroadcastEndpoint, ConfigurationError, ConnectionManager

pytestmark = pytest.mark.anyio


def define(bases: tuple[type, ...] = (BroadcastEndpoint,), **attributes: Any) -> type:
    return type("Chat", bases, attributes)


@pytest.mark.parametrize(
    ("attributes", "line"),
    [
        (
            {"brodcast": Broadcast()},
            "does not read Chat.brodcast: its hub is the attribute named broadcast, which",
        ),
        (
            {"hub": Broadcast()},
            "does not read Chat.hub: its hub is the attribute named broadcast, which",
        ),
        ({"encodng": "json"}, "does not read Chat.encodng: did you mean encoding?"),
        ({"heartbeat": {}}, "does not read Chat.heartbeat: did you mean heartbeats?"),
        ({"on_recieve": print}, "does not read Chat.on_recieve: did you mean on_receive?"),
        ({"getchannel": print}, "does not read Chat.getchannel: did you mean get_channel?"),
        ({"max_bufer": 1}, "argument of the hub, Broadcast(max_buffer=...)"),
        ({"origins": ["*"]}, "argument of the hub, Broadcast(origins=...)"),
        ({"publish": False}, "argument of the hub, Broadcast.app(publish=...)"),
    ],
)
def test_a_misspelt_attribute_is_in_the_log_once(caplog, attributes, line):
    cls = define(**attributes)
    define((cls,))
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("starcast", logging.WARNING)
    assert record.getMessage().startswith("BroadcastEndpoint ")
    assert line in record.getMessage()


async def test_an_async_get_channel_is_refused():
    async def get_channel(self, websocket): ...

    with pytest.raises(TypeError, match=r"^Chat\.get_channel is not awaited: write def"):
        define(get_channel=get_channel)


@pytest.mark.parametrize(
    "attributes",
    [
        {"broadcast": Broadcast(), "alerts": Broadcast()},
        {"broadcast": None},  # until the app sets it
        {"broadcast": property(lambda self: Broadcast())},
        {"encoding": property(lambda self: "text")},
        {"encoding": None, "heartbeats": {"ping": None}, "subprotocols": ["chat"]},
        {"name": "lobby", "user": None, "rooms": [], "encode": print, "error": "", "url": "/ws"},
        {"publish": print, "origins": print},  # helpers of the class
        {"decode": print, "decoder": print},  # whoever has both means both
        {"_brodcast": Broadcast(), "_encodng": "json"},
    ],
)
def test_nothing_is_said_of_anything_else(caplog, attributes):
    define(**attributes)
    assert caplog.records == []


def test_an_inherited_hub_is_a_hub_that_is_set(caplog):
    define((define(broadcast=Broadcast()),), alerts=Broadcast())
    assert caplog.records == []


@pytest.mark.parametrize("hub", ["redis://:secret@localhost", Broadcast, ConnectionManager()])
def test_a_hub_that_is_none_is_a_type_error(hub):
    with pytest.raises(TypeError, match=r"Chat.broadcast needs a Broadcast, not \w+") as raised:
        define(broadcast=hub)
    assert "secret" not in str(raised.value)


def test_an_encoding_that_is_none_is_an_error_where_the_class_is_defined():
    with pytest.raises(ConfigurationError, match="encoding must be text, bytes, json or None"):
        define(encoding="jsn")


async def test_the_line_is_there_before_a_client_of_the_wrong_hub_is(caplog, serve):
    hub = Broadcast()

    class Chat(BroadcastEndpoint):
        brodcast = hub

    assert "Chat.brodcast" in caplog.text
    server = await serve(Router([WebSocketRoute("/", Chat)]))
    async with server.connect("/"):
        assert (len(hub), len(Chat.broadcast)) == (0, 1)
