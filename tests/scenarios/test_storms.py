"""A random sequence of troubles for hubs on a real broker, and what their subscribers then have.

Each publisher counts. No subscriber may get two of its messages in the wrong order, or one twice,
and each message whose `publish` returned must have reached everybody who was subscribed before, or
there must be a gap just where it is missing.

`STARCAST_STORM` is how many troubles there are (`.ci/slow` has more), `STARCAST_SEED` which ones; 0
is another one each time. What the troubles meet is up to the clock, so a seed repeats them only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from backends.front import SlowLine
from backends.nats_server import NatsServer
from backends.postgres_server import PostgresServer
from backends.redis_server import RedisServer
from starcast import BackendUnavailable, Broadcast, Event, Gap, Tuning
from support import OtherLoop, starcast_tasks, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1200)]

TROUBLES = int(os.environ.get("STARCAST_STORM", "3"))
SEED = int(os.environ.get("STARCAST_SEED", "481")) or random.SystemRandom().randrange(1, 10**6)
NAME = "storm"
NEVER = (-math.inf, -math.inf)
CHANNELS = ["a", "b", "c"]
QUIET = [f"quiet {number}" for number in range(25 * TROUBLES)]  # that take a while to restore


class Redis(RedisServer):
    """A server with a user who may be denied channels."""

    def start(self) -> None:
        super().start()
        self.command("ACL", "SETUSER", "few", "on", ">pass", "+@all")
        self.deny()

    @property
    def user_url(self) -> str:
        return self.url.replace("//", "//few:pass@")

    def deny(self, *denied: str) -> None:
        # There is no rule for what is denied.
        allowed = ["starcast-probe*", "quiet*", *(name for name in CHANNELS if name not in denied)]
        names = [f"&starcast:{NAME}:{name}" for name in allowed]
        self.command("ACL", "SETUSER", "few", "resetchannels", *names)

    def cut(self, choose: random.Random) -> None:
        """End one of the connections."""
        if clients := self.clients():
            self.command("CLIENT", "KILL", "ID", choose.choice(clients)["id"])


class Nats(NatsServer):
    def __init__(self) -> None:
        super().__init__(self._rights())

    @property
    def user_url(self) -> str:
        return self.url.replace("//", "//few:pass@")

    def _rights(self, *denied: str) -> str:
        names = ", ".join(f'"starcast:{NAME}.{name}"' for name in denied)
        rights = f'{{allow: [">"], deny: [{names}]}}'
        rights = f"{{publish: {rights}, subscribe: {rights}}}"
        return f"authorization: {{users: [{{user: few, password: pass, permissions: {rights}}}]}}"

    def deny(self, *denied: str) -> None:
        self.reload(self._rights(*denied))


class Postgres(PostgresServer):
    @property
    def user_url(self) -> str:
        return self.url

    def cut(self, choose: random.Random) -> None:
        async def terminate() -> None:
            admin = await asyncpg.connect(self.url)
            found = await admin.fetch(
                "SELECT pid FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            if found:
                pid = choose.choice(found)["pid"]
                await admin.execute("SELECT pg_terminate_backend($1)", pid)
            await admin.close()

        asyncio.run(terminate())


TUNING = Tuning(
    max_pending=200_000,
    probe_timeout=0.4,
    publish_timeout=0.5,
    max_backoff=0.2,
    subscribe_backoff=0.2,
    max_held_back=20_000,
)

SERVERS = {"redis": Redis, "nats": Nats, "postgres": Postgres}


# The short one leaves out PostgreSQL, which takes a second to start and can deny nothing.
@pytest.fixture(params=SERVERS if "STARCAST_STORM" in os.environ else ["redis", "nats"])
def stormy(request):
    server = SERVERS[request.param]()
    server.start()
    yield server
    server.close()


class Stream:
    """What one subscription has brought, from its beginning to its end."""

    def __init__(self, name: str, channel: str) -> None:
        self.name = name
        self.channel = channel
        self.since = time.time()
        self.items: list[Event | Gap] = []
        self.last: dict[str, int] = {}  # of each publisher
        self.stuck = False  # it does not get what is published last

    def take(self, item: Event | Gap) -> None:
        self.items.append(item)
        if isinstance(item, Event):
            who, number = item.message.split()
            self.last[who] = int(number)

    def numbers(self, who: str) -> list[tuple[int, int]]:
        """The positions and the numbers of a publisher's messages."""
        found = []
        for at, item in enumerate(self.items):
            if isinstance(item, Event):
                speaker, number = item.message.split()
                if speaker == who:
                    found.append((at, int(number)))
        return found

    def check(self, who: str, returned: dict[int, tuple[float, float]]) -> list[str]:
        """Return what is wrong with what it has of a publisher.

        Args:
            who: The publisher.
            returned: The numbers of the messages whose `publish` returned, and when it was called.
        """
        found = self.numbers(who)
        numbers = [number for _, number in found]
        wrong = []
        if numbers != sorted(set(numbers)):
            bad = [pair for pair in itertools.pairwise(numbers) if pair[0] >= pair[1]]
            wrong.append(f"{self.name} got those of {who} in the wrong order: {bad}")
        gaps = {at: item for at, item in enumerate(self.items) if isinstance(item, Gap)}
        for (before, low), (after, high) in itertools.pairwise([(-1, 0), *found]):
            missing = [n for n in range(low + 1, high) if returned.get(n, NEVER)[0] > self.since]
            here = [gap for at, gap in gaps.items() if before < at < after]
            if missing and not here:
                wrong.append(
                    f"{self.name} misses {who} {missing[0]} to {missing[-1]} between {before} and "
                    f"{after}; gaps are at {list(gaps)}"
                )
                continue
            for start, end in map(returned.__getitem__, missing):
                if not any(g.since <= end and start <= g.since + g.seconds for g in here):
                    times = [(g.since, g.since + g.seconds) for g in here]
                    wrong.append(
                        f"{self.name} misses what {who} published from {start} to {end}, "
                        f"and not in the time of a gap: {times}"
                    )
        return wrong


class Storm:
    def __init__(self, server: Any, other: OtherLoop, line: SlowLine) -> None:
        self.server = server
        self.choose = random.Random(SEED)
        self.line = line
        parts = urlsplit(server.user_url)
        slow = parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{line.port}"))
        self.here = asyncio.get_running_loop()
        self.other = other.loop
        self.hubs = {
            name: Broadcast(
                url,
                name=NAME,
                probe_interval=0.05,
                max_buffer=2**24,
                tuning=TUNING,
            )
            for name, url in [
                ("near", server.user_url),
                ("slow", slow.geturl()),
                ("threaded", server.user_url),
            ]
        }
        self.loops = {"near": self.here, "slow": self.here, "threaded": self.other}
        self.streams: list[Stream] = []
        self.current: set[Stream] = set()
        self.returned: dict[str, dict[int, tuple[float, float]]] = {}
        self.counts: dict[str, int] = {}
        self.stopping = False
        self.futures: list[Future[None]] = []
        self.told: list[str] = []

    def run_on(self, loop: asyncio.AbstractEventLoop, work: Any) -> asyncio.Future[Any]:
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))

    # Those who publish and those who listen

    async def listen(self, hub: str, channel: str, name: str) -> None:
        while not self.stopping:
            stream = Stream(f"{name} on {hub}, {channel}", channel)
            try:
                async with self.hubs[hub].subscribe(channel, gaps=True) as subscriber:
                    stream.since = time.time()
                    self.streams.append(stream)
                    self.current.add(stream)
                    async for item in subscriber:
                        stream.take(item)
            except BackendUnavailable:
                await asyncio.sleep(0.02)
            finally:
                self.current.discard(stream)

    async def publish(self, hub: str, channel: str) -> None:
        who = f"{hub}/{channel}"
        self.counts[who] = number = self.counts.get(who, 0) + 1
        began = time.time()
        await self.hubs[hub].publish(channel, f"{who} {number}")
        self.returned.setdefault(who, {})[number] = began, time.time()

    async def speak(self, hub: str, channel: str) -> None:
        while not self.stopping:
            try:
                await self.publish(hub, channel)
            except BackendUnavailable:
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.001)

    async def flood(self, hub: str) -> None:
        """Without waiting: in order, whatever is lost."""
        number = 0
        while not self.stopping:
            for _ in range(20):
                number += 1
                with contextlib.suppress(BackendUnavailable):
                    self.hubs[hub].publish_nowait("a", f"flood/{hub} {number}")
            await asyncio.sleep(0.005)

    # Troubles

    async def killed(self) -> None:
        await asyncio.to_thread(self.server.kill)
        await asyncio.sleep(self.choose.choice([0, 0.05, 0.3]))
        await asyncio.to_thread(self.server.start)

    async def frozen(self) -> None:
        await asyncio.to_thread(self.server.freeze)
        await asyncio.sleep(self.choose.choice([0.1, 0.7]))
        self.server.thaw()

    async def denied(self) -> None:
        if not hasattr(self.server, "deny"):
            return await self.cut()
        for _ in range(self.choose.choice([1, 2, 3])):
            denied = self.choose.sample(CHANNELS, self.choose.choice([1, 2]))
            await asyncio.to_thread(self.server.deny, *denied)
            await asyncio.sleep(self.choose.choice([0, 0, 0.02, 0.3]))
            await asyncio.to_thread(self.server.deny)
            await asyncio.sleep(self.choose.choice([0, 0, 0.05]))

    async def cut(self) -> None:
        if hasattr(self.server, "cut"):
            for _ in range(self.choose.choice([1, 3])):
                await asyncio.to_thread(self.server.cut, self.choose)

    async def slow(self) -> None:
        self.line.rate = self.choose.choice([20_000, 200_000])
        await asyncio.sleep(self.choose.choice([0.2, 0.6]))
        self.line.rate = math.inf

    async def silent(self) -> None:
        self.line.silent = set(range(self.line.made))
        await asyncio.sleep(self.choose.choice([0.2, 0.6]))
        self.line.silent = set()

    async def blocked(self) -> None:
        async def block(seconds: float) -> None:
            time.sleep(seconds)  # noqa: ASYNC251  # that is the point

        loop = self.choose.choice([self.here, self.other])
        await self.run_on(loop, block(self.choose.choice([0.05, 0.3, 0.6])))

    async def reopened(self) -> None:
        name = self.choose.choice(list(self.hubs))
        hub, loop = self.hubs[name], self.loops[name]
        for _ in range(self.choose.choice([1, 2])):
            await self.run_on(loop, hub.disconnect())
            await asyncio.sleep(self.choose.choice([0, 0.1]))
            self.run_on(loop, self.open(name))

    async def moved(self) -> None:
        """The event loop of a connection ends, and another one takes over."""
        name = self.choose.choice(list(self.hubs))
        await self.run_on(self.loops[name], self.hubs[name].disconnect())
        brief = OtherLoop()
        await self.run_on(brief.loop, self.open(name))
        await asyncio.sleep(self.choose.choice([0, 0.1, 0.3]))
        await asyncio.to_thread(brief.close)

    async def open(self, name: str) -> None:
        with contextlib.suppress(BackendUnavailable):
            await self.hubs[name].connect()

    async def come_and_go(self) -> None:
        hub = self.choose.choice(list(self.hubs))

        async def come() -> None:
            for _ in range(5):
                with contextlib.suppress(BackendUnavailable):
                    async with self.hubs[hub].subscribe(self.choose.choice(["brief", "c"])):
                        pass

        await asyncio.gather(*(self.run_on(self.loops[hub], come()) for _ in range(3)))

    async def storm(self, troubles: int) -> None:
        kinds: list[Callable[[], Awaitable[None]]] = [
            self.killed,
            self.frozen,
            self.denied,
            self.denied,
            self.cut,
            self.slow,
            self.silent,
            self.blocked,
            self.reopened,
            self.moved,
            self.come_and_go,
        ]
        left = troubles
        while left:
            some = self.choose.sample(kinds, min(left, self.choose.choice([1, 1, 2, 3])))
            # What they do to the server itself must not happen at once.
            exclusive = [k for k in some if k in (self.killed, self.frozen, self.denied, self.cut)]
            some = [k for k in some if k not in exclusive[1:]]
            left -= len(some)
            self.told.append("+".join(kind.__name__ for kind in some))
            await asyncio.gather(*(kind() for kind in some))
            await asyncio.sleep(self.choose.choice([0, 0, 0.1, 0.3]))

    # All of it

    async def run(self, troubles: int) -> None:
        for name in self.hubs:
            await self.run_on(self.loops[name], self.hubs[name].connect())
        tasks = []
        for hub, loop in self.loops.items():
            for channel in CHANNELS:
                tasks.append(self.run_on(loop, self.listen(hub, channel, "one")))
                tasks.append(self.run_on(loop, self.speak(hub, channel)))
            for channel in QUIET:
                tasks.append(self.run_on(loop, self.listen(hub, channel, "quiet")))
        # And on the loop that is not that of the hub's connection.
        tasks.append(self.run_on(self.other, self.listen("near", "a", "away")))
        tasks.append(self.run_on(self.here, self.listen("threaded", "b", "away")))
        flooding = [self.run_on(self.loops[hub], self.flood(hub)) for hub in self.hubs]
        try:
            await until(lambda: len(self.current) == len(tasks) - 9)
            await self.storm(troubles)
            await self.calm(len(tasks) - 9)
        finally:
            self.stopping = True
            for name in self.hubs:
                await self.run_on(self.loops[name], self.hubs[name].disconnect())
            await asyncio.gather(*tasks, *flooding)

    async def calm(self, listeners: int) -> None:
        """Wait until all is well again, and everybody has what is published then."""
        end = time.monotonic() + 20
        for name, hub in self.hubs.items():
            while not await self.run_on(self.loops[name], hub.healthy()):
                assert time.monotonic() < end, (name, hub.stats())
                await asyncio.sleep(0.05)
        await until(lambda: len(self.current) == listeners)
        current = [stream for stream in self.current if stream.channel in CHANNELS]
        last: dict[str, int] = {}
        for hub, loop in self.loops.items():
            for channel in CHANNELS:
                while True:
                    who = f"{hub}/{channel}"
                    try:
                        await self.run_on(loop, self.publish(hub, channel))
                        last[who] = max(self.returned[who])
                        break
                    except BackendUnavailable:
                        assert time.monotonic() < end

        def has_all(stream: Stream) -> bool:
            speakers = [who for who in last if who.endswith(f"/{stream.channel}")]
            return all(stream.last.get(who, 0) >= last[who] for who in speakers)

        with contextlib.suppress(AssertionError):  # `check` says more
            await until(lambda: all(map(has_all, current)))
        for stream in current:
            stream.stuck = not has_all(stream)

    def check(self) -> list[str]:
        wrong = [
            f"{each.name} does not get what was published last"
            for each in self.streams
            if each.stuck
        ]
        for stream in self.streams:
            for who in stream.last:
                wrong += stream.check(who, self.returned.get(who, {}))
        return wrong


async def test_a_storm(stormy, other):
    async with SlowLine(urlsplit(stormy.url).port) as line:
        storm = Storm(stormy, other, line)
        await storm.run(TROUBLES)
    wrong = storm.check()
    assert not wrong, "\n".join([f"seed {SEED}: {storm.told}", *wrong[:10]])
    assert all(storm.returned.values())
    await until(lambda: not starcast_tasks())
