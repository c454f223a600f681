"""The load: many clients in one process, on raw sockets.

`python -m benchmarks.load` reads a `Task` as JSON from standard input and writes what it measured
as JSON to standard output. It ends by itself, whatever the server does.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import random
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from itertools import cycle

from . import accounting, payloads
from .frames import CLOSE, PING, PONG, FrameCounter, client_frame

HOST = "127.0.0.1"
STALL = 5.0  # seconds without any progress after which a run is given up
CONNECTING_AT_ONCE = 64
WARM_UP = 0.25
PING_EVERY = 0.025
BUFFER = 1 << 18


@dataclasses.dataclass
class Task:
    """What to do.

    `rounds`: everybody is in one room. `rooms`: many rooms. `talks`: everybody talks in many rooms.
    `storm`: clients connect, some at a time. `restart`: all connect at once. `resume`: so they do,
    and want what they have missed. `memory`: nothing.
    """

    ports: list[int]  # of the server's workers; clients are spread evenly over them
    pids: list[int]
    kind: str = "rounds"
    path: str = "/ws"  # {room} is filled in
    clients: int = 10
    size: int = 128
    payload: str = "text"  # or "json"
    batch: int = 1  # messages in one write
    seconds: float = 1.0
    deflate: bool = False  # offer permessage-deflate
    socketio: bool = False  # speak Engine.IO 4 and Socket.IO 5
    silent: int = 0  # one client in so many never reads
    stuff: int = 0  # bytes sent to everybody beforehand, so that silent clients are stuck
    pings: bool = False  # measure how soon a ping is answered meanwhile
    rooms: int = 1
    in_flight: int = 1  # rooms that are published to at the same time
    messages: int = 0  # for `memory`: those that everybody got before; for `resume`: has missed
    spread: float = 0.0  # for `restart` and `resume`: seconds in which all come
    ids_path: str = ""  # for `resume`: where clients are told the ids
    spin: bool = False  # never sleep, so that no write has to wake this process
    verify: bool = False  # keep and compare what was received


class Failed(Exception):
    """The run gave no figures, and why."""


class Client:
    """One connection."""

    def __init__(self, sock: socket.socket, room: int, keep: bool) -> None:
        self.sock = sock
        self.recv_into = sock.recv_into
        self.room = room
        self.port = 0
        self.path = ""  # that of the task by default
        self.got = 0  # messages, without those that only got it ready
        self.deflate = False
        self.pinged = self.next_ping = 0.0
        self.lags: list[float] = []
        self.counter = FrameCounter(self._control, keep=keep)

    def _control(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self.send(client_frame(payload, PONG))
        elif opcode == PONG and self.pinged:
            now = time.perf_counter()
            self.lags.append(now - self.pinged)
            self.pinged = 0.0
            # At no fixed moment of a round.
            self.next_ping = now + PING_EVERY * random.uniform(0.5, 1.5)
        elif opcode == CLOSE:
            code = int.from_bytes(payload[:2], "big")
            raise Failed(f"the server closed a client with {code}")

    def send(self, data: bytes) -> None:
        while data:
            try:
                data = data[self.sock.send(data) :]
            except BlockingIOError:
                if not select.select([], [self.sock], [], STALL)[1]:
                    raise Failed("the server does not read") from None

    def ping(self) -> None:
        self.pinged = time.perf_counter()
        self.send(client_frame(b"lag", PING))


class Load:
    def __init__(self, task: Task) -> None:
        self.task = task
        self.pids = [pid for worker in task.pids for pid in accounting.family(worker)]
        self.buffer = bytearray(BUFFER)
        self.view = memoryview(self.buffer)
        self.epoll = select.epoll()
        self.clients: dict[int, Client] = {}  # those that read
        self.silent: list[Client] = []
        self.bytes = 0
        make = payloads.json_objects if task.payload == "json" else payloads.text
        self.contents = make(task.size)
        self.sent: list[bytes] = []
        # How a frame of this size begins, and how long it is: what comes so is counted by length.
        self.frame = self._wrap(self.contents[0])
        self.head, self.frame_size = self._frame_of(self.frame)

    def _wrap(self, content: bytes) -> bytes:
        """Return a message's payload on the wire."""
        if not self.task.socketio:
            return content
        if self.task.payload == "text":
            content = b'"' + content + b'"'
        return b'42["message",' + content + b"]"

    @staticmethod
    def _frame_of(payload: bytes) -> tuple[bytes, int]:
        masked = client_frame(payload)
        head = bytes((masked[0], masked[1] & 0x7F)) + masked[2 : len(masked) - len(payload) - 4]
        return head, len(head) + len(payload)

    # Connecting

    def connect(self, count: int) -> list[Client]:
        """Open connections and wait until the server has taken them."""
        opened = []
        for first in range(0, count, CONNECTING_AT_ONCE):
            numbers = range(first, min(first + CONNECTING_AT_ONCE, count))
            some = [self._dial(number) for number in numbers]
            for client in some:
                self._finish_handshake(client)
            opened += some
        return opened

    def _dial(self, number: int, wait: bool = True, path: str = "", keep: bool = False) -> Client:
        task = self.task
        sock = socket.socket()
        if self._is_silent(number):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(STALL)
        # Closing resets: thousands of ports in TIME_WAIT would be in the way of the next run.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = Client(sock, number % task.rooms, task.verify or keep)
        client.path = path
        client.port = task.ports[number % len(task.ports)]
        if wait:
            sock.connect((HOST, client.port))
            sock.sendall(self._request(client))
        else:
            sock.setblocking(False)
            sock.connect_ex((HOST, client.port))
        return client

    def _request(self, client: Client) -> bytes:
        task = self.task
        request = [
            f"GET {(client.path or task.path).format(room=f'room{client.room}')} HTTP/1.1",
            f"Host: {HOST}:{client.port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
            "Sec-WebSocket-Version: 13",
        ]
        if task.deflate:  # what browsers say
            request.append("Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")
        return "\r\n".join([*request, "", ""]).encode()

    def _is_silent(self, number: int) -> bool:
        return bool(self.task.silent) and number % self.task.silent == self.task.silent - 1

    def _finish_handshake(self, client: Client) -> None:
        response = b""
        try:
            while b"\r\n\r\n" not in response:
                data = client.sock.recv(4096)
                if not data:
                    raise Failed("the server closed a connection in its handshake")
                response += data
            head, _, rest = response.partition(b"\r\n\r\n")
            if b" 101 " not in head.split(b"\r\n")[0]:
                raise Failed(f"the server answered {head.splitlines()[0].decode()!r}")
            client.deflate = b"permessage-deflate" in head.lower()
            client.counter.feed(rest)
            if self.task.socketio:  # "open" comes, "connect" goes and comes back
                for number, answer in ((1, b"40"), (2, b"")):
                    while client.counter.messages < number:
                        client.counter.feed(client.sock.recv(4096))
                    if answer:
                        client.sock.sendall(client_frame(answer))
        except TimeoutError:
            raise Failed("the server did not answer a handshake") from None
        client.sock.setblocking(False)

    def open(self) -> None:
        for number, client in enumerate(self.connect(self.task.clients)):
            if self._is_silent(number):
                self.silent.append(client)
                continue
            self.clients[client.sock.fileno()] = client
            self.epoll.register(client.sock, select.EPOLLIN)
        self.members: list[list[Client]] = [[] for _ in range(self.task.rooms)]
        for client in self.clients.values():
            self.members[client.room].append(client)

    def _make_ready(self) -> None:
        """Wait until each client gets what its room's first client says.

        A server may register a client only some time after it has answered the handshake.
        """
        for _ in range(5):
            time.sleep(0.1)
            for room in self.members:
                room[0].send(client_frame(self.frame))
            deadline = time.perf_counter() + 2
            while not (ready := all(c.got for c in self.clients.values())):
                if time.perf_counter() > deadline:
                    break
                self.pump(0.1)
            self._quiet()
            if ready:
                break
        else:
            raise Failed("not every client gets what one says")
        for client in self.clients.values():
            client.got = 0
            client.counter.messages = client.counter.compressed = 0
            if client.counter.payloads is not None:
                client.counter.payloads.clear()
        self.bytes = 0

    def _quiet(self) -> None:
        while self.pump(0.05):
            pass

    # Receiving

    def pump(self, timeout: float) -> list[tuple[Client, int]]:
        """Read from every socket that has something, and return who got how many messages."""
        head, size, buffer, clients = self.head, self.frame_size, self.buffer, self.clients
        got = []
        for fd, _ in self._poll(timeout):
            client = clients[fd]
            try:
                length = client.recv_into(buffer)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise Failed(f"a connection was lost: {exc.strerror}") from None
            if not length:
                raise Failed("the server closed a connection")
            self.bytes += length
            counter = client.counter
            if (
                length % size == 0
                and not counter.partial
                and counter.payloads is None
                and buffer.startswith(head)
                and buffer.startswith(head, length - size)
            ):
                count = length // size
            else:
                count = counter.feed(self.view[:length])
            client.got += count
            got.append((client, count))
        return got

    def _poll(self, timeout: float) -> list[tuple[int, int]]:
        if not self.task.spin:
            return self.epoll.poll(timeout, len(self.clients))
        end = time.perf_counter() + timeout
        while not (events := self.epoll.poll(0, len(self.clients))):
            if time.perf_counter() > end:
                break
        return events

    # Sending

    def frames(self) -> Iterator[bytes]:
        """Return endlessly what is written at once: `batch` messages, in frames."""
        wrapped = cycle([self._wrap(content) for content in self.contents])
        batches = [
            [next(wrapped) for _ in range(self.task.batch)] for _ in range(len(self.contents))
        ]
        ready = [(batch, b"".join(map(client_frame, batch))) for batch in batches]
        for batch, data in cycle(ready):  # made at the first call, before the clock runs
            if self.task.verify:
                self.sent += batch
            yield data

    def round(self, data: bytes, count: int) -> float:
        """Let the first client send, and wait until every client has all. Return how long it took.

        `count` is how many messages a client has to get.
        """
        missing = count * len(self.clients)
        began = time.perf_counter()
        self.members[0][0].send(data)
        deadline = began + STALL
        while missing > 0:
            self._ping()
            got = self.pump(PING_EVERY if self.pinger else 0.5)
            for _, more in got:
                missing -= more
            if got:
                deadline = time.perf_counter() + STALL
            elif time.perf_counter() > deadline:
                raise Failed(f"stalled: {missing} deliveries missing for {STALL:g} seconds")
        if missing < 0:
            raise Failed(f"{-missing} deliveries too many")
        return time.perf_counter() - began

    pinger: Client | None = None

    def _ping(self) -> None:
        pinger = self.pinger
        if pinger and not pinger.pinged and time.perf_counter() >= pinger.next_ping:
            pinger.ping()

    # Kinds

    def run(self) -> dict:
        if self.task.kind == "memory":
            return self._memory()
        if self.task.kind == "storm":
            return self._storm()
        if self.task.kind == "restart":
            return self._restart()
        if self.task.kind == "resume":
            return self._resume()
        self.open()
        self._make_ready()
        if self.task.stuff:
            self._stuff()
        kinds = {"rounds": self._rounds, "rooms": self._rooms, "talks": self._talks}
        result = kinds[self.task.kind]()
        agreed = sum(client.deflate for client in self.clients.values())
        result["deflate_agreed"] = agreed == len(self.clients)
        result["clients"] = len(self.clients)
        return result

    def _stuff(self) -> None:
        """Send everybody so much that those who never read are stuck."""
        size = 16384
        head, frame_size = self.head, self.frame_size
        payload = b"s" * size
        self.head, self.frame_size = self._frame_of(payload)
        for _ in range(-(-self.task.stuff // size)):
            self.round(client_frame(payload), 1)
        self.head, self.frame_size = head, frame_size
        for client in self.clients.values():
            client.got = 0

    def _rounds(self) -> dict:
        task = self.task
        frames = self.frames()
        rounds = 0
        end = time.perf_counter() + min(WARM_UP, task.seconds)
        while rounds < 2 or time.perf_counter() < end:
            self.round(next(frames), task.batch)
            rounds += 1
        self._start_pings()
        self.bytes = 0
        times = []
        before = accounting.cpu_seconds(self.pids)
        own_before = time.process_time()
        began = time.perf_counter()
        end = began + task.seconds
        while time.perf_counter() < end:
            times.append(self.round(next(frames), task.batch))
        elapsed = time.perf_counter() - began
        own = time.process_time() - own_before
        cpu = accounting.cpu_seconds(self.pids) - before
        rounds += len(times)
        for client in self.clients.values():
            if client.got != rounds * task.batch:
                raise Failed(f"a client got {client.got} messages of {rounds * task.batch}")
        self._compare({0: self.sent})
        deliveries = len(times) * task.batch * len(self.clients)
        result = self._figures(deliveries, elapsed, cpu, own, times)
        result |= self._lags()
        return result

    def _start_pings(self) -> None:
        if self.task.pings:
            self.pinger = list(self.clients.values())[-1]

    def _lags(self) -> dict:
        """How long pings took to be answered."""
        lags = self.pinger.lags if self.pinger else []
        if not lags:
            return {}
        return {
            "ping_p50_ms": percentile(lags, 50) * 1e3,
            "ping_p99_ms": percentile(lags, 99) * 1e3,
            "ping_max_ms": max(lags) * 1e3,
        }

    def _rooms(self) -> dict:
        """Publish to the rooms in turn, so that a number of them wait for their message."""
        task = self.task
        sizes = [len(members) for members in self.members]
        missing = [0] * task.rooms
        since = [0.0] * task.rooms
        frames = self.frames()
        sent: dict[int, list[bytes]] = {room: [] for room in range(task.rooms)}
        turn = busy = deliveries = 0
        times: list[float] = []
        clock = time.perf_counter
        now = heard = clock()
        warm = now + min(WARM_UP, task.seconds)
        began = before = own_before = 0.0
        end = None
        while True:
            now = clock()
            if end is None and now >= warm and turn >= task.rooms:
                self._start_pings()
                times, deliveries, self.bytes = [], 0, 0
                before = accounting.cpu_seconds(self.pids)
                own_before = time.process_time()
                began = clock()
                end = began + task.seconds
            if end is None or now < end:
                while busy < task.in_flight and not missing[turn % task.rooms]:
                    room = turn % task.rooms
                    frame = next(frames)
                    if task.verify:
                        sent[room].append(self.sent[-1])
                    missing[room] = sizes[room]
                    since[room] = clock()
                    self.members[room][0].send(frame)
                    turn += 1
                    busy += 1
            elif not busy:
                break
            self._ping()
            got = self.pump(PING_EVERY if self.pinger else STALL)
            if got:
                heard = now
            elif now - heard > STALL:
                raise Failed(f"stalled: {busy} rooms wait for {STALL:g} seconds")
            for client, count in got:
                room = client.room
                missing[room] -= count
                deliveries += count
                if not missing[room] and count:
                    busy -= 1
                    times.append(clock() - since[room])
                elif missing[room] < 0:
                    raise Failed("deliveries too many")
        elapsed = clock() - began
        own = time.process_time() - own_before
        cpu = accounting.cpu_seconds(self.pids) - before
        self._compare(sent)
        return self._figures(deliveries, elapsed, cpu, own, times) | self._lags()

    def _talks(self) -> dict:
        """Each client has one message in flight: it sends the next when its room's are there.

        Figures are for each message that the server receives, however many get it.
        """
        task = self.task
        data = client_frame(self._wrap(self.contents[0]))
        sizes = [len(members) for members in self.members]
        said = dict.fromkeys(self.clients.values(), 1)
        clock = time.perf_counter
        warm = clock() + min(WARM_UP, task.seconds)
        began = before = own_before = 0.0
        first = 0
        end = math.inf
        for client in said:
            client.send(data)
        while (now := clock()) < end:
            if not first and now >= warm:
                first, self.bytes = sum(said.values()), 0
                before, own_before = accounting.cpu_seconds(self.pids), time.process_time()
                began = clock()
                end = began + task.seconds
            got = self.pump(STALL)
            if not got:
                raise Failed(f"stalled: nothing for {STALL:g} seconds")
            for client, _ in got:
                if client.got >= sizes[client.room] * said[client]:
                    said[client] += 1
                    client.send(data)
        elapsed = clock() - began
        own = time.process_time() - own_before
        cpu = accounting.cpu_seconds(self.pids) - before
        received = sum(said.values()) - first
        expected = {c: sum(said[each] for each in room) for room in self.members for c in room}
        while any(client.got < count for client, count in expected.items()):
            if not self.pump(STALL):
                raise Failed("a client did not get what was said in its room")
        self._quiet()
        if any(client.got > count for client, count in expected.items()):
            raise Failed("a client got more than what was said in its room")
        return self._figures(received, elapsed, cpu, own, [elapsed * len(said) / received])

    def _storm(self) -> dict:
        """Open connections as fast as the server accepts them."""
        for client in self.connect(200):  # what is loaded with the first ones
            client.sock.close()
        time.sleep(0.5)
        before, began = accounting.cpu_seconds(self.pids), time.perf_counter()
        opened = self.connect(self.task.clients)
        elapsed = time.perf_counter() - began
        cpu = accounting.cpu_seconds(self.pids) - before
        return {
            "cpu_us": cpu / len(opened) * 1e6,
            "connections_per_second": len(opened) / elapsed,
            "server_busy": cpu / elapsed,
            "clients": len(opened),
            "deflate_agreed": all(client.deflate for client in opened),
        }

    def _restart(self) -> dict:
        """Open all connections at once, as after a restart, while a client that is there talks."""
        return self._all_at_once(self.connect(1)[0])

    def _resume(self) -> dict:
        """Let all come back at once to rooms in which they have missed messages."""
        task = self.task
        rooms = [self._dial(number, path=task.ids_path, keep=True) for number in range(task.rooms)]
        for client in rooms:
            self._finish_handshake(client)
            client.sock.settimeout(STALL)
        missed = [f"{task.path}?last_event_id={self._miss(client)}" for client in rooms]
        talker = rooms.pop()  # in a room of its own: nobody comes back there
        missed.pop()
        talker.sock.setblocking(False)
        talker.counter.payloads = None
        return self._all_at_once(talker, missed)

    def _miss(self, client: Client) -> str:
        """Say what others are to miss, and return the id of what was before it."""
        counter = client.counter
        while not counter.payloads:
            counter.feed(client.sock.recv(4096))
        position = json.loads(counter.payloads[0])["id"]
        client.send(b"".join(map(client_frame, self.contents[:1] * self.task.messages)))
        while counter.messages < self.task.messages + 1:
            counter.feed(client.sock.recv(BUFFER))
        return position

    def _all_at_once(self, client: Client, paths: list[str] | None = None) -> dict:
        """Open all connections at once, while a client that is there talks to itself.

        With `paths`, they go there in turn, and have to get what they have missed.
        """
        needed = self.task.messages if paths else 0
        lags: list[float] = []
        data = client_frame(self.contents[0])
        clock = time.perf_counter
        self.epoll.register(client.sock, select.EPOLLIN)
        before, began = accounting.cpu_seconds(self.pids), clock()
        coming: dict[int, Client] = {}
        receiving: dict[int, Client] = {}
        dialled = 0
        opened = []
        said, next_said, deadline = 0.0, clock(), clock() + STALL
        while len(opened) < self.task.clients and clock() < deadline:
            while dialled < self.task.clients and (
                clock() - began >= dialled / self.task.clients * self.task.spread
            ):
                room = dialled % len(paths) if paths else dialled + 1
                new = self._dial(room, wait=False, path=paths[room] if paths else "")
                coming[new.sock.fileno()] = new
                self.epoll.register(new.sock, select.EPOLLOUT)
                dialled += 1
            if not said and clock() >= next_said:
                said = clock()
                client.send(data)
            for fd, event in self.epoll.poll(PING_EVERY / 5, 1024):
                if (new := receiving.get(fd) or coming.get(fd)) is None:
                    client.counter.feed(client.sock.recv(4096))
                    lags.append(clock() - said)
                    said, next_said = 0.0, clock() + PING_EVERY * random.uniform(0.5, 1.5)
                    continue
                if event & select.EPOLLOUT:
                    new.sock.sendall(self._request(new))
                    self.epoll.modify(new.sock, select.EPOLLIN)
                    continue
                if fd in coming:
                    new.sock.settimeout(STALL)
                    self._finish_handshake(new)
                    receiving[fd] = coming.pop(fd)
                else:
                    new.counter.feed(new.sock.recv(BUFFER))
                if new.counter.messages >= needed:
                    opened.append(receiving.pop(fd))
                    self.epoll.unregister(fd)
                deadline = clock() + STALL
        if len(opened) < self.task.clients:
            raise Failed(
                f"{len(coming)} clients were not accepted and {len(receiving)} did not get "
                f"everything within {STALL:g} seconds"
            )
        if needed and any(new.counter.messages != needed for new in opened):
            raise Failed("a client got more than it had missed")
        elapsed = clock() - began
        cpu = accounting.cpu_seconds(self.pids) - before
        return {
            "cpu_us": cpu / len(opened) * 1e6,
            "connections_per_second": len(opened) / elapsed,
            "server_busy": cpu / elapsed,
            "clients": len(opened),
            "deflate_agreed": all(client.deflate for client in opened),
            "p50_ms": percentile(lags, 50) * 1e3,
            "p99_ms": percentile(lags, 99) * 1e3,
            "messages": len(lags),
        }

    def _compare(self, sent: dict[int, list[bytes]]) -> None:
        for client in self.clients.values():
            received = client.counter.payloads
            if received is not None and received != sent[client.room]:
                raise Failed("a client got something else than was sent")

    def _figures(
        self, deliveries: int, elapsed: float, cpu: float, own: float, times: list[float]
    ) -> dict:
        return {
            "deliveries": deliveries,
            "deliveries_per_second": deliveries / elapsed,
            "cpu_us": cpu / deliveries * 1e6,
            "load_cpu_us": own / deliveries * 1e6,
            "server_busy": cpu / elapsed,
            "load_busy": own / elapsed,
            "bytes_per_delivery": self.bytes / deliveries,
            "p50_ms": percentile(times, 50) * 1e3,
            "p99_ms": percentile(times, 99) * 1e3,
            "rounds": len(times),
        }

    def _memory(self) -> dict:
        """Compare the server's memory with and without idle connections."""
        task = self.task
        for client in self.connect(20):  # what is loaded with the first ones
            client.sock.close()
        time.sleep(0.5)
        before = accounting.memory_bytes(self.pids)
        self.open()
        frames = self.frames()
        if task.messages:
            self._make_ready()
            for _ in range(task.messages):
                self.round(next(frames), task.batch)
        time.sleep(0.7)
        after = accounting.memory_bytes(self.pids)
        agreed = sum(client.deflate for client in self.clients.values())
        return {
            "memory_kib": (after - before) / len(self.clients) / 1024,
            "clients": len(self.clients),
            "deflate_agreed": agreed == len(self.clients),
        }


def percentile(values: list[float], percent: float) -> float:
    """Return the smallest value that so many percent of all don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def main() -> None:
    task = Task(**json.load(sys.stdin))
    try:
        result = Load(task).run()
    except Failed as exc:
        result = {"failed": str(exc)}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
