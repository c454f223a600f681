import os

from redis.asyncio import Redis

from starcast import Broadcast
from starcast.backends.redis import RedisBackend

redis = Redis.from_url(os.environ.get("REDIS_URL", "redis://localhost"))
hub = Broadcast(backend=RedisBackend(client=redis))
