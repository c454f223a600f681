"""Model: what the hooks of a `ChannelsEndpoint` return, and its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..arguments import check_info, check_user
from ..codec import check_channel
from ..exceptions import ConfigurationError
from ..tuning import check_positive


@dataclasses.dataclass(frozen=True, slots=True)
class Subscription:
    """What a client may do on a channel: `on_subscribe` returns one to let it subscribe.

    Args:
        presence: Whether it is one of the members of the channel, and may ask who they are.
        join_leave: Whether it is told who joins and leaves.
        history: Whether it may ask for the channel's history. A client that has missed messages of
            a channel with a history gets them in any case.
        info: What others see of it on this channel, besides what `Client` says: JSON data of up to
            2 KiB.
        data: What the client gets with the answer: JSON data.
        expires_at: When it ends, in seconds since 1970, unless the client renews it with another
            token; None for never. `on_subscribe` is called with the new token.

    Raises:
        ConfigurationError: A value is not valid.
    """

    presence: bool = False
    join_leave: bool = False
    history: bool = False
    info: Any = None
    data: Any = None
    expires_at: float | None = None

    def __post_init__(self) -> None:
        check_time(self.expires_at)
        object.__setattr__(self, "info", check_info(self.info))


@dataclasses.dataclass(frozen=True, slots=True)
class Client:
    """Who a client is: `on_connect` returns one to let it connect.

    Args:
        user: Its user, up to 150 characters without control characters; an `int` and a `UUID` stand
            for their `str()`. Empty, the default, if that is not known.
        info: What others see of it: JSON data of up to 2 KiB.
        data: What the client gets with the answer: JSON data.
        expires_at: When the connection ends, in seconds since 1970, unless the client renews it
            with another token, which `on_refresh` gets; None, the default, for never.
        channels: The channels that it is subscribed to without asking: their names, or a dict of a
            `Subscription` for each.

    Raises:
        ConfigurationError: A value is not valid.
        TypeError: `user` is None, or cannot be one.
    """

    user: str = ""
    info: Any = None
    data: Any = None
    expires_at: float | None = None
    channels: Sequence[str] | Mapping[str, Subscription] = ()

    def __post_init__(self) -> None:
        if self.user != "":
            object.__setattr__(self, "user", check_user(self.user))
        object.__setattr__(self, "info", check_info(self.info))
        if isinstance(self.channels, str):
            raise ConfigurationError(f"channels is a list, such as [{self.channels!r}]")
        for name in self.channels:
            check_channel(name)
        check_time(self.expires_at)

    @property
    def subscriptions(self) -> dict[str, Subscription]:
        """The channels that it is subscribed to without asking."""
        if isinstance(self.channels, Mapping):
            return dict(self.channels)
        return dict.fromkeys(self.channels, Subscription())


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Bounds and timings of the connections of a `ChannelsEndpoint`.

    Args:
        ping_interval: Seconds between two pings, 25 by default.
        pong_timeout: Seconds that a client has to answer a ping, 10 by default. It is closed with
            3012 then, and comes back.
        connect_timeout: Seconds that a new client has for its first command, 10 by default. It is
            closed with 3502 then.
        max_subscriptions: Channels of one client, 500 by default. Error 106.
        commands: Commands a second that one client may send on average, 100 by default. Error 111.
        burst: Commands that it may send at once, 2,000 by default: after an outage it subscribes to
            all of its channels again.
        max_calls: Calls of `on_rpc` for one client at the same time, 16 by default. Nothing more is
            read from it until one of them has ended.
        max_history: Publications that one command may ask for, 1,000 by default.

    Raises:
        ConfigurationError: A value is not more than 0.
    """

    ping_interval: float = 25.0
    pong_timeout: float = 10.0
    connect_timeout: float = 10.0
    max_subscriptions: int = 500
    commands: float = 100.0
    burst: int = 2000
    max_calls: int = 16
    max_history: int = 1000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_positive(field.name, getattr(self, field.name))


def check_time(expires_at: object) -> None:
    """Raise `ConfigurationError` if it is no time."""
    if expires_at is not None and (
        isinstance(expires_at, bool) or not isinstance(expires_at, (int, float))
    ):
        raise ConfigurationError(
            "expires_at is a time in seconds since 1970, such as time.time() + 3600, "
            f"not {expires_at!r}"
        )
