"""The URL of a Redis: its schemes, its options, and what is said about those that are wrong."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError

from ..exceptions import ConfigurationError
from .urls import first_of, options_of, refuse_option

# What to do about options that hosters and other libraries put into a URL.
_ADVICE = {
    "family": "it is for ioredis; take it out",
    "ssl": "write rediss:// for TLS, and take it out",
    "tls": "write rediss:// for TLS, and take it out",
    "ssl_cert_reqs": (
        "it is 'none', 'optional' or 'required', in a URL that begins with rediss:// (or "
        "valkeys://); Celery's CERT_NONE is 'none' here"
    ),
}
_TAKE_OUT = "redis-py does not know it; take it out"
_SSL_ONLY = "it is for TLS: write rediss:// in place of redis://"

# The schemes that redis-py does not know, and those that mean the same to it.
_SCHEMES = {"valkey": "redis", "valkeys": "rediss"}


def pool_of(url: str) -> ConnectionPool:
    """Return what redis-py makes of a URL; nothing connects.

    Raises:
        ConfigurationError: It makes no sense. The message repeats no part of it but an option.
    """
    scheme, separator, rest = url.partition("://")
    url = _SCHEMES.get(scheme, scheme) + separator + rest
    options: list[tuple[str, str]] = []
    try:
        parts = urlsplit(url)
        if "@" in parts.path + parts.query + parts.fragment:
            raise ValueError("a password that ends the host's part of the URL")
        if parts.scheme == "unix" and not _is_path(parts):
            raise ValueError("what should be a path may be a part of a password")
        options = options_of(parts.query)
        pool = ConnectionPool.from_url(url)
        pool.connection_class(**pool.connection_kwargs)  # looks at the options, and no more
        return pool
    except Exception as error:
        # Nothing of what the error says but the name of an option: it may repeat the password.
        refused = _refused(dict(options), error)
    # Not in the block above, where the error would go along as the context of this one.
    raise refused or ConfigurationError(
        "not the URL of a Redis server, or its options are not valid; a URL looks like "
        "redis://user:password@host:6379 or unix://user:password@/path/redis.sock, with %40 for an "
        "@ in the password or the path, %2F for a / in the password and so on"
    )


def _is_path(parts: SplitResult) -> bool:
    """Whether a URL of a socket has a path, and nothing but a login before it."""
    host = parts.netloc.rpartition("@")[2]
    return parts.path.startswith("/") and not (host or parts.fragment)


def _refused(options: dict[str, str], error: Exception) -> ConfigurationError | None:
    """Return what to say if redis-py complains about an option of the URL."""
    if isinstance(error, RedisError) and "ssl_cert_reqs" in options:
        return refuse_option("Redis", "ssl_cert_reqs", _ADVICE["ssl_cert_reqs"])
    name = first_of(options, str(error))
    if name is None:
        return None
    if isinstance(error, ValueError):
        return refuse_option("Redis", name, "its value is not valid")
    otherwise = _SSL_ONLY if name.startswith("ssl_") else _TAKE_OUT
    return refuse_option("Redis", name, _ADVICE.get(name, otherwise))
