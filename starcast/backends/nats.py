"""NATS: core subjects and, for a history, JetStream, over nats-py."""

from __future__ import annotations

import inspect
import re
from typing import Any

import nats.errors
from nats.aio.client import Client

from ..exceptions import BackendUnavailable, ConfigurationError
from ..sync.deadline import Deadline
from ..tuning import check_positive
from .base import Deliver, LoginRefused, Lost
from .nats_connection import NatsConnection
from .nats_names import endpoints_of, parse_url, same_servers
from .urls import Endpoint

STEP_TIMEOUT = 2.0  # seconds for each step of connecting to one server, such as its greeting

# Characters. A server takes 4,096 bytes of subject; a hub's name has 64 and a dot, and the 200
# characters of a channel take up to 2,400.
MAX_PREFIX = 200

# Printable ASCII but the wildcards, in tokens between dots; the last one may be empty.
_PREFIX = re.compile(r"(?:[!-)+,\-/-=?-~]+\.)*[!-)+,\-/-=?-~]*")

# Options of `nats.connect` that the user cannot set.
_FIXED: dict[str, Any] = {
    "allow_reconnect": False,
    # With 0 it would never give up. Now each server is tried twice, without a pause.
    "max_reconnect_attempts": 1,
    "reconnect_time_wait": 0,
    # Commands are never kept for a later connection, and passing one to nats-py never suspends.
    # (Where it did, nats-py would swallow a cancellation.)
    "pending_size": 0,
    "flusher_queue_size": 0,
    "no_echo": False,
    "verbose": False,
}

# Options whose value may be a function that is asked for it, for each connection.
_CREDENTIALS = ("user", "password", "token")


class NatsBackend:
    """`Broadcast("nats://localhost:4222")`: core NATS, and JetStream for a history.

    A channel is the subject of the prefix, the hub's name, a dot and the channel, in which every
    byte of its UTF-8 form that is not an ASCII letter, a digit, `-` or `_` is written as `%` and
    two upper-case hex digits. The channel `room 1.b` is `starcast:default.room%201%2Eb`, so no
    channel is a wildcard or has two tokens. `nats pub starcast:default.lobby hello` reaches the
    clients of the channel `lobby`; headers and reply subjects are ignored.

    With the prefix `starcast.` the channels of the hub `staff` are `starcast.staff.*` in
    permissions and for other subscribers. A process needs `starcast.*` as well, for a subject of
    its own: `%-` and a random word after the prefix, which is no hub's channel. When a message that
    it sends to itself there is back, the server has handled everything before it.

    One publisher's messages keep their order, also across channels. Those of two publishers may
    reach two processes in different orders.

    A history needs JetStream, of nats-server 2.11 or newer: start it with `-js`. There is a stream
    for each hub and each size and time to live, which is created when it is first used, on disk and
    without replicas: `starcast%3Adefault-100-300000` has 100 messages of each channel for 300,000
    milliseconds. It may be given replicas, and limits for all channels together. With a history,
    the user of the hub `staff` may need these rights, with `NAME` for the stream: to subscribe to
    `starcast.*` and `starcast.staff.>`, and to publish to `starcast.*`, `starcast.staff.>`,
    `$JS.API.STREAM.INFO.NAME`, `$JS.API.STREAM.CREATE.NAME`, `$JS.API.STREAM.UPDATE.NAME`,
    `$JS.API.STREAM.PURGE.NAME` and `$JS.API.DIRECT.GET.NAME`.

    Everybody gets the messages of a channel that are kept in one order. A message counts as
    published when it is stored, and then nothing is lost if the server is killed; if the machine
    fails, that takes `sync_interval: always` in the server's configuration. Offsets grow by more
    than one, because a stream numbers its messages over all channels. A client resumes if the event
    that it names is still stored, or if the stream shows that nothing after it was removed. In a
    cluster, messages of one publisher may overtake each other if one channel has another setting
    of its history, or none. Another size or time to live begins another history: while programs
    with both are running, each gets the messages of the other without ids.

    Args:
        url: `nats://` or `tls://`, with `user:password@` or `token@` (percent-encoded) before the
            host; port 4222 by default. More servers of a cluster follow after commas; one of them
            is chosen at random. `tls://` refuses a server without TLS; `nats://` uses TLS when
            the server asks for it. A `str`, or anything whose `str()` is one.
        prefix: What subjects begin with: up to 200 printable ASCII characters without blanks, `*`
            and `>`; may be empty.
        connect_timeout: How many seconds one attempt to connect may take, above 0. At most two of
            them are spent on each step with one server.
        options: Further arguments of `nats.connect`, such as `tls` (an `ssl.SSLContext`),
            `user_credentials`, `nkeys_seed` or `name`. `user`, `password` and `token` may be
            functions without arguments, plain or `async`, that are called for each connection: for
            passwords that expire. They are called on the event loop, within `connect_timeout`.

    Attributes:
        address: Where its channels are; see `Backend`.

    Raises:
        ConfigurationError: The URL, the prefix, the timeout or an option makes no sense.
    """

    keeps_history = True
    if_silent = "do the user's permissions allow to subscribe to what it may publish to?"

    def __init__(
        self,
        url: object,
        *,
        prefix: str = "starcast:",
        connect_timeout: float = 5.0,
        **options: Any,
    ) -> None:
        if len(prefix) > MAX_PREFIX or not _PREFIX.fullmatch(prefix):
            raise ConfigurationError(
                f"a prefix of subjects is up to {MAX_PREFIX} printable ASCII characters without "
                f"blanks, '*', '>' and empty tokens, not {prefix!r}"
            )
        self._connect_timeout = check_positive("connect_timeout", connect_timeout)
        if taken := options.keys() & {*_FIXED, "servers", "error_cb", "closed_cb"}:
            raise ConfigurationError(f"the backend sets these options: {', '.join(sorted(taken))}")
        known = inspect.signature(Client.connect).parameters
        if unknown := options.keys() - known:
            raise ConfigurationError(f"nats.connect does not know: {', '.join(sorted(unknown))}")
        self._servers, login = parse_url(str(url))
        if "password" in options and "token" in login:  # nats://user@host is a user then
            login = {"user": login["token"]}
        self._name = "NATS at " + ", ".join(url.partition("://")[2] for url in self._servers)
        step = min(STEP_TIMEOUT, connect_timeout)
        self._options = {**login, **options, **_FIXED, "connect_timeout": step}
        self.address = f"NATS at {', '.join(same_servers(self._servers))}, prefix {prefix!r}"
        self.endpoints: list[Endpoint] = [*endpoints_of(self._servers)]
        self._prefix = prefix

    async def connect(self, deliver: Deliver, lost: Lost) -> NatsConnection:
        """Connect to one of the servers. See `Backend`."""
        connection = NatsConnection(self._name, self._prefix, deliver)
        try:
            async with Deadline(self._connect_timeout):
                await connection.open(self._servers, await self._current_options(), lost)
            return connection
        except BaseException as error:
            await connection.close()
            if not isinstance(error, (OSError, ValueError, nats.errors.Error)):
                raise
            why = str(connection.error or error) or "no answer in time"
        # Not above: whatever the driver's error holds, it would be the context of this one.
        is_login = "authorization violation" in why.lower()
        raise (LoginRefused if is_login else BackendUnavailable)(f"{self._name}: {why}")

    async def _current_options(self) -> dict[str, Any]:
        options = dict(self._options)
        for name in _CREDENTIALS:
            ask = options.get(name)
            if callable(ask):
                try:
                    answer = ask()
                    options[name] = await answer if inspect.isawaitable(answer) else answer
                    continue
                except Exception as error:
                    kind = type(error).__name__  # and not what it says, which may hold a secret
                raise BackendUnavailable(f"{self._name}: {name}= raised {kind}")
        return options
