"""What every backend must do: `CHECKS` for a test suite of your own.

    @pytest.mark.anyio
    @pytest.mark.parametrize("check", starcast.testing.CHECKS, ids=lambda check: check.__name__)
    async def test_my_backend(check):
        await check(lambda: MyBackend("my://localhost"))

Each check takes a function that makes a backend, and calls it as often as it needs to; all of these
backends must use the same broker. A check raises AssertionError if the backend breaks the contract,
and leaves nothing behind but histories, which expire. Its channels begin with `check-`. Nothing
here needs pytest. `starcast.testing.history.CHECKS` are for backends with `keeps_history`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

from ..backends.base import Backend, BrokerConnection
from ..broadcast import Broadcast
from ..history import Position

Make = Callable[[], Backend]
Check = Callable[[Make], Awaitable[None]]

# How long a check waits for something until it fails, in seconds. Set it to more for a broker that
# is far away.
DEADLINE = 10.0

# Names that a broker might mistake for something else, and the longest ones.
ODD_NAMES = [
    *("*", ">", "a.b", "a..b", ".", "a b", "a*", "'", '"', "\\", "%s", "%20", "{}", "$1", "#", "?"),
    *(
        "\N{GRINNING FACE}",
        "\xe9",
        "e\u0301",
        "A",
        "a",
        "-",
        "--",
        "; DROP TABLE x",
        "\N{DEGREE SIGN}" * 200,
    ),
    *("x" * 200, "x" * 199 + "y"),
]

MESSAGES = [
    *(b"", b"text", b" ", "\N{GRINNING FACE}".encode(), b"a\r\nb", b"a\0b", b"'; DROP TABLE x; --"),
    *(b"\xff\x01\x01\x00\xfe", b"\xff\x01\x01" + bytes(range(256)), b"x" * 7999, b"x" * 8000),
    *("\N{DEGREE SIGN}".encode() * 5000, b"x" * 100_000),
]


class Inbox:
    """Records what a connection delivers, and the errors that it reports."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes]] = []
        # The position of each of them, and the offset of the message before it on its channel.
        self.positions: list[tuple[Position | None, int | None]] = []
        self.errors: list[Exception] = []
        self._news = asyncio.Event()

    def deliver(
        self,
        channel: str,
        payload: bytes,
        position: Position | None = None,
        previous: int | None = None,
        /,
    ) -> None:
        self.got.append((channel, payload))
        if position is not None and previous is None:
            previous = position.offset - 1
        self.positions.append((position, previous))
        self._news.set()

    def lost(self, error: Exception) -> None:
        self.errors.append(error)
        self._news.set()

    async def until(self, count: int) -> list[tuple[str, bytes]]:
        """Wait until so many messages have arrived, and return all of them."""
        deadline = time.monotonic() + DEADLINE
        while len(self.got) < count:
            assert not self.errors, f"the connection was lost: {self.errors}"
            left = deadline - time.monotonic()
            assert left > 0, f"{len(self.got)} of {count} messages came within {DEADLINE:g} seconds"
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._news.wait()
        return self.got


@contextlib.asynccontextmanager
async def connected(make: Make) -> AsyncIterator[tuple[BrokerConnection, Inbox]]:
    inbox = Inbox()
    async with asyncio.timeout(DEADLINE):
        connection = await make().connect(inbox.deliver, inbox.lost)
    try:
        yield connection, inbox
    finally:
        async with asyncio.timeout(DEADLINE):
            await connection.close()
        assert not inbox.errors, f"`lost` was called: {inbox.errors}"


def channel_name(name: str = "") -> str:
    return f"check-{uuid.uuid4().hex}-{name}"[:200]


async def what_is_published_arrives(make: Make) -> None:
    """At every connection that is subscribed, including the one that publishes."""
    channel = channel_name()
    async with connected(make) as (one, ones), connected(make) as (two, twos):
        await one.subscribe(channel)
        await two.subscribe(channel)
        await one.publish([(channel, b"1")])
        await two.publish([(channel, b"2")])
        for inbox in (ones, twos):
            assert sorted(await inbox.until(2)) == [(channel, b"1"), (channel, b"2")]


async def a_payload_arrives_as_it_was(make: Make) -> None:
    channel = channel_name()
    async with connected(make) as (connection, inbox):
        await connection.subscribe(channel)
        sent = [message for message in MESSAGES if len(message) <= connection.max_payload]
        for message in sent:
            await connection.publish([(channel, message)])
        assert [message for _, message in await inbox.until(len(sent))] == sent


async def equal_messages_of_one_batch_all_arrive(make: Make) -> None:
    channel = channel_name()
    async with connected(make) as (connection, inbox):
        await connection.subscribe(channel)
        await connection.publish([(channel, b"same")] * 5)
        await connection.publish([(channel, b"last")])
        assert [payload for _, payload in await inbox.until(6)] == [b"same"] * 5 + [b"last"]


async def order_is_kept_within_and_across_channels(make: Make) -> None:
    channels = [channel_name(str(number)) for number in range(3)]
    async with connected(make) as (connection, inbox):
        for channel in channels:
            await connection.subscribe(channel)
        sent = [(channels[number % 3], str(number).encode()) for number in range(1000)]
        for start in range(0, 1000, 100):
            await connection.publish(sent[start : start + 100])
        assert await inbox.until(1000) == sent


async def odd_names_are_names_and_nothing_else(make: Make) -> None:
    """No name is a pattern or a command, and none is mistaken for another."""
    async with connected(make) as (connection, inbox):
        for name in ODD_NAMES:
            await connection.subscribe(name)
        sent = [(name, f"to {index}".encode()) for index, name in enumerate(ODD_NAMES)]
        await connection.publish(sent)
        assert await inbox.until(len(sent)) == sent
        for name in ODD_NAMES:
            await connection.unsubscribe(name)


async def a_channel_that_is_left_is_silent(make: Make) -> None:
    left, kept = channel_name("left"), channel_name("kept")
    async with connected(make) as (connection, inbox):
        for channel in (left, kept):
            await connection.subscribe(channel)
        await connection.unsubscribe(left)
        await connection.publish([(left, b"1"), (kept, b"2")])
        assert await inbox.until(1) == [(kept, b"2")]
        await connection.subscribe(left)
        await connection.publish([(left, b"3")])
        assert await inbox.until(2) == [(kept, b"2"), (left, b"3")]


async def many_may_be_subscribed_to_at_once(make: Make) -> None:
    channels = [channel_name(str(number)) for number in range(50)]
    async with connected(make) as (connection, inbox):
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*map(connection.subscribe, channels))
        await connection.publish([(channel, b"x") for channel in channels])
        assert await inbox.until(50) == [(channel, b"x") for channel in channels]


async def a_backend_connects_again_and_again(make: Make) -> None:
    channel = channel_name()
    backend = make()
    for number in range(2):
        inbox = Inbox()
        async with asyncio.timeout(DEADLINE):
            connection = await backend.connect(inbox.deliver, inbox.lost)
            await connection.subscribe(channel)
            await connection.publish([(channel, str(number).encode())])
        assert await inbox.until(1) == [(channel, str(number).encode())]
        async with asyncio.timeout(DEADLINE):
            await connection.close()
            await connection.close()
        assert not inbox.errors


async def connections_of_one_backend_are_independent(make: Make) -> None:
    channel = channel_name()
    backend = make()
    async with connected(lambda: backend) as (one, ones):
        async with connected(lambda: backend) as (two, twos):
            await one.subscribe(channel)
            await two.publish([(channel, b"1")])
            await ones.until(1)
            await two.subscribe(channel)
        await one.publish([(channel, b"2")])
        assert await ones.until(2) == [(channel, b"1"), (channel, b"2")]
        assert twos.got == []


async def nothing_is_left_behind(make: Make) -> None:
    before = asyncio.all_tasks()
    async with connected(make) as (connection, _):
        await connection.subscribe(channel_name())
    deadline = time.monotonic() + DEADLINE
    while left := asyncio.all_tasks() - before:
        assert time.monotonic() < deadline, f"tasks are left: {left}"
        await asyncio.sleep(0.01)


async def two_hubs_are_one_room(make: Make) -> None:
    """With everything that a hub does."""
    channel = channel_name()
    async with (
        Broadcast(backend=make(), name="check") as one,
        Broadcast(backend=make(), name="check") as two,
        one.subscribe(channel) as ones,
        two.subscribe(channel) as twos,
        asyncio.timeout(DEADLINE),
    ):
        await one.publish(channel, "text")
        await one.publish(channel, b"\xff")
        await one.publish(channel, {"a": [1]})
        for subscriber in (ones, twos):
            got = [(await anext(subscriber)).message for _ in range(3)]
            assert got == ["text", b"\xff", '{"a":[1]}']
        assert await one.healthy()
        assert await two.healthy()


CHECKS: list[Check] = [
    what_is_published_arrives,
    a_payload_arrives_as_it_was,
    equal_messages_of_one_batch_all_arrive,
    order_is_kept_within_and_across_channels,
    odd_names_are_names_and_nothing_else,
    a_channel_that_is_left_is_silent,
    many_may_be_subscribed_to_at_once,
    a_backend_connects_again_and_again,
    connections_of_one_backend_are_independent,
    nothing_is_left_behind,
    two_hubs_are_one_room,
]
