"""What people pass as a URL, what hosters put into it, and which servers are the same."""

from __future__ import annotations

import getpass
import logging
import traceback
from urllib.parse import quote, quote_plus

import pytest
from pydantic import NatsDsn, PostgresDsn, RedisDsn, SecretStr
from redis.asyncio import Redis
from starlette.datastructures import URL

from backends.postgres_server import PASSWORD
from backends.redis_server import RedisServer
from starcast import BackendUnavailable, Broadcast, ConfigurationError
from starcast.backends import from_url
from starcast.backends.base import LoginRefused
from starcast.backends.nats import NatsBackend
from starcast.backends.postgres import PostgresBackend
from starcast.backends.postgres_url import Server
from starcast.backends.redis import RedisBackend
from support import said

pytestmark = pytest.mark.anyio

# What is passed


@pytest.mark.parametrize("kind", [str, URL], ids=["str", "URL"])
async def test_a_url_may_be_what_has_one_as_its_str(url, kind):
    async with Broadcast(kind(url)) as hub:
        assert await hub.healthy()


@pytest.mark.parametrize(
    ("dsn", "address"),
    [
        (RedisDsn("redis://u:p@redis.example:6380/0"), "Redis at redis.example:6380,"),
        (PostgresDsn("postgresql://u:p@pg.example/db"), "PostgreSQL at pg.example:5432, database"),
        (NatsDsn("nats://u:p@nats.example"), "NATS at nats.example:4222,"),
    ],
    ids=["redis", "postgres", "nats"],
)
def test_pydantic(dsn, address):
    assert from_url(dsn).address.startswith(address)
    assert type(from_url(dsn))(dsn).address.startswith(address)


@pytest.mark.parametrize("scheme", ["valkey", "redis"])
async def test_valkey(urls, scheme):
    async with Broadcast(urls("redis").replace("redis://", f"{scheme}://")) as hub:
        assert await hub.healthy()


def test_valkeys_is_tls():
    assert from_url("valkeys://h").address == from_url("rediss://h").address


@pytest.mark.parametrize("backend", [RedisBackend, PostgresBackend])
def test_blanks_around_a_url_do_not_count(backend):
    scheme = "redis" if backend is RedisBackend else "postgresql"
    assert from_url(f" {scheme}://host/1\n").address == backend(f"{scheme}://host/1").address


@pytest.mark.parametrize(
    ("url", "says"), [(None, "is None"), ("", "is empty"), (" \n", "is empty")]
)
def test_a_variable_that_is_not_set(url, says):
    with pytest.raises(ConfigurationError, match=r"environment variable .* is not set") as raised:
        Broadcast(url)
    assert says in str(raised.value)
    assert "memory://" in str(raised.value)


def test_what_is_no_url_and_could_be_made_one():
    with pytest.raises(ConfigurationError, match=r"pass url\.get_secret_value\(\)"):
        Broadcast(SecretStr("redis://:secret@localhost"))
    with pytest.raises(ConfigurationError, match=r"write Broadcast\(backend=\.\.\.\)"):
        Broadcast(RedisBackend("redis://localhost"))


@pytest.mark.parametrize("url", ["user:secret@host://x", "sec ret://host", "redis:secret@h://"])
def test_a_scheme_that_is_none_is_not_repeated(url):
    with pytest.raises(ConfigurationError, match="this one starts with none of them") as raised:
        Broadcast(url)
    assert "secret" not in str(raised.value)


# A backend of another kind


class OfBroadcaster:
    """What encode/broadcaster calls a backend."""

    async def connect(self): ...
    async def disconnect(self): ...
    async def join(self, channel): ...
    async def leave(self, channel): ...
    async def publish(self, channel, message): ...
    async def next_published(self): ...


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        (OfBroadcaster(), "OfBroadcaster is made for encode/broadcaster; pass its URL"),
        (object(), "object has none"),
        (Redis(), "Redis has none"),
        ("redis://localhost", "str has none"),
        (RedisBackend, "RedisBackend is a class"),
    ],
    ids=["broadcaster", "object", "client", "str", "class"],
)
def test_objects_that_are_not_backends(backend, says):
    with pytest.raises(ConfigurationError) as raised:
        Broadcast(backend=backend)
    assert "a method connect(deliver, lost) that returns a connection" in str(raised.value)
    assert says in str(raised.value)


# Options

ADVICE = [
    ("redis://h?family=6", "family", "take it out"),
    ("redis://h?maxRetriesPerRequest=5", "maxRetriesPerRequest", "take it out"),
    ("unix:///s?wait=5", "wait", "take it out"),
    ("redis://h?ssl=true", "ssl", "rediss://"),
    ("redis://h?tls=true", "tls", "rediss://"),
    ("redis://h?ssl_cert_reqs=none", "ssl_cert_reqs", "rediss://"),
    ("redis://h?ssl_ca_certs=/x", "ssl_ca_certs", "rediss://"),
    ("rediss://h?ssl_cert_reqs=CERT_NONE", "ssl_cert_reqs", "'none'"),
    ("redis://h?socket_timeout=CERT_NONE", "socket_timeout", "not valid"),
    ("redis://u:secret@h?db=x", "db", "not valid"),
    ("nats://h?tls=true", "tls", "tls://"),
    ("nats://u:p@a,nats://u:p@b?name=CERT_NONE", "name", "NatsBackend(url, name="),
    ("postgres://h/d?sslmode=require&channel_binding=require", "channel_binding", "take it out"),
    ("postgres://h/d?pgbouncer=true&connection_limit=1", "pgbouncer", "LISTEN"),
    ("postgres://h/d?sslmode=require&supa=base-pooler.x", "supa", "LISTEN"),
    ("postgres://h/d?connection_limit=1", "connection_limit", "Prisma"),
    ("postgres://h/d?schema=public", "schema", "Prisma"),
    ("postgres://h/d?connect_timeout=10", "connect_timeout", "libpq"),
    ("postgres://h/d?prepared_statement_cache_size=0", "prepared_statement_cache_size", "SQLAl"),
    ("postgres://h/d?ssl=true", "ssl", "sslmode=require"),
    ("postgres://h/d?ssl=CERT_NONE", "ssl", "sslmode=require"),
    ("postgres://h/d?sslmode=no-verify", "sslmode", "verify-full; for no-verify write require"),
    ("postgres://h/d?sslmode=verify-full&sslrootcert=system", "sslrootcert", "PostgresBackend(url"),
    ("postgres://h/d?uselibpqcompat=true", "uselibpqcompat", "take it out"),
]


@pytest.mark.parametrize(("url", "name", "advice"), ADVICE, ids=[url for url, *_ in ADVICE])
def test_an_option_that_a_driver_does_not_know_is_named(url, name, advice):
    with pytest.raises(ConfigurationError) as raised:
        Broadcast(url)
    assert f"the option {name!r} in the URL" in str(raised.value)
    assert advice in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://h?odd=s3cret",
        "redis://h?socket_timeout=s3cret",
        "rediss://h?ssl_cert_reqs=s3cret",
        "redis://u:12?s3cret=x@host",
        "redis://h?s3cret%20word=1",
        "nats://h?odd=s3cret",
        "nats://h?s3cret%20word=1",
        "nats://u:12?s3cret=x@host",
        "postgres://h/d?sslmode=s3cret",
        "postgres://h/d?pgbouncer=s3cret",
        "postgres://u:12?s3cret=x@host",
    ],
)
def test_the_value_of_an_option_is_not_told(url):
    with pytest.raises(ConfigurationError) as raised:
        Broadcast(url)
    assert "s3cret" not in str(raised.value)
    assert "s3cret" not in "".join(traceback.format_exception(raised.value)).split("Error: ", 1)[1]


def test_options_that_drivers_know():
    Broadcast("redis://h/0?protocol=3&socket_timeout=5&health_check_interval=30&client_name=x")
    Broadcast("rediss://h?ssl_cert_reqs=none&ssl_check_hostname=false")
    Broadcast("postgres://h/d?sslmode=require&application_name=x&target_session_attrs=any")


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("prepareThreshold=s3cret", "take it out"),  # JDBC's
        ("port_of_call=s3cret", "take it out"),
        ("work_mem=s3cret", "value is not valid"),
        ("max_connections=500", "does not let this user set it"),
        ("ssl_renegotiation_limit=s3cret", "value is not valid"),
    ],
)
async def test_an_option_that_the_server_does_not_know_is_named_at_the_start(urls, option, advice):
    hub = Broadcast(f"{urls('postgres')}?application_name=x&{option}")
    with pytest.raises(ConfigurationError) as raised:
        await hub.connect()
    assert f"the option {option.partition('=')[0]!r} in the URL of PostgreSQL" in str(raised.value)
    assert advice in str(raised.value)
    text = "".join(traceback.format_exception(raised.value))
    assert "s3cret" not in text.split("Error: ", 1)[1]
    assert PASSWORD not in text


async def test_options_that_the_server_knows(urls):
    url = f"{urls('postgres')}?sslmode=prefer&application_name=x&statement_timeout=5000"
    async with Broadcast(url) as hub:
        assert await hub.healthy()


def test_arguments_that_drivers_do_not_know():
    with pytest.raises(ConfigurationError, match=r"asyncpg\.connect does not know: a, pool_size"):
        PostgresBackend("postgresql://h", pool_size=1, a=2)
    with pytest.raises(ConfigurationError, match=r"backend sets these options: dsn, loop"):
        PostgresBackend("postgresql://h", dsn="x", loop=None)
    with pytest.raises(ConfigurationError, match=r"nats\.connect does not know: a, sslmode"):
        NatsBackend("nats://h", sslmode=1, a=2)


# Secrets, wherever they stand and whatever they hold

MARKS = "/@:?#%&[] \n+;=,\\"
PIECES = ("Hw7q", "Zk9v")  # of the password, on both sides of such a mark

WITH_A_PASSWORD = [
    "redis://u:{}@127.0.0.1:1",
    "redis://:{}@127.0.0.1:1/0",
    "redis://{}@127.0.0.1:1",
    "valkey://u:{}@127.0.0.1:1",
    "redis://127.0.0.1:1?password={}&db=0",
    "redis://127.0.0.1:1?username={}",
    "rediss://127.0.0.1:1?ssl_password={}",
    "unix://u:{}@/no/x.sock",
    "unix://:{}@/no/x.sock?db=0",
    "unix://{}@/no/x.sock",
    "unix://u:{}@no/x.sock",
    "unix://u:{}/no/x.sock",
    "unix:///no/x.sock?password={}",
    "nats://u:{}@127.0.0.1:1",
    "nats://{}@127.0.0.1:1",
    "nats://{}:p@127.0.0.1:1",
    "nats://u:{0}@127.0.0.1:1,nats://u:{0}@127.0.0.1:2",
    "nats://127.0.0.1:1,u:{}@127.0.0.1:2",
    "nats://127.0.0.1:1?password={}",
    "tls://u:{}@127.0.0.1:1",
    "postgresql://u:{}@127.0.0.1:1/d",
    "postgres://{}:p@127.0.0.1:1/d",
    "postgresql://{}@127.0.0.1:1/d",
    "postgresql://u:{}@127.0.0.1:1,127.0.0.1:2/d",
    "postgresql://u:{}@/d?host=127.0.0.1&port=1",
    "postgresql://127.0.0.1:1/d?user=u&password={}",
    "postgresql://127.0.0.1:1/d?passfile={}",
    "postgresql://127.0.0.1:1/d?sslmode=require&sslpassword={}",
    "postgresql://127.0.0.1:1/d?sslmode=require&sslkey={}",
    "ws://u:{}@127.0.0.1:1",
    "redis:{}@127.0.0.1",
    "user:{}@127.0.0.1",
]


@pytest.mark.parametrize("form", WITH_A_PASSWORD)
async def test_no_piece_of_a_password_is_told(form, caplog):
    """Neither when the URL is read, nor when there is no server, nor behind the error."""
    caplog.set_level(logging.NOTSET)
    for mark in [*MARKS, *map(quote_plus, MARKS), quote(" ")]:
        url = form.format(mark.join(PIECES))
        told = []
        try:
            hub = Broadcast(url, open_timeout=0)
        except ConfigurationError as exc:
            told.append(said(exc))
        else:
            told.append(f"{hub!r} {from_url(url).address}")
            with pytest.raises((BackendUnavailable, ConfigurationError)) as raised:
                await hub.connect()
            told.append(f"{said(raised.value)} {hub.stats()}")
        told = "".join([*told, caplog.text])
        assert not [piece for piece in PIECES if piece in told], (url, told)


@pytest.mark.parametrize(
    "url",
    [
        "unix://u:s3/cret@/x.sock",
        "unix://s3/cret@/x.sock",
        "unix://u:s3?cret@/x.sock",
        "unix://u:s3#cret@/x.sock",
        "unix://u:s3cret@",
        "unix://u:s3cret@host/x.sock",
        "unix://run/x.sock",
        "unix:///x@y.sock",
    ],
)
def test_a_url_of_a_socket_that_could_be_read_otherwise(url):
    with pytest.raises(ConfigurationError, match=r"unix://user:password@/path.*%2F for a /"):
        Broadcast(url)


async def test_a_url_of_a_socket():
    with RedisServer("--requirepass", "s3/cr@t") as server:
        path = server.path.replace("redis.sock", "redis%2Esock")
        async with Broadcast(f"unix://:s3%2Fcr%40t@{path}") as hub:
            assert await hub.healthy()
        with pytest.raises(LoginRefused) as raised:
            await Broadcast(f"unix://:s3%2Fwr%40ng@{path}").connect()
    assert server.path in str(raised.value)
    assert "s3/" not in said(raised.value)
    assert "wr@ng" not in said(raised.value)


async def test_what_a_server_repeats_of_a_password_is_not_told():
    """It does so with the arguments of a command that it does not know."""
    with RedisServer("--rename-command", "AUTH", "", "--rename-command", "HELLO", "") as server:
        url = server.url.replace("//", "//:s3cret@")
        with pytest.raises(BackendUnavailable, match="unknown command") as raised:
            await Broadcast(url, open_timeout=0).connect()
    assert "s3cret" not in said(raised.value)


# Which servers are the same

SAME = [
    ["redis://", "redis://localhost", "redis://127.0.0.1:6379/5", "redis://[::1]", "valkey://u:p@"],
    ["redis://H.example", "rediss://h.EXAMPLE:6379?ssl_cert_reqs=none", "redis://h.example."],
    ["unix:///run/redis.sock", "unix:///run/redis.sock?db=3"],
    ["redis://10.0.0.1", "redis://[::ffff:10.0.0.1]"],
    ["redis://[fe80::1]", "redis://[fe80:0::1]"],
    ["nats://localhost", "nats://127.0.0.1:4222", "tls://u:p@[::1]", "nats://0.0.0.0"],
    ["nats://a,nats://b:1", "nats://b:1,a"],
    ["postgresql://u@localhost/d", "postgres://v:p@127.0.0.1:5432/d", "postgres://[::1]/d",
     "postgres:///d", "postgres://u@:5432/d?dbname=x", "postgres://%6cocalhost/d"],
    ["postgres://me@h", "postgres://h/me", "postgres://h?dbname=me", "postgres://h?database=me",
     "postgres://h?user=me", "postgres:///me?host=h&port=5432"],
    ["postgres://a,b:1/d", "postgres://b:1,a:5432/d", "postgres:///d?host=a,b&port=5432,1"],
    ["postgres:///d?host=/run/pg", "postgres:///d?host=/run/pg/"],
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("PGHOST", "PGPORT", "PGUSER", "PGDATABASE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("urls_of_one", SAME, ids=[found[0] for found in SAME])
def test_spellings_of_one_server(urls_of_one):
    assert len({from_url(url).address for url in urls_of_one}) == 1


def test_different_servers():
    more = ["redis://:6380", "nats://b:2", "postgres://h/other", "postgres://h:1/me"]
    urls = [found[0] for found in SAME] + more
    assert len({from_url(url).address for url in urls}) == len(urls)


def test_the_environment_that_asyncpg_looks_at(monkeypatch):
    assert from_url("postgres://h").address == from_url(f"postgres://h/{getpass.getuser()}").address
    monkeypatch.setenv("PGUSER", "me")
    assert from_url("postgres://h").address == from_url("postgres://h/me").address
    monkeypatch.setenv("PGDATABASE", "d")
    assert from_url("postgres://h").address == from_url("postgres://h/d").address
    monkeypatch.setenv("PGHOST", "a.example,b.example")
    monkeypatch.setenv("PGPORT", "1")
    assert (
        from_url("postgres://").address == from_url("postgres://a.example:1,b.example:1/d").address
    )


def test_arguments_go_before_the_url():
    there = from_url("postgres://h:1/d").address
    options = {"host": "h", "port": 1, "database": "d", "user": "u"}
    assert PostgresBackend("postgres://x:2/y", **options).address == there
    assert (
        PostgresBackend("postgres://", **{**options, "host": ["h"], "port": [1]}).address == there
    )
    assert Server("postgres://x:2/y", options).where == "PostgreSQL at h, database d"
    alone = PostgresBackend("postgres:///d", host="::1").address
    assert alone == from_url("postgres://localhost/d").address


def test_a_client_of_redis():
    made = RedisBackend(client=Redis(host="LOCALHOST", password="s3cret"))
    assert made.address == from_url("redis://").address


@pytest.mark.parametrize("scheme", ["redis", "nats", "postgresql"])
def test_an_address_holds_no_login(scheme):
    address = from_url(f"{scheme}://s3cret-user:s3cret@host").address
    assert "s3cret:" not in address
    assert ":s3cret" not in address
