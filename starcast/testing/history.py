"""What every backend must do that keeps the history of channels: `CHECKS`, as in `testing`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import cast

from .. import testing
from ..backends.base import HistoryConnection, Kept, Stored
from ..broadcast import Broadcast
from ..history import History, Position

_HISTORY = History(size=5, ttl=60)


@contextlib.asynccontextmanager
async def _keeping(make: testing.Make) -> AsyncIterator[tuple[HistoryConnection, testing.Inbox]]:
    async with testing.connected(make) as (connection, inbox):
        yield cast(HistoryConnection, connection), inbox


async def _keep(
    connection: HistoryConnection, channel: str, *payloads: bytes, key: str | None = None
) -> list[Position]:
    kept = [Kept(channel, payload, _HISTORY, key) for payload in payloads]
    async with asyncio.timeout(testing.DEADLINE):
        return list(await connection.publish_kept(kept))


async def _read(
    connection: HistoryConnection,
    channel: str,
    since: int | None = None,
    limit: int = 100,
    reverse: bool = False,
) -> Stored:
    async with asyncio.timeout(testing.DEADLINE):
        return await connection.read_kept(channel, _HISTORY, since, limit, reverse)


def _payloads(stored: Stored) -> list[bytes]:
    return [message.payload for message in stored.messages]


async def what_is_kept_arrives_with_its_position(make: testing.Make) -> None:
    """In order, at every connection, and each names the offset of the one before it."""
    channel = testing.channel_name()
    async with _keeping(make) as (one, ones), _keeping(make) as (two, twos):
        await one.subscribe(channel)
        await two.subscribe(channel)
        positions = await _keep(one, channel, b"1", b"2") + await _keep(two, channel, b"3")
        assert len({position.epoch for position in positions}) == 1
        offsets = [position.offset for position in positions]
        assert offsets == sorted(set(offsets))
        for inbox in (ones, twos):
            assert await inbox.until(3) == [(channel, b"1"), (channel, b"2"), (channel, b"3")]
            assert [position for position, _ in inbox.positions] == positions
            assert [previous for _, previous in inbox.positions] == [0, *offsets[:-1]]


async def what_is_kept_can_be_read(make: testing.Make) -> None:
    """With the positions that were returned for it, forwards, backwards and in part."""
    channel = testing.channel_name()
    sent = [message for message in testing.MESSAGES if len(message) <= 8000]
    async with _keeping(make) as (connection, _):
        positions = [(await _keep(connection, channel, payload))[0] for payload in sent]
        stored = await _read(connection, channel)
        assert stored.position == positions[-1]
        assert _payloads(stored) == sent[-5:]
        assert [it.offset for it in stored.messages] == [it.offset for it in positions[-5:]]
        assert _payloads(await _read(connection, channel, limit=2)) == sent[-5:-3]
        assert _payloads(await _read(connection, channel, reverse=True)) == sent[:-6:-1]
        assert _payloads(await _read(connection, channel, limit=0)) == []
        since = positions[-3].offset
        assert _payloads(await _read(connection, channel, since)) == sent[-2:]
        before = await _read(connection, channel, since, limit=1, reverse=True)
        assert _payloads(before) == sent[-4:-3]


async def a_history_says_whether_something_is_missing(make: testing.Make) -> None:
    channel = testing.channel_name()
    async with _keeping(make) as (connection, _):
        empty = await _read(connection, channel)
        assert (empty.messages, empty.position.offset) == ([], 0)
        positions = [(await _keep(connection, channel, b"%d" % n))[0] for n in range(8)]
        assert positions[0].epoch == empty.position.epoch
        for number, position in enumerate(positions):
            stored = await _read(connection, channel, position.offset)
            # Of eight, five are kept. A backend may say no where the message itself is gone.
            assert stored.complete in ([False] if number < 2 else [True, number > 2])
        assert not (await _read(connection, channel, 0)).complete


async def what_is_published_again_with_its_key_is_published_once(make: testing.Make) -> None:
    channel = testing.channel_name()
    async with _keeping(make) as (one, inbox), _keeping(make) as (two, _):
        await one.subscribe(channel)
        first, other = await _keep(one, channel, b"1", key="a"), await _keep(two, channel, b"x")

        async def try_again(connection: HistoryConnection) -> None:
            for _ in range(3):
                assert await _keep(connection, channel, b"1", key="a") == first

        await asyncio.gather(try_again(one), try_again(two))
        assert first != other
        await _keep(one, testing.channel_name("other"), b"1", key="a")
        await _keep(one, channel, b"last")
        assert await inbox.until(3) == [(channel, b"1"), (channel, b"x"), (channel, b"last")]
        assert _payloads(await _read(two, channel)) == [b"1", b"x", b"last"]


async def kept_and_other_messages_keep_their_order(make: testing.Make) -> None:
    channels = [testing.channel_name(str(number)) for number in range(3)]
    async with _keeping(make) as (connection, inbox):
        for channel in channels:
            await connection.subscribe(channel)
        sent = []
        for number in range(0, 60, 2):
            batch = [(channels[n % 3], b"%d" % n) for n in (number, number + 1)]
            if number % 4:
                async with asyncio.timeout(testing.DEADLINE):
                    await connection.publish(batch)
            else:
                await connection.publish_kept([Kept(*it, _HISTORY) for it in batch])
            sent += batch
        assert await inbox.until(60) == sent


async def several_connections_keep_one_history(make: testing.Make) -> None:
    """They publish at the same time, to the same channels in different orders."""
    channels = [testing.channel_name(str(number)) for number in range(3)]
    async with _keeping(make) as (one, ones), _keeping(make) as (two, twos):
        for channel in channels:
            await one.subscribe(channel)
            await two.subscribe(channel)

        async def publish(connection: HistoryConnection, names: list[str]) -> None:
            for number in range(20):
                batch = [Kept(name, b"%d" % number, _HISTORY) for name in names]
                async with asyncio.timeout(testing.DEADLINE):
                    await connection.publish_kept(batch)

        await asyncio.gather(publish(one, channels), publish(two, channels[::-1]))
        for inbox in (ones, twos):
            got = zip(await inbox.until(120), inbox.positions, strict=True)
            places: dict[str, list[tuple[int, int | None]]] = {}
            for (channel, _), (position, previous) in got:
                assert position is not None
                places.setdefault(channel, []).append((position.offset, previous))
            for found in places.values():
                assert len(found) == 40
                assert [previous for _, previous in found] == [0, *(it for it, _ in found[:-1])]


async def odd_names_have_histories_of_their_own(make: testing.Make) -> None:
    async with _keeping(make) as (connection, _):
        for number, name in enumerate(testing.ODD_NAMES):
            await _keep(connection, name, b"%d" % number, key="\r\n \N{GRINNING FACE} '")
        for number, name in enumerate(testing.ODD_NAMES):
            assert _payloads(await _read(connection, name))[-1:] == [b"%d" % number]


async def a_hub_misses_nothing(make: testing.Make) -> None:
    """With everything that a hub does."""
    channel = testing.channel_name()
    history = {channel: History(size=50, ttl=60)}
    async with (
        Broadcast(backend=make(), name="check", history=history) as one,
        Broadcast(backend=make(), name="check", history=history) as two,
        asyncio.timeout(testing.DEADLINE),
    ):
        ids = [await one.publish(channel, str(number)) for number in range(10)]
        async with two.subscribe(channel, since=ids[2]) as subscriber:
            assert subscriber.resumed is not None
            assert subscriber.resumed.recovered
            ids += [await one.publish(channel, "live", idempotency_key="live") for _ in range(2)]
            got = [await anext(subscriber) for _ in range(8)]
            assert [event.message for event in got] == [*map(str, range(3, 10)), "live"]
            assert [event.id for event in got] == ids[3:-1]
            assert ids[-1] == ids[-2]
        past = await two.history(channel, reverse=True, limit=1)
        assert past.id == past.events[0].id == ids[-1]


CHECKS: list[testing.Check] = [
    what_is_kept_arrives_with_its_position,
    what_is_kept_can_be_read,
    a_history_says_whether_something_is_missing,
    what_is_published_again_with_its_key_is_published_once,
    kept_and_other_messages_keep_their_order,
    several_connections_keep_one_history,
    odd_names_have_histories_of_their_own,
    a_hub_misses_nothing,
]
