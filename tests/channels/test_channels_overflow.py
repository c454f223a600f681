"""A client that does not keep up loses a subscription, resumes it, and loses nothing else."""

from __future__ import annotations

import asyncio

import pytest
import websockets

from channels.speaking import Talker, narrow, serving
from starcast import Broadcast, History, Tuning
from support import until

pytestmark = pytest.mark.anyio


def pause(talker: Talker) -> None:
    """Let it read nothing more."""
    talker.socket.transport.pause_reading()


async def test_the_channel_that_fills_the_buffer_is_unsubscribed_and_resumed():
    hub = Broadcast(
        history={"flood": History(size=10_000)},
        max_buffer=100_000,
        tuning=Tuning(close_timeout=0.5),
    )
    async with (
        serving(hub=hub, send_buffer=8192) as room,
        narrow(room) as slow,
        room.talker() as quick,
    ):
        for talker in (slow, quick):
            await talker.get("subscribe", channel="calm")
            epoch = (await talker.get("subscribe", channel="flood"))["epoch"]
        pause(slow)
        sent = 0
        while not hub.stats().dropped:
            await hub.publish("flood", f"{sent:05}" + "x" * 2000)
            sent += 1
            if sent % 50 == 0:
                await hub.publish("calm", sent)
            push = await quick.push()
            if push["channel"] == "calm":
                push = await quick.push()
        await hub.publish("calm", "end")
        slow.socket.transport.resume_reading()
        flood, calm, offset = [], [], 0
        while calm[-1:] != ["end"]:
            push = await slow.push()
            if push["channel"] == "calm":
                calm.append(push["pub"]["data"])
            elif "pub" in push:
                flood.append(int(push["pub"]["data"][:5]))
                offset = push["pub"]["offset"]
            else:
                assert push["unsubscribe"] == {"code": 2500, "reason": "insufficient state"}
                where = {"recover": True, "epoch": epoch, "offset": offset}
                await slow.send({"id": 99, "subscribe": {"channel": "flood", **where}})
        reply = {}
        while reply.get("id") != 99:
            reply = await slow.next()
        assert reply["subscribe"]["recovered"] is True
        flood += [int(pub["data"][:5]) for pub in reply["subscribe"]["publications"]]
        assert flood == list(range(sent))
        assert calm == [*range(50, sent + 1, 50), "end"]
        assert hub.stats().slow_clients == 0
        # It has taken everything in time, so it is not given up.
        await asyncio.sleep(0.6)
        assert len(hub) == 2


async def test_a_client_that_never_reads_is_given_up():
    hub = Broadcast(max_buffer=50_000, tuning=Tuning(close_timeout=0.2))
    async with serving(hub=hub, send_buffer=8192) as room, narrow(room) as slow:
        await slow.get("subscribe", channel="room")
        pause(slow)
        while not hub.stats().dropped:
            await hub.publish("room", "x" * 2000)
        assert hub.channels == {}
        await until(lambda: not len(hub))
        slow.socket.transport.resume_reading()
        assert (await slow.closed())[0] == 1006


async def test_replies_that_are_not_read_cut_a_client_off():
    hub = Broadcast(max_buffer=20_000, tuning=Tuning(close_timeout=0.2))
    async with serving(hub=hub, send_buffer=8192) as room, narrow(room) as slow:
        pause(slow)

        async def flood() -> None:
            while True:
                await slow.send({"id": 5, "x" * 1000: {}})

        flooding = asyncio.create_task(flood())
        await until(lambda: not len(hub))
        assert hub.stats().slow_clients == 1
        slow.socket.transport.resume_reading()
        with pytest.raises(websockets.ConnectionClosed):
            await flooding
