"""The floor: a frame made once and written with transport.write to every socket, on uvloop.

It does a handshake and reads short frames, and nothing else that a WebSocket server has to do.
"""

import asyncio
import base64
import hashlib
import sys
from collections import defaultdict

import uvloop

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

rooms = defaultdict(list)


class Floor(asyncio.Protocol):
    room = None

    def connection_made(self, transport):
        self.transport = transport
        self.data = b""

    def connection_lost(self, exc):
        if self.room is not None:
            self.room.remove(self.transport)

    def data_received(self, data):
        self.data += data
        if self.room is None:
            self.handshake()
        while self.room is not None and self.message():
            pass

    def handshake(self):
        head, end, rest = self.data.partition(b"\r\n\r\n")
        if not end:
            return
        self.data = rest
        path = head.split()[1]
        lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
        headers = {name.lower(): value.strip() for name, _, value in lines}
        digest = hashlib.sha1(headers[b"sec-websocket-key"] + GUID).digest()
        self.transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
        )
        self.room = rooms[path]
        self.room.append(self.transport)

    def message(self):
        data = self.data
        if len(data) < 2:
            return False
        length, start = data[1] & 127, 2
        if length == 126:
            length, start = int.from_bytes(data[2:4], "big"), 4
        mask, stop = data[start : start + 4], start + 4 + length
        if len(data) < stop:
            return False
        self.data = data[stop:]
        payload = data[start + 4 : stop]
        if mask != b"\0\0\0\0":
            payload = bytes(byte ^ mask[i & 3] for i, byte in enumerate(payload))
        if data[0] == 0x81:
            frame = b"\x81" + data[1:start].replace(data[1:2], bytes((data[1] & 127,)), 1) + payload
            for transport in self.room:
                transport.write(frame)
        elif data[0] == 0x89:
            self.transport.write(bytes((0x8A, len(payload))) + payload)
        return True


async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Floor, "127.0.0.1", int(sys.argv[1]), backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
