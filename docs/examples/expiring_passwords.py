import os

from starcast import Broadcast
from starcast.backends.postgres import PostgresBackend


async def token() -> str:
    """Ask your token service. A plain function works too."""
    return os.environ["TOKEN"]


hub = Broadcast(backend=PostgresBackend(os.environ["DATABASE_URL"], password=token))
