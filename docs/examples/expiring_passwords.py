import os

from starcast import Broadcast
from starcast.backends.postgres import PostgresBackend


async def token() -> str:
    """Ask whoever gives out tokens. A plain function would do as well."""
    return os.environ["TOKEN"]


hub = Broadcast(backend=PostgresBackend(os.environ["DATABASE_URL"], password=token))
