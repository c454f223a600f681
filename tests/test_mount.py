"""The hub as an ASGI app below a mount: which part of the path is the channel."""

from __future__ import annotations

import warnings

import pytest
from fastapi import FastAPI
from fastapi.exceptions import FastAPIDeprecationWarning
from starlette.applications import Starlette
from starlette.routing import Host, Mount, Router
from websockets.exceptions import InvalidStatus

from starcast import Broadcast
from support import Peer, until

pytestmark = pytest.mark.anyio

# A channel as it stands in the URL, and its name.
CHANNELS = [
    ("news", "news"),
    ("a/b", "a/b"),
    ("a%2Fb", "a/b"),  # the server decodes the path, so these two are one
    ("a%252Fb", "a%2Fb"),
    ("a%20b", "a b"),
    ("caf%C3%A9", "caf\u00e9"),
    ("news/", "news/"),
    ("/news", "/news"),
    ("..", ".."),
    ("live", "live"),
    ("livestream", "livestream"),
    ("live/news", "live/news"),
    ("live/live/news", "live/live/news"),
    ("api", "api"),
    ("api/live/news", "api/live/news"),
    ("v1/live/news", "v1/live/news"),
]


def fastapi(root_path: str = "") -> FastAPI:
    with warnings.catch_warnings():
        # It is deprecated, and in a great many programs.
        warnings.simplefilter("ignore", FastAPIDeprecationWarning)
        return FastAPI(root_path=root_path)


class Asked:
    """A hub whose `authorize` keeps what it is asked for."""

    def __init__(self) -> None:
        self.hub = Broadcast()
        self.channels: list[str] = []
        self.app = self.hub.app(authorize=self._authorize)

    async def _authorize(self, websocket, channel) -> bool:
        assert websocket.path_params["channel"] == channel
        self.channels.append(channel)
        return True

    async def channel(self, server, path: str) -> str | None:
        """The channel that a client of this path is on; None if it is refused."""
        self.channels.clear()
        try:
            async with server.connect(path) as client:
                await until(lambda: self.hub.channels)
                (name,) = self.hub.channels
                assert self.channels == [name]
                await self.hub.publish(name, "hello")
                assert await client.recv() == "hello"
        except InvalidStatus:
            assert self.channels == []
            return None
        await until(lambda: not self.hub.channels)
        return name


# Who knows the prefix /api: the app, the server, both, or nobody. A server that knows it puts it in
# front of every path, because it takes the proxy for one that strips.
KNOWN = [
    # app, server, prefixes that a client's path may have
    ("", "", [""]),
    ("/api", "", ["", "/api"]),
    ("", "/api", [""]),
    ("/api", "/api", [""]),
]


@pytest.mark.parametrize(("app_knows", "server_knows", "prefixes"), KNOWN)
@pytest.mark.parametrize("at", ["/live", "/live/v1", "/{tenant}"])
async def test_a_mount_behind_a_prefix(serve, app_knows, server_knows, prefixes, at):
    asked = Asked()
    app = fastapi(app_knows)
    app.mount(at, asked.app)
    server = await serve(app, root_path=server_knows)
    for prefix in prefixes:
        for written, name in CHANNELS:
            if at == "/{tenant}" and prefix:
                continue  # /api/t/... is below the mount in two ways: see the next test
            path = f"{prefix}{at.format(tenant='t')}/{written}"
            assert await asked.channel(server, path) == name, path


async def test_a_prefix_that_might_be_a_tenant_is_the_prefix(serve):
    asked = Asked()
    app = fastapi("/api")
    app.mount("/{tenant}", asked.app)
    server = await serve(app)
    assert await asked.channel(server, "/api/t/news") == "news"
    assert await asked.channel(server, "/apis/t/news") == "t/news"


@pytest.mark.parametrize(("app_knows", "server_knows", "prefixes"), KNOWN)
@pytest.mark.parametrize("inner", ["fastapi", "starlette", "mount"])
async def test_two_mounts_deep(serve, app_knows, server_knows, prefixes, inner):
    asked = Asked()
    app = fastapi(app_knows)
    if inner == "mount":
        app.router.routes.append(Mount("/v1", routes=[Mount("/live", asked.app)]))
    else:
        sub = FastAPI() if inner == "fastapi" else Starlette()
        sub.mount("/live", asked.app)
        app.mount("/v1", sub)
    server = await serve(app, root_path=server_knows)
    for prefix in prefixes:
        for written, name in CHANNELS:
            # Where the app alone knows the prefix, Starlette's second mount looks for it in vain,
            # whatever is mounted there, and the client never gets as far as the hub.
            lost = app_knows and not server_knows and not prefix
            path = f"{prefix}/v1/live/{written}"
            assert await asked.channel(server, path) == (None if lost else name), path


@pytest.mark.parametrize(("app_knows", "server_knows", "prefixes"), KNOWN)
@pytest.mark.parametrize("root", ["/api", "/api/"])
async def test_a_mount_at_the_root(serve, app_knows, server_knows, prefixes, root):
    asked = Asked()
    app = fastapi(app_knows and root)
    app.mount("/", asked.app)
    server = await serve(app, root_path=server_knows)
    for prefix in prefixes:
        assert await asked.channel(server, f"{prefix}/news") == "news"
        assert await asked.channel(server, f"{prefix}/a/b") == "a/b"


async def test_a_mount_named_like_the_prefix(serve):
    asked = Asked()
    app = fastapi("/live")
    app.mount("/live", asked.app)
    server = await serve(app)
    for path in ("/live/live/news", "/live/live/live/news"):
        assert await asked.channel(server, path) == path.removeprefix("/live/live/")
    assert await asked.channel(server, "/live/news") is None  # of the prefix, and below no mount


async def test_two_mounts_of_one_name(serve):
    asked = Asked()
    app = fastapi("/api")
    app.mount("/live", Router([Mount("/live", asked.app)]))
    server = await serve(app)
    assert await asked.channel(server, "/api/live/live/news") == "news"
    assert await asked.channel(server, "/live/live/news") == "news"
    # Starlette lets this pass, which is not below both mounts.
    assert await asked.channel(server, "/live/news") is None


@pytest.mark.parametrize("prefix", ["", "/api"])
async def test_an_app_with_a_prefix_inside_another(serve, prefix):
    """A FastAPI app puts its own root path in the place of what was there."""
    asked = Asked()
    sub = fastapi("/api")
    sub.mount("/live", asked.app)
    server = await serve(Starlette(routes=[Mount("/", sub)]))
    assert await asked.channel(server, f"{prefix}/live/news") == "news"
    assert await asked.channel(server, f"{prefix}/live/live/news") == "live/news"


async def test_below_a_host(serve):
    asked = Asked()
    app = fastapi("/api")
    app.router.routes.append(Host("127.0.0.1", Router([Mount("/live", asked.app)])))
    server = await serve(app)
    for path in ("/live/news", "/api/live/news"):
        assert await asked.channel(server, path) == "news"


@pytest.mark.parametrize("root_path", ["", "/api"])
async def test_the_hub_alone(serve, root_path):
    asked = Asked()
    server = await serve(asked.app, root_path=root_path)
    for written, name in CHANNELS:
        assert await asked.channel(server, f"/{written}") == name


@pytest.mark.parametrize(
    ("path", "root_path", "channel"),
    [
        ("/news", "", "news"),
        ("/api/news", "/api", "news"),
        ("/apis/news", "/api", "apis/news"),
        ("/news", "/api", "news"),  # a server that leaves the path as the proxy has sent it
        ("/b/news", "/a/b", "b/news"),
        ("/news", "/", "news"),
    ],
)
async def test_the_hub_alone_on_a_server_that_leaves_the_path_alone(path, root_path, channel):
    asked = Asked()
    peer = Peer()
    peer.scope |= {"path": path, "root_path": root_path}
    peer.leave()
    await asked.app(peer.scope, peer.receive, peer.send)
    assert asked.channels == [channel]


@pytest.mark.parametrize("at", ["", "/", "/live"])
@pytest.mark.parametrize(("app_knows", "server_knows"), [known[:2] for known in KNOWN])
async def test_a_newline_at_the_end_does_not_move_the_mount(serve, at, app_knows, server_knows):
    """`$` in Starlette's pattern matches before one, so the mount's path lacks a character."""
    asked = Asked()
    app = fastapi(app_knows)
    app.mount(at, asked.app)
    server = await serve(app, root_path=server_knows)
    path = f"{at.rstrip('/')}/news"
    for end in ("%0A", "%0D%0A", "%0Anews", "%0A%0A"):
        assert await asked.channel(server, path + end) is None
    assert await asked.channel(server, f"{at.rstrip('/')}/%0A") is None
    assert await asked.channel(server, path) == "news"


@pytest.mark.parametrize("framework", [Starlette, fastapi])
async def test_a_mount_without_a_channel_is_refused(serve, framework):
    asked = Asked()
    app = framework()
    app.mount("/live", asked.app)
    server = await serve(app)
    for path in ("/live/", "/live", "/lives/news", "/"):
        assert await asked.channel(server, path) is None
