"""Passwords that expire: each connection asks for the one that is valid now."""

from __future__ import annotations

import time

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.credentials import CredentialProvider

from backends.nats_server import NatsServer
from backends.postgres_server import PostgresServer
from backends.redis_server import RedisServer
from starcast import BackendUnavailable, Broadcast
from starcast.backends.nats import NatsBackend
from starcast.backends.postgres import PostgresBackend
from starcast.backends.redis import RedisBackend
from support import joined, said, until

pytestmark = pytest.mark.anyio


class Vault:
    """Where the password is, and who has asked for it."""

    def __init__(self) -> None:
        self.password = "s3cret-one"
        self.asked: list[str] = []

    def ask(self) -> str:
        self.asked.append(self.password)
        return self.password

    async def ask_async(self) -> str:
        return self.ask()


class FromVault(CredentialProvider):
    def __init__(self, vault: Vault) -> None:
        self.vault = vault

    def get_credentials(self):
        return "app", self.vault.ask()

    async def get_credentials_async(self):
        return "app", await self.vault.ask_async()


class OnRedis:
    def __init__(self) -> None:
        self.server = RedisServer()

    async def set(self, password: str) -> None:
        rights = ["on", "resetpass", f">{password}", "+@all", "&*"]
        self.server.command("ACL", "SETUSER", "app", *rights)
        if any(client["user"] == "app" for client in self.server.clients()):
            self.server.command("CLIENT", "KILL", "USER", "app")

    def backend(self, vault: Vault, kind: str) -> RedisBackend:
        client = Redis(port=self.server.port, credential_provider=FromVault(vault))
        return RedisBackend(client=client)


class OnNats:
    def __init__(self) -> None:
        self.server = NatsServer()

    async def set(self, password: str) -> None:
        self.server.configure(f'authorization: {{user: app, password: "{password}"}}')
        self.server.kill()
        self.server.start()

    def backend(self, vault: Vault, kind: str) -> NatsBackend:
        url = self.server.url.replace("//", "//app@")
        return NatsBackend(url, password=vault.ask if kind == "plain" else vault.ask_async)


class OnNatsWithToken(OnNats):
    async def set(self, password: str) -> None:
        self.server.configure(f'authorization: {{token: "{password}"}}')
        self.server.kill()
        self.server.start()

    def backend(self, vault: Vault, kind: str) -> NatsBackend:
        return NatsBackend(self.server.url, token=vault.ask if kind == "plain" else vault.ask_async)


class OnPostgres:
    def __init__(self) -> None:
        self.server = PostgresServer()

    async def set(self, password: str) -> None:
        connection = await asyncpg.connect(self.server.url)
        if not await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = 'app'"):
            await connection.execute("CREATE ROLE app LOGIN")
        await connection.execute(f"ALTER ROLE app PASSWORD '{password}'")
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"
        )
        await connection.close()

    def backend(self, vault: Vault, kind: str) -> PostgresBackend:
        url = f"postgresql://app@127.0.0.1:{self.server.port}/postgres"
        return PostgresBackend(url, password=vault.ask if kind == "plain" else vault.ask_async)


@pytest.fixture(params=[OnRedis, OnNats, OnNatsWithToken, OnPostgres])
async def place(request, anyio_backend):
    place = request.param()
    place.server.start()
    yield place
    place.server.close()


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_a_hub_comes_back_with_the_password_of_now(place, kind):
    vault = Vault()
    await place.set(vault.password)
    async with Broadcast(backend=place.backend(vault, kind)) as hub:
        peer = await joined(hub, "room")
        await hub.publish("room", "before")
        await until(lambda: peer.got == ["before"])
        assert set(vault.asked) == {"s3cret-one"}
        vault.password = "s3cret-two"
        await place.set(vault.password)
        await until(lambda: hub.stats().backend.gaps)
        await hub.publish("room", "after")
        await until(lambda: peer.got == ["before", "after"])
        assert "s3cret-two" in vault.asked


async def test_a_password_that_is_no_more(place):
    """The broker refuses it, and it is in no error."""
    vault = Vault()
    await place.set("s3cret-two")
    with pytest.raises(BackendUnavailable) as raised:
        await Broadcast(backend=place.backend(vault, "async")).connect()
    assert "s3cret" not in said(raised.value)


@pytest.mark.parametrize("kind", [NatsBackend, PostgresBackend])
@pytest.mark.parametrize("is_async", [False, True])
async def test_whoever_has_the_password_fails(urls, kind, is_async):
    def broken() -> str:
        raise KeyError("s3cret")

    async def broken_async() -> str:
        return broken()

    url = urls("nats" if kind is NatsBackend else "postgres")
    backend = kind(url, password=broken_async if is_async else broken)
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match="KeyError") as raised:
        await Broadcast(backend=backend, open_timeout=0).connect()
    assert time.monotonic() - began < 5
    assert "s3cret" not in said(raised.value)
