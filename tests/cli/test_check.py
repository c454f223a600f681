"""`starcast check`: which step of the way to the broker failed, with real brokers."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl

import pytest
import trustme

from backends.front import front
from backends.postgres_server import PASSWORD, QUOTED
from backends.redis_server import RedisServer
from starcast import BackendUnavailable, cli
from starcast.backends import from_url
from starcast.backends.redis import RedisBackend
from starcast.cli.check import check
from support import Bus, free_port

pytestmark = pytest.mark.anyio

STEPS = ["name resolution", "TCP", "login", "subscribe", "publish", "delivery"]


@pytest.fixture
def checked(capsys):
    """Runs the command; returns its code, the steps that went well, and what it complains of."""

    async def run(url: str, *options: str) -> tuple[int, list[str], str]:
        code = await asyncio.to_thread(cli.main, ["check", url, *options])
        output = capsys.readouterr()
        assert "s3cret" not in output.out + output.err
        return code, [line.partition(":")[0] for line in output.out.splitlines()], output.err

    return run


def failed(step: str, error: str) -> str:
    """Return why the step failed, which is what the error must say, with what to do."""
    found = re.fullmatch(r"starcast: (.+?) failed: (.+)\n  (.+)\n", error, re.DOTALL)
    assert found, error
    assert found[1] == step, error
    return f"{found[2]} -> {found[3]}"


async def test_a_way_without_obstacles(url, capsys):
    assert await asyncio.to_thread(cli.main, ["check", url]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == STEPS
    assert lines[0] == "name resolution: 127.0.0.1 is 127.0.0.1"
    assert re.fullmatch(r"delivery: 20 round trips, median [\d.]+ ms, slowest [\d.]+ ms", lines[-1])
    assert output.err == ""


@pytest.mark.parametrize("error", [socket.gaierror(-2, "not known"), TimeoutError()])
async def test_name_resolution(url, checked, monkeypatch, error):
    async def getaddrinfo(*args, **kwargs):
        raise error

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    code, went_well, said = await checked(url.replace("127.0.0.1", "broker.example"))
    assert (code, went_well) == (1, [])
    why = failed("name resolution", said)
    assert "broker.example: " in why
    assert ("no answer within" if isinstance(error, TimeoutError) else "not known") in why
    assert "check the host in the URL" in why


async def test_a_name_that_none_can_be(checked):
    code, _, said = await checked(f"redis://{'x' * 64}")
    assert code == 1
    failed("name resolution", said)


@pytest.mark.parametrize("scheme", ["redis", "nats", "postgresql"])
async def test_tcp(checked, scheme):
    code, went_well, said = await checked(f"{scheme}://u:s3cret@127.0.0.1:{free_port()}")
    assert (code, went_well) == (1, ["name resolution"])
    assert "Connection refused -> check that the broker is running" in failed("TCP", said)


async def test_one_of_several_servers_is_enough(checked, own_nats):
    with_server = own_nats()
    gone = f"nats://127.0.0.1:{free_port()}"
    code, went_well, _ = await checked(f"{gone},{with_server.url}")
    assert code == 0
    assert went_well == ["name resolution", "TCP failed", *STEPS]
    with_server.kill()
    code, went_well, said = await checked(f"{gone},{with_server.url}")
    assert went_well == ["name resolution", "TCP failed"] * 2
    failed("TCP", said)


async def test_unix_socket(checked):
    with RedisServer() as server:
        code, went_well, _ = await checked(server.unix_url)
        assert (code, went_well) == (0, ["unix socket", *STEPS[2:]])
    code, went_well, said = await checked(server.unix_url)
    assert (code, went_well) == (1, [])
    assert f"{server.path}: No such file" in failed("unix socket", said)


async def test_tls_that_the_server_does_not_have(urls, checked):
    for url in (
        urls("redis").replace("redis://", "rediss://"),
        urls("nats").replace("nats://", "tls://u:s3cret@"),
        f"{urls('postgres')}?sslmode=require",
    ):
        code, went_well, said = await checked(url, "--timeout", "0.5")  # Redis waits for a line
        assert (code, went_well) == (1, STEPS[:2])
        assert "check whether the broker speaks TLS on this port" in failed("TLS", said)


async def test_tls_with_a_certificate_that_nobody_knows(urls, checked, tmp_path):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    for broker, tail in (
        ("redis", "rediss://u:s3cret@localhost:{}"),
        ("postgres", "postgres://u:s3cret@localhost:{}/d?sslmode=verify-ca&sslrootcert={}/ca.pem"),
    ):
        port = int(urls(broker).rpartition(":")[2].partition("/")[0])
        async with front(port, tls=context, asked=broker == "postgres") as port:
            _, went_well, said = await checked(tail.format(port, tmp_path))
        assert went_well == STEPS[:2]
        assert "certificate" in failed("TLS", said).partition(" -> ")[0]


async def test_tls_with_a_file_that_is_not_there(urls, checked):
    url = urls("redis").replace("redis://", "rediss://") + "?ssl_ca_certs=/no/such.pem"
    code, went_well, said = await checked(url)
    assert (code, went_well) == (1, STEPS[:2])
    assert "whether the files that the URL names exist" in failed("TLS", said)


async def test_login(urls, checked, own_nats):
    with RedisServer("--requirepass", "right") as redis:
        nats = own_nats('authorization: {user: app, password: "right"}')
        for url in (
            redis.url.replace("//", "//:s3cret@"),
            nats.url.replace("//", "//app:s3cret@"),
            urls("postgres").replace(QUOTED, "wrong-s3cret"),
            f"{urls('postgres').rpartition('/')[0]}/tls",  # no such database, which is not TLS
        ):
            code, went_well, said = await checked(url)
            assert (code, went_well) == (1, STEPS[:2])
            assert PASSWORD not in said
            assert "check the user, the password" in failed("login", said)


async def test_subscribe_and_publish(checked):
    """What the rights of a user leave out."""
    with RedisServer() as redis:
        for step in ("subscribe", "publish"):
            redis.command("ACL", "SETUSER", step, "on", ">s3cret", "+@all", "&*", f"-{step}")
            code, went_well, said = await checked(redis.url.replace("//", f"//{step}:s3cret@"))
            assert (code, went_well) == (1, STEPS[: STEPS.index(step)])
            assert f"give the user the right to {step}" in failed(step, said)


@pytest.mark.parametrize(
    ("publish", "subscribe", "step", "logged_in"),
    [
        ("starcast.>", "starcast.default.*", "subscribe", False),  # not to the subject for answers
        ("starcast.default.*", "starcast.>", "publish", False),
        ("starcast.>", "starcast.*", "subscribe", True),
        ("starcast.*", "starcast.>", "publish", True),
    ],
)
async def test_subscribe_and_publish_on_nats(
    checked, own_nats, publish, subscribe, step, logged_in
):
    rights = f'publish: {{allow: "{publish}"}}, subscribe: {{allow: "{subscribe}"}}'
    user = f"{{user: u, password: s3cret, permissions: {{{rights}}}}}"
    url = own_nats(f"authorization: {{users: [{user}]}}").url.replace("//", "//u:s3cret@")
    code, went_well, said = await checked(url, "--prefix", "starcast.", "--timeout", "0.5")
    assert (code, went_well) == (1, STEPS[: STEPS.index(step) if logged_in else 2])
    why = failed(step, said)
    assert "Permissions Violation" in why
    assert f"give the user the right to {step}" in why


async def test_delivery():
    async def lose(connection, messages, proceed):
        """The broker confirms the messages, and they arrive nowhere."""

    went_well: list[str] = []
    with pytest.raises(BackendUnavailable) as raised:
        await check(Bus(on_publish=lose), "default", False, 0.1, went_well.append)
    assert [line.partition(":")[0] for line in went_well] == STEPS[2:-1]
    assert "delivery failed: no answer within 0.1 seconds\n" in str(raised.value)


async def test_what_a_broker_advises_if_nothing_is_delivered(urls):
    backend = RedisBackend(urls("redis"))
    silent = Bus(on_publish=lambda connection, messages, proceed: asyncio.sleep(0))
    silent.if_silent = backend.if_silent
    with pytest.raises(BackendUnavailable) as raised:
        await check(silent, "default", False, 0.1, lambda line: None)
    assert str(raised.value).endswith(f"\n  {backend.if_silent}")


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "inf", "nan"])
def test_a_timeout_that_makes_no_sense(capsys, seconds):
    with pytest.raises(SystemExit) as raised:
        cli.main(["check", "redis://localhost", f"--timeout={seconds}"])
    assert raised.value.code == 2
    assert "a timeout must be a number above 0" in capsys.readouterr().err


async def test_an_option_that_only_the_server_knows(urls, checked):
    code, went_well, said = await checked(f"{urls('postgres')}?odd=s3cret")
    assert (code, went_well) == (2, STEPS[:2])
    assert "the option 'odd'" in said


async def test_a_backend_that_says_nothing_of_itself():
    """The messages that it raises may be empty, too."""
    lines = []
    await check(Bus(), "default", False, 5.0, lines.append)
    assert [line.partition(":")[0] for line in lines] == STEPS[2:]

    async def subscribe(connection, channel, proceed):
        raise KeyError

    async def publish(connection, messages, proceed):
        raise AssertionError("never")

    bus = Bus(on_subscribe=subscribe, on_publish=publish)
    with pytest.raises(BackendUnavailable, match="subscribe failed: KeyError"):
        await check(bus, "default", False, 5.0, lines.append)


@pytest.mark.parametrize(
    ("url", "endpoints"),
    [
        ("redis://", [("localhost", 6379)]),
        ("unix:///a/b", ["/a/b"]),
        ("nats://a,b:1", [("a", 4222), ("b", 1)]),
        ("postgres://a,b:1/d", [("a", "5432"), ("b", "1")]),
        ("postgres:///d?host=/run", ["/run/.s.PGSQL.5432"]),
        ("postgres:///d", []),
    ],
)
def test_where_servers_are(url, endpoints, monkeypatch):
    monkeypatch.delenv("PGHOST", raising=False)
    assert from_url(url).endpoints == endpoints
