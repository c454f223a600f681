"""`starcast check`: tests the connection to a broker step by step.

It resolves the broker's name and opens a TCP connection. Then the backend itself connects,
subscribes and publishes, as it does for a hub.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from .. import logs
from ..backends import Backend
from ..backends.base import LoginRefused
from ..backends.urls import Endpoint
from ..broker.naming import NamedBackend
from ..exceptions import BackendUnavailable, ConfigurationError

Result = TypeVar("Result")

ROUND_TRIPS = 20

# A backend limits the time to connect itself, and knows better why that failed, so the step takes
# this much longer, in seconds.
EXTRA_TIME = 1.0

# What to do if a step fails.
ADVICE = {
    "name resolution": (
        "check the host in the URL; in a container it is the name of the broker's service or host, "
        "not localhost"
    ),
    "TCP": (
        "check that the broker is running and listens on this address and port, and that no "
        "firewall is in between"
    ),
    "unix socket": "check that the broker is running with this socket, and who may write to it",
    "TLS": (
        "check whether the broker speaks TLS on this port (rediss://, tls:// and sslmode=require "
        "ask for it), whether its certificate is for this host, whether this machine trusts the "
        "authority that signed it, and whether the files that the URL names exist"
    ),
    "login": (
        "check the user, the password and the database in the URL, and that the scheme is that of "
        "the broker on this port: redis:// does not speak TLS, rediss:// does"
    ),
    "subscribe": "give the user the right to subscribe to what the hub subscribes to",
    "publish": "give the user the right to publish to what the hub publishes to",
    "delivery": "check what is between here and the broker, and the rights of the user",
}

# What the errors of OpenSSL and of the drivers have in common when TLS fails.
_TLS = re.compile(r"\b(SSL|TLS|CERTIFICATE|certificate|secure connection)")


def _failed(step: str, why: object, advice: str = "") -> BackendUnavailable:
    """Return an error that says which step failed, why, and what to do."""
    return BackendUnavailable(f"{step} failed: {why}\n  {advice or ADVICE[step]}")


async def check(
    backend: Backend, name: str, tls: bool, timeout: float, say: Callable[[str], None]
) -> None:
    """Publish to a broker and receive the message, and report the result of each step.

    Args:
        backend: For the broker.
        name: Of the hub.
        tls: Whether the URL asks for TLS, by its scheme.
        timeout: How long each step and each round trip may take, in seconds.
        say: Called with a line for each step that succeeds.

    Raises:
        BackendUnavailable: A step failed.
        ConfigurationError: An option of the URL is not valid, which only the broker knows.
    """
    endpoints: list[Endpoint] = getattr(backend, "endpoints", [])
    await _reach(endpoints, timeout, say)
    arrived: asyncio.Queue[bytes] = asyncio.Queue()  # of our own messages, one at a time
    named = NamedBackend(backend, name)
    channel = f"starcast-check-{uuid.uuid4().hex}"

    def deliver(channel: str, payload: bytes, *position: object) -> None:
        arrived.put_nowait(payload)

    def lost(error: Exception) -> None:
        """Ignored: the step that waits for the broker raises, or takes too long."""

    async def step(
        at: str, work: Callable[[], Awaitable[Result]], seconds: float = timeout
    ) -> tuple[Result, float]:
        """Run a step, and return its result and how long it took, in milliseconds."""
        began = time.perf_counter()
        try:
            async with asyncio.timeout(seconds):
                result = await work()
            return result, _since(began)
        except ConfigurationError:
            raise
        except TimeoutError:
            why = f"no answer within {seconds:g} seconds"
        except Exception as exc:
            why = logs.describe(exc)
            if at == "login" and not isinstance(exc, LoginRefused):
                at = step_of(why)
        raise _failed(at, why, named.if_silent if at == "delivery" else "")

    def step_of(why: str) -> str:
        """Return which step of `connect` failed: it connects and logs in at once."""
        if "Permissions Violation" in why:  # NATS has a subject of its own for answers
            return "subscribe" if "Subscription" in why else "publish"
        for endpoint in endpoints:  # `tls.example.com` is no reason
            why = why.replace(endpoint if isinstance(endpoint, str) else endpoint[0], "")
        # A server without TLS waits for the rest of what it takes for a command. A file is that of
        # a certificate: of a socket it was seen before that it is there.
        is_tls = tls and ("no answer" in why or "No such file" in why)
        return "TLS" if is_tls or _TLS.search(why) else "login"

    connection, took = await step(
        "login", lambda: named.connect(deliver, lost), timeout + EXTRA_TIME
    )

    async def there_and_back() -> None:
        await connection.publish([(channel, b"again")])
        await arrived.get()

    try:
        say(f"login: {took:.1f} ms")
        _, took = await step("subscribe", lambda: connection.subscribe(channel))
        say(f"subscribe: {took:.1f} ms")
        first = [(channel, b"first")]
        _, took = await step("publish", lambda: connection.publish(first))
        say(f"publish: {took:.1f} ms")
        await step("delivery", arrived.get)
        trips = [(await step("delivery", there_and_back))[1] for _ in range(ROUND_TRIPS)]
        say(
            f"delivery: {ROUND_TRIPS} round trips, median {statistics.median(trips):.2f} ms, "
            f"slowest {max(trips):.2f} ms"
        )
    finally:
        await connection.close()


def _since(began: float) -> float:
    return 1000 * (time.perf_counter() - began)


async def _reach(endpoints: list[Endpoint], timeout: float, say: Callable[[str], None]) -> None:
    """Open a connection to each, and close it. One of several is enough."""
    failure: BackendUnavailable | None = None
    reached = False
    for endpoint in endpoints:
        try:
            if isinstance(endpoint, str):
                connecting = asyncio.open_unix_connection(endpoint)
                await _connect("unix socket", connecting, endpoint, timeout, say)
            else:
                await _reach_host(*endpoint, timeout, say)
            reached = True
        except BackendUnavailable as exc:
            failure = exc
            if len(endpoints) > 1:
                say(str(exc).partition("\n")[0])
    if failure is not None and not reached:
        raise failure


async def _reach_host(
    host: str, port: int | str, timeout: float, say: Callable[[str], None]
) -> None:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise _failed("name resolution", f"{host}: {_words(exc, timeout)}") from None
    addresses = ", ".join(dict.fromkeys(str(address[0]) for *_, address in found))
    say(f"name resolution: {host} is {addresses}")
    connecting = asyncio.open_connection(host, port)
    await _connect("TCP", connecting, f"{addresses}, port {port}", timeout, say)


async def _connect(
    step: str, connecting: Any, where: str, timeout: float, say: Callable[[str], None]
) -> None:
    began = time.perf_counter()
    try:
        async with asyncio.timeout(timeout):
            _, writer = await connecting
    except OSError as exc:
        raise _failed(step, f"{where}: {_words(exc, timeout)}") from None
    writer.transport.abort()
    await asyncio.sleep(0)  # the socket is closed in the event loop's next iteration
    say(f"{step}: {where}, {_since(began):.1f} ms")


def _words(error: OSError | UnicodeError, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} seconds"
    number = getattr(error, "errno", None) or 0
    if number > 0:
        return os.strerror(number)  # asyncio's own words repeat the address
    return getattr(error, "strerror", None) or str(error)
