"""Tuning: timings and bounds that few programs ever have to change, in one place."""

from __future__ import annotations

import dataclasses
import math

from .exceptions import ConfigurationError

KIB = 1024
MIB = 1024 * KIB


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Timings and bounds of a hub, for `Broadcast(tuning=Tuning(close_timeout=2.0))`.

    The defaults suit servers on the internet. A test suite may want shorter timeouts. Times are in
    seconds, sizes in bytes; all of them must be above 0.

    Args:
        close_timeout: How long a client has to take what it still has to get, and then the close
            frame. After that its connection is dropped.
        watch_interval: How often clients that have left without a word are looked for.
        send_timeout: How long one send may take on a server whose sockets are out of reach. By
            default, as long as uvicorn waits for the answer to a ping: 20 s until it is sent and
            20 s for the answer.
        time_slice: How long deliveries may run before other tasks of the event loop get a turn.
        max_pending: How much may wait for one event loop: by default, sixteen times the buffer of
            a client. A loop that is further behind is blocked.
        space_timeout: How long a sender waits for space in a buffer from which nothing is taken.
        publish_timeout: How long `publish` waits for space, and for a broker that is away.
        max_queued: How much may wait for the broker.
        batch_messages: How many messages are given to the broker at once.
        batch_size: How large one batch of messages may be.
        connect_timeout: How long one attempt to connect to the broker may take.
        stop_timeout: How long closing the connection to the broker may take.
        probe_timeout: How long a hub waits for a message to itself by way of the broker before it
            takes the connection for lost.
        min_throughput: The slowest connection that is taken for a working one, in bytes a second.
            A probe that is queued behind a large message has that much longer.
        first_backoff: The longest wait before the first attempt to reconnect. Each wait is a random
            part of its limit, and each limit is half as long again as the one before.
        max_backoff: The longest wait between two attempts to reconnect.
        stable_after: How long a connection has to last until the backoff begins anew.
        max_held_back: How much is held back of what arrives while channels are being resubscribed.
        max_subscribing: How many channels are being subscribed to at once.
        subscribe_backoff: The longest wait before a channel that the broker refused is tried again.
        position_interval: How long nothing arrives on a channel that has a history, until the
            broker is asked whether there was something: it may drop messages without a word.
        restart_delay: How long the connection to the broker is not started again on an event loop
            that has cancelled it: most likely that loop is ending.
    """

    close_timeout: float = 10.0
    watch_interval: float = 0.5
    send_timeout: float = 40.0
    time_slice: float = 0.005
    max_pending: int = 16 * MIB
    space_timeout: float = 10.0
    publish_timeout: float = 2.0
    max_queued: int = 16 * MIB
    batch_messages: int = 1000
    batch_size: int = MIB
    connect_timeout: float = 10.0
    stop_timeout: float = 5.0
    probe_timeout: float = 5.0
    min_throughput: int = MIB
    first_backoff: float = 0.1
    max_backoff: float = 1.5
    stable_after: float = 10.0
    max_held_back: int = 8 * MIB
    max_subscribing: int = 1000
    subscribe_backoff: float = 10.0
    position_interval: float = 30.0
    restart_delay: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_positive(field.name, value)
            if field.type == "int" and not isinstance(value, int):
                raise ConfigurationError(f"{field.name} must be an integer, not {value!r}")


def check_positive(name: str, value: float) -> float:
    """Return a number of seconds or bytes if it is valid.

    Raises:
        ConfigurationError: It is not a finite number above 0.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf):
        raise ConfigurationError(f"{name} must be a number above 0, not {value!r}")
    return value
