import hmac

from starlette.applications import Starlette
from starlette.routing import Mount

from starcast import Broadcast

same_host = Broadcast()
these_pages = Broadcast(origins=["https://example.com", "http://localhost:5173"])
subdomains = Broadcast(origins=["https://example.com", "https://*.example.com"])
with_shells = Broadcast(
    origins=["https://example.com", "capacitor://localhost", "app://obsidian.md"]
)
every_page = Broadcast(origins="*")

CUSTOMERS = {"shop.example.org", "www.example.net"}


def known(origin, websocket):
    scheme, _, host = origin.partition("://")
    return scheme == "https" and host in CUSTOMERS


embedded = Broadcast(origins=known)

TOKENS = {"t-ann": "ann", "t-ben": "ben"}
MEMBERS = {"kitchen": {"ann", "ben"}, "bar": {"ben"}}
rooms = Broadcast()


async def may_listen(websocket, channel):
    user = TOKENS.get(websocket.query_params.get("token"))
    return user is not None and user in MEMBERS.get(channel, ())


SECRET = "t-ann"


def has_token(websocket, channel):
    match websocket.scope["subprotocols"]:
        case ["bearer", token]:
            return hmac.compare_digest(token.encode(), SECRET.encode())
    return False


app = Starlette(
    routes=[
        Mount("/rooms", rooms.app(publish=True, authorize=may_listen)),
        Mount("/token", rooms.app(authorize=has_token, subprotocols=["bearer"])),
        Mount("/same", same_host),
        Mount("/these", these_pages),
        Mount("/subdomains", subdomains),
        Mount("/shells", with_shells),
        Mount("/every", every_page),
        Mount("/embedded", embedded),
    ],
)
