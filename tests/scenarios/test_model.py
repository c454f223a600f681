"""A hub against a plain model of it: any sequence of connects, messages, stalls and deaths."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from starlette.websockets import WebSocketDisconnect

from starcast import Broadcast
from support import Peer, examples

CHANNELS = ["a", "b", "c"]
COST = 64 + 5  # every message has five characters
ROOM = 3  # messages that fit into an outbox

clients = st.integers(0, 99)
channels = st.sampled_from(CHANNELS)


@dataclasses.dataclass
class Client:
    """What must be true of one client."""

    peer: Peer
    overflow: str
    channels: set[str]
    got: list[str] = dataclasses.field(default_factory=list)
    waiting: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    in_flight: str | None = None  # the message whose send is suspended
    registered: bool = True
    stalled: bool = False
    dead: bool = False
    closing: bool = False  # cut off: 1013 follows what is in flight

    @property
    def buffered(self) -> int:
        return sum(COST for _, channel in self.waiting if channel is not None)

    def take(self, message: str, channel: str | None) -> None:
        """A message comes: of a channel, to this client alone (""), or by its handler (None)."""
        if self.closing:
            return
        if self.in_flight is None:
            if self.stalled:
                self.in_flight = message
            elif self.dead:
                self.registered = False
                self.closing = True
            else:
                self.got.append(message)
            return
        if channel is None:
            self.waiting.append((message, None))
            return
        if self.overflow == "latest" and channel:
            self.waiting = [item for item in self.waiting if item[1] != channel]
        if self.buffered + COST > ROOM * COST:
            if self.overflow == "drop_newest":
                return
            if self.overflow == "disconnect":
                self.waiting.clear()
                self.registered = False
                self.closing = True
                return
            oldest = next(item for item in self.waiting if item[1] is not None)
            self.waiting.remove(oldest)
        self.waiting.append((message, channel))

    def resume(self) -> None:
        self.stalled = False
        if self.in_flight is not None:
            if self.dead:
                self.registered = False
                self.closing = True
            else:
                self.got += [self.in_flight, *(message for message, _ in self.waiting)]
            self.in_flight = None
            self.waiting.clear()


class HubMachine(RuleBasedStateMachine):
    Peer: type[Peer] = Peer

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.hub = Broadcast(max_buffer=ROOM * COST)
        self.clients: list[Client] = []
        self.sends: list[asyncio.Task] = []
        self.number = 0

    def teardown(self) -> None:
        async def end():
            for client in self.clients:
                client.peer.open.set()
            await asyncio.gather(*self.sends)
            await self.hub.disconnect()

        self.loop.run_until_complete(end())
        assert not asyncio.all_tasks(self.loop)
        assert len(self.hub) == 0
        self.loop.close()

    def run(self, coroutine) -> None:
        """Run it, and then the loop until nothing more happens by itself."""

        async def run():
            await coroutine
            await self.hub.publish("nobody", "waits until all others are delivered")
            for _ in range(20):
                await asyncio.sleep(0)

        self.loop.run_until_complete(run())

    def pick(self, number: int) -> Client:
        return self.clients[number % len(self.clients)]

    def message(self) -> str:
        self.number += 1
        return f"{self.number:05}"

    some = precondition(lambda self: self.clients)

    @precondition(lambda self: len(self.clients) < 6)
    @rule(
        channel=channels,
        overflow=st.sampled_from(["disconnect", "drop_oldest", "drop_newest", "latest"]),
    )
    def connect(self, channel, overflow):
        async def connect():
            peer = self.Peer()
            await self.hub.connect(peer.websocket, channel, overflow=overflow)
            self.clients.append(Client(peer, overflow, {channel}))

        self.run(connect())

    @some
    @rule(client=clients, channel=channels)
    def join(self, client, channel):
        client = self.pick(client)
        if client.registered:
            client.channels.add(channel)
            self.run(self.hub.connect(client.peer.websocket, channel))

    @some
    @rule(client=clients, channel=channels)
    def leave(self, client, channel):
        client = self.pick(client)
        if client.registered and client.channels != {channel}:
            client.channels.discard(channel)
            self.run(self.hub.disconnect(client.peer.websocket, channel))

    @some
    @rule(client=clients)
    def disconnect(self, client):
        client = self.pick(client)
        leaving = self.loop.create_task(self.hub.disconnect(client.peer.websocket))
        self.run(asyncio.sleep(0))
        if client.registered:
            client.registered = False
            assert leaving.done() == (client.in_flight is None)
            # What is on its way still arrives, and the model need not follow it further.
            client.resume()
            client.peer.open.set()
            self.run(leaving)
            self.clients.remove(client)
            if not client.dead:
                assert client.peer.got == client.got

    @rule(channel=channels, exclude=st.sets(clients, max_size=2), nowait=st.booleans())
    def publish(self, channel, exclude, nowait):
        message = self.message()
        excluded = [self.pick(number) for number in exclude] if self.clients else []
        websockets = [client.peer.websocket for client in excluded]
        if nowait:
            self.hub.publish_nowait(channel, message, exclude=websockets)
            self.run(asyncio.sleep(0))
        else:
            self.run(self.hub.publish(channel, message, exclude=websockets))
        for client in self.clients:
            if client.registered and channel in client.channels and client not in excluded:
                client.take(message, channel)

    @some
    @rule(client=clients)
    def send_to_one(self, client):
        client, message = self.pick(client), self.message()
        if not client.registered:
            return
        sending = self.loop.create_task(self.hub.send(message, to=client.peer.websocket))
        self.run(asyncio.sleep(0))
        if client.buffered and client.buffered + COST > ROOM * COST // 2:
            assert not sending.done()  # it waits for the client, and leaves nothing behind
            sending.cancel()
            self.run(asyncio.wait([sending]))
        else:
            assert sending.result() is True
            client.take(message, "")

    @some
    @rule(client=clients)
    def handlers_own_send(self, client):
        client, message = self.pick(client), self.message()
        if not client.registered:
            return

        async def send():
            with contextlib.suppress(WebSocketDisconnect):
                await client.peer.websocket.send_text(message)

        self.sends.append(self.loop.create_task(send()))
        self.run(asyncio.sleep(0))
        client.take(message, None)

    @some
    @rule(client=clients)
    def stall(self, client):
        client = self.pick(client)
        client.stalled = True
        client.peer.open.clear()

    @some
    @rule(client=clients)
    def resume(self, client):
        client = self.pick(client)
        client.peer.open.set()
        self.run(asyncio.sleep(0))
        client.resume()

    @some
    @rule(client=clients)
    def die(self, client):
        client = self.pick(client)
        client.dead = True
        client.peer.fail = OSError("gone")

    @invariant()
    def everybody_has_what_the_model_says(self):
        for client in self.clients:
            assert client.peer.got == client.got

    @invariant()
    def the_registry_is_what_the_model_says(self):
        registered = [client for client in self.clients if client.registered]
        counts = {}
        for client in registered:
            for channel in client.channels:
                counts[channel] = counts.get(channel, 0) + 1
        stats = self.hub.stats()
        assert stats.channels == counts
        assert stats.clients == len(self.hub) == len(registered)
        assert stats.buffered == sum(client.buffered for client in registered)


class PeerWithFrames(Peer):
    frames = True


class FramesMachine(HubMachine):
    Peer = PeerWithFrames


HubMachine.TestCase.settings = FramesMachine.TestCase.settings = settings(
    max_examples=examples(50),
    stateful_step_count=40,
    print_blob=True,
)
TestHub = HubMachine.TestCase
TestHubWithFrames = FramesMachine.TestCase
